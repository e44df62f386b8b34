"""Depth Pro in MLX: canonical inverse depth and horizontal field of view from one square picture.

Source: Bochkovskii et al. 2024, https://arxiv.org/abs/2410.02073; reference: transformers'
`DepthProForDepthEstimation`, whose published names the attributes carry. Pictures and feature maps are channels-last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

from mflux.backend import mx, nn
from mflux.checkpoints.loading import FileDifferences
from mflux.models.common.component_config import ComponentConfig
from mflux.models.common.controls.depth_pro.dinov2 import Dinov2Config, Dinov2Model
from mflux.models.common.networks.layers import Conv2d, Linear, product


@dataclass(frozen=True)
class DepthProConfig(ComponentConfig):
    """Lists that run over scales go from the smallest copy of the picture to the largest, those that run over hooks
    from the deepest layer to the shallowest: in both cases from coarse features to fine ones."""

    patch_size: int = 384
    scaled_images_ratios: tuple[float, ...] = (0.25, 0.5, 1)
    scaled_images_overlap_ratios: tuple[float, ...] = (0.0, 0.5, 0.25)
    scaled_images_feature_dims: tuple[int, ...] = (1024, 1024, 512)
    intermediate_hook_ids: tuple[int, ...] = (11, 5)
    intermediate_feature_dims: tuple[int, ...] = (256, 256)
    merge_padding_value: int = 3
    fusion_hidden_size: int = 256
    use_batch_norm_in_fusion_residual: bool = False
    use_bias_in_fusion_residual: bool | None = True
    use_fov_model: bool = True
    num_fov_head_layers: int = 2
    patch_model_config: Dinov2Config = field(default_factory=Dinov2Config)
    image_model_config: Dinov2Config = field(default_factory=Dinov2Config)
    fov_model_config: Dinov2Config = field(default_factory=Dinov2Config)

    def __post_init__(self) -> None:
        for name in ("patch_model_config", "image_model_config", "fov_model_config"):
            values = getattr(self, name)
            if isinstance(values, dict):
                object.__setattr__(self, name, Dinov2Config.from_dict(values, source=f"{name} of config.json"))

    @property
    def image_size(self) -> int:
        """The side of the picture for which the smallest copy is one patch: 1536 as published."""
        return round(self.patch_size / self.scaled_images_ratios[0])

    def check(self) -> str | None:
        encoders = (self.patch_model_config, self.image_model_config, self.fov_model_config)
        if any(encoder.image_size != self.patch_size for encoder in encoders):
            return f"every encoder's image_size must be the patch_size, {self.patch_size}"
        scales = (self.scaled_images_ratios, self.scaled_images_overlap_ratios, self.scaled_images_feature_dims)
        if len({len(values) for values in scales}) != 1 or not self.scaled_images_ratios:
            return "the lists scaled_images_… must be of one length"
        if self.scaled_images_ratios[0] <= 0 or any(low >= high for low, high in pairwise(self.scaled_images_ratios)):
            return "scaled_images_ratios must grow"
        if any(not 0 <= overlap < 1 for overlap in self.scaled_images_overlap_ratios):
            return "scaled_images_overlap_ratios must lie between 0 and 1"
        if len(self.intermediate_hook_ids) != len(self.intermediate_feature_dims):
            return "intermediate_hook_ids and intermediate_feature_dims must be of one length"
        if any(not 0 <= hook < self.patch_model_config.num_hidden_layers for hook in self.intermediate_hook_ids):
            return "intermediate_hook_ids names a layer that the patch encoder does not have"
        if self.use_batch_norm_in_fusion_residual:
            return "batch normalisation between the fusion's convolutions is not built"
        if self.fusion_hidden_size >> self.num_fov_head_layers < 1:
            return "fusion_hidden_size is too small for num_fov_head_layers"
        return None


def resize_bilinear(x: mx.array, size: tuple[int, int], ratio: float | None = None) -> mx.array:
    """Resize pictures as `torch.nn.functional.interpolate(…, mode="bilinear", align_corners=False)` does.

    There is no antialiasing: each result mixes the two nearest samples of each axis, however far the step between
    results.

    Args:
        x: (batch, height, width, channels), of any dtype; whole numbers are resized as float32.
        size: the new height and width.
        ratio: new size to old where the new size was rounded from it; by default the exact quotient per axis.
    """
    dtype = x.dtype if mx.issubdtype(x.dtype, mx.floating) else mx.float32
    for axis, length in ((1, size[0]), (2, size[1])):
        if x.shape[axis] == length:
            continue
        step = 1 / ratio if ratio else x.shape[axis] / length
        position = mx.maximum((mx.arange(length) + 0.5) * step - 0.5, 0)
        before = mx.minimum(mx.floor(position).astype(mx.int32), x.shape[axis] - 1)
        after = mx.minimum(before + 1, x.shape[axis] - 1)
        share = mx.expand_dims(position - before, tuple(range(1, 4 - axis)))
        x = (1 - share) * mx.take(x, before, axis=axis) + share * mx.take(x, after, axis=axis)
    return x.astype(dtype)


def cut_patches(x: mx.array, patch_size: int, overlap: float) -> tuple[mx.array, int]:
    """Square windows of (batch, side, side, channels), row by row, those of one picture together.

    Returns:
        (batch · steps², patch_size, patch_size, channels), and steps, the windows along one side.
    """
    side = x.shape[1]
    stride = int(patch_size * (1 - overlap))
    starts = range(0, side - patch_size + 1, stride) if side > patch_size else (0,)
    patches = [x[:, top : top + patch_size, left : left + patch_size] for top in starts for left in starts]
    return mx.stack(patches, axis=1).flatten(0, 1), len(starts)


def merge_patches(tokens: mx.array, steps: int, margin: int) -> mx.array:
    """One feature map from the tokens of a picture's windows; `margin` features go from each edge where two meet.

    Args:
        tokens: (batch · steps², 1 + grid², channels), as encoded from `cut_patches`.

    Returns:
        (batch, side, side, channels) with side = steps · grid − 2 · margin · (steps − 1).
    """
    grid = math.isqrt(tokens.shape[1])
    margin = min(margin, grid // 4)
    tiles = tokens[:, -(grid**2) :].reshape(-1, steps, steps, grid, grid, tokens.shape[-1])
    # First the tiles of each column are joined, then the columns: both times axis 1 counts and axis 3 becomes one.
    for _ in range(2):
        kept = [tiles[:, i, :, margin if i > 0 else 0 : grid - margin if i < steps - 1 else grid] for i in range(steps)]
        tiles = mx.concatenate(kept, axis=2)
    return tiles


class Conv3x3(Conv2d):
    """A 3×3 convolution that keeps the size."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True):
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1, bias=bias)


