"""Latents that are tokens as the autoencoder gives them, one for 16 × 16 pixels: FLUX.2's and FLUX.3's."""

from __future__ import annotations

from typing import ClassVar

from mflux.backend import mx
from mflux.models.common.noise import noise

# Pixels of a token along each side.
SIDE = 16


class TokenLatentCreator:
    """
    Attributes:
        channels: of a token.
    """

    channels: ClassVar[int]

    @classmethod
    def create_noise(cls, seed: int, height: int, width: int) -> mx.array:
        """Noise (1, h · w, channels), float32; `height` and `width` in pixels. mflux 0.24 rounded it to bfloat16."""
        tokens = noise(seed, (1, (height // SIDE) * (width // SIDE), cls.channels))
        return tokens.astype(mx.bfloat16).astype(mx.float32)

    @staticmethod
    def pack_latents(latents: mx.array, height: int | None = None, width: int | None = None) -> mx.array:
        """(B, C, h, w) → (B, h · w, C), row by row. The size in pixels follows from the shape."""
        return latents.flatten(2).transpose(0, 2, 1)

    @staticmethod
    def unpack_latents(latents: mx.array, height: int, width: int) -> mx.array:
        """(B, h · w, C) → (B, C, h, w); `height` and `width` in pixels."""
        if latents.ndim == 4:
            return latents
        batch, _, channels = latents.shape
        return latents.transpose(0, 2, 1).reshape(batch, channels, height // SIDE, width // SIDE)
