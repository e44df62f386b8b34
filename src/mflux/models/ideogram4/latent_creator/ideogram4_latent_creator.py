"""Ideogram 4's latents as tokens: (1, h · w, 128) for an image of 16 h × 16 w pixels."""

from __future__ import annotations

from mflux.backend import mx
from mflux.models.common.noise import check_seed

CHANNELS = 128
# Pixels of a token along each side.
SIDE = 16


class Ideogram4LatentCreator:
    @staticmethod
    def create_noise(seed: int, height: int, width: int, latent_dim: int = CHANNELS) -> mx.array:
        """Noise (1, h · w, latent_dim), float32; `height` and `width` in pixels.

        The values are those of mflux 0.24, which asked MLX for the next key of all after setting the seed.
        """
        key = mx.random.split(mx.random.key(check_seed(seed)))[1]
        return mx.random.normal((1, height // SIDE * (width // SIDE), latent_dim), key=key)

    @staticmethod
    def pack_latents(latents: mx.array, height: int | None = None, width: int | None = None) -> mx.array:
        """(B, C, h, w) → (B, h · w, C), row by row. The size in pixels follows from the shape."""
        return latents.flatten(2).transpose(0, 2, 1)

    @staticmethod
    def unpack_latents(latents: mx.array, height: int, width: int) -> mx.array:
        """(B, h · w, C) → (B, C, h, w); `height` and `width` in pixels."""
        batch, _, channels = latents.shape
        return latents.transpose(0, 2, 1).reshape(batch, channels, height // SIDE, width // SIDE)
