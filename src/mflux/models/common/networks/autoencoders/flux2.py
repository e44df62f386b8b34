"""FLUX.2's autoencoder: FLUX.1's with 32 channels, whose latents are put together in squares of 2 × 2 and normalised.

Reference class: diffusers' `AutoencoderKLFlux2`, and of its pipelines the lines that patchify and normalise latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mflux.backend import mx, nn
from mflux.checkpoints.loading import FileDifferences
from mflux.models.common.networks.autoencoders.kl import AutoencoderKL, AutoencoderKLConfig


@dataclass(frozen=True)
class AutoencoderKLFlux2Config(AutoencoderKLConfig):
    """`config.json` of an AutoencoderKLFlux2; defaults are FLUX.2's."""

    latent_channels: int = 32
    decoder_block_out_channels: tuple[int, ...] | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    batch_norm_eps: float = 1e-4
    patch_size: tuple[int, ...] = (2, 2)
    # Statistics take the place of one factor for all channels.
    scaling_factor: float = 1.0
    shift_factor: float | None = None

    @property
    def decoder_channels(self) -> tuple[int, ...]:
        return self.decoder_block_out_channels or self.block_out_channels

    @property
    def latents(self) -> tuple[int, int]:
        """Of the squares that latents are put together in."""
        patch = self.patch_size[0]
        return self.latent_channels * patch**2, self.spatial_factor * patch

    def check(self) -> str | None:
        if len(self.patch_size) != 2 or len(set(self.patch_size)) != 1 or self.patch_size[0] < 1:
            return f"patch_size {list(self.patch_size)} is not a square's"
        if self.scaling_factor != 1.0 or self.shift_factor:
            return "scaling_factor and shift_factor have no place in FLUX.2's autoencoder"
        return super().check()


class Statistics(nn.Module):
    """Mean and variance of each channel of patchified latents, as a batch norm has gathered them in training."""

    def __init__(self, channels: int):
        super().__init__()
        self.running_mean = mx.zeros(channels)
        self.running_var = mx.ones(channels)


class AutoencoderKLFlux2(AutoencoderKL):
    """Pictures in [-1, 1] ↔ latents of zero mean and unit variance, one for 16 × 16 pixels.

    What other families with this autoencoder do otherwise, a subclass says.

    Attributes:
        epsilon: added to the variances; None takes what the configuration says.
        square_first: whether a channel of latents, and its statistics, is counted by its place in the square before
            its channel there.
    """

    config_class = AutoencoderKLFlux2Config
    epsilon: ClassVar[float | None] = None
    square_first: ClassVar[bool] = False
    differences = FileDifferences(ignored=(r"^bn\.num_batches_tracked$",))

    config: AutoencoderKLFlux2Config

    def __init__(self, config: AutoencoderKLFlux2Config):
        super().__init__(config)
        self.bn = Statistics(self.latent_channels)

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels * self.config.patch_size[0] ** 2

    @property
    def spatial_scale(self) -> int:
        return self.config.spatial_factor * self.config.patch_size[0]

    def encode(self, image: mx.array) -> mx.array:
        """The mean of the posterior, as normalised latents.

        Args:
            image: (B, in_channels, H, W) in [-1, 1]; H and W multiples of `spatial_scale`.

        Returns:
            (B, latent_channels, H / spatial_scale, W / spatial_scale); channel 4c + 2i + j is row i and column j of the
            square's channel c. With `square_first` that is channel 32 (2i + j) + c.
        """
        x = super().encode(image)
        batch, channels, height, width = x.shape
        side = self.config.patch_size[0]
        x = x.reshape(batch, channels, height // side, side, width // side, side)
        order = (0, 3, 5, 1, 2, 4) if self.square_first else (0, 1, 3, 5, 2, 4)
        x = x.transpose(order).reshape(batch, -1, height // side, width // side)
        mean, deviation = self._per_channel()
        return ((x - mean) / deviation).astype(image.dtype)

    def decode(self, latents: mx.array) -> mx.array:
        """Latents (B, latent_channels, h, w) to pictures (B, out_channels, h · scale, w · scale), about [-1, 1]."""
        mean, deviation = self._per_channel()
        batch, _, height, width = latents.shape
        side = self.config.patch_size[0]
        x = (latents * deviation + mean).astype(latents.dtype)
        if self.square_first:
            x = x.reshape(batch, side, side, -1, height, width).transpose(0, 3, 4, 1, 5, 2)
        else:
            x = x.reshape(batch, -1, side, side, height, width).transpose(0, 1, 4, 2, 5, 3)
        return super().decode(x.reshape(batch, -1, height * side, width * side))

    def statistics(self) -> tuple[mx.array, mx.array]:
        """Mean and deviation of each channel of latents, (latent_channels,) each."""
        epsilon = self.config.batch_norm_eps if self.epsilon is None else self.epsilon
        return self.bn.running_mean, mx.sqrt(self.bn.running_var + epsilon)

    def _per_channel(self) -> tuple[mx.array, mx.array]:
        mean, deviation = self.statistics()
        return mean.reshape(1, -1, 1, 1), deviation.reshape(1, -1, 1, 1)
