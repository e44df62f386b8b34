"""Convolutions: each block of positions writes its windows side by side, in a core's cache, and is one product."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import as_strided

from mflux.backend import mx
from mflux.cpu import work
from mflux.cpu.work import differentiable, is_here, mlx_multiplies_slowly, room, spare

# Multiplications below which MLX is as fast.
_LEAST_PRODUCTS = 1 << 16
# Positions at a time: enough that a product is worth its kernel's way into the cache, and few enough to stay there.
_POSITIONS = 512


@dataclass(frozen=True)
class Sides:
    """Zeros before and behind the rows and columns of an image."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0


def serves_convolution(x: mx.array, weight: mx.array) -> bool:
    """Whether `convolution` is to compute it."""
    return mlx_multiplies_slowly() and is_here(x, weight) and x.size * weight.shape[0] >= _LEAST_PRODUCTS


def convolution(
    x: mx.array, weight: mx.array, bias: mx.array | None, stride: tuple[int, int], padding: tuple[int, int]
) -> mx.array:
    """`mx.conv2d` of (B, H, W, C) with (O, kernel rows, kernel columns, C), plus a bias (O,)."""
    sides = Sides(padding[0], padding[0], padding[1], padding[1])

    def plain(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
        y = mx.conv2d(x, weight, stride, padding)
        return y if bias is None else y + bias

    def compute(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
        kernel, added = np.asarray(weight), None if bias is None else np.asarray(bias)
        out, into = room(_shape(x.shape, weight.shape, stride, sides))
        convolve(np.asarray(x), kernel, added, stride=stride, sides=sides, into=into)
        return out

    return differentiable(compute, plain)(*((x, weight) if bias is None else (x, weight, bias)))


def _shape(x: tuple[int, ...], kernel: tuple[int, ...], stride: tuple[int, int], sides: Sides) -> tuple[int, ...]:
    rows = (x[1] + sides.top + sides.bottom - kernel[1]) // stride[0] + 1
    columns = (x[2] + sides.left + sides.right - kernel[2]) // stride[1] + 1
    return x[0], rows, columns, kernel[0]


def convolve(
    x: np.ndarray,
    kernel: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    sides: Sides = Sides(),
    into: np.ndarray | None = None,
) -> np.ndarray:
    """A two-dimensional convolution of float32, channels last.

    Args:
        x: (B, H, W, C), a view with gaps if need be.
        kernel: (O, kernel rows, kernel columns, C).
        bias: (O,).
        into: where the result goes, (B, rows, columns, O) with O in one piece; a new array unless given.
    """
    shape = batch, rows, columns, out_channels = _shape(x.shape, kernel.shape, stride, sides)
    out = np.empty(shape, np.float32) if into is None else into
    matrix = kernel.reshape(out_channels, -1).T
    high, wide = max(1, min(rows, _POSITIONS // columns)), min(columns, _POSITIONS)
    down, across = -(-rows // high), -(-columns // wide)

    def block(number: int, _: int) -> None:
        place, column = divmod(number, across)
        picture, row = divmod(place, down)
        top, left = row * high, column * wide
        some = min(high, rows - top), min(wide, columns - left)
        windows = _windows(x[picture], top, left, some, kernel.shape[1:3], stride, sides)
        product = np.matmul(windows, matrix, out=spare((len(windows), out_channels), 2)).reshape(*some, out_channels)
        part = out[picture, top : top + some[0], left : left + some[1]]
        if bias is None:
            np.copyto(part, product)
        else:
            np.add(product, bias, out=part)

    work.share(block, batch * down * across, 1, multiplies=True)
    return out


def _windows(
    x: np.ndarray,
    top: int,
    left: int,
    shape: tuple[int, int],
    size: tuple[int, ...],
    stride: tuple[int, int],
    sides: Sides,
) -> np.ndarray:
    """Windows of an image (H, W, C) from a place of the result on, a row each: (rows · columns, window · C)."""
    height, width, channels = x.shape
    first = top * stride[0] - sides.top, left * stride[1] - sides.left
    tall, broad = ((count - 1) * step + span for count, step, span in zip(shape, stride, size, strict=True))
    tile = spare((tall, broad, channels), 0)
    inside = [
        (max(start, 0), min(start + span, whole))
        for start, span, whole in zip(first, (tall, broad), (height, width), strict=True)
    ]
    (y, y_end), (z, z_end) = inside
    if (y_end - y, z_end - z) != (tall, broad):
        tile[:] = 0
    tile[y - first[0] : y_end - first[0], z - first[1] : z_end - first[1]] = x[y:y_end, z:z_end]
    # A window's columns lie behind each other already, so a row of it is one piece.
    strides = tile.strides[0] * stride[0], tile.strides[1] * stride[1], tile.strides[0], tile.strides[2]
    views = as_strided(tile, (*shape, size[0], size[1] * channels), strides)
    windows = spare(views.shape, 1)
    np.copyto(windows, views)
    return windows.reshape(shape[0] * shape[1], -1)
