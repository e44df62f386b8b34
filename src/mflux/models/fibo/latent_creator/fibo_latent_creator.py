"""FIBO's latents: the noise a picture starts from, and one token for each 16 x 16 pixels."""

from __future__ import annotations

from mflux.backend import mx
from mflux.models.common.noise import noise

_CHANNELS = 48
_PIXELS = 16


class FiboLatentCreator:
    @staticmethod
    def create_noise(seed: int, height: int, width: int) -> mx.array:
        """Packed noise (1, height/16 · width/16, 48), float32; see `noise`."""
        drawn = noise(seed, (1, _CHANNELS, height // _PIXELS, width // _PIXELS))
        return FiboLatentCreator.pack_latents(drawn, height, width)

    @staticmethod
    def pack_latents(latents: mx.array, height: int, width: int) -> mx.array:
        """(B, C, height/16, width/16) → (B, height/16 · width/16, C)."""
        return latents.flatten(2).transpose(0, 2, 1)

    @staticmethod
    def unpack_latents(latents: mx.array, height: int, width: int) -> mx.array:
        """(B, height/16 · width/16, C) → (B, C, height/16, width/16)."""
        rows, columns = height // _PIXELS, width // _PIXELS
        return latents.transpose(0, 2, 1).reshape(latents.shape[0], -1, rows, columns)
