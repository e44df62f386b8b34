"""What MLX's CPU backend computes slowly, computed by numpy on every core.

MLX runs everything but matrix products on one thread, and its exponentials and its unpacking of quantized weights take
five to thirty times as long as numpy's (benchmarks/README.md). Products stay MLX's: that is where OpenBLAS is. numpy
works on MLX's own memory, in blocks that stay in a core's cache, so nothing is copied and little is allocated.

What is computed here is computed at once and not put off as MLX would. Gradients pass through (`_with_gradient`), and
inside `mx.compile` or `mx.vmap`, where nothing can be computed at once, MLX's own operation is used; within `lazily`,
always.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import cache
from typing import Any, cast

import numpy as np

from mflux.backend import has_gpu, mx, nn

# With fewer elements than this MLX is as fast.
LEAST = 1 << 16
# Elements of an array in a block: what a kernel touches stays in the second cache, and a thread seldom needs Python.
_BLOCK = 1 << 17
# Bytes of what is written down at once of attention's scores, or of a quantized layer's dense weights.
ROOM = 16 << 20

Kernel = Callable[..., None]
_LAZY: ContextVar[bool] = ContextVar("lazy", default=False)


@contextlib.contextmanager
def lazily() -> Iterator[None]:
    """Leave everything to MLX within the block, so that its graph is kept whole: a checkpointed block of a model can
    then forget what it computed, and compute it again for its gradient."""
    token = _LAZY.set(True)
    try:
        yield
    finally:
        _LAZY.reset(token)


def serves(*arrays: mx.array) -> bool:
    """Whether numpy is to compute with these: on the CPU, in float32, and there is enough of the first."""
    return _is_here(*arrays) and arrays[0].size >= LEAST


def _is_here(*arrays: mx.array) -> bool:
    return not (has_gpu() or _LAZY.get()) and all(array.dtype == mx.float32 for array in arrays)


# ---- threads


def threads() -> int:
    """As many as this process may have, and as it lets BLAS have."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    # Python refuses to read a number of thousands of digits.
    return max(1, min(cores, int(asked)) if asked.isdecimal() and len(asked) < 10 else cores)


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="mflux-cpu")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


