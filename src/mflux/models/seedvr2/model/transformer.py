"""SeedVR2's transformer (Wang et al. 2025, https://arxiv.org/abs/2506.05301), for a video of one frame.

Reference classes: `NaDiT` of `dit_3b` and of `dit_7b` in ByteDance's code, as the public repository
numz/ComfyUI-SeedVR2_VideoUpscaler has it at 4490bd1. Patches of the picture attend to each other and to a constant text
within windows, whose borders every second block moves by half a window; the text's own result is the mean over windows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil, sqrt
from typing import Any, Literal

import numpy as np

from mflux import fused
from mflux.backend import mx, nn
from mflux.checkpoints.loading import FileDifferences
from mflux.models.common.component_config import ComponentConfig
from mflux.models.common.networks.layers import (
    TIME_CHANNELS,
    Linear,
    RMSNorm,
    Rotary,
    Turns,
    attention,
    gelu_approx,
    merge_heads,
    normed_heads,
    parts_of,
    residual,
    rms_norm,
    rotate_pairs,
    silu,
    silu_times,
    split_heads,
    waves,
)

# Windows are cut as if the picture had so many patches, 1280 x 720 pixels, whatever its size.
_PATCHES = 45 * 80
# Of the pictures' positions in the 3B kind, from `theta` down, and of those in the 7B kind, in half turns.
_THETA = 10_000.0
_MOST_HALF_TURNS = 128.0
# What the gated feed-forward's width is rounded up to.
_HIDDEN_STEP = 256


@dataclass(frozen=True)
class SeedVR2TransformerConfig(ComponentConfig):
    """`config.json` of a NaDiT; defaults are SeedVR2-3B's.

    Attributes:
        mm_layers: in so many blocks, the first ones, picture and text have weights of their own; then they share them.
        rope_type: "mmrope3d" turns picture and text by their places as language models do, and leaves the last block's
            text as it is (3B); None turns the picture's alone, by where in its window a patch lies (7B).
        rope_dim: how many channels of a head three axes share; what a pair cannot be made of stays as it is.
        window: into how many windows a picture of 1280 x 720 pixels is cut along time, rows and columns.
        vid_out_norm: "fusedrms" if the result is normalized and modulated (3B).
    """

    vid_in_channels: int = field(default=33, metadata={"least": 1})
    vid_out_channels: int = field(default=16, metadata={"least": 1})
    vid_dim: int = field(default=2560, metadata={"least": 1})
    txt_in_dim: int = field(default=5120, metadata={"least": 1})
    txt_dim: int = field(default=2560, metadata={"least": 1})
    emb_dim: int = field(default=15360, metadata={"least": 1})
    heads: int = field(default=20, metadata={"least": 1})
    head_dim: int = field(default=128, metadata={"least": 2})
    expand_ratio: int = field(default=4, metadata={"least": 1})
    norm_eps: float = field(default=1e-5, metadata={"least": 0.0})
    qk_bias: bool = False
    patch_size: tuple[int, int, int] = field(default=(1, 2, 2), metadata={"least": 1})
    num_layers: int = field(default=32, metadata={"least": 1})
    mm_layers: int = 10
    mlp_type: Literal["swiglu", "normal"] = "swiglu"
    rope_type: Literal["mmrope3d"] | None = "mmrope3d"
    rope_dim: int = field(default=128, metadata={"least": 1})
    vid_out_norm: Literal["fusedrms"] | None = "fusedrms"
    window: tuple[int, int, int] = field(default=(4, 3, 3), metadata={"least": 1})

    @property
    def inner_dim(self) -> int:
        return self.vid_dim

    @property
    def num_attention_heads(self) -> int:
        return self.heads

    def check(self) -> str | None:
        if self.txt_dim != self.vid_dim:
            return f"txt_dim {self.txt_dim} is not vid_dim {self.vid_dim}: streams of two widths are not built"
        if self.emb_dim != 6 * self.vid_dim:
            return f"emb_dim {self.emb_dim} is not six times vid_dim {self.vid_dim}"
        if self.patch_size[0] != 1:
            return f"patch_size {list(self.patch_size)} takes several frames together, and one is built"
        if self.head_dim % 2 or self.rope_pairs < 1 or 6 * self.rope_pairs > self.head_dim:
            return f"rope_dim {self.rope_dim} does not fit into heads of {self.head_dim} channels"
        return None

    @property
    def rope_pairs(self) -> int:
        """How many pairs of channels each axis turns: 21 of 64 in 3B, 10 in 7B."""
        return self.rope_dim // 3 // 2

    @property
    def ends_with_video(self) -> bool:
        """Whether the last block does nothing more to the text."""
        return self.rope_type is not None


# ---- windows


def borders(length: int, size: int, shifted: bool) -> list[int]:
    """Where windows of `size` begin and end along an axis: from 0 to `length`. Shifted, the first one is half a window,
    and further borders in between two patches come to lie before both."""
    if shifted and size < length:
        inner = {int((number + 0.5) * size) for number in range(ceil(length / size))}
    else:
        inner = set(range(0, length, size))
    return sorted({0, length} | {border for border in inner if border < length})


def window_size(rows: int, columns: int, counts: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a window, in a picture of so many rows and columns of patches."""
    scale = sqrt(_PATCHES / (rows * columns))
    height, width = (
        # A picture that is thinner than a window has one of a single patch.
        max(1, ceil(round(length * scale) / count))
        for length, count in zip((rows, columns), counts, strict=True)
    )
    return height, width


