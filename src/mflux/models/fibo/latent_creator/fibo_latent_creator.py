"""FIBO's latents: the noise a picture starts from, and one token for each 16 x 16 pixels."""

from __future__ import annotations

from mflux.backend import mx
from mflux.errors import UsageError

_CHANNELS = 48
_PIXELS = 16


class FiboLatentCreator:
    @staticmethod
    def create_noise(seed: int, height: int, width: int) -> mx.array:
        """Packed noise (1, height/16 · width/16, 48), float32: the same for a seed as in mflux 0.24.

        Raises:
            UsageError: a seed that does not fit into 64 bits.
        """
        if not 0 <= seed < 2**64:
            raise UsageError(f"{seed} is no seed: it must be from 0 to {2**64 - 1}")
        noise = mx.random.normal((1, _CHANNELS, height // _PIXELS, width // _PIXELS), key=mx.random.key(seed))
        return FiboLatentCreator.pack_latents(noise, height, width)

    @staticmethod
    def pack_latents(latents: mx.array, height: int, width: int) -> mx.array:
        """(B, C, height/16, width/16) → (B, height/16 · width/16, C)."""
        return latents.flatten(2).transpose(0, 2, 1)

    @staticmethod
    def unpack_latents(latents: mx.array, height: int, width: int) -> mx.array:
        """(B, height/16 · width/16, C) → (B, C, height/16, width/16)."""
        rows, columns = height // _PIXELS, width // _PIXELS
        return latents.transpose(0, 2, 1).reshape(latents.shape[0], -1, rows, columns)
