"""The images that an edit starts from, as FLUX.3 sees them.

Reference class: diffusers' `Flux3ImageProcessor`. Loads nothing heavy: a command asks for sizes before it loads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mflux.errors import UsageError
from mflux.models.common.sizes import MEGAPIXEL, Size
from mflux.utils.scale_factor import GRID

if TYPE_CHECKING:
    import PIL.Image

MOST = 10
_AREA, _LEAST, _MOST = 4 * MEGAPIXEL, 64, 4096


@dataclass(frozen=True)
class Canvas:
    """Where one reference stands as a whole.

    Attributes:
        image: its width and height.
        size: those of the canvas, multiples of 16.
    """

    image: Size
    size: Size

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the image, in the middle."""
        left, top = ((outer - inner) // 2 for outer, inner in zip(self.size, self.image, strict=True))
        return left, top, left + self.image[0], top + self.image[1]


def canvas_of(size: Size) -> Canvas:
    """The canvas of an image of so many pixels: as large as it is, or smaller where that would be too large."""
    width, height = size
    scale = min(1.0, math.sqrt(_AREA / (width * height)), _MOST / max(size))
    while True:
        image = max(1, round(width * scale)), max(1, round(height * scale))
        outer = _on_grid(image[0]), _on_grid(image[1])
        if outer[0] * outer[1] <= _AREA:
            return Canvas(image, outer)
        scale *= 0.995


def _on_grid(side: int) -> int:
    return min(_MOST, max(_LEAST, -(-side // GRID) * GRID))


def on_canvas(image: PIL.Image.Image) -> PIL.Image.Image:
    """An image as a whole, its reflection around it up to the canvas."""
    import numpy as np
    from PIL import Image

    canvas = canvas_of(image.size)
    if image.size != canvas.image:
        image = image.resize(canvas.image, Image.Resampling.LANCZOS)
    if canvas.image == canvas.size:
        return image
    (left, top, right, bottom), (width, height) = canvas.box, canvas.size
    margins = (top, height - bottom), (left, width - right), (0, 0)
    # A reflection without the edge needs an image that is wider than it.
    mode = "reflect" if min(image.size) > GRID else "symmetric"
    return Image.fromarray(np.pad(np.asarray(image), margins, mode=mode))  # type: ignore[call-overload]


def check_count(count: int) -> None:
    """
    Raises:
        UsageError: none, or more than the model takes.
    """
    if not 1 <= count <= MOST:
        raise UsageError(
            f"there are {count} images to edit, and FLUX.3 takes 1 to {MOST}: name them with image_paths "
            "(--image-paths), or generate from text alone with Flux3Klein (mflux-generate-flux3)"
        )
