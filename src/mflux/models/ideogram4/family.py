"""Ideogram 4 as data: its components, commands and models."""

from mflux.models.common.family import Command, Component, Family
from mflux.utils.settings import Setting
from mflux.utils.values import Text

_MODEL = "mflux.models.ideogram4.model"
_TRANSFORMER = f"{_MODEL}.transformer:Ideogram4Transformer"

FAMILY = Family(
    title="Ideogram 4",
    components=(
        Component("text_encoder", f"{_MODEL}.text_encoder:Ideogram4TextEncoder", "text_encoder", stage="encode"),
        Component("transformer", _TRANSFORMER, "transformer", published_class="Ideogram4Transformer2DModel", lora=True),
        Component(
            "unconditional_transformer",
            _TRANSFORMER,
            "unconditional_transformer",
            published_class="Ideogram4Transformer2DModel",
        ),
        Component(
            "vae",
            f"{_MODEL}.autoencoder:Ideogram4Autoencoder",
            "vae",
            stage="decode",
            published_class="AutoencoderKLFlux2",
        ),
    ),
    commands=(
        Command(
            "generate-ideogram4",
            "mflux.models.ideogram4.cli.ideogram4_generate",
            "draw with Ideogram 4",
            models=("ideogram-4-fp8",),
            pipeline="mflux.models.ideogram4.variants.txt2img.ideogram4:Ideogram4",
        ),
    ),
    settings=(Setting("preset", "Preset", kind=Text(), option="--preset", after="vae_full_precision"),),
    lora="mflux.models.ideogram4.lora_names:LORA",
    layout="mflux.models.ideogram4.layouts:LAYOUT",
)
