"""Z-Image as data: its components, commands and models."""

from mflux.models.common.family import Command, Component, Family, Trained
from mflux.utils.settings import Setting
from mflux.utils.values import Switch

_MODEL = "mflux.models.z_image.model"
_CLI = "mflux.models.z_image.cli"
_Z_IMAGE = "mflux.models.z_image.variants.z_image:ZImage"

# Turbo's transformer is published in float32, and everybody computes it in bfloat16: half of it is enough to hold.
COMPONENTS = (
    Component("text_encoder", f"{_MODEL}.text_encoder:ZImageTextEncoder", "text_encoder", stage="encode"),
    Component(
        "transformer",
        f"{_MODEL}.transformer:ZImageTransformer",
        "transformer",
        published_class="ZImageTransformer2DModel",
        lora=True,
        dtype="bfloat16",
    ),
    Component(
        "vae",
        "mflux.models.common.networks.autoencoders.kl:AutoencoderKL",
        "vae",
        stage="decode",
        published_class="AutoencoderKL",
    ),
)
CONTROLNET = Component(
    "controlnet",
    f"{_MODEL}.controlnet:ZImageControlNet",
    "controlnet",
    published_class="ZImageControlNetModel",
    dtype="bfloat16",
    repository="controlnet_model",
)

_TRAINING = "mflux.models.z_image.training_adapter.z_image_training_adapter:ZImageTrainingAdapter"

FAMILY = Family(
    title="Z-Image",
    components=COMPONENTS,
    commands=(
        Command(
            "generate-z-image-turbo",
            f"{_CLI}.z_image_turbo_generate",
            "draw with Z-Image-Turbo, in few steps",
            models=("z-image-turbo",),
            pipeline=_Z_IMAGE,
        ),
        Command(
            "generate-z-image",
            f"{_CLI}.z_image_generate",
            "draw with Z-Image",
            models=("z-image", "z-image-turbo"),
            pipeline=_Z_IMAGE,
        ),
        Command(
            "generate-z-image-controlnet",
            f"{_CLI}.z_image_turbo_generate_controlnet",
            "draw with Z-Image-Turbo after edges or depths of another picture",
            models=("z-image-turbo-controlnet-union-2.1",),
            pipeline="mflux.models.z_image.variants.controlnet.z_image_turbo_controlnet:ZImageTurboControlnet",
        ),
    ),
    settings=(Setting("float32", "float32 throughout", kind=Switch(), option="--float32", after="compute_precision"),),
    lora="mflux.models.z_image.lora_names:LORA",
    layout="mflux.models.z_image.layouts:LAYOUT",
    training=(
        Trained(("z-image",), "generate-z-image", _TRAINING),
        # Distilled: what that took away would be learned again.
        Trained(
            ("z-image-turbo",),
            "generate-z-image-turbo",
            _TRAINING,
            assistant="ostris/zimage_turbo_training_adapter:zimage_turbo_training_adapter_v2.safetensors",
        ),
    ),
    float16=True,
)
