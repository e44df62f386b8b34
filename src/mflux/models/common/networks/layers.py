"""Small building blocks that several architectures share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from typing import ClassVar

import numpy as np

from mflux import cpu, fused
from mflux.backend import has_gpu, mx, nn
from mflux.checkpoints.quantization import QuantizedLinear, product_by_columns
from mflux.cpu import (
    convolution,
    gelu,
    gelu_approx,
    product,
    quick_gelu,
    serves_convolution,
    silu,
    silu_times,
)
from mflux.errors import CheckpointError
from mflux.models.common.networks.divided import Divisible
from mflux.models.common.networks.interiors import Interior

# Channels of a time or guidance value's sinusoid, in every model here.
TIME_CHANNELS = 256
_MAX_PERIOD = 10_000
# Channels of a head for which that is so (MLX 0.32: backend/metal/scaled_dot_product_attention.cpp), and bytes from
# which on a slower kernel is the better one.
_WIDE_HEADS = (192, 256)
_MANY_SCORES = 2**28
# Cosines and sines of rotary positions, (L, D / 2) each, or with batch and head axes before.
Rotary = tuple[mx.array, mx.array]


def embedded(embedding: nn.Module, ids: mx.array) -> mx.array:
    """The rows of an embedding for token ids.

    Raises:
        CheckpointError: there is no such row.
    """
    if (wrong := _beyond(ids, embedding.weight.shape[0])) is not None:
        raise CheckpointError(
            f"the tokenizer has a token {wrong:,} and the text encoder only {embedding.weight.shape[0]:,} of them: "
            "these folders do not belong together; fetch the model again"
        )
    return embedding(ids)


def looked_up(table: nn.Module, places: mx.array, *, what: str) -> mx.array:
    """The rows of any other embedding. What reads a row by a number goes through here, or through `embedded`: MLX would
    read whatever lies behind the last one.

    Args:
        what: the table's name, for the message.

    Raises:
        CheckpointError: there is no such row.
    """
    if (wrong := _beyond(places, table.weight.shape[0])) is not None:
        raise CheckpointError(
            f"config.json asks for row {wrong:,} of the {what}, which has {table.weight.shape[0]:,}: it belongs to "
            "other weights; fetch the model again"
        )
    return table(places)


def _beyond(places: mx.array, rows: int) -> int | None:
    """The first number found that is no row's of so many, or None."""
    least, most = (int(places.min()), int(places.max())) if places.size else (0, -1)
    return least if least < 0 else most if most >= rows else None


# By the names that published configurations use.
ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "gelu": gelu,
    "gelu_new": gelu_approx,
    "gelu_pytorch_tanh": gelu_approx,
    "quick_gelu": quick_gelu,
    "relu": nn.relu,
    "silu": silu,
    "swish": silu,
}


class Activation(nn.Module):
    """One of `ACTIVATIONS` as a layer, where published names count it as one."""

    def __init__(self, name: str):
        super().__init__()
        self.function = ACTIVATIONS[name]

    def __call__(self, x: mx.array) -> mx.array:
        return self.function(x)


class Embedding(nn.Embedding):
    """MLX's; as a linear layer it is a `Linear`."""

    def as_linear(self, x: mx.array) -> mx.array:
        return product(x, self.weight, frozen="weight" in self._no_grad)


class Conv2d(nn.Conv2d):
    """MLX's, on all cores of a CPU."""

    def __call__(self, x: mx.array) -> mx.array:
        if self.groups != 1 or self.dilation != 1 or not serves_convolution(x, self.weight):
            return super().__call__(x)
        return convolution(x, self.weight, self.get("bias"), self.stride, self.padding)


class Linear(nn.Linear):
    """MLX's, multiplied by numpy on a Linux CPU, whose BLAS is the faster one."""

    def __call__(self, x: mx.array) -> mx.array:
        # What is frozen is told, because numpy computes at once whatever gradient it is asked for.
        return product(x, self.weight, self.get("bias"), frozen="weight" in self._no_grad)


def split_heads(x: mx.array, heads: int) -> mx.array:
    """(B, L, heads · D) → (B, heads, L, D)."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def normed_heads(norm: Callable[[mx.array], mx.array], x: mx.array, heads: int) -> mx.array:
    """The same, each head normed, before heads and tokens change places: while rows lie one after the other."""
    batch, length, width = x.shape
    rows = norm(x.reshape(batch, length * heads, width // heads))
    return rows.reshape(batch, length, heads, -1).transpose(0, 2, 1, 3)


def merge_heads(x: mx.array) -> mx.array:
    """(B, heads, L, D) → (B, L, heads · D)."""
    x = x.transpose(0, 2, 1, 3)
    return x.reshape(*x.shape[:2], -1)


def attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float | None = None, mask: mx.array | str | None = None
) -> mx.array:
    """Scaled dot-product attention over (B, heads, L, D); `scale` defaults to 1/√D."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if cpu.attention_serves(q, k, v):
        return cpu.attention(q, k, v, scale, mask)
    # Metal has a kernel for such heads, and takes one that writes all scores down unless it is made to.
    scores = q[..., 0].size * k.shape[2] * q.dtype.size
    forced = q.shape[-1] in _WIDE_HEADS and scores >= _MANY_SCORES and mx.metal.is_available()
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, force_fused=forced)


