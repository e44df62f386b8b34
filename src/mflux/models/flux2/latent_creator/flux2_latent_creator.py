"""FLUX.2's latents as tokens: (1, h · w, 128) for a picture of 16 h × 16 w pixels."""

from __future__ import annotations

from mflux.backend import mx
from mflux.models.common.latent_creator.tokens import SIDE, TokenLatentCreator
from mflux.models.common.noise import noise

CHANNELS = 128


class Flux2LatentCreator(TokenLatentCreator):
    channels = CHANNELS

    @classmethod
    def create_noise(cls, seed: int, height: int, width: int) -> mx.array:
        """Noise (1, h · w, 128), float32; `height` and `width` in pixels.

        The values are those of mflux 0.24, which drew them channel by channel and rounded them to bfloat16.
        """
        latents = noise(seed, (1, CHANNELS, height // SIDE, width // SIDE)).astype(mx.bfloat16).astype(mx.float32)
        return cls.pack_latents(latents, height, width)

    @staticmethod
    def unpack_latents(latents: mx.array, height: int, width: int, vae_scale_factor: int = 8) -> mx.array:
        """(B, h · w, C) → (B, C, h, w); `height` and `width` in pixels, two latents of the autoencoder a token."""
        if latents.ndim == 4:
            return latents
        batch, _, channels = latents.shape
        side = 2 * vae_scale_factor
        return latents.transpose(0, 2, 1).reshape(batch, channels, height // side, width // side)

    # What mflux 0.24 has besides, for programs.

    @staticmethod
    def patchify_latents(latents: mx.array) -> mx.array:
        """The autoencoder's latents (B, C, 2 h, 2 w) → (B, 4 C, h, w), each token's four behind each other."""
        if latents.ndim == 5:
            latents = latents[:, :, 0]
        batch, channels, height, width = latents.shape
        squares = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).transpose(0, 1, 3, 5, 2, 4)
        return squares.reshape(batch, 4 * channels, height // 2, width // 2)

    @staticmethod
    def prepare_grid_ids(latents: mx.array, *, t_coord: int) -> mx.array:
        """Where the tokens of latents (B, C, h, w) are: (B, h · w, 4), time, row, column and 0."""
        from mflux.models.flux2.model.transformer import grid_ids

        batch, _, height, width = latents.shape
        ids = grid_ids(height, width, time=t_coord)
        return mx.broadcast_to(ids[None], (batch, *ids.shape))

    @staticmethod
    def prepare_latents(
        seed: int,
        height: int,
        width: int,
        batch_size: int = 1,
        num_latents_channels: int = 32,
        vae_scale_factor: int = 8,
    ) -> tuple[mx.array, mx.array, int, int]:
        """Noise (B, 4 C, h, w), float32, where its tokens are, h and w; `height` and `width` in pixels."""
        rows, columns = height // (2 * vae_scale_factor), width // (2 * vae_scale_factor)
        shape = (batch_size, 4 * num_latents_channels, rows, columns)
        latents = noise(seed, shape).astype(mx.bfloat16).astype(mx.float32)
        return latents, Flux2LatentCreator.prepare_grid_ids(latents, t_coord=0), rows, columns

    @staticmethod
    def prepare_packed_latents(
        seed: int,
        height: int,
        width: int,
        batch_size: int = 1,
        num_latents_channels: int = 32,
        vae_scale_factor: int = 8,
    ) -> tuple[mx.array, mx.array, int, int]:
        """As `prepare_latents`, with the noise as tokens (B, h · w, 4 C)."""
        latents, ids, rows, columns = Flux2LatentCreator.prepare_latents(
            seed, height, width, batch_size, num_latents_channels, vae_scale_factor
        )
        return Flux2LatentCreator.pack_latents(latents), ids, rows, columns
