"""ERNIE-Image's autoencoder: FLUX.2's, with the epsilon that its statistics were trained with."""

from mflux.models.common.networks.autoencoders.flux2 import AutoencoderKLFlux2


class ErnieAutoencoder(AutoencoderKLFlux2):
    # The published config.json says 1e-4, and diffusers' pipeline that it is wrong there.
    epsilon = 1e-5
