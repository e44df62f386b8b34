"""What is computed on a strip of a feature map, (B, rows, columns, channels): once for GPUs, once for MLX on a CPU.

On a CPU MLX copies nine shifted pictures before it multiplies, element by element, and takes ten times numpy's time for
an exponential. There a strip is a numpy array; a convolution is one product of matrices for each tap of its kernel, on
views of one padded copy, which BLAS adds up in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce

import numpy as np

from mflux.backend import BLAS, has_gpu, mx, nn

# Elements that numpy works on at a time: what it makes in between stays in the processor's cache.
_BLOCK = 2**16
# With fewer channels than this, taps become channels and one product does for all of them.
_FEW = 32
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
    def moments(x: mx.array) -> tuple[np.ndarray, np.ndarray]:
        """Of each channel: the mean (B, C), and the sum of squared distances from it."""
        x = x.astype(mx.float32)
        mean = x.mean(axis=(1, 2))
        squares = (x - mean[:, None, None]).square().sum(axis=(1, 2))
        mx.eval(mean, squares)
        return np.array(mean), np.array(squares)

    @staticmethod
    def affine(x: mx.array, factor: np.ndarray, offset: np.ndarray, silu: bool) -> mx.array:
        """factor · x + offset, both (B, C), and then SiLU if asked for."""
        y = (mx.array(factor)[:, None, None] * x + mx.array(offset)[:, None, None]).astype(x.dtype)
        return nn.silu(y) if silu else y

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

    # Small enough for the cache, large enough for a product to be worth a thread.
    strip_bytes = 2**23

    @staticmethod
    def concatenate(parts: Sequence[np.ndarray], axis: int) -> np.ndarray:
        return np.concatenate(parts, axis)

    @staticmethod
    def evaluate(x: np.ndarray) -> None:
        """There is nothing left to do."""

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
        return np.array(x, copy=False)

    @staticmethod
    def array(x: np.ndarray) -> mx.array:
        return mx.array(x)

    @staticmethod
    def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        batch, rows, columns, channels = x.shape
        # Distances from a value of about the right size: squares of a large mean would drown the variance.
        near = x[:, 0].mean(axis=1)
        sums, squares = np.zeros((2, batch, channels))
        for index, row in _blocks(x):
            distances = row - near[index]
            sums[index] += distances.sum(axis=1).sum(axis=0, dtype=np.float64)
            squares[index] += np.einsum("rwc,rwc->rc", distances, distances).sum(axis=0, dtype=np.float64)
        count = rows * columns
        return near + sums / count, squares - sums**2 / count

    @staticmethod
    def affine(x: np.ndarray, factor: np.ndarray, offset: np.ndarray, silu: bool) -> np.ndarray:
        y = np.empty(x.shape, np.float32)
        for (index, rows), (_, into) in zip(_blocks(x), _blocks(y), strict=True):
            np.multiply(rows, factor[index], out=into)
            into += offset[index]
            if silu:
                _silu(into)
        return y

    @staticmethod
    def rms_norm(x: np.ndarray, weight: mx.array, eps: float, silu: bool) -> np.ndarray:
        factors = np.array(weight)
        y = np.empty(x.shape, np.float32)
        for (_, rows), (_, into) in zip(_blocks(x), _blocks(y), strict=True):
            squares = np.einsum("rwc,rwc->rw", rows, rows)
            np.multiply(rows, (1 / np.sqrt(squares / x.shape[-1] + np.float32(eps)))[..., None], out=into)
            into *= factors
            if silu:
                _silu(into)
        return y

    @staticmethod
    def convolution(layer: nn.Conv2d) -> Callable[[np.ndarray], np.ndarray]:
        if layer.weight.shape[1:3] == (1, 1):
            return lambda x: _finish(_product(np.ascontiguousarray(x), layer.weight.squeeze((1, 2))), layer)
        taps = _taps(layer)
        few_inputs, few_outputs = layer.weight.shape[-1] <= _FEW, layer.weight.shape[0] <= _FEW

        def run(x: np.ndarray) -> np.ndarray:
            batch, rows, columns, _ = x.shape
            pitch = columns + 1
            count = (rows - 2) * pitch
            padded = _padded(x, rows, pitch)
            places = [row * pitch + column for row in range(3) for column in range(3)]
            if few_inputs:
                shifted = [np.array(padded[:, place : place + count], copy=False) for place in places]
                y = _product(np.concatenate(shifted, axis=-1), mx.concatenate(taps, axis=-1))
            elif few_outputs:
                # One product for all taps; what it gives is added up along the columns, where it lies in one piece.
                every = np.array(mx.concatenate(taps) @ padded.swapaxes(1, 2), copy=False)
                every = every.reshape(batch, 9, -1, every.shape[-1])
                y = every[:, 0, :, :count].copy()
                for tap, place in enumerate(places[1:], 1):
                    y += every[:, tap, :, place : place + count]
                y = y.swapaxes(1, 2)
            else:
                y = _sum_of_products(((padded, place, tap) for place, tap in zip(places, taps, strict=True)), count)
            return _finish(y.reshape(batch, rows - 2, pitch, -1)[:, :, :columns], layer)

        return run

    @staticmethod
    def halving(layer: nn.Conv2d) -> Callable[[np.ndarray], np.ndarray]:
        taps = _taps(layer)

        def run(x: np.ndarray) -> np.ndarray:
            batch, rows, columns, _ = x.shape
            # Every second row and column from the first and from the second, each a picture of half the size.
            half, width = rows // 2, columns // 2
            pitch = width + 1
            places = []
            for row, column in np.ndindex(2, 2):
                part = _padded(x[:, row::2, column::2], half + 1, pitch, left=0)
                for down, right in np.ndindex(2 - row, 2 - column):
                    places.append((part, down * pitch + right, taps[(2 * down + row) * 3 + 2 * right + column]))
            y = _sum_of_products(places, half * pitch)
            return _finish(y.reshape(batch, half, pitch, -1)[:, :, :width], layer)

        return run

    @staticmethod
    def doubling(layer: nn.Conv2d) -> Callable[[np.ndarray], np.ndarray]:
        """Of the nine pixels under the kernel, repeated ones are the same, so four products do for one result; they
        differ with its being in an even or an odd row and column."""
        kernel = np.array(layer.weight).transpose(1, 2, 0, 3)
        sums = {}
        for row, column in np.ndindex(2, 2):
            rows = (kernel[:1], kernel[1:]) if row == 0 else (kernel[:2], kernel[2:])
            for down, part in enumerate(rows):
                part = part.sum(axis=0)
                parts = (part[:1], part[1:]) if column == 0 else (part[:2], part[2:])
                for right, tap in enumerate(parts):
                    sums[row, column, down, right] = mx.array(tap.sum(axis=0))
        bias = np.array(layer.bias) if "bias" in layer else np.float32(0)

        def run(x: np.ndarray) -> np.ndarray:
            batch, rows, columns, _ = x.shape
            pitch = columns + 1
            padded = _padded(x, rows, pitch)
            y = np.empty((batch, rows - 2, 2, columns, 2, layer.weight.shape[0]), np.float32)
            for row, column in np.ndindex(2, 2):
                places = [
                    (padded, (row + down) * pitch + column + right, sums[row, column, down, right])
                    for down, right in np.ndindex(2, 2)
                ]
                part = _sum_of_products(places, (rows - 2) * pitch)
                part = part.reshape(batch, rows - 2, pitch, -1)[:, :, :columns]
                np.add(part, bias, out=y[:, :, row, :, column])
            return y.reshape(batch, 2 * (rows - 2), 2 * columns, -1)

        return run


def kernels(dtype: mx.Dtype) -> type[OnGPU] | type[OnCPU]:
    """What computes best on this machine. 16-bit floats, which numpy does not all know, are left to MLX."""
    return OnGPU if has_gpu() or dtype != mx.float32 else OnCPU


def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Attention with one head, (B, L, C) each, over so many queries at a time that their scores take little memory."""
    batch, length, channels = q.shape
    scale = channels**-0.5
    at_once = max(1, _SCORES // (batch * length * q.dtype.size))
    keys = k.swapaxes(1, 2)
    parts = []
    for first in range(0, length, at_once):
        queries = q[:, first : first + at_once]
        if kernels(q.dtype) is OnGPU:
            whole = [x[:, None] for x in (queries, k, v)]
            part = mx.fast.scaled_dot_product_attention(*whole, scale=scale)[:, 0]
            mx.eval(part)
        else:
            scores = (queries * scale) @ keys
            mx.eval(scores)
            sums = _exponentials(np.array(scores, copy=False))
            part = (scores @ v) / mx.array(sums)
            mx.eval(part)
        parts.append(part)
    return mx.concatenate(parts, axis=1)


def _exponentials(scores: np.ndarray) -> np.ndarray:
    """exp(x - the row's largest), in place; gives their sums."""
    sums = np.empty((*scores.shape[:-1], 1), np.float32)
    step = max(1, _BLOCK // scores.shape[-1])
    for index, picture in enumerate(scores):
        for top in range(0, scores.shape[1], step):
            rows = picture[top : top + step]
            rows -= rows.max(axis=-1, keepdims=True)
            np.exp(rows, out=rows)
            np.sum(rows, axis=-1, keepdims=True, out=sums[index, top : top + step])
    return sums


def _blocks(x: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Rows of a strip, as many at a time as the cache likes, each with the number of its picture."""
    step = max(1, _BLOCK // (x.shape[2] * x.shape[3]))
    for index, picture in enumerate(x):
        for top in range(0, x.shape[1], step):
            yield index, picture[top : top + step]


def _silu(x: np.ndarray) -> None:
    """x / (1 + exp(-x)), in place. Where the exponential overflows, dividing by infinity is zero, which is right."""
    with np.errstate(over="ignore"):
        y = np.negative(x)
        np.exp(y, out=y)
    y += 1
    x /= y


def _taps(layer: nn.Conv2d) -> list[mx.array]:
    """A kernel (O, 3, 3, C) as nine matrices (O, C), row by row.

    The layer's weight is replaced by the same values, in the same shape, that lie in memory one matrix after the other:
    so the matrices are views, and nothing is in memory twice.
    """
    by_taps = mx.contiguous(layer.weight.transpose(1, 2, 0, 3))
    layer.weight = by_taps.transpose(2, 0, 1, 3)
    taps = list(by_taps.reshape(9, *layer.weight.shape[::3]))
    mx.eval(layer.weight, taps)
    return taps


def _padded(x: np.ndarray, rows: int, pitch: int, left: int = 1) -> mx.array:
    """(B, at most `rows`, columns, C) → (B, about rows · pitch, C): row after row with zeros in what remains.

    The zero at a row's end is the one before the next row's beginning, so that moving a window over the picture is
    moving one place along the second axis.
    """
    batch, height, columns, channels = x.shape
    padded = mx.zeros((batch, rows * pitch + 2, channels))
    mx.eval(padded)
    inside = np.array(padded, copy=False)[:, : rows * pitch].reshape(batch, rows, pitch, channels)
    inside[:, :height, left : left + columns] = x
    return padded


def _product(x: np.ndarray, weight: mx.array) -> np.ndarray:
    """(…, C) and (O, C) → (…, O)."""
    if BLAS is None:
        return x @ np.array(weight, copy=False).T
    y = mx.array(x) @ weight.T
    mx.eval(y)
    return np.array(y, copy=False)


def _sum_of_products(places: Iterable[tuple[mx.array, int, mx.array]], count: int) -> np.ndarray:
    """The sum over (x, place, weight) of `count` positions of x from that place, (B, count, C), times (O, C)."""
    if BLAS is None:
        # MLX has no good product of its own here; numpy brings one.
        return reduce(
            lambda one, other: np.add(one, other, out=one),
            (np.array(x, copy=False)[:, at : at + count] @ np.array(weight, copy=False).T for x, at, weight in places),
        )
    y: mx.array | None = None
    for x, at, weight in places:
        part = x[:, at : at + count]
        y = part @ weight.T if y is None else mx.addmm(y, part, weight.T)
    mx.eval(y)
    return np.array(y, copy=False)


def _finish(y: np.ndarray, layer: nn.Conv2d) -> np.ndarray:
    if "bias" in layer:
        y += np.array(layer.bias)
    return y
