"""The convolutional autoencoder of latent diffusion (Rombach et al. 2022, arxiv.org/abs/2112.10752).

Reference class: diffusers' `AutoencoderKL`. Pictures and latents are (B, C, H, W) outside, as in mflux; inside,
everything is channels-last, as MLX's convolutions want it, and computed in strips of rows (`strips.Map`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mflux.backend import mx, nn
from mflux.models.common.component_config import ComponentConfig
from mflux.models.common.networks.autoencoders.kernels import attention
from mflux.models.common.networks.autoencoders.strips import Map
from mflux.models.common.networks.layers import Linear

_EPS = 1e-6


@dataclass(frozen=True)
class AutoencoderKLConfig(ComponentConfig):
    """`config.json` of an AutoencoderKL; defaults are FLUX.1's."""

    # What convolves: a class that is made of the same blocks may read its kernels in another way.
    conv: ClassVar[type[nn.Conv2d]] = nn.Conv2d
    block_types: ClassVar[tuple[str, str]] = ("DownEncoderBlock2D", "UpDecoderBlock2D")

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4
    layers_per_block: int = 2
    norm_num_groups: int = 32
    act_fn: str = "silu"
    mid_block_add_attention: bool = True
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False
    scaling_factor: float = 0.3611
    shift_factor: float | None = 0.1159
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    def check(self) -> str | None:
        down, up = self.block_types
        if set(self.down_block_types) != {down} or set(self.up_block_types) != {up}:
            return f"only {down} and {up} are built"
        if not len(self.down_block_types) == len(self.up_block_types) == len(self.block_out_channels):
            return "block types and block_out_channels differ in number"
        if self.act_fn != "silu":
            return f"act_fn {self.act_fn!r} is not built, only silu"
        if self.latents_mean is not None or self.latents_std is not None:
            return "latents_mean and latents_std are not built, only shift_factor and scaling_factor"
        if len(self.decoder_channels) != len(self.block_out_channels):
            return "encoder and decoder differ in their number of blocks"
        widths = self.block_out_channels + self.decoder_channels
        uneven = [channels for channels in widths if channels % self.norm_num_groups]
        if uneven:
            return f"{uneven[0]} channels do not divide into {self.norm_num_groups} groups"
        return None

    @property
    def decoder_channels(self) -> tuple[int, ...]:
        """The widths of the decoder's levels, in the encoder's order."""
        return self.block_out_channels

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent along each side: 8 for FLUX.1."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def latents(self) -> tuple[int, int]:
        """Channels of the latents that a transformer sees, and pixels along a side of each."""
        return self.latent_channels, self.spatial_factor


def _norm(config: AutoencoderKLConfig, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_num_groups, channels, eps=_EPS, pytorch_compatible=True)


