"""Z-Image's latents: (16, 1, height/8, width/8), as mflux 0.24 has them, a video of one frame without a batch."""

from __future__ import annotations

from mflux.backend import mx
from mflux.utils import values

_CHANNELS = 16
_PIXELS = 8


class ZImageLatentCreator:
    @staticmethod
    def create_noise(seed: int, height: int, width: int) -> mx.array:
        """Noise (16, 1, height/8, width/8), float32: the same for a seed as in mflux 0.24, which rounded it to
        bfloat16.

        Raises:
            UsageError: a seed that does not fit into 64 bits.
        """
        seed = values.whole(seed, "seed", least=0, most=values.LARGEST_SEED)
        shape = (_CHANNELS, 1, height // _PIXELS, width // _PIXELS)
        return mx.random.normal(shape, key=mx.random.key(seed)).astype(mx.bfloat16).astype(mx.float32)

    @staticmethod
    def pack_latents(latents: mx.array, height: int | None = None, width: int | None = None) -> mx.array:
        """(B, 16, h, w), or (B, 16, 1, h, w) as a video has them, → (16, B, h, w). The size follows from the shape."""
        return latents.reshape(-1, _CHANNELS, *latents.shape[-2:]).transpose(1, 0, 2, 3)

    @staticmethod
    def unpack_latents(latents: mx.array, height: int | None = None, width: int | None = None) -> mx.array:
        """(16, B, h, w) → (B, 16, h, w)."""
        return latents.transpose(1, 0, 2, 3)
