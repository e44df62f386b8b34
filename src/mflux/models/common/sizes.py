"""The size at which a model sees an image: the image's shape at the area that the model was made for, on its grid.

Each model's own rounding decides between two sizes where another's would take the other one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Size = tuple[int, int]
# How a side becomes a whole number.
Rounding = Callable[[float], int]

MEGAPIXEL = 1024 * 1024


def nearest(grid: int) -> Rounding:
    """To the nearest multiple of `grid`, halves to even ones; a long and narrow image keeps one of them."""
    return lambda side: max(grid, round(side / grid) * grid)


def down(grid: int) -> Rounding:
    """To the nearest pixel, and then down to a multiple of `grid`; a long and narrow image keeps one of them."""
    return lambda side: max(grid, round(side) // grid * grid)


def shrunk(size: Size, area: int, rounding: Rounding) -> Size:
    """Width and height of at most about so many pixels."""
    width, height = size
    scale = min(1.0, math.sqrt(area / (width * height)))
    return rounding(width * scale), rounding(height * scale)


def fitted(size: Size, area: int, rounding: Rounding) -> Size:
    """Width and height of about so many pixels, whether that shrinks or enlarges.

    Written as `shrunk` is, a few sizes in a million would round to the other side.
    """
    ratio = size[0] / size[1]
    width = math.sqrt(area * ratio)
    return rounding(width), rounding(width / ratio)
