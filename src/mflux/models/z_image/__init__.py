"""mflux's import path for Z-Image. The classes are loaded when they are asked for: `--help` reads this package too."""

from typing import Any

__all__ = ["ZImage", "ZImageTurbo", "ZImageTurboControlnet"]


def __getattr__(name: str) -> Any:
    if name == "ZImageTurboControlnet":
        from mflux.models.z_image.variants.controlnet import ZImageTurboControlnet

        return ZImageTurboControlnet
    if name in __all__:
        from mflux.models.z_image import variants

        return getattr(variants, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
