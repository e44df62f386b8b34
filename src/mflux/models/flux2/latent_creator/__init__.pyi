"""Written by tools/stubs.py."""

from mflux.models.flux2.latent_creator.flux2_latent_creator import Flux2LatentCreator as Flux2LatentCreator
