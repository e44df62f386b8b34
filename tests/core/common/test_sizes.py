"""Sizes that models see images at, against each reference's own formula."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mflux.models.common.sizes import MEGAPIXEL, down, fitted, nearest, shrunk

RANDOM = np.random.default_rng(7)
SIZES = [
    *[tuple(size) for size in RANDOM.integers(1, 5000, (20_000, 2)).tolist()],
    *[tuple(size) for size in RANDOM.integers(1, 60_000, (5_000, 2)).tolist()],
    # Shapes that end exactly between two multiples, and around a megapixel.
    *[(side * side, 128 * 128) for side in range(1, 256, 2)],
    *[(1024 + more, 1024 + other) for more in range(-20, 21) for other in range(-20, 21)],
    (832, 325), (64, 289), (289, 64), (1, 65_535), (65_535, 1), (140_000, 30),
]  # fmt: skip


def of_flux(width: int, height: int) -> tuple[int, int]:
    shrink = min(1.0, (1024 * 1024 / (width * height)) ** 0.5)
    return tuple(max(16, round(side * shrink) // 16 * 16) for side in (width, height))


def of_flux2(width: int, height: int) -> tuple[int, int]:
    if width * height <= 1024 * 1024:
        return width, height
    scale = math.sqrt(1024 * 1024 / (width * height))
    return int(width * scale), int(height * scale)


def of_fibo(width: int, height: int) -> tuple[int, int]:
    shrink = min(1.0, (1024 * 1024 / float(width * height)) ** 0.5)
    return tuple(max(16, round(side * shrink / 16) * 16) for side in (width, height))


def of_qwen(width: int, height: int, area: int) -> tuple[int, int]:
    across = math.sqrt(area * (width / height))
    return tuple(max(32, round(side / 32) * 32) for side in (across, across / (width / height)))


@pytest.mark.parametrize(
    ("ours", "reference"),
    {
        "flux": (lambda size: shrunk(size, MEGAPIXEL, down(16)), of_flux),
        "flux2": (lambda size: shrunk(size, MEGAPIXEL, int), of_flux2),
        "fibo": (lambda size: shrunk(size, MEGAPIXEL, nearest(16)), of_fibo),
        "qwen": (lambda size: fitted(size, MEGAPIXEL, nearest(32)), lambda *size: of_qwen(*size, 1024 * 1024)),
        "qwen-shown": (lambda size: fitted(size, 384 * 384, nearest(32)), lambda *size: of_qwen(*size, 384 * 384)),
    }.values(),
    ids=["flux", "flux2", "fibo", "qwen", "qwen-shown"],
)
def test_each_model_rounds_as_its_reference(ours, reference):
    assert [ours(size) for size in SIZES] == [reference(*size) for size in SIZES]


def test_the_two_ways_to_a_size_differ():
    """What keeps `fitted` apart from `shrunk`."""
    assert fitted((832, 325), 384 * 384, nearest(32)) == (608, 256)
    assert shrunk((832, 325), 384 * 384, nearest(32)) == (608, 224)