class Upsample(nn.ConvTranspose2d):
    """A transposed convolution that doubles the size: its kernels do not overlap, so it is one matrix product.

    MLX's own would multiply the zeros in between as well, on the CPU thirty times slower.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool):
        super().__init__(in_channels, out_channels, kernel_size=2, stride=2, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        batch, height, width, channels = x.shape
        out = self.weight.shape[0]
        spread = product(x, self.weight.transpose(1, 2, 0, 3).reshape(4 * out, channels))
        spread = spread.reshape(batch, height, width, 2, 2, out).transpose(0, 1, 3, 2, 4, 5)
        spread = spread.reshape(batch, 2 * height, 2 * width, out)
        return spread + self.bias if "bias" in self else spread


class PatchEncoder(nn.Module):
    """Features of overlapping windows at several scales, merged into one map for each scale and each hook."""

    def __init__(self, config: DepthProConfig):
        super().__init__()
        self.config = config
        self.model = Dinov2Model(config.patch_model_config)

    def __call__(self, pixels: mx.array, base: int) -> list[mx.array]:
        config = self.config
        levels, steps = [], []
        for ratio, overlap in zip(config.scaled_images_ratios, config.scaled_images_overlap_ratios, strict=True):
            side = math.floor(pixels.shape[1] * ratio)
            windows, count = cut_patches(resize_bilinear(pixels, (side, side), ratio), config.patch_size, overlap)
            levels.append(windows)
            steps.append(count)
        tokens, hooked = self.model(mx.concatenate(levels), hooks=config.intermediate_hook_ids)

        ends = [sum(len(windows) for windows in levels[: i + 1]) for i in range(len(levels))]
        maps = []
        for i, (ratio, windows) in enumerate(zip(config.scaled_images_ratios, levels, strict=True)):
            own = tokens[ends[i] - len(windows) : ends[i]]
            merged = merge_patches(own, steps[i], int(config.merge_padding_value / ratio))
            maps.append(resize_bilinear(merged, (base << i, base << i)))
        # The hooks look at the windows of the largest copy only, which stand last.
        finest = base << len(levels) - 1
        for hook in config.intermediate_hook_ids:
            own = hooked[hook][ends[-1] - len(levels[-1]) :]
            merged = merge_patches(own, steps[-1], int(config.merge_padding_value / config.scaled_images_ratios[-1]))
            maps.append(resize_bilinear(merged, (finest, finest)))
        return maps


class ImageEncoder(nn.Module):
    """Features of the whole picture, made as small as one patch."""

    def __init__(self, config: Dinov2Config):
        super().__init__()
        self.size = config.image_size
        self.model = Dinov2Model(config)

    def __call__(self, pixels: mx.array, base: int) -> mx.array:
        tokens, _ = self.model(resize_bilinear(pixels, (self.size, self.size)))
        return resize_bilinear(merge_patches(tokens, 1, 0), (base, base))


class Encoder(nn.Module):
    def __init__(self, config: DepthProConfig):
        super().__init__()
        self.patch_encoder = PatchEncoder(config)
        self.image_encoder = ImageEncoder(config.image_model_config)


class UpsampleBlock(nn.Module):
    def __init__(self, dims: tuple[int, int, int], doublings: int, *, project: bool = True, bias: bool = False):
        super().__init__()
        before, between, after = dims
        self.layers: list[nn.Module] = [Conv2d(before, between, kernel_size=1, bias=bias)] if project else []
        self.layers += [Upsample(between if i == 0 else after, after, bias=bias) for i in range(doublings)]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
        return x


class FeatureUpsample(nn.Module):
    def __init__(self, config: DepthProConfig):
        super().__init__()
        image, patch = config.image_model_config.hidden_size, config.patch_model_config.hidden_size
        coarsest = config.scaled_images_feature_dims[0]
        self.image_block = UpsampleBlock((image, image, coarsest), 1, project=False, bias=True)
        self.scaled_images = [UpsampleBlock((patch, dim, dim), 1) for dim in config.scaled_images_feature_dims]
        self.intermediate = [
            UpsampleBlock((patch, config.fusion_hidden_size if i == 0 else dim, dim), 2 + i)
            for i, dim in enumerate(config.intermediate_feature_dims)
        ]


class FeatureProjection(nn.Module):
    def __init__(self, config: DepthProConfig):
        super().__init__()
        out = config.fusion_hidden_size
        dims = config.scaled_images_feature_dims + config.intermediate_feature_dims
        self.projections: list[nn.Module] = [Conv3x3(dim, out, bias=False) for dim in dims]
        if dims[-1] == out:
            self.projections[-1] = nn.Identity()


class Neck(nn.Module):
    """Brings all maps to the fusion's width, each twice the size of the one before."""

    def __init__(self, config: DepthProConfig):
        super().__init__()
        coarsest = config.scaled_images_feature_dims[0]
        self.feature_upsample = FeatureUpsample(config)
        self.fuse_image_with_low_res = Conv2d(2 * coarsest, coarsest, kernel_size=1)
        self.feature_projection = FeatureProjection(config)

    def __call__(self, image: mx.array, maps: list[mx.array]) -> list[mx.array]:
        upsample = self.feature_upsample
        blocks = [*upsample.scaled_images, *upsample.intermediate]
        maps = [block(features) for block, features in zip(blocks, maps, strict=True)]
        both = mx.concatenate([maps[0], upsample.image_block(image)], axis=-1)
        maps[0] = self.fuse_image_with_low_res(both)
        return [project(x) for project, x in zip(self.feature_projection.projections, maps, strict=True)]


