"""How language models of the Qwen-VL line see pictures: what their vision towers and their prompts have in common.

Sources: Qwen team 2025, https://arxiv.org/abs/2502.13923 (Qwen2.5-VL) and https://arxiv.org/abs/2511.21631 (Qwen3-VL).
A picture is cut into patches; squares of neighbouring patches become one token of the language model each. Positions
have three axes, time, row and column, which text counts as one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mflux.backend import mx, nn
from mflux.models.common.networks.layers import (
    Rotary,
    attention,
    inverse_frequencies,
    merge_heads,
    rotate_halves,
    split_heads,
)

# Rows and columns of a picture's patches, or of its tokens.
Grid = tuple[int, int]


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


def prompt_positions(ids: Sequence[int], image_token: int, grids: Sequence[Grid]) -> tuple[list[list[int]], int]:
    """Time, row and column of each token, and the position after the last.

    Text advances all three together. The tokens of a picture share the time at which it begins, and spread over rows
    and columns from there; what follows continues after the longer side.

    Args:
        ids: the prompt's tokens; a picture stands in it as one `image_token` for each of its own.
        grids: rows and columns of each picture in tokens, in order.

    Raises:
        ValueError: tokens and pictures do not match.
    """
    axes: list[list[int]] = [[], [], []]
    position, index, pictures = 0, 0, iter(grids)
    while index < len(ids):
        if ids[index] != image_token:
            for axis in axes:
                axis.append(position)
            position, index = position + 1, index + 1
            continue
        rows, columns = next(pictures, (0, 0))
        count = rows * columns
        if not count or any(token != image_token for token in ids[index : index + count]) or index + count > len(ids):
            raise ValueError("the prompt's picture tokens do not match its pictures")
        axes[0] += [position] * count
        axes[1] += [position + row for row in range(rows) for _ in range(columns)]
        axes[2] += [position + column for _ in range(rows) for column in range(columns)]
        position, index = position + max(rows, columns), index + count
    if next(pictures, None) is not None:
        raise ValueError("the prompt has fewer places than pictures")
    return axes, position


# ---- vision tower


class PatchEmbed(nn.Module):
    def __init__(self, config: Any, *, bias: bool):
        super().__init__()
        size = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel_size=size, stride=size, bias=bias)

    def __call__(self, patches: mx.array) -> mx.array:
        """Patches (N, channels · time · height · width) to (N, hidden_size)."""
        weight = self.proj.weight
        # The kernel covers a patch exactly, so the convolution is one product.
        patches = patches.astype(weight.dtype).reshape(-1, weight.shape[-1], *weight.shape[1:-1])
        x = mx.moveaxis(patches, 1, -1).flatten(1) @ weight.flatten(1).T
        return x + self.proj.bias if "bias" in self.proj else x


class VisionAttention(nn.Module):
    """Every patch of a picture, or of a window of it, sees every other."""

    def __init__(self, features: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(features, 3 * features)
        self.proj = nn.Linear(features, features)

    def __call__(self, x: mx.array, rotary: Rotary, mask: mx.array | None = None) -> mx.array:
        """Patches (B, N, features), each of the B on its own; `mask` is true where a patch may be seen."""
        q, k, v = (split_heads(part, self.heads) for part in mx.split(self.qkv(x), 3, axis=-1))
        q, k = rotate_halves(q, rotary), rotate_halves(k, rotary)
        return self.proj(merge_heads(attention(q, k, v, mask=mask)))


def see(tower: Callable[[mx.array, Grid], Any], patches: mx.array, grids: Sequence[Grid]) -> list[Any]:
    """What a vision tower makes of each of several pictures.

    Args:
        tower: takes one picture's patches and its grid.
        patches: of all pictures, (N, channels · time · height · width).
        grids: rows and columns of patches of each picture.
    """
    seen, start = [], 0
    for grid in grids:
        stop = start + grid[0] * grid[1]
        seen.append(tower(patches[start:stop], grid))
        # Its activations are gone before the next picture's come.
        mx.eval(seen[-1])
        start = stop
    return seen
