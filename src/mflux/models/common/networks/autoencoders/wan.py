"""Wan's video autoencoder (Wan Team 2025, arxiv.org/abs/2503.20314), for pictures: a video of one frame.

Reference classes: diffusers' `AutoencoderKLQwenImage` and `AutoencoderKLWan`. A convolution over time sees nothing
before the first frame but zeros, so on one frame only the last slice of its kernel counts: what is three-dimensional
in the file is two-dimensional here, and the layers that halve or double the number of frames never run. Pictures and
latents are (B, C, H, W) outside; inside, everything is channels-last. Norms look at one position alone, so but for the
attention in the middle rows run through all layers at once, in strips.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

from mflux.backend import mx, nn
from mflux.checkpoints.loading import FileDifferences
from mflux.models.common.component_config import ComponentConfig
from mflux.models.common.networks.autoencoders.kernels import attention
from mflux.models.common.networks.autoencoders.strips import Map

# The norm divides by a length, not by a mean square, and takes lengths below 1e-12 as that.
_EPS = 1e-24


@dataclass(frozen=True)
class AutoencoderWanConfig(ComponentConfig):
    """`config.json` of an AutoencoderKLQwenImage or AutoencoderKLWan; defaults are Qwen-Image's, which is Wan 2.1's.

    Wan 2.2's has `is_residual` and a `patch_size`, and counts channels after patches were made of the picture.
    """

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    in_channels: int = 3
    out_channels: int = 3
    is_residual: bool = False
    patch_size: int | None = None
    latents_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )  # fmt: skip
    latents_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916,
    )  # fmt: skip

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: object = "config.json") -> Self:
        # AutoencoderKLQwenImage has one number for both ends, under a name of its own.
        if (channels := values.get("input_channels")) is not None:
            values = {"in_channels": channels, "out_channels": channels} | dict(values)
        return super().from_dict(values, source=source)

    def check(self) -> str | None:
        if self.attn_scales:
            return "attn_scales is not built: attention stands in the middle block only"
        if self.in_channels % self.patch**2 or self.out_channels % self.patch**2:
            return f"{self.in_channels} and {self.out_channels} channels are not patches of {self.patch} x {self.patch}"
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            return f"{len(self.dim_mult)} levels need {len(self.dim_mult) - 1} entries in temperal_downsample"
        if self.is_residual and self.dim_mult[-2:-1] and self.dim_mult[-2] % self.dim_mult[-1]:
            # Nothing is moved into the channels of the last level, so it can only average what there is.
            return f"the last level of dim_mult {list(self.dim_mult)} does not divide the one before it"
        if not len(self.latents_mean) == len(self.latents_std) == self.z_dim:
            return f"latents_mean and latents_std do not have z_dim = {self.z_dim} entries"
        if 0 in self.latents_std:
            return "latents_std has a zero in it"
        return None

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent along each side: 8 for Qwen-Image."""
        return 2 ** (len(self.dim_mult) - 1) * self.patch

    @property
    def latents(self) -> tuple[int, int]:
        """Channels of the latents that a transformer sees, and pixels along a side of each."""
        return self.z_dim, self.spatial_factor

    @property
    def patch(self) -> int:
        return self.patch_size or 1


# ---- what a convolution over time is for one frame


class FrameConv(nn.Conv2d):
    """A causal convolution over (time, rows, columns) as it acts on a video's first frame."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)

    @staticmethod
    def from_published(kernel: mx.array) -> mx.array:
        """(O, I, time, rows, columns), or a slice that was saved (O, I, rows, columns) → (O, rows, columns, I)."""
        return mx.moveaxis(kernel[:, :, -1] if kernel.ndim == 5 else kernel, 1, -1)


class ChannelNorm(nn.Module):
    """Each position's channels, scaled to a length of √channels."""

    def __init__(self, channels: int, trailing: int):
        super().__init__()
        self.gamma = mx.ones((channels, *[1] * trailing))

    def __call__(self, x: Map, *, silu: bool = False) -> Map:
        return x.rms_norm(self.gamma.reshape(-1), _EPS, silu=silu)


# ---- blocks


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = ChannelNorm(in_channels, 3)
        self.conv1 = FrameConv(in_channels, out_channels, 3)
        self.norm2 = ChannelNorm(out_channels, 3)
        self.conv2 = FrameConv(out_channels, out_channels, 3)
        if in_channels != out_channels:
            self.conv_shortcut = FrameConv(in_channels, out_channels, 1)

    def __call__(self, x: Map) -> Map:
        skip = x.conv(self.conv_shortcut) if "conv_shortcut" in self else x
        x = self.norm1(x, silu=True).conv(self.conv1)
        return skip + self.norm2(x, silu=True).conv(self.conv2)


