"""Written by tools/stubs.py."""

from mflux.models.anima.latent_creator.anima_latent_creator import AnimaLatentCreator as AnimaLatentCreator
