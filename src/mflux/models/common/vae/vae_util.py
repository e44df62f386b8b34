"""Pictures to latents and back, for programs, at mflux 0.24's path."""

from __future__ import annotations

from mflux.backend import mx, nn
from mflux.models.common.networks.autoencoders import tiling
from mflux.models.common.networks.autoencoders.tiling import TilingConfig


class VAEUtil:
    @staticmethod
    def encode(vae: nn.Module, image: mx.array, tiling_config: TilingConfig | None = None) -> mx.array:
        """(B, 3, H, W) in [-1, 1] → latents (B, C, H / scale, W / scale); tiles take one picture at a time."""
        return tiling.encode(vae, image, tiling_config)

    @staticmethod
    def decode(vae: nn.Module, latent: mx.array, tiling_config: TilingConfig | None = None) -> mx.array:
        """Latents (B, C, h, w), or (B, C, 1, h, w) as a video has them, → (B, 3, h · scale, w · scale)."""
        return tiling.decode(vae, latent[:, :, 0] if latent.ndim == 5 else latent, tiling_config)