class AttentionBlock(nn.Module):
    """Every position attends to every other, with one head."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = ChannelNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def __call__(self, x: Map) -> Map:
        batch, _, _, channels = x.shape
        flat = self.norm(x.store()).conv(self.to_qkv).array(keep=True).reshape(batch, -1, 3 * channels)
        y = attention(*mx.split(flat, 3, axis=-1))
        return x + Map.of(y.reshape(x.shape)).conv(self.proj)


class Downsample(nn.Module):
    """Halves the sides; padded on the right and at the bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.resample: list[Any] = [nn.Identity(), nn.Conv2d(channels, channels, 3, stride=2)]

    def __call__(self, x: Map) -> Map:
        return x.halve(self.resample[1])


class Upsample(nn.Module):
    """Doubles the sides by repeating pixels, then convolves."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.resample: list[Any] = [nn.Identity(), nn.Conv2d(channels, out_channels, 3, padding=1)]

    def __call__(self, x: Map) -> Map:
        return x.double(self.resample[1])


class MidBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.resnets = [ResidualBlock(channels, channels), ResidualBlock(channels, channels)]
        self.attentions = [AttentionBlock(channels)]

    def __call__(self, x: Map) -> Map:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


def resnets(count: int, in_channels: int, out_channels: int) -> list[ResidualBlock]:
    return [ResidualBlock(in_channels if index == 0 else out_channels, out_channels) for index in range(count)]


class UpBlock(nn.Module):
    """Residual blocks, then twice the sides with half the channels, except in the last."""

    def __init__(self, config: AutoencoderWanConfig, in_channels: int, out_channels: int, is_last: bool):
        super().__init__()
        self.resnets = resnets(config.num_res_blocks + 1, in_channels, out_channels)
        if not is_last:
            self.upsamplers = [Upsample(out_channels, out_channels // 2)]

    def __call__(self, x: Map) -> Map:
        for resnet in self.resnets:
            x = resnet(x)
        return self.upsamplers[0](x) if "upsamplers" in self else x


# ---- Wan 2.2's blocks: beside the convolutions, pixels are moved to channels and back


class ResidualDownBlock(nn.Module):
    def __init__(self, config: AutoencoderWanConfig, level: int, in_channels: int, out_channels: int):
        super().__init__()
        self.out_channels = out_channels
        self.is_last = level == len(config.dim_mult) - 1
        self.frames = 2 if not self.is_last and config.temperal_downsample[level] else 1
        self.resnets = resnets(config.num_res_blocks, in_channels, out_channels)
        if not self.is_last:
            self.downsampler = Downsample(out_channels)

    def __call__(self, x: Map) -> Map:
        skip = x.rearranged(self.gather, taken=1 if self.is_last else 2)
        for resnet in self.resnets:
            x = resnet(x)
        return skip + (x if self.is_last else self.downsampler(x))

    def gather(self, x: mx.array) -> mx.array:
        """Squares of pixels as channels, of which neighbours are averaged. Where the number of frames is halved, the
        frame before the first counts as well, and is zero."""
        side = 1 if self.is_last else 2
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // side, side, width // side, side, channels).transpose(0, 1, 3, 5, 2, 4)
        if self.frames == 2:
            x = mx.stack([mx.zeros_like(x), x], axis=4)
        return x.reshape(*x.shape[:3], self.out_channels, -1).mean(axis=-1)


class ResidualUpBlock(nn.Module):
    def __init__(self, config: AutoencoderWanConfig, level: int, in_channels: int, out_channels: int):
        super().__init__()
        self.out_channels = out_channels
        self.is_last = level == len(config.dim_mult) - 1
        self.frames = 2 if not self.is_last and config.temperal_downsample[::-1][level] else 1
        self.resnets = resnets(config.num_res_blocks + 1, in_channels, out_channels)
        if not self.is_last:
            self.upsampler = Upsample(out_channels, out_channels)

    def __call__(self, x: Map) -> Map:
        y = x
        for resnet in self.resnets:
            y = resnet(y)
        return y if self.is_last else x.rearranged(self.spread, given=2) + self.upsampler(y)

    def spread(self, x: mx.array) -> mx.array:
        """Channels, repeated, as squares of pixels. Where the number of frames is doubled, the second one is the
        picture."""
        batch, height, width, channels = x.shape
        x = mx.repeat(x, self.out_channels * self.frames * 4 // channels, axis=-1)
        x = x.reshape(batch, height, width, self.out_channels, self.frames, 2, 2)[..., -1, :, :]
        return x.transpose(0, 1, 4, 2, 5, 3).reshape(batch, 2 * height, 2 * width, self.out_channels)


def patchify(x: mx.array, patch: int) -> mx.array:
    """Squares of pixels as channels, column by column: (B, H, W, C) → (B, H / patch, W / patch, C · patch²)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // patch, patch, width // patch, patch, channels).transpose(0, 1, 3, 5, 4, 2)
    return x.reshape(*x.shape[:3], -1)


