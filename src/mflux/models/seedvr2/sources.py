"""From a picture file to what the network sees, and from what it drew to a picture like the file's."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import PIL.Image

from mflux.errors import UsageError
from mflux.utils import values
from mflux.utils.picture_files import alpha_of, in_rgb, open_image, unreadable
from mflux.utils.scale_factor import GRID, LARGEST, ScaleFactor

_BICUBIC = PIL.Image.Resampling.BICUBIC
# How many times smaller a picture is made, and enlarged again, at the most softness.
_SOFTEST = 8


@dataclass(frozen=True)
class Source:
    """A picture to draw again, at the size that is drawn.

    Attributes:
        colour: in RGB, upright.
        alpha: how opaque it is, where any of it is not wholly so.
        profile: what its numbers stand for, an ICC profile; None is sRGB.
    """

    colour: PIL.Image.Image
    alpha: PIL.Image.Image | None
    profile: bytes | None

    @property
    def width(self) -> int:
        return self.colour.width

    @property
    def height(self) -> int:
        return self.colour.height

    def pixels(self) -> np.ndarray:
        """(3, height, width), float32 from -1 to 1; sides filled up to multiples of 16 with black, at the right and at
        the bottom."""
        pixels = np.asarray(self.colour, np.float32).transpose(2, 0, 1) / 255
        return np.pad(pixels, ((0, 0), (0, -self.height % GRID), (0, -self.width % GRID))) * 2 - 1

    def dressed(self, drawn: PIL.Image.Image) -> PIL.Image.Image:
        """What was drawn, as opaque as the source and in its colour space."""
        if self.alpha is not None:
            drawn = drawn.copy()
            drawn.putalpha(self.alpha)
        if self.profile is not None:
            drawn.info["icc_profile"] = self.profile
        return drawn


def read_source(path: str | bytes | os.PathLike, resolution: int | ScaleFactor, softness: float = 0.0) -> Source:
    """A picture file, enlarged as far as that goes without a network.

    Args:
        path: of any format that pictures are read in.
        resolution: pixels of the shorter side, or how many times as long it is to be, to a multiple of 16.
        softness: 0 to 1: how much of the detail is taken away first, so that more is drawn anew.

    Raises:
        ImageError: it cannot be read.
        UsageError: the size or the softness makes no sense.
    """
    file = values.image(path, "image_path")
    softness = values.real(softness, "softness", least=0, most=1)
    image = open_image(file)
    size = target_size(image.size, resolution)
    try:
        colour, profile = in_rgb(image)
        alpha = alpha_of(image)
    except (ValueError, OSError) as error:
        raise unreadable(file, error) from None
    if softness > 0:
        factor = 1 + softness * (_SOFTEST - 1)
        colour = colour.resize([max(2, int(side / factor)) for side in size], _BICUBIC)
    return Source(
        colour=colour.resize(size, _BICUBIC),
        alpha=None if alpha is None else alpha.resize(size, _BICUBIC),
        profile=profile,
    )


def target_size(size: tuple[int, int], resolution: int | ScaleFactor) -> tuple[int, int]:
    """Width and height of what is drawn, both even, for a picture of a width and height.

    Raises:
        UsageError: the resolution is none, or one of the sides would become too small or too large.
    """
    shorter = min(size)
    if isinstance(resolution, ScaleFactor):
        wanted = resolution.get_scaled_value(shorter)
        if wanted < GRID:
            raise UsageError(
                f"{resolution} of {shorter} pixels, its shorter side, is less than {GRID}: say --resolution in pixels"
            )
    else:
        wanted = values.whole(resolution, "resolution", least=GRID, most=LARGEST)
    # In whole numbers: a quotient would now and then lose the last pixel.
    width, height = (side * wanted // shorter // 2 * 2 for side in size)
    if max(width, height) > LARGEST:
        raise UsageError(
            f"a picture of {size[0]}x{size[1]} would become {width}x{height}, and {LARGEST} is the most that a side "
            f"can have: use a smaller --resolution"
        )
    return width, height


def recorded(resolution: int | ScaleFactor) -> int | str:
    """A resolution as a picture's settings say it."""
    return str(resolution) if isinstance(resolution, ScaleFactor) else int(resolution)
