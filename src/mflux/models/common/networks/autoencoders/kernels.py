"""What is computed on a strip of a feature map, (B, rows, columns, channels): once for GPUs, once for MLX on a CPU.

On a CPU MLX copies nine shifted images before it multiplies, element by element, and takes ten times numpy's time for
an exponential. There a strip is a numpy array, and `mflux.cpu` computes with it on all cores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mflux import fused
from mflux.backend import has_gpu, mx, nn
from mflux.cpu import work
from mflux.cpu.convolutions import Sides, convolve
from mflux.cpu.work import spare
from mflux.models.common.networks import layers
from mflux.models.common.networks.autoencoders.budget import UnderWay

# Bytes of attention scores that are held at a time.
_SCORES = 2**25


class OnGPU:
    """Strips are MLX arrays in the checkpoint's dtype; MLX's own convolutions are used."""

    # The size of a layer's strips: large, since starting work costs more than memory traffic.
    strip_bytes = 2**26
    concatenate = staticmethod(mx.concatenate)
    evaluate = staticmethod(mx.eval)
    zeros = staticmethod(mx.zeros)

    @staticmethod
    def strip(x: mx.array) -> mx.array:
        return x

    array = own = strip

    @staticmethod
    def begun(x: mx.array) -> mx.array:
        """Have it computed while something else goes on; what is to be waited for."""
        mx.async_eval(x)
        return x

    @staticmethod
    def add(one: mx.array, other: mx.array) -> mx.array:
        return one + other

    @staticmethod
    def moments(x: mx.array) -> tuple[mx.array, mx.array]:
        """Of each channel: the mean (B, C), and the sum of squared distances from it. Nobody waits for them yet."""
        mean = x.astype(mx.float32).mean(axis=(1, 2))
        squares = fused.squared_distance(x, mean[:, None, None]).sum(axis=(1, 2))
        mx.async_eval(mean, squares)
        return mean, squares

    @staticmethod
    def affine(x: mx.array, factor: np.ndarray, offset: np.ndarray, silu: bool) -> mx.array:
        """factor · x + offset, both (B, C), and then SiLU if asked for."""
        chain = fused.affine_silu if silu else fused.affine
        return chain(x, mx.array(factor)[:, None, None], mx.array(offset)[:, None, None])

    @staticmethod
    def rms_norm(x: mx.array, weight: mx.array, eps: float, silu: bool) -> mx.array:
        """Each position's channels divided by their root mean square, times `weight`, and then SiLU if asked for."""
        y = mx.fast.rms_norm(x, weight, eps)
        return nn.silu(y) if silu else y

    @staticmethod
    def convolution(layer: nn.Conv2d) -> Callable[[mx.array], mx.array]:
        """Of a strip with the rows around it: 1 × 1, or 3 × 3 with a column of zeros on either side."""
        sides = (0, layer.weight.shape[2] // 2)
        return lambda x: _biased(mx.conv2d(x, layer.weight, padding=sides), layer)

    @staticmethod
    def halving(layer: nn.Conv2d) -> Callable[[mx.array], mx.array]:
        """3 × 3, every second position, with a column of zeros on the right."""
        return lambda x: _biased(mx.conv2d(mx.pad(x, [(0, 0), (0, 0), (0, 1), (0, 0)]), layer.weight, stride=2), layer)

    @staticmethod
    def doubling(layer: nn.Conv2d) -> Callable[[mx.array], mx.array]:
        """3 × 3 of pixels repeated twice along each side; of the rows around, only the nearer copy is used."""

        def run(x: mx.array) -> mx.array:
            x = mx.repeat(mx.repeat(x, 2, axis=1)[:, 1:-1], 2, axis=2)
            return _biased(mx.conv2d(x, layer.weight, padding=(0, 1)), layer)

        return run


def _biased(y: mx.array, layer: nn.Conv2d) -> mx.array:
    return y + layer.bias if "bias" in layer else y


class OnCPU:
    """Strips are float32 numpy arrays, often views with gaps."""

    # Small enough for the cache, large enough for work to be worth a thread.
    strip_bytes = 2**23

    @staticmethod
    def concatenate(parts: Sequence[np.ndarray], axis: int) -> np.ndarray:
        return np.concatenate(parts, axis)

    @staticmethod
    def begun(x: np.ndarray) -> None:
        """There is nothing left to do."""

    evaluate = begun

    @staticmethod
    def zeros(shape: tuple[int, ...], dtype: mx.Dtype) -> np.ndarray:
        return np.zeros(shape, np.float32)

    @staticmethod
    def own(x: np.ndarray) -> np.ndarray:
        """A copy, so that a few rows do not hold the memory of a strip."""
        return x.copy()

    @staticmethod
    def strip(x: mx.array) -> np.ndarray:
        mx.eval(x)
        return np.asarray(x)

    @staticmethod
    def array(x: np.ndarray) -> mx.array:
        return mx.from_dlpack(x)

    @staticmethod
    def add(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return _by_rows(lambda rows, into, more: np.add(rows, more, out=into), one, other)

    @staticmethod
    def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        batch, rows, columns, channels = x.shape
        # Distances from a value of about the right size: squares of a large mean would drown the variance.
        near = x[:, 0].mean(axis=1)
        found = np.zeros((2, batch, rows, channels))

        def count(index: int, top: int, bottom: int) -> None:
            distances = np.subtract(x[index, top:bottom], near[index], out=spare((bottom - top, columns, channels)))
            found[0, index, top:bottom] = distances.sum(axis=1)
            found[1, index, top:bottom] = np.einsum("rwc,rwc->rc", distances, distances)

        _share(count, x.shape)
        sums, squares = found.sum(axis=2)
        total = rows * columns
        return near + sums / total, squares - sums**2 / total

    @staticmethod
    def affine(x: np.ndarray, factor: np.ndarray, offset: np.ndarray, silu: bool) -> np.ndarray:
        def apply(rows: np.ndarray, into: np.ndarray, factor: np.ndarray, offset: np.ndarray) -> None:
            np.multiply(rows, factor, out=into)
            np.add(into, offset, out=into)
            if silu:
                _silu(into)

        return _by_rows(apply, x, factor[:, None], offset[:, None])

    @staticmethod
    def rms_norm(x: np.ndarray, weight: mx.array, eps: float, silu: bool) -> np.ndarray:
        factors = np.asarray(weight)

        def apply(rows: np.ndarray, into: np.ndarray) -> None:
            squares = np.einsum("rwc,rwc->rw", rows, rows)
            np.multiply(rows, (1 / np.sqrt(squares / x.shape[-1] + np.float32(eps)))[..., None], out=into)
            np.multiply(into, factors, out=into)
            if silu:
                _silu(into)

        return _by_rows(apply, x)

    @staticmethod
    def convolution(layer: nn.Conv2d) -> Callable[[np.ndarray], np.ndarray]:
        side = layer.weight.shape[2] // 2
        return _convolution(layer, sides=Sides(left=side, right=side))

    @staticmethod
    def halving(layer: nn.Conv2d) -> Callable[[np.ndarray], np.ndarray]:
        return _convolution(layer, sides=Sides(right=1), stride=(2, 2))

    @staticmethod
    def doubling(layer: nn.Conv2d) -> Callable[[np.ndarray], np.ndarray]:
        """Of the nine pixels under the kernel, repeated ones are the same, so a kernel of 2 × 2 does for one result;
        it differs with the result's being in an even or an odd row and column."""
        kernel, bias = np.asarray(layer.weight), _bias(layer)
        # An even row sees the row above once and its own twice; an odd one its own twice and the row below once.
        rows = [np.concatenate([kernel[:, :1], kernel[:, 1:].sum(axis=1, keepdims=True)], axis=1),
                np.concatenate([kernel[:, :2].sum(axis=1, keepdims=True), kernel[:, 2:]], axis=1)]  # fmt: skip
        kernels = {
            (row, column): np.concatenate(
                [part[:, :, :1], part[:, :, 1:].sum(axis=2, keepdims=True)]
                if column == 0
                else [part[:, :, :2].sum(axis=2, keepdims=True), part[:, :, 2:]],
                axis=2,
            )
            for row, part in enumerate(rows)
            for column in range(2)
        }

        def run(x: np.ndarray) -> np.ndarray:
            batch, rows, columns, _ = x.shape
            y = np.empty((batch, rows - 2, 2, columns, 2, layer.weight.shape[0]), np.float32)
            for (row, column), kernel in kernels.items():
                convolve(
                    x[:, row : row + rows - 1],
                    kernel,
                    bias,
                    sides=Sides(left=1 - column, right=column),
                    into=y[:, :, row, :, column],
                )
            return y.reshape(batch, 2 * (rows - 2), 2 * columns, -1)

        return run


def kernels(dtype: mx.Dtype) -> type[OnGPU] | type[OnCPU]:
    """What computes best on this machine. 16-bit floats, which numpy does not all know, are left to MLX."""
    return OnGPU if has_gpu() or dtype != mx.float32 else OnCPU


def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Attention with one head, (B, L, C) each, over so many queries at a time that their scores take little memory."""
    batch, length, channels = q.shape
    scale = channels**-0.5
    if kernels(q.dtype) is OnCPU:
        return layers.attention(*(x[:, None] for x in (q, k, v)), scale=scale)[:, 0]
    at_once = max(1, _SCORES // (batch * length * q.dtype.size))
    parts, under_way = [], UnderWay(_SCORES, OnGPU.evaluate)
    for first in range(0, length, at_once):
        whole = [x[:, None] for x in (q[:, first : first + at_once], k, v)]
        parts.append(mx.fast.scaled_dot_product_attention(*whole, scale=scale)[:, 0])
        under_way.add(OnGPU.begun(parts[-1]))
    return mx.concatenate(parts, axis=1)


# ---- on a CPU


def _convolution(layer: nn.Conv2d, **how: Any) -> Callable[[np.ndarray], np.ndarray]:
    kernel, bias = np.asarray(layer.weight), _bias(layer)
    return lambda x: convolve(x, kernel, bias, **how)


def _bias(layer: nn.Conv2d) -> np.ndarray | None:
    return np.asarray(layer.bias) if "bias" in layer else None


def _share(do: Callable[[int, int, int], None], shape: tuple[int, ...]) -> None:
    """Call `do(image, top, bottom)` for rows of a strip, as many at a time as the cache likes."""
    batch, rows, columns, channels = shape
    step = max(1, min(rows, work.BLOCK // (columns * channels)))
    blocks = -(-rows // step)

    def block(number: int, _: int) -> None:
        index, place = divmod(number, blocks)
        do(index, place * step, min((place + 1) * step, rows))

    work.share(block, batch * blocks, 1)


def _by_rows(apply: Callable[..., Any], x: np.ndarray, *others: np.ndarray) -> np.ndarray:
    """`apply(rows, into, *others)` to all rows of a strip; of the others, where they have rows, the same ones."""
    y = np.empty(x.shape, np.float32)

    def part(index: int, top: int, bottom: int) -> None:
        more = (other[index, top:bottom] if other.ndim == x.ndim else other[index] for other in others)
        apply(x[index, top:bottom], y[index, top:bottom], *more)

    _share(part, x.shape)
    return y


def _silu(x: np.ndarray) -> None:
    """x · sigmoid(x), in place; a sigmoid is (1 + tanh of half of it) / 2."""
    half = np.multiply(x, np.float32(0.5), out=spare(x.shape))
    np.tanh(half, out=x)
    np.multiply(x, half, out=x)
    np.add(x, half, out=x)
