"""Written by tools/stubs.py."""

from mflux.models.ernie_image.latent_creator.ernie_latent_creator import ErnieLatentCreator as ErnieLatentCreator
