"""How language models of the Qwen-VL line see images: what their vision towers have in common.

Sources: Qwen team 2025, https://arxiv.org/abs/2502.13923 (Qwen2.5-VL) and https://arxiv.org/abs/2511.21631 (Qwen3-VL).
An image is cut into patches; squares of neighbouring patches become one token of the language model each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mflux.backend import mx, nn
from mflux.models.common.component_config import ComponentConfig
from mflux.models.common.networks.layers import (
    ACTIVATIONS,
    Linear,
    Rotary,
    attention,
    inverse_frequencies,
    merge_heads,
    product,
    rotate_halves,
    split_heads,
)

# Rows and columns of a picture's patches, or of its tokens.
Grid = tuple[int, int]


@dataclass(frozen=True)
class VisionConfig(ComponentConfig):
    """What every `vision_config` of a config.json says."""

    depth: int
    hidden_size: int
    hidden_act: str
    intermediate_size: int
    patch_size: int
    out_hidden_size: int
    num_heads: int = 16
    in_channels: int = 3
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def check(self) -> str | None:
        if self.hidden_act not in ACTIVATIONS:
            return f"the vision tower's hidden_act {self.hidden_act!r} is not known"
        if self.hidden_size % self.num_heads or self.head_dim % 4:
            return f"{self.hidden_size} features do not divide into {self.num_heads} heads of a multiple of four"
        return None


# ---- positions


def patch_places(grid: Grid, merge: int) -> mx.array:
    """Row and column of each patch, (rows · columns, 2): patches that are merged into one token follow each other."""
    rows, columns = grid
    shape = (rows // merge, columns // merge, merge, merge)
    row = mx.arange(rows).reshape(-1, 1, merge, 1)
    column = mx.arange(columns).reshape(1, -1, 1, merge)
    return mx.stack([mx.broadcast_to(row, shape), mx.broadcast_to(column, shape)], axis=-1).reshape(-1, 2)


def vision_rotary(places: mx.array, head_dim: int, theta: float) -> Rotary:
    """Cosines and sines of `patch_places`, (N, head_dim / 2) each: the first half turns with the row, the second with
    the column."""
    angles = (places[:, :, None].astype(mx.float32) * inverse_frequencies(head_dim // 2, theta)).flatten(1)
    return mx.cos(angles), mx.sin(angles)


# ---- vision tower


class PatchEmbed(nn.Module):
    def __init__(self, config: VisionConfig, *, bias: bool):
        super().__init__()
        size = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel_size=size, stride=size, bias=bias)

    def __call__(self, patches: mx.array) -> mx.array:
        """Patches (N, channels · time · height · width) to (N, hidden_size)."""
        weight = self.proj.weight
        # The kernel covers a patch exactly, so the convolution is one product.
        patches = patches.astype(weight.dtype).reshape(-1, weight.shape[-1], *weight.shape[1:-1])
        return product(mx.moveaxis(patches, 1, -1).flatten(1), weight.flatten(1), self.proj.get("bias"))


class VisionAttention(nn.Module):
    """Every patch of a picture, or of a window of it, sees every other."""

    def __init__(self, features: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(features, 3 * features)
        self.proj = Linear(features, features)

    def __call__(self, x: mx.array, rotary: Rotary, mask: mx.array | None = None) -> mx.array:
        """Patches (B, N, features), each of the B on its own; `mask` is true where a patch may be seen."""
        q, k, v = (split_heads(part, self.heads) for part in mx.split(self.qkv(x), 3, axis=-1))
        q, k = rotate_halves(q, rotary), rotate_halves(k, rotary)
        return self.proj(merge_heads(attention(q, k, v, mask=mask)))


def see(
    tower: Callable[[mx.array, Grid], Sequence[mx.array]], patches: mx.array, grids: Sequence[Grid]
) -> list[mx.array]:
    """Show a vision tower several images; each of its results has one image after the other.

    Args:
        tower: takes one image's patches and its grid.
        patches: of all images, (N, channels · time · height · width).
        grids: rows and columns of patches of each image.
    """
    seen, start = [], 0
    for grid in grids:
        stop = start + grid[0] * grid[1]
        seen.append(tower(patches[start:stop], grid))
        # Its activations are gone before the next image's come.
        mx.eval(seen[-1])
        start = stop
    return [mx.concatenate(list(results)) for results in zip(*seen, strict=True)]
