"""The picture that FIBO-Edit works on, as the model sees it, and what becomes of its matte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image

from mflux.errors import UsageError
from mflux.utils.image_util import ImageUtil, open_image
from mflux.utils.masks import read_mask, tell_what_it_selects

_GREY = (128, 128, 128)


def source_picture(image: Path | str, mask: Path | str | None = None, *, tell: bool = True) -> PIL.Image.Image:
    """A picture in RGB, grey where a mask is white, see `read_mask`.

    Args:
        tell: whether to warn of a mask that selects nothing or everything.

    Raises:
        ImageError: one of them cannot be read.
        UsageError: their sizes differ.
    """
    picture = ImageUtil.load_image(image)
    if mask is None:
        return picture
    white = read_mask(mask)
    if white.size != picture.size:
        raise UsageError(
            f"the mask has {white.width} x {white.height} pixels and the picture {picture.width} x {picture.height}: "
            "--mask-path wants one of the picture's size"
        )
    if tell:
        tell_what_it_selects(np.asarray(white) > 127, mask)
    return PIL.Image.composite(PIL.Image.new("RGB", picture.size, _GREY), picture, white)


def cut_out(image: Path | str, matte: PIL.Image.Image) -> PIL.Image.Image:
    """The picture at its full size, as transparent as its matte is dark."""
    picture = open_image(image).convert("RGB")
    picture.putalpha(matte.convert("L").resize(picture.size, PIL.Image.Resampling.LANCZOS))
    return picture
