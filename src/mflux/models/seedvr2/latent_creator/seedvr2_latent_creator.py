"""SeedVR2's latents: (1, 16, 1, height/8, width/8), those of a video of one frame."""

from __future__ import annotations

from mflux.backend import mx
from mflux.models.common.noise import noise


class SeedVR2LatentCreator:
    @staticmethod
    def create_noise(seed: int, height: int, width: int) -> mx.array:
        """Noise for an image of that many pixels, (1, 16, 1, height/8, width/8), float32; for a seed the same as in
        mflux 0.24."""
        return SeedVR2LatentCreator.create_noise_latents(seed, height // 8, width // 8)

    @staticmethod
    def create_noise_latents(
        seed: int, height: int, width: int, batch_size: int = 1, latent_channels: int = 16
    ) -> mx.array:
        """The same for that many latents."""
        return noise(seed, (batch_size, latent_channels, 1, height, width))

    @staticmethod
    def create_condition(encoded_latent: mx.array) -> mx.array:
        """The image that is enlarged, as latents (B, C, h, w) or (B, C, 1, h, w), with a channel of ones that says that
        all of it is given: (B, C + 1, 1, h, w)."""
        latents = encoded_latent[:, :, None] if encoded_latent.ndim == 4 else encoded_latent
        return mx.concatenate([latents, mx.ones_like(latents[:, :1])], axis=1)

    @staticmethod
    def pack_latents(latents: mx.array, height: int | None = None, width: int | None = None) -> mx.array:
        """(1, C, h, w) → (1, C, 1, h, w). The size follows from the shape."""
        return latents[:, :, None]

    @staticmethod
    def unpack_latents(latents: mx.array, height: int | None = None, width: int | None = None) -> mx.array:
        """The way back."""
        return latents[:, :, 0]
