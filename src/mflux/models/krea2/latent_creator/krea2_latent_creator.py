"""Krea 2's latents, at mflux 0.24's path: (1, 16, height / 8, width / 8), not packed."""

from __future__ import annotations

from mflux.backend import mx
from mflux.models.common.noise import noise

CHANNELS = 16
# Pixels of a latent along each side.
SIDE = 8


class Krea2LatentCreator:
    @staticmethod
    def create_noise(seed: int, height: int, width: int) -> mx.array:
        """Noise (1, 16, height / 8, width / 8), float32: the same for a seed as in mflux 0.24."""
        return noise(seed, (1, CHANNELS, height // SIDE, width // SIDE))

    @staticmethod
    def pack_latents(latents: mx.array, height: int | None = None, width: int | None = None) -> mx.array:
        """As they are, or without the time of a video of one frame."""
        return latents[:, :, 0] if latents.ndim == 5 else latents

    @staticmethod
    def unpack_latents(latents: mx.array, height: int | None = None, width: int | None = None) -> mx.array:
        """As they are."""
        return latents
