"""Products of matrices by numpy's BLAS: linear layers, whole and quantized."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from mflux.backend import mx
from mflux.cpu import work
from mflux.cpu.work import differentiable, is_here, mlx_multiplies_slowly, room, spare

# Rows and columns at most of a product that a thread computes at a time: larger ones are no faster.
_TILE = 512
# Multiplications below which MLX is as fast.
_LEAST_PRODUCTS = 1 << 15


# ---- dense


def product(x: mx.array, weight: mx.array, bias: mx.array | None = None, *, frozen: bool = False) -> mx.array:
    """x (…, in) times the transpose of a weight (out, in), plus a bias (out,).

    Args:
        frozen: no gradient of weight and bias will be asked for, so that none is computed.
    """
    given = (weight,) if bias is None else (weight, bias)
    if not (
        mlx_multiplies_slowly() and is_here(x, *given) and x.size * len(weight) >= _LEAST_PRODUCTS and weight.ndim == 2
    ):
        return _plain(x, *given)
    if frozen:
        function = differentiable(
            lambda x: _product(x, *given),
            lambda x: _plain(x, *given),
            lambda primals, cotangent: [product(cotangent, weight.T, frozen=True)],
        )
        return function(x)
    return _differentiable_product(x, *given)


def _plain(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    return x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)


def _product(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    out, into = room((*x.shape[:-1], len(weight)))
    rows, added = np.asarray(x).reshape(-1, x.shape[-1]), None if bias is None else np.asarray(bias)
    multiply(rows, np.asarray(weight), added, into.reshape(-1, len(weight)))
    return out


def multiply(one: np.ndarray, other: np.ndarray, bias: np.ndarray | None, out: np.ndarray) -> None:
    """out (rows, columns) = one (rows, in) times the transpose of other (columns, in), plus a bias (columns,).

    In tiles, which are the same on any number of threads, as BLAS's own parts of a product are not: so are the bits.
    """
    high, wide = (min(_TILE, -(-size // -(-size // _TILE))) for size in out.shape)
    across = -(-out.shape[1] // wide)

    def tile(number: int, _: int) -> None:
        row, column = divmod(number, across)
        rows, columns = slice(row * high, (row + 1) * high), slice(column * wide, (column + 1) * wide)
        part = out[rows, columns]
        np.matmul(one[rows], other[columns].T, out=part)
        if bias is not None:
            np.add(part, bias[columns], out=part)

    work.share(tile, -(-out.shape[0] // high) * across, 1, multiplies=True)


def _gradient(primals: Sequence[mx.array], cotangent: mx.array) -> list[mx.array]:
    x, weight, *bias = primals
    rows = cotangent.reshape(-1, len(weight))
    found = [product(cotangent, weight.T), product(rows.T, x.reshape(-1, x.shape[-1]).T)]
    return [*found, rows.sum(axis=0)] if bias else found


_differentiable_product = differentiable(_product, _plain, _gradient)


# ---- quantized

# How many bits are looked up together, whole weights each, and how many weights those are.
_PIECES = {2: (8, 4), 3: (12, 4), 4: (8, 2), 5: (10, 2), 6: (12, 2)}
# Products of weights and rows below which MLX is as fast; and with one row its own product always is.
_LEAST_QUANTIZED = 1 << 18


def quantized_serves(x: mx.array, weight: mx.array, bits: int, mode: str) -> bool:
    """Whether `quantized_product` is to multiply x (…, in) with a quantized weight."""
    rows = x.size // max(x.shape[-1], 1)
    return is_here(x) and (bits == 8 or bits in _PIECES) and rows > 1 and x.size * len(weight) >= _LEAST_QUANTIZED


def quantized_product(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    group_size: int,
    bits: int,
    mode: str = "affine",
) -> mx.array:
    """x (…, in) times the transpose of a quantized weight (out, in), `ROOM` bytes of it dense at a time and thread.

    Args:
        biases: None of MLX's floating-point forms.
    """
    form: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": mode}

    def plain(x: mx.array) -> mx.array:
        return mx.quantized_matmul(x, weight, scales, biases, transpose=True, **form).astype(x.dtype)

    def blocks() -> tuple[int, Callable[[int, int], np.ndarray]]:
        """How many rows of the weight fit at once, and what gives some of them, dense."""
        mx.eval(weight)
        packed, columns = np.asarray(weight), x.shape[-1]
        factors = _numbers(scales) if mode == "affine" else _scales(mode)[np.asarray(scales)]
        offsets = None if biases is None else _numbers(biases)

        def dense(start: int, stop: int) -> np.ndarray:
            here, out = slice(start, stop), spare((stop - start, columns))
            _unpack(packed[here], factors[here], None if offsets is None else offsets[here], form, out)
            return out

        return max(1, min(len(weight), work.ROOM // (4 * columns))), dense

    def compute(x: mx.array) -> mx.array:
        step, dense = blocks()
        out, into = room((*x.shape[:-1], len(weight)))
        rows, products = np.asarray(x).reshape(-1, x.shape[-1]), into.reshape(-1, len(weight))

        def multiply(start: int, stop: int) -> None:
            np.matmul(rows, dense(start, stop).T, out=products[:, start:stop])

        work.share(multiply, len(weight), step, multiplies=True)
        return out

    def gradient(_: Sequence[mx.array], cotangent: mx.array) -> list[mx.array]:
        return [differentiable(back, back_plain)(cotangent)]

    def back_plain(cotangent: mx.array) -> mx.array:
        product = mx.quantized_matmul(cotangent, weight, scales, biases, transpose=False, **form)
        return product.astype(cotangent.dtype)

    def back(cotangent: mx.array) -> mx.array:
        step, dense = blocks()
        out, into = room((*cotangent.shape[:-1], x.shape[-1]))
        rows, sums = np.asarray(cotangent).reshape(-1, len(weight)), into.reshape(-1, x.shape[-1])
        sums[:] = 0
        part = np.empty_like(sums)
        for start in range(0, len(weight), step):
            stop = min(start + step, len(weight))
            multiply(rows[:, start:stop], dense(start, stop).T, None, part)
            np.add(sums, part, out=sums)
        return out

    return differentiable(compute, plain, gradient)(x)


def _numbers(array: mx.array) -> np.ndarray:
    array = array.astype(mx.float32)
    mx.eval(array)
    return np.asarray(array)


def _unpack(
    packed: np.ndarray, scales: np.ndarray, biases: np.ndarray | None, form: Mapping[str, Any], out: np.ndarray
) -> None:
    """Rows of a quantized weight, dense: each number times its group's scale, plus its group's bias."""
    numbers, bits = packed.view(np.uint8), form["bits"]
    groups = out.reshape(len(out), -1, form["group_size"])
    if bits == 8 and biases is not None:
        np.multiply(numbers.reshape(groups.shape), scales[..., None], out=groups)
    else:
        table = _table(bits) if biases is not None else _float_table(form["mode"])
        pieces = numbers if bits == 8 else _pieces(numbers, bits)
        np.take(table, pieces, out=out.view(table.dtype), mode="clip")
        np.multiply(groups, scales[..., None], out=groups)
    if biases is not None:
        np.add(groups, biases[..., None], out=groups)


@cache
def _float_table(mode: str) -> np.ndarray:
    """For each byte of a floating-point form its weights, as one element to copy: one of eight bits, or two of four."""
    if mode == "mxfp8":
        return np.array(mx.from_fp8(mx.arange(256, dtype=mx.uint8), mx.float32))
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    values = np.concatenate([magnitudes, -magnitudes])
    codes = np.arange(256)
    return np.stack([values[codes & 15], values[codes >> 4]], axis=-1).view(np.float64)[:, 0].copy()


@cache
def _scales(mode: str) -> np.ndarray:
    """For each byte of a scale its factor: a power of two, or (nvfp4) a float8."""
    if mode == "nvfp4":
        return _float_table("mxfp8")
    # The last is no number.
    return np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))


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
