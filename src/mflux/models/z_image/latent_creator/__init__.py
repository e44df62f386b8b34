"""mflux's import path for Z-Image's latents."""

from mflux.models.z_image.latent_creator.z_image_latent_creator import ZImageLatentCreator

__all__ = ["ZImageLatentCreator"]
