"""Activations, norms, modulation and rotary positions: what is computed element by element, or row by row."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from mflux import fused
from mflux.backend import mx
from mflux.cpu import work
from mflux.cpu.work import BLOCK, Plain, differentiable, room, serves, share_rows, spare

Kernel = Callable[..., None]

# ---- activations


def _elementwise(kernel: Kernel, plain: Plain) -> Plain:
    """`plain` of one or more arrays of one shape, computed by a kernel (x, out, free, *others) where that serves."""

    def compute(*arrays: mx.array) -> mx.array:
        out, into = room(arrays[0].shape)
        sources = [np.asarray(array) for array in arrays]
        if all(source.flags.c_contiguous for source in sources):
            flat: tuple[int, ...] = (-1,)
            step = BLOCK
        else:  # such as a half of a wider array, which is not copied
            flat = (-1, into.shape[-1])
            step = max(1, BLOCK // into.shape[-1])
        first, *others = (source.reshape(flat) for source in sources)
        into = into.reshape(flat)

        def run(start: int, stop: int) -> None:
            part = into[start:stop]
            kernel(first[start:stop], part, spare(part.shape), *(other[start:stop] for other in others))

        work.share(run, len(into), step)
        return out

    traced = differentiable(compute, plain)

    def activation(*arrays: mx.array) -> mx.array:
        return traced(*arrays) if serves(*arrays) else plain(*arrays)

    activation.__name__ = activation.__qualname__ = plain.__name__
    activation.__doc__ = plain.__doc__
    return activation


def _times_sigmoid(factor: float) -> Kernel:
    """x · sigmoid(factor · x); a sigmoid is (1 + tanh of half of it) / 2, and tanh is numpy's fastest."""

    def kernel(x: np.ndarray, out: np.ndarray, free: np.ndarray) -> None:
        np.multiply(x, np.float32(factor / 2), out=free)
        np.tanh(free, out=out)
        np.multiply(x, np.float32(0.5), out=free)
        np.multiply(out, free, out=out)
        np.add(out, free, out=out)

    return kernel


def _gelu_tanh(x: np.ndarray, out: np.ndarray, free: np.ndarray) -> None:
    slope = math.sqrt(2 / math.pi)
    np.multiply(x, x, out=free)
    np.multiply(free, np.float32(0.044715 * slope), out=free)
    np.add(free, np.float32(slope), out=free)
    np.multiply(free, x, out=free)
    np.tanh(free, out=out)
    np.multiply(x, np.float32(0.5), out=free)
    np.multiply(out, free, out=out)
    np.add(out, free, out=out)


# x Φ(x) = x / 2 · (1 + tanh(x Q(x²))) with a polynomial Q, fitted to atanh(erf(x / √2)) / x as far as x Φ(x) feels it:
# no further off than 7e-8, which is what float32 rounds by. Past 5.9 the tanh is 1 and Q goes astray, so x² ends there.
_Q = (0.797884216, 0.036334284, -3.31303313e-05, -5.52400497e-05, 3.96909321e-06, -1.33445306e-07, 1.80558919e-09)
_Q_END = 5.9**2


def _gelu(x: np.ndarray, out: np.ndarray, free: np.ndarray) -> None:
    square = np.multiply(x, x, out=free)
    np.minimum(square, np.float32(_Q_END), out=square)
    np.multiply(square, np.float32(_Q[-1]), out=out)
    for coefficient in _Q[-2:0:-1]:
        np.add(out, np.float32(coefficient), out=out)
        np.multiply(out, square, out=out)
    np.add(out, np.float32(_Q[0]), out=out)
    np.multiply(out, x, out=out)
    np.tanh(out, out=out)
    np.multiply(x, np.float32(0.5), out=free)
    np.multiply(out, free, out=out)
    np.add(out, free, out=out)


def _gated_silu(x: np.ndarray, out: np.ndarray, free: np.ndarray, other: np.ndarray) -> None:
    _SILU(x, out, free)
    np.multiply(out, other, out=out)


def _gated_gelu(x: np.ndarray, out: np.ndarray, free: np.ndarray, other: np.ndarray) -> None:
    _gelu(x, out, free)
    np.multiply(out, other, out=out)


_SILU = _times_sigmoid(1.0)
silu = _elementwise(_SILU, fused.silu)
silu_times = _elementwise(_gated_silu, fused.silu_times)
gelu = _elementwise(_gelu, fused.gelu)
gelu_times = _elementwise(_gated_gelu, fused.gelu_times)
gelu_approx = _elementwise(_gelu_tanh, fused.gelu_approx)
quick_gelu = _elementwise(_times_sigmoid(1.702), fused.quick_gelu)


# ---- norms and modulation


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """`mx.fast.rms_norm` of (…, L, C)."""

    def plain(x: mx.array, weight: mx.array | None = None) -> mx.array:
        return mx.fast.rms_norm(x, weight, eps)

    return _normalised(plain, eps, x, *(() if weight is None else (weight,)), centred=False)


