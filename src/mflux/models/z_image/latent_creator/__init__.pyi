"""Written by tools/stubs.py."""

from mflux.models.z_image.latent_creator.z_image_latent_creator import ZImageLatentCreator as ZImageLatentCreator