# ---- rotary positions (Su et al. 2021, https://arxiv.org/abs/2104.09864)


def rotate_halves(x: mx.array, rotary: Rotary) -> mx.array:
    """Turn channel i of (…, L, D) together with channel i + D/2, in float32: language models."""
    turns = rotary if isinstance(rotary, Turns) else Turns(rotary)
    return turn_halves(x, *turns.of_halves)


def turn_halves(x: mx.array, along: mx.array, across: mx.array) -> mx.array:
    """Each channel of (…, L, D) times `along`, plus the one half of D away times `across`, (…, L, 2, D / 2) each."""
    halves = x.reshape(*x.shape[:-1], 2, -1)
    return fused.turn(halves, halves[..., ::-1, :], along, across).reshape(x.shape)


class Turns(tuple[mx.array, mx.array]):
    """Cosines and sines, which one image's steps and blocks have in common."""

    @cached_property
    def factors(self) -> tuple[mx.array, mx.array]:
        """What each channel of a pair is multiplied by, and the other one of it, (…, L, D / 2, 2) each."""
        cos, sin = self
        return mx.stack([cos, cos], axis=-1), mx.stack([-sin, sin], axis=-1)

    @cached_property
    def of_halves(self) -> tuple[mx.array, mx.array]:
        """The same of channels half a head apart, (…, L, 2, D / 2) each."""
        cos, sin = self
        return mx.stack([cos, cos], axis=-2), mx.stack([-sin, sin], axis=-2)


def rotate_pairs(x: mx.array, rotary: Rotary) -> mx.array:
    """Turn channel 2i of (…, L, D) together with channel 2i + 1, in float32: FLUX and its kin."""
    if cpu.serves(x, *rotary):
        return cpu.turned_pairs(x, *rotary, _rotate_pairs)
    return _turn(x, rotary if isinstance(rotary, Turns) else Turns(rotary))


