"""SeedVR2 as data: its components and its command."""

from mflux.models.common.family import Command, Component, Family
from mflux.utils.settings import Setting

_MODEL = "mflux.models.seedvr2.model"

# Both are published in float16. The reference computes the transformer in bfloat16, whose range its sums need; the
# autoencoder's own settings ask for float16, which the sums of its kernels' taps are rounded to as well.
COMPONENTS = (
    Component("transformer", f"{_MODEL}.transformer:SeedVR2Transformer", "transformer", dtype="bfloat16"),
    Component("vae", f"{_MODEL}.autoencoder:SeedVR2Autoencoder", "vae", stage="decode", dtype="float16"),
)

FAMILY = Family(
    title="SeedVR2",
    components=COMPONENTS,
    commands=(
        Command(
            "upscale-seedvr2",
            "mflux.models.seedvr2.cli.seedvr2_upscale",
            "draw pictures again with more pixels, with SeedVR2",
            models=("seedvr2-3b", "seedvr2-7b"),
            pipeline="mflux.models.seedvr2.variants.upscale.seedvr2:SeedVR2",
        ),
    ),
    beside=(),
    settings=(
        Setting("resolution", "Resolution", after="redux_image_strengths"),
        Setting("softness", "Softness", after="resolution"),
    ),
    layout="mflux.models.seedvr2.layouts:LAYOUT",
)