class Windows:
    """How the patches of a picture are put into windows, windows of one shape side by side.

    Attributes:
        order: (rows · columns,), which patch, in the picture's order, stands at each place.
        back: the way back.
        groups: for each shape how many windows it has, and how many patches.
        shapes: rows and columns of each group's windows.
        number: how many windows there are.
    """

    def __init__(self, rows: int, columns: int, counts: tuple[int, int], *, shifted: bool):
        grid = np.arange(rows * columns, dtype=np.int32).reshape(rows, columns)
        size = window_size(rows, columns, counts)
        edges = [borders(length, side, shifted) for length, side in zip((rows, columns), size, strict=True)]
        cut: dict[tuple[int, int], list[np.ndarray]] = {}
        for top, bottom in zip(edges[0], edges[0][1:], strict=False):
            for left, right in zip(edges[1], edges[1][1:], strict=False):
                cut.setdefault((bottom - top, right - left), []).append(grid[top:bottom, left:right].reshape(-1))
        order = np.concatenate([patches for windows in cut.values() for patches in windows])
        self.order = mx.array(order)
        self.back = mx.array(np.argsort(order).astype(np.int32))
        self.shapes = list(cut)
        self.groups = [(len(windows), height * width) for (height, width), windows in cut.items()]
        self.number = sum(number for number, _ in self.groups)

    @cached_property
    def places(self) -> np.ndarray:
        """Row and column of each patch in its window, and the window's rows and columns: (4, rows · columns)."""
        found = []
        for (height, width), (number, _) in zip(self.shapes, self.groups, strict=True):
            row, column = np.indices((height, width)).reshape(2, -1)
            sides = np.full_like(row, height), np.full_like(row, width)
            found.append(np.tile(np.stack([row, column, *sides]), number))
        return np.concatenate(found, axis=1)


# ---- positions


