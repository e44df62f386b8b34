"""mflux's import path for Z-Image. The class is loaded when it is asked for: `--help` reads this package too."""

from typing import Any

__all__ = ["ZImage", "ZImageTurbo"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from mflux.models.z_image.variants import z_image

        return getattr(z_image, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