class ResnetBlock(nn.Module):
    def __init__(self, config: AutoencoderKLConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = _norm(config, in_channels)
        self.conv1 = config.conv(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(config, out_channels)
        self.conv2 = config.conv(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.conv_shortcut = config.conv(in_channels, out_channels, 1)

    def __call__(self, x: Map) -> Map:
        y = x.group_norm(self.norm1, silu=True).conv(self.conv1)
        y = y.group_norm(self.norm2, silu=True).conv(self.conv2)
        skip = x.conv(self.conv_shortcut) if "conv_shortcut" in self else x
        return (skip + y).store()


class AttentionBlock(nn.Module):
    """Every position attends to every other, with one head."""

    def __init__(self, config: AutoencoderKLConfig, channels: int):
        super().__init__()
        self.group_norm = _norm(config, channels)
        self.to_q = Linear(channels, channels)
        self.to_k = Linear(channels, channels)
        self.to_v = Linear(channels, channels)
        self.to_out = [Linear(channels, channels)]

    def __call__(self, x: Map) -> Map:
        batch, _, _, channels = x.shape
        flat = x.group_norm(self.group_norm).array(keep=True).reshape(batch, -1, channels)
        y = attention(self.to_q(flat), self.to_k(flat), self.to_v(flat))
        return x + Map.of(self.to_out[0](y).reshape(x.shape))


class Downsampler(nn.Module):
    """Halves the sides; padded on the right and at the bottom only."""

    def __init__(self, config: AutoencoderKLConfig, channels: int):
        super().__init__()
        self.conv = config.conv(channels, channels, 3, stride=2)

    def __call__(self, x: Map) -> Map:
        return x.halve(self.conv)


class Upsampler(nn.Module):
    """Doubles the sides by repeating pixels, then convolves."""

    def __init__(self, config: AutoencoderKLConfig, channels: int):
        super().__init__()
        self.conv = config.conv(channels, channels, 3, padding=1)

    def __call__(self, x: Map) -> Map:
        return x.double(self.conv)


class DownBlock(nn.Module):
    def __init__(self, config: AutoencoderKLConfig, in_channels: int, out_channels: int, is_last: bool):
        super().__init__()
        self.resnets = [
            ResnetBlock(config, in_channels if index == 0 else out_channels, out_channels)
            for index in range(config.layers_per_block)
        ]
        if not is_last:
            self.downsamplers = [Downsampler(config, out_channels)]

    def __call__(self, x: Map) -> Map:
        for resnet in self.resnets:
            x = resnet(x)
        return self.downsamplers[0](x) if "downsamplers" in self else x


class UpBlock(nn.Module):
    def __init__(
        self, config: AutoencoderKLConfig, in_channels: int, out_channels: int, upsampler: nn.Module | None = None
    ):
        super().__init__()
        self.resnets = [
            ResnetBlock(config, in_channels if index == 0 else out_channels, out_channels)
            for index in range(config.layers_per_block + 1)
        ]
        if upsampler is not None:
            self.upsamplers = [upsampler]

    def __call__(self, x: Map) -> Map:
        for resnet in self.resnets:
            x = resnet(x)
        return self.upsamplers[0](x) if "upsamplers" in self else x


class MidBlock(nn.Module):
    def __init__(self, config: AutoencoderKLConfig, channels: int):
        super().__init__()
        self.resnets = [ResnetBlock(config, channels, channels), ResnetBlock(config, channels, channels)]
        if config.mid_block_add_attention:
            self.attentions = [AttentionBlock(config, channels)]

    def __call__(self, x: Map) -> Map:
        x = self.resnets[0](x)
        if "attentions" in self:
            x = self.attentions[0](x)
        return self.resnets[1](x)


class Encoder(nn.Module):
    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        channels = config.block_out_channels
        self.conv_in = config.conv(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = [
            DownBlock(config, channels[max(index - 1, 0)], width, is_last=index == len(channels) - 1)
            for index, width in enumerate(channels)
        ]
        self.mid_block = MidBlock(config, channels[-1])
        self.conv_norm_out = _norm(config, channels[-1])
        self.conv_out = config.conv(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def __call__(self, x: Map) -> Map:
        x = x.conv(self.conv_in)
        for block in self.down_blocks:
            x = block(x)
        return self.mid_block(x).group_norm(self.conv_norm_out, silu=True).conv(self.conv_out)


class Decoder(nn.Module):
    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        channels = config.decoder_channels[::-1]
        self.conv_in = config.conv(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(config, channels[0])
        upsamplers = [self.upsampler(config, index, width) for index, width in enumerate(channels[:-1])]
        self.up_blocks = [
            UpBlock(config, channels[max(index - 1, 0)], width, upsampler)
            for index, (width, upsampler) in enumerate(zip(channels, [*upsamplers, None], strict=True))
        ]
        self.conv_norm_out = _norm(config, channels[-1])
        self.conv_out = config.conv(channels[-1], config.out_channels, 3, padding=1)

    def upsampler(self, config: AutoencoderKLConfig, level: int, channels: int) -> nn.Module:
        """What doubles the sides behind a level, counted from the smallest."""
        return Upsampler(config, channels)

    def __call__(self, x: Map) -> Map:
        x = self.mid_block(x.conv(self.conv_in))
        for block in self.up_blocks:
            x = block(x)
        return x.group_norm(self.conv_norm_out, silu=True).conv(self.conv_out)


class AutoencoderKL(nn.Module):
    """Pictures in [-1, 1] ↔ the diffusion model's latents, shifted and scaled to about unit variance."""

    config_class = AutoencoderKLConfig
    decoder_class: ClassVar[type[Decoder]] = Decoder

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = self.decoder_class(config)
        if config.use_quant_conv:
            self.quant_conv = config.conv(2 * config.latent_channels, 2 * config.latent_channels, 1)
        if config.use_post_quant_conv:
            self.post_quant_conv = config.conv(config.latent_channels, config.latent_channels, 1)

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    @property
    def spatial_scale(self) -> int:
        return self.config.spatial_factor

    def encode(self, image: mx.array) -> mx.array:
        """The mean of the posterior, as latents.

        Args:
            image: (B, in_channels, H, W) in [-1, 1]; H and W multiples of `spatial_scale`.

        Returns:
            (B, latent_channels, H / spatial_scale, W / spatial_scale).
        """
        moments = self.encoder(Map.of(image.transpose(0, 2, 3, 1))).array()
        if "quant_conv" in self:
            moments = self.quant_conv(moments)
        mean = moments[..., : self.config.latent_channels]
        return ((mean - (self.config.shift_factor or 0.0)) * self.config.scaling_factor).transpose(0, 3, 1, 2)

    def decode(self, latents: mx.array) -> mx.array:
        """Latents (B, latent_channels, h, w) to pictures (B, out_channels, h · scale, w · scale), about [-1, 1]."""
        x = (latents / self.config.scaling_factor + (self.config.shift_factor or 0.0)).transpose(0, 2, 3, 1)
        if "post_quant_conv" in self:
            x = self.post_quant_conv(x)
        return self.decoder(Map.of(x)).array().transpose(0, 3, 1, 2)