class DepthProModel(nn.Module):
    def __init__(self, config: DepthProConfig):
        super().__init__()
        self.encoder = Encoder(config)
        self.neck = Neck(config)

    def __call__(self, pixels: mx.array, base: int) -> list[mx.array]:
        maps = self.encoder.patch_encoder(pixels, base)
        return self.neck(self.encoder.image_encoder(pixels, base), maps)


class ResidualLayer(nn.Module):
    def __init__(self, config: DepthProConfig):
        super().__init__()
        width = config.fusion_hidden_size
        bias = config.use_bias_in_fusion_residual is not False
        self.convolution1 = Conv3x3(width, width, bias=bias)
        self.convolution2 = Conv3x3(width, width, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.convolution2(nn.relu(self.convolution1(nn.relu(x))))


class FusionLayer(nn.Module):
    def __init__(self, config: DepthProConfig, double: bool):
        super().__init__()
        width = config.fusion_hidden_size
        self.double = double
        # The first layer of the stage has nothing to add, but published files hold its unused weights too.
        self.residual_layer1 = ResidualLayer(config)
        self.residual_layer2 = ResidualLayer(config)
        if double:
            self.deconv = Upsample(width, width, bias=False)
        self.projection = Conv2d(width, width, kernel_size=1)

    def __call__(self, x: mx.array, finer: mx.array | None = None) -> mx.array:
        if finer is not None:
            x = x + self.residual_layer1(finer)
        x = self.residual_layer2(x)
        return self.projection(self.deconv(x) if self.double else x)


class FusionStage(nn.Module):
    def __init__(self, config: DepthProConfig):
        super().__init__()
        count = len(config.scaled_images_ratios) + len(config.intermediate_hook_ids)
        self.intermediate = [FusionLayer(config, double=True) for _ in range(count - 1)]
        self.final = FusionLayer(config, double=False)

    def __call__(self, maps: list[mx.array]) -> mx.array:
        x = self.intermediate[0](maps[0])
        for layer, finer in zip([*self.intermediate[1:], self.final], maps[1:], strict=True):
            x = layer(x, finer)
        return x


class DepthHead(nn.Module):
    def __init__(self, config: DepthProConfig):
        super().__init__()
        width = config.fusion_hidden_size
        self.layers = [
            Conv3x3(width, width // 2),
            Upsample(width // 2, width // 2, bias=True),
            Conv3x3(width // 2, 32),
            nn.ReLU(),
            Conv2d(32, 1, kernel_size=1),
            nn.ReLU(),
        ]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
        return x.squeeze(-1)


class FovEncoder(nn.Module):
    def __init__(self, config: DepthProConfig):
        super().__init__()
        self.size = config.patch_size
        self.model = Dinov2Model(config.fov_model_config)
        self.neck = Linear(config.fov_model_config.hidden_size, config.fusion_hidden_size // 2)

    def __call__(self, pixels: mx.array, base: int) -> mx.array:
        tokens, _ = self.model(resize_bilinear(pixels, (self.size, self.size)))
        return resize_bilinear(merge_patches(self.neck(tokens), 1, 0), (base, base))


class FovHead(nn.Module):
    def __init__(self, config: DepthProConfig):
        super().__init__()
        self.size = config.image_model_config.grid
        halvings = config.num_fov_head_layers
        dims = [math.ceil(config.fusion_hidden_size / 2 ** (i + 1)) for i in range(halvings + 1)]
        self.layers = []
        for before, after in pairwise(dims):
            self.layers += [Conv2d(before, after, kernel_size=3, stride=2, padding=1), nn.ReLU()]
        self.layers.append(Conv2d(dims[-1], 1, kernel_size=int((self.size - 1) / 2**halvings + 1)))

    def __call__(self, x: mx.array) -> mx.array:
        x = resize_bilinear(x, (self.size, self.size))
        for layer in self.layers:
            x = layer(x)
        return x.flatten()


class FovModel(nn.Module):
    """The field of view, from an encoder of its own and from the coarsest map of the depth network."""

    def __init__(self, config: DepthProConfig):
        super().__init__()
        width = config.fusion_hidden_size
        self.fov_encoder = FovEncoder(config)
        self.conv = Conv2d(width, width // 2, kernel_size=3, stride=2, padding=1)
        self.head = FovHead(config)

    def __call__(self, pixels: mx.array, coarsest: mx.array, base: int) -> mx.array:
        return self.head(self.fov_encoder(pixels, base) + nn.relu(self.conv(coarsest)))


class DepthProForDepthEstimation(nn.Module):
    """The whole network. `config.use_fov_model` says whether it estimates the field of view too."""

    config_class = DepthProConfig
    differences = FileDifferences(ignored=(r"\.embeddings\.mask_token$",))

    def __init__(self, config: DepthProConfig):
        super().__init__()
        self.config = config
        self.depth_pro = DepthProModel(config)
        self.fusion_stage = FusionStage(config)
        self.head = DepthHead(config)
        if config.use_fov_model:
            self.fov_model = FovModel(config)
        else:
            # A network without that head takes what it needs of a file that has it.
            self.differences = FileDifferences(ignored=(*self.differences.ignored, r"^fov_model\."))

    def __call__(self, pixels: mx.array) -> tuple[mx.array, mx.array | None]:
        """Estimate depth.

        Args:
            pixels: (batch, side, side, 3), from −1 to 1, side at least `config.image_size`.

        Returns:
            Canonical inverse depth (batch, side′, side′), near is large, where side′ is `side` for a patch size of 16;
            and the horizontal field of view in degrees (batch,), or None.
        """
        config = self.config
        side = pixels.shape[1]
        if pixels.shape[2] != side or side * config.scaled_images_ratios[0] < config.patch_size:
            raise ValueError(f"pictures must be square and at least {config.image_size} pixels wide")
        # The side of the coarsest map: the picture halved as often as it stays at least as wide as an encoder's grid.
        base = side >> int(math.log2(side / config.image_model_config.grid))
        maps = self.depth_pro(pixels, base)
        depth = self.head(self.fusion_stage(maps))
        fov = self.fov_model(pixels, maps[0], base) if config.use_fov_model else None
        return depth, fov
