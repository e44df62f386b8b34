"""Anima's latents, at mflux 0.24's path: (1, 16, height / 8, width / 8), as the autoencoder has them."""

from __future__ import annotations

from mflux.backend import mx
from mflux.models.common.noise import noise

CHANNELS, SIDE = 16, 8


class AnimaLatentCreator:
    @staticmethod
    def create_noise(seed: int, height: int, width: int) -> mx.array:
        """Noise (1, 16, height / 8, width / 8), float32; the same for a seed as in mflux 0.24."""
        return noise(seed, (1, CHANNELS, height // SIDE, width // SIDE))

    @staticmethod
    def pack_latents(latents: mx.array, height: int, width: int) -> mx.array:
        """As they are; mflux 0.24's own had an axis of one frame more."""
        return latents[:, :, 0] if latents.ndim == 5 else latents

    @staticmethod
    def unpack_latents(latents: mx.array, height: int, width: int) -> mx.array:
        """As they are."""
        return latents
