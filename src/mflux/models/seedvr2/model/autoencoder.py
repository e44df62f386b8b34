"""SeedVR2's autoencoder for a video of one frame: FLUX.1's blocks, with convolutions that were made for videos.

Reference class: `VideoAutoencoderKLWrapper` in ByteDance's code, as the public repository
numz/ComfyUI-SeedVR2_VideoUpscaler has it at 4490bd1. It repeats the first frame before the video begins, so with one
frame all taps of a kernel along time see the same picture, and their sum does what they do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mflux.backend import compute_dtype, mx, nn
from mflux.models.common.networks.autoencoders.kl import AutoencoderKL, AutoencoderKLConfig, Decoder
from mflux.models.common.networks.autoencoders.strips import Map
from mflux.models.common.networks.layers import product


class StillConv(nn.Conv2d):
    """A convolution over (time, rows, columns) as it acts on a video that stands still."""

    @staticmethod
    def from_published(kernel: mx.array) -> mx.array:
        """(O, I, time, rows, columns), or a sum that was saved (O, I, rows, columns) → (O, rows, columns, I)."""
        if kernel.ndim == 5:
            # Where computation is float32, the sum is not rounded to what the file holds.
            kernel = kernel.astype(mx.float32).sum(axis=2).astype(compute_dtype(kernel.dtype))
        return mx.moveaxis(kernel, 1, -1)


@dataclass(frozen=True)
class SeedVR2AutoencoderConfig(AutoencoderKLConfig):
    """`config.json` of SeedVR2's autoencoder.

    Attributes:
        temporal_scale_num: so many levels, the smallest ones, halve and double the number of frames as well.
        decoder_layers_per_block: always one more than the encoder's.
    """

    conv: ClassVar[type[nn.Conv2d]] = StillConv
    block_types: ClassVar[tuple[str, str]] = ("DownEncoderBlock3D", "UpDecoderBlock3D")

    down_block_types: tuple[str, ...] = ("DownEncoderBlock3D",) * 4
    up_block_types: tuple[str, ...] = ("UpDecoderBlock3D",) * 4
    temporal_scale_num: int = 2
    decoder_layers_per_block: int | None = None
    scaling_factor: float = 0.9152
    shift_factor: float | None = 0.0

    def check(self) -> str | None:
        if self.decoder_layers_per_block not in (None, self.layers_per_block + 1):
            return (
                f"decoder_layers_per_block is {self.decoder_layers_per_block}: only one more than layers_per_block, "
                f"{self.layers_per_block + 1}, is built"
            )
        return super().check()


class StillUpsampler(nn.Module):
    """Doubles the sides: four times the channels become squares of pixels, which are convolved.

    Where the number of frames is doubled as well there are eight times the channels, for two frames, of which a video's
    beginning keeps the first.
    """

    def __init__(self, config: SeedVR2AutoencoderConfig, channels: int, frames: int):
        super().__init__()
        self.frames = frames
        self.upscale_conv = config.conv(channels, 4 * frames * channels, 1)
        self.conv = config.conv(channels, channels, 3, padding=1)

    def __call__(self, x: Map) -> Map:
        return x.rearranged(self._squares, given=2).conv(self.conv)

    def _squares(self, x: mx.array) -> mx.array:
        batch, height, width, channels = x.shape
        weight = self.upscale_conv.weight.reshape(4, self.frames, channels, channels)[:, 0]
        bias = self.upscale_conv.bias.reshape(4, self.frames, channels)[:, 0]
        x = product(x, weight.reshape(-1, channels), bias.reshape(-1))
        x = x.reshape(batch, height, width, 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(batch, 2 * height, 2 * width, channels)


class StillDecoder(Decoder):
    def upsampler(self, config: Any, level: int, channels: int) -> nn.Module:
        return StillUpsampler(config, channels, frames=2 if level < config.temporal_scale_num else 1)


class SeedVR2Autoencoder(AutoencoderKL):
    """Pictures in [-1, 1] ↔ the diffusion model's latents, both with channels first as those of other autoencoders."""

    config_class = SeedVR2AutoencoderConfig
    decoder_class = StillDecoder
