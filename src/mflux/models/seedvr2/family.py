"""SeedVR2 as data: its components."""

from mflux.models.common.family import Component, Family

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
    beside=(),
    open_folder="mflux.models.seedvr2.layouts:open_folder",
)