def share(work: Callable[[int, int], None], rows: int, step: int) -> None:
    """Call `work(start, stop)` for blocks of at most `step` rows, on all cores; numpy's functions leave Python free."""
    workers = max(1, min(threads(), -(-rows // step)))
    bounds = [rows * number // workers for number in range(workers + 1)]

    def part(number: int) -> None:
        # As MLX, without a word: what is not finite is found where it matters, and said there.
        with np.errstate(all="ignore"):
            for start in range(bounds[number], bounds[number + 1], step):
                work(start, min(start + step, bounds[number + 1]))

    if workers == 1:
        part(0)
    else:
        list(_pool(workers).map(part, range(workers)))


def share_rows(work: Callable[[tuple[int, ...], int, int], None], shape: tuple[int, ...]) -> None:
    """Call `work(index, start, stop)` for blocks of rows of an array (…, rows, channels), on all cores."""
    places, rows = list(np.ndindex(shape[:-2])), shape[-2]

    def part(start: int, stop: int) -> None:
        for number in range(start // rows, -(-stop // rows)):
            first = number * rows
            work(places[number], max(start - first, 0), min(stop - first, rows))

    whole = len(places) * rows
    share(part, whole, max(1, min(_BLOCK // shape[-1], -(-whole // threads()))))


class _Spare(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[int, np.ndarray] = {}


_spare = _Spare()


def spare(shape: tuple[int, ...], number: int = 0) -> np.ndarray:
    """Memory of this thread's own that a kernel may write to, always the same: new pages cost more than the work."""
    size = math.prod(shape)
    buffers = _spare.buffers
    if number not in buffers or buffers[number].size < size:
        buffers[number] = np.empty(max(size, _BLOCK), np.float32)
    return buffers[number][:size].reshape(shape)


def room(shape: tuple[int, ...]) -> tuple[mx.array, np.ndarray]:
    """Allocate a float32 array; returns MLX's and numpy's view of it."""
    array = mx.zeros(shape, mx.float32)
    mx.eval(array)
    return array, np.asarray(array)


def _with_gradient(function: Callable[..., mx.array], plain: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """`function` of arrays, with the gradient of what it stands for; that itself where nothing can be computed yet."""

    def run(*arrays: mx.array) -> mx.array:
        try:
            mx.eval(arrays)
        except ValueError:  # inside mx.compile or mx.vmap
            return plain(*arrays)
        return function(*arrays)

    traced = mx.custom_function(run)

    @traced.vjp
    def gradient(primals: Any, cotangent: mx.array, _: Any) -> Any:
        primals = list(primals) if isinstance(primals, (list, tuple)) else [primals]
        found = mx.vjp(plain, primals, [cotangent])[1]
        return found[0] if len(found) == 1 else tuple(found)

    def call(*arrays: mx.array) -> mx.array:
        result = cast(mx.array, traced(*arrays))
        with contextlib.suppress(ValueError):
            mx.eval(result)  # else it keeps what it was made of, in case of a gradient
        return result

    return call


# ---- activations


def _elementwise(kernel: Kernel, plain: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """`plain` of one or more arrays of one shape, computed by a kernel (x, out, free, *others) where that serves."""

    def compute(*arrays: mx.array) -> mx.array:
        out, into = room(arrays[0].shape)
        sources = [np.asarray(array) for array in arrays]
        if all(source.flags.c_contiguous for source in sources):
            flat: tuple[int, ...] = (-1,)
            step = _BLOCK
        else:  # such as a half of a wider array, which is not copied
            flat = (-1, into.shape[-1])
            step = max(1, _BLOCK // into.shape[-1])
        first, *others = (source.reshape(flat) for source in sources)
        into = into.reshape(flat)

        def work(start: int, stop: int) -> None:
            part = into[start:stop]
            kernel(first[start:stop], part, spare(part.shape), *(other[start:stop] for other in others))

        share(work, len(into), step)
        return out

    traced = _with_gradient(compute, plain)

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


# erf(x) = 1 - (a1 t + … + a5 t⁵) exp(-x²), t = 1 / (1 + p x), for x ≥ 0; no further off than 1.5e-7. Abramowitz and
# Stegun, Handbook of Mathematical Functions (1964), 7.1.26.
_ERF = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
_ERF_P = 0.3275911


def _gelu(x: np.ndarray, out: np.ndarray, free: np.ndarray) -> None:
    # With z = |x| / √2: x Φ(x) = max(x, 0) - |x| / 2 · (1 - erf(z)).
    np.abs(x, out=free)
    t = np.multiply(free, np.float32(_ERF_P * math.sqrt(0.5)), out=spare(x.shape, 1))
    np.add(t, np.float32(1), out=t)
    np.reciprocal(t, out=t)
    np.multiply(t, np.float32(_ERF[-1]), out=out)
    for coefficient in _ERF[-2::-1]:
        np.add(out, np.float32(coefficient), out=out)
        np.multiply(out, t, out=out)
    np.multiply(out, free, out=out)
    np.multiply(free, free, out=free)
    np.multiply(free, np.float32(-0.5), out=free)
    np.exp(free, out=free)
    np.multiply(out, free, out=out)
    np.multiply(out, np.float32(-0.5), out=out)
    np.maximum(x, np.float32(0), out=free)
    np.add(out, free, out=out)


def _gated_silu(x: np.ndarray, out: np.ndarray, free: np.ndarray, other: np.ndarray) -> None:
    _SILU(x, out, free)
    np.multiply(out, other, out=out)


def _silu_times(x: mx.array, other: mx.array) -> mx.array:
    """silu(x) · other, as in SwiGLU."""
    return nn.silu(x) * other


def _quick_gelu(x: mx.array) -> mx.array:
    """x · sigmoid(1.702 x), as OpenAI's CLIP was trained."""
    return x * mx.sigmoid(1.702 * x)


_SILU = _times_sigmoid(1.0)
silu = _elementwise(_SILU, nn.silu)
silu_times = _elementwise(_gated_silu, _silu_times)
gelu = _elementwise(_gelu, nn.gelu)
gelu_approx = _elementwise(_gelu_tanh, nn.gelu_approx)
quick_gelu = _elementwise(_times_sigmoid(1.702), _quick_gelu)


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
        return mx.fast.layer_norm(x, None, None, eps) * (1 + scale) + shift

    return _normalised(plain, eps, x, scale, shift, more=1)


def residual(x: mx.array, gate: mx.array | int, y: mx.array) -> mx.array:
    """x + gate · y of (B, L, C)."""

    def plain(x: mx.array, gate: mx.array | int, y: mx.array) -> mx.array:
        return x + gate * y

    def compute(x: mx.array, gate: mx.array, y: mx.array) -> mx.array:
        out, into = room(x.shape)
        one, two, factors = np.asarray(x), np.asarray(y), np.broadcast_to(np.asarray(gate), x.shape)

        def work(index: tuple[int, ...], start: int, stop: int) -> None:
            part = into[index][start:stop]
            np.multiply(two[index][start:stop], factors[index][0], out=part)
            np.add(part, one[index][start:stop], out=part)

        share_rows(work, x.shape)
        return out

    if isinstance(gate, int) or not (serves(x, gate, y) and x.shape == y.shape and _is_of_channels(gate, x)):
        return plain(x, gate, y)
    return _with_gradient(compute, plain)(x, gate, y)


def _is_of_channels(values: mx.array, x: mx.array) -> bool:
    """Whether they are the same for all rows of a batch's entry: (C,), or (1 or B, …, 1, C)."""
    if values.ndim == 1:
        return values.shape == x.shape[-1:]
    fits = all(size in (1, there) for size, there in zip(values.shape[:-2], x.shape[:-2], strict=False))
    return values.ndim == x.ndim and fits and values.shape[-2:] == (1, x.shape[-1])


def _normalised(
    plain: Callable[..., mx.array], eps: float, x: mx.array, *parts: mx.array, centred: bool = True, more: int = 0
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

        def work(index: tuple[int, ...], start: int, stop: int) -> None:
            rows, part = source[index][start:stop], into[index][start:stop]
            if centred:
                rows = np.subtract(rows, rows.mean(axis=-1, keepdims=True), out=part)
            spread = np.einsum("rc,rc->r", rows, rows) / np.float32(channels) + np.float32(eps)
            np.multiply(rows, (1 / np.sqrt(spread))[:, None], out=part)
            if factor is not None:
                np.multiply(part, factor[index][0] + np.float32(more), out=part)
            if offset is not None:
                np.add(part, offset[index][0], out=part)

        share_rows(work, x.shape)
        return out

    if x.ndim < 2 or not serves(x, *parts) or not all(_is_of_channels(part, x) for part in parts):
        return plain(x, *parts)
    return _with_gradient(compute, plain)(x, *parts)


# ---- rotary positions


def turned_pairs(x: mx.array, cos: mx.array, sin: mx.array, plain: Callable[..., mx.array]) -> mx.array:
    """Channels 2i and 2i + 1 of (…, L, D) turned as one complex number; cos and sin are (L, D / 2) or broadcast."""

    def compute(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        turn = np.empty((*cos.shape, 2), np.float32)
        turn[..., 0], turn[..., 1] = np.asarray(cos), np.asarray(sin)
        turn = np.broadcast_to(turn.view(np.complex64)[..., 0], (*x.shape[:-1], x.shape[-1] // 2))
        out, into = room(x.shape)
        source = np.ascontiguousarray(np.asarray(x)).view(np.complex64)
        into = into.view(np.complex64)

        def work(index: tuple[int, ...], start: int, stop: int) -> None:
            np.multiply(source[index][start:stop], turn[index][start:stop], out=into[index][start:stop])

        share_rows(work, x.shape)
        return out

    return _with_gradient(compute, plain)(x, cos, sin)


# ---- attention


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | str | None) -> mx.array:
    """`mx.fast.scaled_dot_product_attention`, `ROOM` bytes of scores at a time.

    Args:
        q: (B, heads, L, D).
        k, v: (B, heads or a divisor of it, S, D).
        mask: true where a position may be seen, or what is added to the scores, (B, heads, L, S) or broadcast to it;
            "causal": the last query sees all keys, the one before it all but the last.
    """
    causal = isinstance(mask, str)
    arrays = (q, k, v) if mask is None or causal else (q, k, v, mask)

    def plain(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | str | None = mask) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)

    def compute(q: mx.array, k: mx.array, v: mx.array, seen: mx.array | None = None) -> mx.array:
        return _attend(q, k, v, scale, None if seen is None else np.asarray(_real(seen)), causal)

    return _with_gradient(compute, plain)(*arrays)


def attention_serves(q: mx.array, k: mx.array, v: mx.array) -> bool:
    """Whether `attention` is to compute it; the number of scores counts."""
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    return _is_here(q, k, v) and scores >= LEAST


def _real(mask: mx.array) -> mx.array:
    """A mask that numpy can read: it knows no bfloat16."""
    return mask if mask.dtype == mx.bool_ else mask.astype(mx.float32)


def _attend(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: np.ndarray | None, causal: bool) -> mx.array:
    batch, heads, length, _ = q.shape
    keys, shared = k.shape[2], heads // k.shape[1]
    # Heads beside each other, as the next layer wants them.
    out, into = room((batch, length, heads, v.shape[-1]))
    if mask is not None:
        mask = np.broadcast_to(mask, (batch, heads, length, keys))
    most = ROOM // 4
    rows = max(1, min(length, most // keys))
    # As many heads at once as there is room for; of those that share keys no others beside them.
    together = 1 if rows < length else max(1, min(most // (length * keys), shared if shared > 1 else heads))
    while together > 1 and shared % together and shared > 1:
        together -= 1
    for number in range(batch):
        for head in range(0, heads, together):
            stop = min(head + together, heads)
            first = head // shared
            # Else every product would copy them.
            own_k, own_v = (
                mx.contiguous(x[number, first : first + 1] if shared > 1 else x[number, head:stop]) for x in (k, v)
            )
            for start in range(0, length, rows):
                end = min(start + rows, length)
                # What the last of these queries sees, where each sees what lies before it.
                visible = min(keys, end + keys - length) if causal else keys
                queries = q[number, head:stop, start:end] * scale
                scores = queries @ own_k[:, :visible].swapaxes(-1, -2)
                mx.eval(scores)
                seen = None if mask is None else mask[number, head:stop, start:end]
                sums = _exponentials(np.asarray(scores), seen, start + keys - length if causal else None)
                part = scores @ own_v[:, :visible]
                mx.eval(part)
                np.divide(np.asarray(part).swapaxes(0, 1), sums.T[..., None], out=into[number, start:end, head:stop])
                del scores, part
    return out.swapaxes(1, 2)


def _exponentials(scores: np.ndarray, mask: np.ndarray | None, diagonal: int | None) -> np.ndarray:
    """A softmax over the last of (heads, rows, keys), in place, that is still to be divided by what is given back:
    each row's sum, (heads, rows). Row i sees keys up to `diagonal` + i."""
    sums = np.empty(scores.shape[:2], np.float32)
    lowest, keys = np.finfo(np.float32).min, np.arange(scores.shape[-1])

    def work(index: tuple[int, ...], start: int, stop: int) -> None:
        x = scores[index][start:stop]
        if mask is not None:
            seen = mask[index][start:stop]
            if seen.dtype == bool:
                np.copyto(x, lowest, where=~seen)
            else:
                np.add(x, seen, out=x)
        if diagonal is not None:
            np.copyto(x, lowest, where=keys > diagonal + np.arange(start, stop)[:, None])
        np.subtract(x, x.max(axis=-1, keepdims=True), out=x)
        np.exp(x, out=x)
        np.sum(x, axis=-1, out=sums[index][start:stop])

    share_rows(work, scores.shape)
    return sums


# ---- quantized layers

# How many bits are looked up together, whole weights each, and how many weights those are.
_PIECES = {2: (8, 4), 3: (12, 4), 4: (8, 2), 5: (10, 2), 6: (12, 2)}
# Products of weights and rows below which MLX is as fast; and with one row its own product always is.
_LEAST_PRODUCTS = 1 << 18


def quantized_serves(x: mx.array, weight: mx.array, bits: int, mode: str) -> bool:
    """Whether `quantized_product` is to multiply x (…, in) with a quantized weight."""
    rows = x.size // max(x.shape[-1], 1)
    return (
        _is_here(x)
        and mode == "affine"
        and (bits == 8 or bits in _PIECES)
        and rows > 1
        and x.size * len(weight) >= _LEAST_PRODUCTS
    )


def quantized_product(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> mx.array:
    """x (…, in) times the transpose of a quantized weight (out, in), of which `ROOM` bytes are dense at a time."""

    def plain(x: mx.array) -> mx.array:
        return mx.quantized_matmul(x, weight, scales, biases, transpose=True, group_size=group_size, bits=bits)

    def compute(x: mx.array) -> mx.array:
        columns, rows = x.shape[-1], len(weight)
        flat = x.reshape(-1, columns)
        mx.eval(flat, weight, scales, biases)
        packed, factors, offsets = np.asarray(weight), _numbers(scales), _numbers(biases)
        out, into = room((len(flat), rows))
        step = max(1, min(rows, ROOM // (4 * columns)))
        dense, block = room((step, columns))
        for start in range(0, rows, step):
            stop = min(start + step, rows)

            def work(first: int, last: int, at: int = start) -> None:
                here = slice(at + first, at + last)
                _unpack(packed[here], factors[here], offsets[here], group_size, bits, block[first:last])

            share(work, stop - start, max(1, _BLOCK // columns))
            product = flat @ dense[: stop - start].T
            mx.eval(product)
            into[:, start:stop] = np.asarray(product)
            del product
        return out.reshape(*x.shape[:-1], rows)

    return _with_gradient(compute, plain)(x)


def _numbers(array: mx.array) -> np.ndarray:
    array = array.astype(mx.float32)
    mx.eval(array)
    return np.asarray(array)


def _unpack(
    packed: np.ndarray, scales: np.ndarray, biases: np.ndarray, group_size: int, bits: int, out: np.ndarray
) -> None:
    """Rows of a quantized weight, dense: each number times its group's scale, plus its group's bias."""
    numbers = packed.view(np.uint8)
    groups = out.reshape(len(out), -1, group_size)
    if bits == 8:
        np.multiply(numbers.reshape(groups.shape), scales[..., None], out=groups)
    else:
        table = _table(bits)
        np.take(table, _pieces(numbers, bits), out=out.view(table.dtype), mode="clip")
        np.multiply(groups, scales[..., None], out=groups)
    np.add(groups, biases[..., None], out=groups)


@cache
def _table(bits: int) -> np.ndarray:
    """For each value of a piece its weights, the first in the lowest bits, as one wide element to copy."""
    width, weights = _PIECES[bits]
    values = (np.arange(1 << width)[:, None] >> (bits * np.arange(weights))) & ((1 << bits) - 1)
    return values.astype(np.float32).view({2: np.float64, 4: np.complex128}[weights])[:, 0].copy()


def _pieces(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Bytes as pieces: 8 bits are a byte; two of 12 are in three bytes, four of 10 in five, lowest bits first."""
    width, _ = _PIECES[bits]
    if width == 8:
        return numbers
    whole = math.lcm(width, 8)
    parts = numbers.reshape(len(numbers), -1, whole // 8)
    out = np.empty((*parts.shape[:2], whole // width), np.intp)
    for number in range(whole // width):
        first, shift = divmod(number * width, 8)
        low, high = parts[..., first].astype(np.uint16), parts[..., first + 1].astype(np.uint16)
        out[..., number] = ((low | high << 8) >> shift) & ((1 << width) - 1)
    return out.reshape(len(numbers), -1)
