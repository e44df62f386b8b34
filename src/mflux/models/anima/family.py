"""Anima as data: its components, commands and models."""

from mflux.models.common.family import Command, Component, Family

_MODEL = "mflux.models.anima.model"

FAMILY = Family(
    title="Anima",
    components=(
        Component("text_encoder", f"{_MODEL}.text_encoder:AnimaTextEncoder", "text_encoder", stage="encode"),
        Component(
            "text_conditioner",
            f"{_MODEL}.text_conditioner:AnimaTextConditioner",
            "text_conditioner",
            stage="encode",
            published_class="AnimaTextConditioner",
            lora=True,
        ),
        Component(
            "transformer",
            f"{_MODEL}.transformer:AnimaTransformer",
            "transformer",
            published_class="CosmosTransformer3DModel",
            lora=True,
        ),
        Component(
            "vae",
            "mflux.models.common.networks.autoencoders.wan:AutoencoderWan",
            "vae",
            stage="decode",
            published_class="AutoencoderKLQwenImage",
        ),
    ),
    commands=(
        Command(
            "generate-anima",
            "mflux.models.anima.cli.anima_generate",
            "generate with Anima",
            models=("anima-turbo", "anima-aesthetic", "anima-base"),
            pipeline="mflux.models.anima.variants.txt2img.anima:Anima",
        ),
    ),
    beside=("modular_model_index.json", "scheduler", "tokenizer", "t5_tokenizer", "tokenizer_2"),
    lora="mflux.models.anima.lora_names:LORA",
    layout="mflux.models.anima.layouts:LAYOUT",
    float16=True,
)
