"""Written by tools/stubs.py."""

from mflux.models.ideogram4.latent_creator.ideogram4_latent_creator import Ideogram4LatentCreator as Ideogram4LatentCreator