def unpatchify(x: mx.array, patch: int) -> mx.array:
    """The way back from `patchify`."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, channels // patch**2, patch, patch).transpose(0, 1, 5, 2, 4, 3)
    return x.reshape(batch, height * patch, width * patch, -1)


# ---- the model


class Encoder(nn.Module):
    def __init__(self, config: AutoencoderWanConfig):
        super().__init__()
        widths = [config.base_dim * factor for factor in (1, *config.dim_mult)]
        self.conv_in = FrameConv(config.in_channels, widths[0], 3)
        self.down_blocks: list[Callable[[Map], Map]] = []
        for level, (in_channels, out_channels) in enumerate(pairwise(widths)):
            if config.is_residual:
                self.down_blocks.append(ResidualDownBlock(config, level, in_channels, out_channels))
                continue
            if level:
                self.down_blocks.append(Downsample(in_channels))
            self.down_blocks += resnets(config.num_res_blocks, in_channels, out_channels)
        self.mid_block = MidBlock(widths[-1])
        self.norm_out = ChannelNorm(widths[-1], 3)
        self.conv_out = FrameConv(widths[-1], 2 * config.z_dim, 3)

    def __call__(self, x: Map) -> Map:
        x = x.conv(self.conv_in)
        for block in self.down_blocks:
            x = block(x)
        return self.norm_out(self.mid_block(x), silu=True).conv(self.conv_out)


class Decoder(nn.Module):
    def __init__(self, config: AutoencoderWanConfig):
        super().__init__()
        widths = [(config.decoder_base_dim or config.base_dim) * factor for factor in config.dim_mult[::-1]]
        self.conv_in = FrameConv(config.z_dim, widths[0], 3)
        self.mid_block = MidBlock(widths[0])
        self.up_blocks: list[Callable[[Map], Map]] = []
        for level, (in_channels, out_channels) in enumerate(pairwise([widths[0], *widths])):
            if config.is_residual:
                self.up_blocks.append(ResidualUpBlock(config, level, in_channels, out_channels))
                continue
            halved = in_channels // 2 if level else in_channels
            self.up_blocks.append(UpBlock(config, halved, out_channels, is_last=level == len(widths) - 1))
        self.norm_out = ChannelNorm(widths[-1], 3)
        self.conv_out = FrameConv(widths[-1], config.out_channels, 3)

    def __call__(self, x: Map) -> Map:
        x = self.mid_block(x.conv(self.conv_in))
        for block in self.up_blocks:
            x = block(x)
        return self.norm_out(x, silu=True).conv(self.conv_out)


class AutoencoderWan(nn.Module):
    """Pictures in [-1, 1] ↔ the diffusion model's latents, each channel shifted and scaled to about unit variance."""

    config_class = AutoencoderWanConfig
    differences = FileDifferences(ignored=(r"\.time_conv\.(weight|bias)$",))

    def __init__(self, config: AutoencoderWanConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = FrameConv(2 * config.z_dim, 2 * config.z_dim, 1)
        self.post_quant_conv = FrameConv(config.z_dim, config.z_dim, 1)

    @property
    def latent_channels(self) -> int:
        return self.config.z_dim

    @property
    def spatial_scale(self) -> int:
        return self.config.spatial_factor

    def encode(self, image: mx.array) -> mx.array:
        """The mean of the posterior, as latents.

        Args:
            image: (B, in_channels / patch_size², H, W) in [-1, 1]; H and W multiples of `spatial_scale`.

        Returns:
            (B, z_dim, H / spatial_scale, W / spatial_scale).
        """
        pixels = patchify(image.transpose(0, 2, 3, 1), self.config.patch)
        moments = self.encoder(Map.of(pixels)).conv(self.quant_conv).array()
        mean = moments[..., : self.config.z_dim]
        return ((mean - self._mean) / self._std).transpose(0, 3, 1, 2).astype(image.dtype)

    def decode(self, latents: mx.array) -> mx.array:
        """Latents (B, z_dim, h, w) to pictures (B, out_channels / patch_size², h · scale, w · scale) in [-1, 1]."""
        x = (latents.transpose(0, 2, 3, 1) * self._std + self._mean).astype(latents.dtype)
        pixels = unpatchify(self.decoder(Map.of(x).conv(self.post_quant_conv)).array(), self.config.patch)
        return mx.clip(pixels, -1, 1).transpose(0, 3, 1, 2)

    @property
    def _mean(self) -> mx.array:
        return mx.array(self.config.latents_mean)

    @property
    def _std(self) -> mx.array:
        return mx.array(self.config.latents_std)
