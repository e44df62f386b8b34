"""Reference images as FLUX.2 and FLUX.3 see them: smaller if they are large, in whole squares of latents."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mflux.errors import ImageError
from mflux.models.common.latent_creator.tokens import SIDE
from mflux.models.common.sizes import MEGAPIXEL, shrunk

if TYPE_CHECKING:
    import PIL.Image


def reference_picture(picture: PIL.Image.Image, source: object) -> PIL.Image.Image:
    """A picture as the model sees it: made smaller if it is large, and its middle, in whole squares of 16 × 16.

    Raises:
        ImageError: nothing is left of it.
    """
    from PIL import Image

    size = width, height = shrunk(picture.size, MEGAPIXEL, int)
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    kept_width, kept_height = width - width % SIDE, height - height % SIDE
    if not (kept_width and kept_height):
        raise ImageError(f"{source} is too small or too narrow: a picture to edit needs {SIDE} pixels on each side")
    left, top = (width - kept_width) // 2, (height - kept_height) // 2
    return picture.crop((left, top, left + kept_width, top + kept_height))
