"""mflux's import path for SeedVR2. The class is loaded when it is asked for: `--help` reads this package too."""

from typing import Any

__all__ = ["SeedVR2"]


def __getattr__(name: str) -> Any:
    if name == "SeedVR2":
        from mflux.models.seedvr2.variants.upscale.seedvr2 import SeedVR2

        return SeedVR2
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
