"""Krea 2 as data: its components, commands and models."""

from mflux.models.common.family import Command, Component, Family

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
    ),
    lora="mflux.models.krea2.lora_names:LORA",
    layout="mflux.models.krea2.layouts:LAYOUT",
)
