"""SeedVR2's latents: those of a video of one frame, with channels last as its transformer takes them."""

from __future__ import annotations

from mflux.backend import mx
from mflux.models.common.noise import noise


class SeedVR2LatentCreator:
    @staticmethod
    def create_noise(seed: int, height: int, width: int) -> mx.array:
        """Noise for a picture of that many pixels, (1, height/8, width/8, 16), float32; for a seed the same as in
        mflux 0.24."""
        return SeedVR2LatentCreator.create_noise_latents(seed, height // 8, width // 8)

    @staticmethod
    def create_noise_latents(seed: int, height: int, width: int, channels: int = 16) -> mx.array:
        """The same for that many latents."""
        return noise(seed, (1, channels, height, width)).transpose(0, 2, 3, 1)

    @staticmethod
    def pack_latents(latents: mx.array, height: int, width: int) -> mx.array:
        """(1, channels, rows, columns) → (1, rows, columns, channels)."""
        return latents.transpose(0, 2, 3, 1)

    @staticmethod
    def unpack_latents(latents: mx.array, height: int, width: int) -> mx.array:
        """The way back."""
        return latents.transpose(0, 3, 1, 2)