def _rotate_pairs(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    return _turn(x, Turns((cos, sin)))


def _turn(x: mx.array, turns: Turns) -> mx.array:
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    return fused.turn(pairs, pairs[..., ::-1], *turns.factors).reshape(x.shape)


def inverse_frequencies(channels: int, theta: float) -> mx.array:
    """The angle that each pair of channels turns by per position: (channels / 2,), float32."""
    # In double precision and rounded once: positions multiply what rounding leaves, and a GPU's power is worse.
    return mx.array((float(theta) ** (-np.arange(0, channels, 2) / channels)).astype(np.float32))


def rotary_embedding(ids: mx.array, axes: Sequence[int], theta: float = 10_000.0) -> Rotary:
    """Cosines and sines for rotary positions on several axes.

    Args:
        ids: (L, axes), the positions of each token.
        axes: how many channels of a head each axis turns.
        theta: the longest period is 2π times nearly this.

    Returns:
        Two arrays (L, head_dim / 2), float32.
    """
    angles = [
        ids[:, axis, None].astype(mx.float32) * inverse_frequencies(channels, theta)
        for axis, channels in enumerate(axes)
    ]
    turned = mx.concatenate(angles, axis=-1)
    return Turns((mx.cos(turned), mx.sin(turned)))


# ---- norms


def rms_norm(x: mx.array, eps: float) -> mx.array:
    """Without weights, over the last axis of (…, L, C)."""
    return cpu.rms_norm(x, None, eps)


def layer_norm(x: mx.array, eps: float) -> mx.array:
    """Without weights, over the last axis of (…, L, C)."""
    return cpu.layer_norm(x, None, None, eps)


class RMSNorm(nn.RMSNorm):
    """MLX's, on all cores of a CPU."""

    def __call__(self, x: mx.array) -> mx.array:
        return cpu.rms_norm(x, self.weight, self.eps)


def normed_and_scaled(norm: RMSNorm, x: mx.array, scale: mx.array | int) -> mx.array:
    """What a norm makes of (B, L, C), times the condition's scale or gate (B, 1, C); 1 is none.

    On a GPU, and for one sample, in one kernel: the norm's weights and the scale are one vector.
    """
    if isinstance(scale, int):
        return norm(x) if scale == 1 else norm(x) * scale
    if has_gpu() and scale.size == x.shape[-1]:
        return mx.fast.rms_norm(x, norm.weight * scale.reshape(-1), norm.eps)
    return norm(x) * scale


def added(x: mx.array, norm: RMSNorm, y: mx.array, gate: mx.array | int) -> mx.array:
    """x + gate · the norm of y: what a block adds to its stream (B, L, C)."""
    return x + normed_and_scaled(norm, y, gate) if has_gpu() else residual(x, gate, norm(y))


class LayerNorm(nn.LayerNorm):
    """MLX's, on all cores of a CPU."""

    def __call__(self, x: mx.array) -> mx.array:
        return cpu.layer_norm(x, self.get("weight"), self.get("bias"), self.eps)


# ---- embeddings and modulation


def waves(values: mx.array, channels: int = TIME_CHANNELS, *, scale: float = 1.0, sin_first: bool = False) -> mx.array:
    """Each value's cosines, then sines, at frequencies from 1 down towards 1/10000: (B,) → (B, channels), float32.

    `scale` multiplies the angles: where a model was trained with it in this place, rounding is as there. `sin_first`
    puts the sines before the cosines.
    """
    angles = scale * (values.astype(mx.float32)[:, None] * mx.array(_time_frequencies(channels)))
    parts = [mx.cos(angles), mx.sin(angles)]
    return mx.concatenate(parts[::-1] if sin_first else parts, axis=-1)


@cache
def _time_frequencies(channels: int) -> np.ndarray:
    """Rounded once from the exponents, which the models were trained with as float32: the angles go up to thousands of
    radians, where one more rounding of a frequency, as MLX's `exp` has it, is visible in their cosines."""
    half = channels // 2
    exponents = np.float32(-math.log(_MAX_PERIOD)) * np.arange(half, dtype=np.float32) / half
    return np.exp(exponents.astype(np.float64)).astype(np.float32)


class MLPEmbedder(nn.Module):
    """Two layers with SiLU between; diffusers' `TimestepEmbedding`."""

    def __init__(self, in_features: int, features: int, *, bias: bool = True):
        super().__init__()
        self.linear_1 = Linear(in_features, features, bias=bias)
        self.linear_2 = Linear(features, features, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear_2(silu(self.linear_1(x)))


def modulate(x: mx.array, shift: mx.array, scale: mx.array, eps: float = 1e-6) -> mx.array:
    """Layer norm without weights of its own; the condition's scale and shift take their place."""
    return cpu.modulate(x, shift, scale, eps)


def residual(x: mx.array, gate: mx.array | int, y: mx.array) -> mx.array:
    """x + gate · y: what a block adds to its stream, let through by the condition's gate (1: all of it)."""
    return cpu.residual(x, gate, y)


def product_of_parts(layer: nn.Module, *parts: mx.array) -> mx.array:
    """A linear layer of parts (B, L, n) that stand beside each other in its input.

    On a GPU each is multiplied with its own columns of the weights, and nothing is written together before: a single
    block of FLUX.1 spares 280 MB at 1024 px. In 16 bits the sum is rounded once more for that. Packed weights are cut
    between two groups, which copies them, 27 MB in FLUX.1's block at 4 bits, so that few rows are not worth it; on a
    CPU a second sum would cost as much.
    """
    if has_gpu() and type(layer) is QuantizedLinear and layer.takes_parts(*parts):
        return layer.of_parts(*parts)
    if not (has_gpu() and type(layer) is Linear):
        linear: Callable[[mx.array], mx.array] = layer
        return linear(mx.concatenate(list(parts), axis=-1))
    return product_by_columns(parts, layer.weight, layer.get("bias"))


def parts_of(x: mx.array, count: int, axis: int = -1) -> list[mx.array]:
    """An array cut into so many equal parts along an axis."""
    return list(mx.split(x, count, axis=axis))


# ---- feed-forward


class FeedForward(Divisible, Interior):
    """Linear, GELU (tanh form), linear; the names leave room for the reference's dropout."""

    rows = ("net.0.proj",)
    columns: ClassVar[Mapping[str, tuple[int, ...]]] = {"net.2": (1,)}
    # Of a GELU's 12,288 channels more is added up than float16 reaches.
    headroom = 8.0

    class Proj(nn.Module):
        def __init__(self, features: int, hidden: int):
            super().__init__()
            self.proj = Linear(features, hidden)

        def __call__(self, x: mx.array) -> mx.array:
            return gelu_approx(self.proj(x))

    def __init__(self, features: int):
        super().__init__()
        self.net = [FeedForward.Proj(features, 4 * features), nn.Identity(), Linear(4 * features, features)]

    def __call__(self, x: mx.array) -> mx.array:
        first, _, last = self.net
        return self.summed(self.leave(last(self.shrunk(first(self.enter(x)))), x))

    def last(self) -> list[nn.Module]:
        return [self.net[2]]


class SwiGLU(nn.Module):
    """A gated feed-forward (Shazeer 2020, https://arxiv.org/abs/2002.05202) under LLaMA's names."""

    def __init__(self, features: int, hidden: int, *, activation: str = "silu", bias: bool = False):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate_proj = Linear(features, hidden, bias=bias)
        self.up_proj = Linear(features, hidden, bias=bias)
        self.down_proj = Linear(hidden, features, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(silu_times(gate, up) if self.activation is silu else self.activation(gate) * up)


class NumberedSwiGLU(nn.Module):
    """The same under the names of Lumina and its kin: w1 is the gate, w3 what it lets through."""

    def __init__(self, features: int, hidden: int):
        super().__init__()
        self.w1 = Linear(features, hidden, bias=False)
        self.w2 = Linear(hidden, features, bias=False)
        self.w3 = Linear(features, hidden, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.w2(silu_times(self.w1(x), self.w3(x)))