def layer_norm(x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float) -> mx.array:
    """`mx.fast.layer_norm` of (…, L, C)."""

    def plain(x: mx.array, weight: mx.array | None = None, bias: mx.array | None = None) -> mx.array:
        return mx.fast.layer_norm(x, weight, bias, eps)

    if (weight is None) != (bias is None):
        return plain(x, weight, bias)
    return _normalised(plain, eps, x, *(() if weight is None else (weight, bias)))


def modulate(x: mx.array, shift: mx.array, scale: mx.array, eps: float) -> mx.array:
    """Layer norm of (B, L, C) without weights of its own, times 1 + scale, plus shift."""

    def plain(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
        if scale.size == shift.size == x.shape[-1]:
            # One kernel for three: of one sample, the condition takes the place of the norm's own weights.
            return mx.fast.layer_norm(x, (1 + scale).reshape(-1), shift.reshape(-1), eps)
        return mx.fast.layer_norm(x, None, None, eps) * (1 + scale) + shift

    return _normalised(plain, eps, x, scale, shift, more=1)


def residual(x: mx.array, gate: mx.array | int, y: mx.array) -> mx.array:
    """x + gate · y of (B, L, C)."""

    def compute(x: mx.array, gate: mx.array, y: mx.array) -> mx.array:
        out, into = room(x.shape)
        one, two, factors = np.asarray(x), np.asarray(y), np.broadcast_to(np.asarray(gate), x.shape)

        def run(index: tuple[int, ...], start: int, stop: int) -> None:
            part = into[index][start:stop]
            np.multiply(two[index][start:stop], factors[index][0], out=part)
            np.add(part, one[index][start:stop], out=part)

        share_rows(run, x.shape)
        return out

    if isinstance(gate, int):
        return x + gate * y
    if not (serves(x, gate, y) and x.shape == y.shape and _is_of_channels(gate, x)):
        return fused.add_gated(x, gate, y)
    return differentiable(compute, fused.add_gated)(x, gate, y)


def _is_of_channels(values: mx.array, x: mx.array) -> bool:
    """Whether they are the same for all rows of a batch's entry: (C,), or (1 or B, …, 1, C)."""
    if values.ndim == 1:
        return values.shape == x.shape[-1:]
    fits = all(size in (1, there) for size, there in zip(values.shape[:-2], x.shape[:-2], strict=False))
    return values.ndim == x.ndim and fits and values.shape[-2:] == (1, x.shape[-1])


def _normalised(
    plain: Plain, eps: float, x: mx.array, *parts: mx.array, centred: bool = True, more: int = 0
) -> mx.array:
    """(x - mean) / spread over the last axis, times `more` plus the first of the parts, plus the second.

    Args:
        plain: the same of x and parts, by MLX.
        centred: false: x itself over its root mean square.
    """

    def compute(x: mx.array, *parts: mx.array) -> mx.array:
        out, into = room(x.shape)
        source, channels = np.asarray(x), x.shape[-1]
        factor, offset = (*(np.broadcast_to(np.asarray(part), x.shape) for part in parts), None, None)[:2]

        def run(index: tuple[int, ...], start: int, stop: int) -> None:
            rows, part = source[index][start:stop], into[index][start:stop]
            if centred:
                rows = np.subtract(rows, rows.mean(axis=-1, keepdims=True), out=part)
            spread = np.einsum("rc,rc->r", rows, rows) / np.float32(channels) + np.float32(eps)
            np.multiply(rows, (1 / np.sqrt(spread))[:, None], out=part)
            if factor is not None:
                np.multiply(part, factor[index][0] + np.float32(more), out=part)
            if offset is not None:
                np.add(part, offset[index][0], out=part)

        share_rows(run, x.shape)
        return out

    if x.ndim < 2 or not serves(x, *parts) or not all(_is_of_channels(part, x) for part in parts):
        return plain(x, *parts)
    return differentiable(compute, plain)(x, *parts)


# ---- rotary positions


def turned_pairs(x: mx.array, cos: mx.array, sin: mx.array, plain: Plain) -> mx.array:
    """Channels 2i and 2i + 1 of (…, L, D) turned as one complex number; cos and sin are (L, D / 2) or broadcast."""

    def compute(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        turn = np.empty((*cos.shape, 2), np.float32)
        turn[..., 0], turn[..., 1] = np.asarray(cos), np.asarray(sin)
        turn = np.broadcast_to(turn.view(np.complex64)[..., 0], (*x.shape[:-1], x.shape[-1] // 2))
        out, into = room(x.shape)
        source = np.asarray(x)
        if source.strides[-1] != source.itemsize:
            source = np.ascontiguousarray(source)
        source = source.view(np.complex64)
        into = into.view(np.complex64)

        def run(index: tuple[int, ...], start: int, stop: int) -> None:
            np.multiply(source[index][start:stop], turn[index][start:stop], out=into[index][start:stop])

        share_rows(run, x.shape)
        return out

    return differentiable(compute, plain)(x, cos, sin)
