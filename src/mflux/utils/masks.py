"""Masks as paint programs and other tools write them, read in one way: white is painted anew, black is kept.

Where a mask is no black-and-white picture, it follows from what it is:

- strokes on a transparent layer: what is painted is where they are, whatever their colour;
- a picture or a plain layer with a hole: the hole;
- strokes of a colour on a plain ground, or a palette's colours: where there is colour;
- labels (0 and 1, or 0 to a few) and faint greys: what is more than half of the lightest.
"""

from __future__ import annotations

import logging
import math
import os
from typing import cast

import numpy as np
import PIL.Image
import PIL.ImageOps
from PIL import ImageChops

from mflux.utils.picture_files import alpha_of, as_rgb, open_image, opened

log = logging.getLogger(__name__)

# What is decided is decided on a copy of at most so many pixels a side.
_SAMPLE = 512
# Values of a channel from black and white by which one may differ and still be that.
_NEAR = 48
# Of the logarithms of two shapes; rounding a side of a small image makes less.
_CLEARLY = 0.05


def read_mask(source: PIL.Image.Image | str | bytes | os.PathLike) -> PIL.Image.Image:
    """A mask in mode L: white where to paint, black where not, soft edges as they are.

    Raises:
        ImageError: it cannot be read.
    """
    image = open_image(source)
    alpha = alpha_of(image)
    colours = as_rgb(image, on_white=False)
    if alpha is not None and (found := _by_alpha(alpha, colours)) is not None:
        return found
    if (found := _by_colour(colours)) is not None:
        return found
    grey = colours.convert("L")
    darkest, lightest = _extremes(grey)
    if darkest == lightest:
        return _of_more_bits(source) or grey.point(lambda value: 255 if value > 127 else 0)
    # Labels, and greys that never become white.
    return grey if lightest > 127 else grey.point(lambda value: value * 255 // lightest)


def tell_what_it_selects(mask: np.ndarray, name: object) -> None:
    """Warn where a mask, as it is used, selects nothing or everything."""
    if not mask.any():
        log.warning("the mask %s selects nothing, so nothing is painted: make white what is to be painted anew", name)
    elif mask.all():
        log.warning("the mask %s selects everything, so nothing of the image is kept: make black what is to stay", name)


def tell_of_its_shape(mask: tuple[int, int], image: tuple[int, int], name: object) -> None:
    """Warn where a mask, (width, height), has clearly not the image's shape, which it is stretched to."""
    if abs(math.log(mask[0] * image[1] / (mask[1] * image[0]))) > _CLEARLY:
        log.warning(
            "the mask %s has %d x %d pixels and the image %d x %d, which is another shape: it is stretched, so that "
            "what it selects is elsewhere; make one of the image's size",
            name, *mask, *image,
        )  # fmt: skip


def _by_alpha(alpha: PIL.Image.Image, colours: PIL.Image.Image) -> PIL.Image.Image | None:
    """What a mask's transparency selects; None where it says nothing."""
    lowest, highest = _extremes(alpha)
    if highest - lowest < 64:
        return None
    # A brush may cover in part only.
    full = alpha.point(lambda value: max(value - lowest, 0) * 255 // (highest - lowest))
    opaque = _sample(full) > 127
    pixels = _sample(colours)[opaque]
    grey = pixels.max(axis=1) - pixels.min(axis=1) < _NEAR
    light, dark = pixels.min(axis=1) > 255 - _NEAR, pixels.max(axis=1) < _NEAR
    if grey.all() and (light | dark).mean() > 0.8 and light.any():
        # White and perhaps black on nothing: the colours say it, and nothing is black.
        return PIL.Image.composite(colours.convert("L"), PIL.Image.new("L", colours.size), full)
    border = np.concatenate([opaque[0], opaque[-1], opaque[:, 0], opaque[:, -1]])
    if border.mean() > 0.5:
        return full.point(lambda value: 255 - value)
    return full


def _by_colour(colours: PIL.Image.Image) -> PIL.Image.Image | None:
    """Where there is colour on a ground of one grey; None where that is not what a mask is."""
    pixels = _sample(colours).reshape(-1, 3)
    spread = pixels.max(axis=1) - pixels.min(axis=1)
    coloured = spread > 2 * _NEAR
    if not coloured.any() or coloured.all():
        return None
    ground = pixels[spread < _NEAR]
    if not len(ground) or np.ptp(ground.max(axis=1)) > _NEAR:
        return None
    red, green, blue = colours.split()

    highest = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    lowest = ImageChops.darker(ImageChops.darker(red, green), blue)
    spread_of_all = ImageChops.subtract(highest, lowest)
    return spread_of_all.point(lambda value: min(255, value * 255 // max(1, int(spread.max()))))


def _of_more_bits(source: PIL.Image.Image | str | bytes | os.PathLike) -> PIL.Image.Image | None:
    """Of 16 bits and more, labels from 0 on, which as a picture's shades are all black."""
    if isinstance(source, PIL.Image.Image):
        values = _deep(source)
    else:
        with opened(source) as image:
            values = _deep(image)
    if values is None:
        return None
    values = np.nan_to_num(values)
    lowest, highest = values.min(), values.max()
    if lowest == highest:
        return None
    return PIL.Image.fromarray(np.where(values > (lowest + highest) / 2, 255, 0).astype(np.uint8))


def _deep(image: PIL.Image.Image) -> np.ndarray | None:
    upright = PIL.ImageOps.exif_transpose(image) if image.mode.startswith(("I", "F")) else None
    return None if upright is None else np.asarray(upright)


def _extremes(image: PIL.Image.Image) -> tuple[int, int]:
    """The smallest and the largest value of a picture in mode L."""
    return cast(tuple[int, int], image.getextrema())


def _sample(image: PIL.Image.Image) -> np.ndarray:
    if max(image.size) > _SAMPLE:
        image = image.resize([min(side, _SAMPLE) for side in image.size], PIL.Image.Resampling.NEAREST)
    return np.asarray(image).astype(np.int16)
