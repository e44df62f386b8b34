"""Qwen-Image and Qwen-Image-Edit as data: their components, commands and models."""

from dataclasses import replace

from mflux.models.common.family import Command, Component, Family, Trained

_MODEL = "mflux.models.qwen.model"
_VARIANTS = "mflux.models.qwen.variants"

_TEXT_ENCODER = Component(
    "text_encoder",
    "mflux.models.common.networks.qwen2_5_vl:Qwen25VLTextEncoder",
    "text_encoder",
    stage="encode",
)
_OTHERS = (
    Component(
        "transformer",
        f"{_MODEL}.transformer:QwenTransformer",
        "transformer",
        published_class="QwenImageTransformer2DModel",
        lora=True,
    ),
    Component(
        "vae",
        "mflux.models.common.networks.autoencoders.wan:AutoencoderWan",
        "vae",
        stage="decode",
        published_class="AutoencoderKLQwenImage",
    ),
)
# To edit, the vision tower shows the language model the pictures.
EDIT_COMPONENTS = (replace(_TEXT_ENCODER, module="mflux.models.common.networks.qwen2_5_vl:Qwen25VLEncoder"), *_OTHERS)

FAMILY = Family(
    published={"qwen-image-edit-2511": {"transformer": {"zero_cond_t": True}}},
    title="Qwen-Image",
    components=(_TEXT_ENCODER, *_OTHERS),
    commands=(
        Command(
            "generate-qwen",
            "mflux.models.qwen.cli.qwen_image_generate",
            "draw with Qwen-Image",
            models=("qwen-image",),
            pipeline=f"{_VARIANTS}.txt2img.qwen_image:QwenImage",
        ),
        Command(
            "generate-qwen-edit",
            "mflux.models.qwen.cli.qwen_image_edit_generate",
            "change pictures with Qwen-Image-Edit",
            models=("qwen-image-edit", "qwen-image-edit-2511"),
            pipeline=f"{_VARIANTS}.edit.qwen_image_edit:QwenImageEdit",
        ),
    ),
    # Repositories of the Edit releases keep the picture processor's settings in a folder of their own.
    beside=("model_index.json", "scheduler", "tokenizer", "processor"),
    lora="mflux.models.qwen.lora_names:LORA",
    layout="mflux.models.qwen.layouts:LAYOUT",
    training=(
        Trained(
            ("qwen-image",),
            "generate-qwen",
            "mflux.models.qwen.training_adapter.qwen_training_adapter:QwenTrainingAdapter",
            continuous=True,
        ),
    ),
    float16=True,
)
