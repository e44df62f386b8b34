"""ERNIE-Image's latents, at mflux 0.24's path: (1, 128, h, w) for an image of 16 h × 16 w pixels."""

from __future__ import annotations

from mflux.backend import mx
from mflux.models.common.noise import noise

CHANNELS = 128
# Pixels of a token along each side.
SIDE = 16


class ErnieLatentCreator:
    @staticmethod
    def create_noise(seed: int, height: int, width: int) -> mx.array:
        """Noise (1, 128, h, w), float32: the same for a seed as in mflux 0.24, which rounded it to bfloat16."""
        return noise(seed, (1, CHANNELS, height // SIDE, width // SIDE)).astype(mx.bfloat16).astype(mx.float32)

    @staticmethod
    def pack_latents(latents: mx.array, height: int | None = None, width: int | None = None) -> mx.array:
        """As they are: the autoencoder gives and takes squares of its latents already."""
        return latents

    @staticmethod
    def unpack_latents(latents: mx.array, height: int | None = None, width: int | None = None) -> mx.array:
        """As they are."""
        return latents
