"""mflux's import path for Z-Image."""

from mflux.models.z_image.variants.z_image import ZImage, ZImageTurbo

__all__ = ["ZImage", "ZImageTurbo"]