def _rotary(config: SeedVR2TransformerConfig, positions: np.ndarray, frequencies: np.ndarray) -> Rotary:
    """Cosines and sines, (L, head_dim / 2), for positions (3, L); channels that no axis turns keep their places."""
    # Rounded where the model rounded in training: the angles are hundreds of radians.
    angles = positions.astype(np.float32)[..., None] * frequencies.astype(np.float32)
    angles = angles.transpose(1, 0, 2).reshape(positions.shape[1], -1).astype(np.float64)
    angles = np.pad(angles, [(0, 0), (0, config.head_dim // 2 - angles.shape[1])])
    return Turns((mx.array(np.cos(angles).astype(np.float32)), mx.array(np.sin(angles).astype(np.float32))))


def _from_minus_one_to_one(steps: np.ndarray, number: np.ndarray) -> np.ndarray:
    """The `steps`-th of `number` evenly spaced values; a single one is -1. Counted from the nearer end, in float32."""
    step = (np.float32(2) / np.maximum(number - 1, 1)).astype(np.float32)
    from_start = np.float32(-1) + step * steps.astype(np.float32)
    from_end = np.float32(1) - step * (number - 1 - steps).astype(np.float32)
    return np.where(steps < number // 2, from_start, from_end) * (number > 1) - (number == 1)


def rotaries(config: SeedVR2TransformerConfig, windows: Windows, length: int) -> tuple[Rotary, Rotary | None]:
    """The turns of a picture's patches, in the windows' order, and of a text of `length` tokens, if it is turned."""
    row, column, height, width = windows.places
    frequencies: np.ndarray
    if config.rope_type is None:
        half_turns = np.linspace(1, _MOST_HALF_TURNS, config.rope_pairs, dtype=np.float32)
        frequencies = (half_turns * np.float32(np.pi)).astype(np.float32)
        positions = np.stack(
            [-np.ones(row.shape), _from_minus_one_to_one(row, height), _from_minus_one_to_one(column, width)]
        )
        return _rotary(config, positions, frequencies), None
    frequencies = _THETA ** (-2 * np.arange(config.rope_pairs) / (config.rope_dim // 3))
    # On the axis of time the frame comes behind the text.
    video = np.stack([np.full_like(row, length), row, column])
    text = np.tile(np.arange(length), (3, 1))
    return _rotary(config, video, frequencies), _rotary(config, text, frequencies)


# ---- layers


class Streams(nn.Module):
    """A layer for picture and text: one for both (`all`), or one for each (`vid`, `txt`), or for the picture alone."""

    def __init__(self, make: Callable[[], nn.Module], *, shared: bool, video_only: bool = False):
        super().__init__()
        if shared:
            self.all = make()
        else:
            self.vid = make()
            if not video_only:
                self.txt = make()

    @property
    def for_video(self) -> Any:
        return self.all if "all" in self else self.vid

    @property
    def for_text(self) -> Any:
        return self.all if "all" in self else self.txt


class Modulation(nn.Module):
    """Shifts, scales and gates that the time adds to.

    In `time`, (dim, 2, 3), the second axis is attention or feed-forward and the third shift, scale, gate.
    """

    def __init__(self, dim: int, *, layers: tuple[str, ...] = ("attn", "mlp"), gates: bool = True):
        super().__init__()
        for layer in layers:
            setattr(self, f"{layer}_shift", mx.zeros(dim))
            setattr(self, f"{layer}_scale", mx.ones(dim))
            if gates:
                setattr(self, f"{layer}_gate", mx.zeros(dim))

    def before(self, x: mx.array, layer: str, time: mx.array) -> mx.array:
        # What is modulated behind the last block takes the attention's part of the time, as in training.
        time = time[:, 1 if layer == "mlp" else 0]
        return fused.scaled(x, time[:, 1] + self[f"{layer}_scale"], time[:, 0] + self[f"{layer}_shift"])

    def behind(self, x: mx.array, y: mx.array, layer: str, time: mx.array) -> mx.array:
        """The stream x and what a layer adds to it."""
        return residual(x, time[:, 1 if layer == "mlp" else 0, 2] + self[f"{layer}_gate"], y)


class GatedFeedForward(nn.Module):
    """A gated feed-forward (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, dim: int, expand_ratio: int):
        super().__init__()
        hidden = _HIDDEN_STEP * ceil(2 * dim * expand_ratio // 3 / _HIDDEN_STEP)
        self.proj_in_gate = Linear(dim, hidden, bias=False)
        self.proj_out = Linear(hidden, dim, bias=False)
        self.proj_in = Linear(dim, hidden, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.proj_out(silu_times(self.proj_in_gate(x), self.proj_in(x)))


class FeedForward(nn.Module):
    def __init__(self, dim: int, expand_ratio: int):
        super().__init__()
        self.proj_in = Linear(dim, dim * expand_ratio)
        self.proj_out = Linear(dim * expand_ratio, dim)

    def __call__(self, x: mx.array) -> mx.array:
        return self.proj_out(gelu_approx(self.proj_in(x)))


class WindowAttention(nn.Module):
    def __init__(self, config: SeedVR2TransformerConfig, *, shared: bool):
        super().__init__()
        self.heads = config.heads
        dim, inner = config.vid_dim, config.heads * config.head_dim
        self.proj_qkv = Streams(lambda: Linear(dim, 3 * inner, bias=config.qk_bias), shared=shared)
        self.proj_out = Streams(lambda: Linear(inner, dim), shared=shared)
        self.norm_q = Streams(lambda: RMSNorm(config.head_dim, eps=config.norm_eps), shared=shared)
        self.norm_k = Streams(lambda: RMSNorm(config.head_dim, eps=config.norm_eps), shared=shared)

    def __call__(
        self, video: mx.array, text: mx.array, windows: Windows, turns: tuple[Rotary, Rotary | None]
    ) -> tuple[mx.array, mx.array]:
        of_video = self._heads(video, "for_video", turns[0], windows.order)
        of_text = self._heads(text, "for_text", turns[1])
        batch = of_video[0].shape[0]
        seen, heard, start = [], mx.array(0), 0
        for number, patches in windows.groups:
            end = start + number * patches
            # Windows of one shape are a batch: (B · number, heads, patches + length, D).
            joint = [
                mx.concatenate([_batched(x[:, :, start:end], number), mx.repeat(words, number, axis=0)], axis=2)
                for x, words in zip(of_video, of_text, strict=True)
            ]
            result = attention(*joint)
            seen.append(_unbatched(result[:, :, :patches], batch))
            words = result[:, :, patches:]
            heard = heard + words.reshape(batch, number, *words.shape[1:]).sum(axis=1)
            start = end
        return (
            self.proj_out.for_video(merge_heads(mx.take(mx.concatenate(seen, axis=2), windows.back, axis=2))),
            self.proj_out.for_text(merge_heads(heard / windows.number)),
        )

    def _heads(self, x: mx.array, stream: str, rotary: Rotary | None, order: mx.array | None = None) -> list[mx.array]:
        """Queries, keys and values of one stream, (B, heads, L, D) each, in an order if one is given."""
        q, k, v = parts_of(getattr(self.proj_qkv, stream)(x), 3)
        norms = (getattr(norm, stream) for norm in (self.norm_q, self.norm_k))
        found = [*(normed_heads(norm, part, self.heads) for norm, part in zip(norms, (q, k), strict=True))]
        found.append(split_heads(v, self.heads))
        if order is not None:
            found = [mx.take(one, order, axis=2) for one in found]
        return found if rotary is None else [rotate_pairs(one, rotary) for one in found[:2]] + found[2:]


def _batched(x: mx.array, number: int) -> mx.array:
    """(B, heads, number · patches, D) → (B · number, heads, patches, D)."""
    batch, heads, _, channels = x.shape
    x = x.reshape(batch, heads, number, -1, channels).transpose(0, 2, 1, 3, 4)
    return x.reshape(batch * number, heads, -1, channels)


def _unbatched(x: mx.array, batch: int) -> mx.array:
    """The way back from `_batched`."""
    _, heads, patches, channels = x.shape
    x = x.reshape(batch, -1, heads, patches, channels).transpose(0, 2, 1, 3, 4)
    return x.reshape(batch, heads, -1, channels)


class Block(nn.Module):
    def __init__(self, config: SeedVR2TransformerConfig, *, shared: bool, video_only: bool):
        super().__init__()
        self.eps = config.norm_eps
        self.video_only = video_only
        feed_forward = {"swiglu": GatedFeedForward, "normal": FeedForward}[config.mlp_type]
        self.attn = WindowAttention(config, shared=shared)
        self.mlp = Streams(
            lambda: feed_forward(config.vid_dim, config.expand_ratio), shared=shared, video_only=video_only
        )
        self.ada = Streams(lambda: Modulation(config.vid_dim), shared=shared, video_only=video_only)

    def __call__(
        self,
        video: mx.array,
        text: mx.array,
        time: mx.array,
        windows: Windows,
        turns: tuple[Rotary, Rotary | None],
    ) -> tuple[mx.array, mx.array]:
        of_video = self.ada.for_video
        seen = of_video.before(self.normalized(video), "attn", time)
        heard = self.normalized(text)
        if not self.video_only:
            heard = self.ada.for_text.before(heard, "attn", time)
        seen, heard = self.attn(seen, heard, windows, turns)
        video = self.feed(of_video.behind(video, seen, "attn", time), of_video, self.mlp.for_video, time)
        if not self.video_only:
            of_text = self.ada.for_text
            text = self.feed(of_text.behind(text, heard, "attn", time), of_text, self.mlp.for_text, time)
        return video, text

    def feed(self, x: mx.array, ada: Modulation, mlp: nn.Module, time: mx.array) -> mx.array:
        return ada.behind(x, mlp(ada.before(self.normalized(x), "mlp", time)), "mlp", time)

    def normalized(self, x: mx.array) -> mx.array:
        return rms_norm(x, self.eps)


class TimeEmbedding(nn.Module):
    def __init__(self, hidden: int, features: int):
        super().__init__()
        self.proj_in = Linear(TIME_CHANNELS, hidden)
        self.proj_hid = Linear(hidden, hidden)
        self.proj_out = Linear(hidden, features)

    def __call__(self, x: mx.array) -> mx.array:
        return self.proj_out(silu(self.proj_hid(silu(self.proj_in(x)))))


class Projection(nn.Module):
    """A linear layer under the name that the published file has for it."""

    def __init__(self, in_features: int, features: int):
        super().__init__()
        self.proj = Linear(in_features, features)

    def __call__(self, x: mx.array) -> mx.array:
        return self.proj(x)


# ---- the model


class SeedVR2Transformer(nn.Module):
    """Predicts the velocity from a picture's latents to noise, beside the latents of the small picture."""

    config_class = SeedVR2TransformerConfig
    # Tables of frequencies, which follow from the configuration.
    differences = FileDifferences(ignored=(r"^blocks\.\d+\.attn\.rope\.rope\.freqs$",))

    def __init__(self, config: SeedVR2TransformerConfig):
        super().__init__()
        self.config = config
        pixels = config.patch_size[1] * config.patch_size[2]
        self.vid_in = Projection(config.vid_in_channels * pixels, config.vid_dim)
        if config.txt_in_dim != config.txt_dim:
            self.txt_in = Linear(config.txt_in_dim, config.txt_dim)
        self.emb_in = TimeEmbedding(config.vid_dim, config.emb_dim)
        last = config.num_layers - 1
        self.blocks = [
            Block(config, shared=index >= config.mm_layers, video_only=config.ends_with_video and index == last)
            for index in range(config.num_layers)
        ]
        if config.vid_out_norm is not None:
            self.vid_out_norm = RMSNorm(config.vid_dim, eps=config.norm_eps)
            self.vid_out_ada = Modulation(config.vid_dim, layers=("out",), gates=False)
        self.vid_out = Projection(config.vid_dim, config.vid_out_channels * pixels)

    def __call__(self, latents: mx.array, text_embeds: mx.array, timestep: float | mx.array) -> mx.array:
        """One prediction.

        Args:
            latents: (B, h, w, vid_in_channels), channels last: noise, the small picture's latents, and a mask of ones.
                h and w are multiples of `patch_size`.
            text_embeds: (L, txt_in_dim), the same for all pictures.
            timestep: from 0, the picture, to 1000, noise.

        Returns:
            (B, h, w, vid_out_channels), in the dtype of `latents`.
        """
        config = self.config
        dtype = self.vid_in.proj.bias.dtype
        batch, height, width, _ = latents.shape
        side_h, side_w = config.patch_size[1:]
        rows, columns = height // side_h, width // side_w

        patches = latents.astype(dtype).reshape(batch, rows, side_h, columns, side_w, -1).transpose(0, 1, 3, 2, 4, 5)
        video = self.vid_in(patches.reshape(batch, rows * columns, -1))
        text = text_embeds.astype(dtype)
        text = self.txt_in(text) if "txt_in" in self else text
        text = mx.broadcast_to(text, (batch, *text.shape))
        values = mx.array(timestep, dtype=mx.float32).reshape(1)
        time = self.emb_in(waves(values, sin_first=True).astype(dtype)).reshape(config.vid_dim, 2, 3)

        plans = [Windows(rows, columns, config.window[1:], shifted=shifted) for shifted in (False, True)]
        turns = [rotaries(config, windows, text.shape[1]) for windows in plans]
        for index, block in enumerate(self.blocks):
            video, text = block(video, text, time, plans[index % 2], turns[index % 2])

        if "vid_out_norm" in self:
            video = self.vid_out_ada.before(self.vid_out_norm(video), "out", time)
        pixels = self.vid_out(video).reshape(batch, rows, columns, side_h, side_w, -1).transpose(0, 1, 3, 2, 4, 5)
        return pixels.reshape(batch, height, width, -1).astype(latents.dtype)
