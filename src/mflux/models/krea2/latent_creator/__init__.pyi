"""Written by tools/stubs.py."""

from mflux.models.krea2.latent_creator.krea2_latent_creator import Krea2LatentCreator as Krea2LatentCreator
