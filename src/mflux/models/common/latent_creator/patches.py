"""The latents of FLUX.1 and Qwen-Image: the noise a picture starts from, and 2 x 2 patches packed into tokens."""

from __future__ import annotations

from mflux.backend import mx
from mflux.models.common.noise import noise

_CHANNELS = 16


class PatchLatentCreator:
    @staticmethod
    def create_noise(seed: int, height: int, width: int) -> mx.array:
        """Packed noise (1, height/16 · width/16, 64), float32; see `noise`."""
        return noise(seed, (1, (height // 16) * (width // 16), 4 * _CHANNELS))

    @staticmethod
    def pack_latents(latents: mx.array, height: int, width: int, num_channels_latents: int = _CHANNELS) -> mx.array:
        """(B, C, height/8, width/8) → (B, height/16 · width/16, 4 C)."""
        rows, columns = height // 16, width // 16
        patches = latents.reshape(-1, num_channels_latents, rows, 2, columns, 2).transpose(0, 2, 4, 1, 3, 5)
        return patches.reshape(-1, rows * columns, 4 * num_channels_latents)

    @staticmethod
    def unpack_latents(latents: mx.array, height: int, width: int) -> mx.array:
        """(B, height/16 · width/16, 4 C) → (B, C, height/8, width/8)."""
        rows, columns = height // 16, width // 16
        patches = latents.reshape(latents.shape[0], rows, columns, -1, 2, 2).transpose(0, 3, 1, 4, 2, 5)
        return patches.reshape(latents.shape[0], -1, 2 * rows, 2 * columns)
