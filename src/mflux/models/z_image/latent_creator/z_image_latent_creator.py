"""Z-Image's latents: the noise a picture starts from. They are not packed into tokens; the transformer does that."""

from __future__ import annotations

from mflux.backend import mx
from mflux.utils import values

_CHANNELS = 16
_PIXELS = 8


class ZImageLatentCreator:
    @staticmethod
    def create_noise(seed: int, height: int, width: int) -> mx.array:
        """Noise (1, 16, height/8, width/8), float32: the same for a seed as in mflux 0.24, which rounded it to
        bfloat16.

        Raises:
            UsageError: a seed that does not fit into 64 bits.
        """
        seed = values.whole(seed, "seed", least=0, most=values.LARGEST_SEED)
        shape = (1, _CHANNELS, height // _PIXELS, width // _PIXELS)
        return mx.random.normal(shape, key=mx.random.key(seed)).astype(mx.bfloat16).astype(mx.float32)

    @staticmethod
    def pack_latents(latents: mx.array, height: int, width: int) -> mx.array:
        """Latents are worked on as they are: (B, 16, height/8, width/8)."""
        return latents

    @staticmethod
    def unpack_latents(latents: mx.array, height: int, width: int) -> mx.array:
        """As `pack_latents`."""
        return latents
