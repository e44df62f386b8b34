"""Written by tools/stubs.py."""

from mflux.models.flux3.latent_creator.flux3_latent_creator import Flux3LatentCreator as Flux3LatentCreator
