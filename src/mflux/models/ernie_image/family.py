"""ERNIE-Image as data: its components, commands and models."""

from mflux.models.common.family import Command, Component, Family, Trained

_MODEL = "mflux.models.ernie_image.model"
_CLI = "mflux.models.ernie_image.cli"
_ERNIE_IMAGE = "mflux.models.ernie_image.variants.txt2img.ernie_image:ErnieImage"
_TRAINING = "mflux.models.ernie_image.training_adapter.ernie_training_adapter:ErnieTrainingAdapter"

FAMILY = Family(
    title="ERNIE-Image",
    components=(
        Component("text_encoder", f"{_MODEL}.text_encoder:ErnieTextEncoder", "text_encoder", stage="encode"),
        Component(
            "transformer",
            f"{_MODEL}.transformer:ErnieTransformer",
            "transformer",
            published_class="ErnieImageTransformer2DModel",
            lora=True,
        ),
        Component(
            "vae",
            f"{_MODEL}.autoencoder:ErnieAutoencoder",
            "vae",
            stage="decode",
            published_class="AutoencoderKLFlux2",
        ),
    ),
    commands=(
        Command(
            "generate-ernie-image",
            f"{_CLI}.ernie_image_generate",
            "generate with ERNIE-Image",
            models=("ernie-image",),
            pipeline=_ERNIE_IMAGE,
        ),
        Command(
            "generate-ernie-image-turbo",
            f"{_CLI}.ernie_image_turbo_generate",
            "generate with ERNIE-Image-Turbo, in few steps",
            models=("ernie-image-turbo",),
            pipeline=_ERNIE_IMAGE,
        ),
    ),
    lora="mflux.models.ernie_image.lora_names:LORA",
    layout="mflux.models.ernie_image.layouts:LAYOUT",
    training=(
        Trained(("ernie-image",), "generate-ernie-image", _TRAINING),
        Trained(("ernie-image-turbo",), "generate-ernie-image-turbo", _TRAINING),
    ),
)
