"""Krea 2 as data: its components, commands and models."""

from dataclasses import replace

from mflux.models.common.family import Command, Component, Family, Trained

_MODEL = "mflux.models.krea2.model"
_CLI = "mflux.models.krea2.cli"
_VARIANTS = "mflux.models.krea2.variants"

COMPONENTS = (
    Component("text_encoder", f"{_MODEL}.text_encoder:Krea2TextEncoder", "text_encoder", stage="encode"),
    Component(
        "transformer",
        f"{_MODEL}.transformer:Krea2Transformer",
        "transformer",
        published_class="Krea2Transformer2DModel",
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

# The changes go into the transformer as it loads; what is saved is the plain one, and they beside it.
CONTROL_COMPONENTS = (
    COMPONENTS[0],
    replace(COMPONENTS[1], module=f"{_MODEL}.depth_control:Krea2ControlTransformer"),
    COMPONENTS[2],
    Component(
        "controlnet",
        f"{_MODEL}.depth_control:DepthControl",
        "controlnet",
        dtype="bfloat16",
        repository="controlnet_model",
    ),
)

FAMILY = Family(
    title="Krea 2",
    components=COMPONENTS,
    commands=(
        Command(
            "generate-krea2",
            f"{_CLI}.krea2_generate",
            "generate with Krea 2, Turbo or Raw",
            models=("krea-2", "krea-2-raw"),
            pipeline=f"{_VARIANTS}.txt2img.krea2:Krea2",
        ),
        Command(
            "generate-krea2-controlnet",
            f"{_CLI}.krea2_controlnet_generate",
            "generate with Krea 2 Turbo after the depth of an image",
            models=("krea-2-controlnet-depth",),
            pipeline=f"{_VARIANTS}.controlnet.krea2_controlnet:Krea2Controlnet",
        ),
    ),
    lora="mflux.models.krea2.lora_names:LORA",
    layout="mflux.models.krea2.layouts:LAYOUT",
    training=(
        Trained(
            ("krea-2-raw", "krea-2"),
            "generate-krea2",
            "mflux.models.krea2.training_adapter.krea2_training_adapter:Krea2TrainingAdapter",
        ),
    ),
)
