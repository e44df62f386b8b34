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

_7B = {
    "vid_dim": 3072, "txt_dim": 3072, "emb_dim": 18432, "heads": 24, "num_layers": 36, "mm_layers": 36,
    "mlp_type": "normal", "rope_type": None, "rope_dim": 64, "vid_out_norm": None,
}  # fmt: skip
_VAE = {"decoder_layers_per_block": 3}

FAMILY = Family(
    published={"seedvr2-3b": {"vae": _VAE}, "seedvr2-7b": {"transformer": _7B, "vae": _VAE}},
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
