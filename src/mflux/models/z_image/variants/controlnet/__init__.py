"""mflux's import path for Z-Image-Turbo with a ControlNet. The class is loaded when it is asked for."""

from typing import Any

from mflux.models.z_image.variants.controlnet.control_types import ControlSpec, ControlType

__all__ = ["ControlSpec", "ControlType", "ZImageTurboControlnet"]


def __getattr__(name: str) -> Any:
    if name == "ZImageTurboControlnet":
        from mflux.models.z_image.variants.controlnet.z_image_turbo_controlnet import ZImageTurboControlnet

        return ZImageTurboControlnet
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
