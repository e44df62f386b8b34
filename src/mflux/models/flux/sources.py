"""The pictures that FLUX.1's variants draw from, as their models want them."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import PIL.Image

from mflux.backend import mx
from mflux.errors import UsageError
from mflux.models.common.sizes import MEGAPIXEL, down, shrunk
from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator
from mflux.utils.image_util import ImageUtil, oriented_size
from mflux.utils.masks import read_mask, tell_of_its_shape, tell_what_it_selects
from mflux.utils.scale_factor import GRID

log = logging.getLogger(__name__)

AnyPath = str | bytes | os.PathLike


def needed(path: AnyPath | None, option: str) -> AnyPath:
    """
    Raises:
        UsageError: there is no picture.
    """
    if path is None:
        raise UsageError(f"this model draws from a picture: say which with {option}")
    return path


def fitted_size(path: AnyPath) -> tuple[int, int]:
    """Width and height to draw at: the picture's, shrunk to about a megapixel, with a warning, if it is larger."""
    width, height = oriented_size(path)
    if width * height <= MEGAPIXEL:
        return width, height
    fitted = shrunk((width, height), MEGAPIXEL, down(GRID))
    log.warning(
        "%s has %d x %d pixels; the model was made for about a million, so %d x %d are drawn: say --width and --height "
        "for another size",
        path, width, height, *fitted,
    )  # fmt: skip
    return fitted


def picture(image: Path | str | PIL.Image.Image, width: int, height: int) -> PIL.Image.Image:
    """A picture in RGB at that size."""
    return ImageUtil.scale_to_dimensions(ImageUtil.load_image(image), width, height)


def mask(
    image: Path | str | PIL.Image.Image, width: int, height: int, of: Path | str | PIL.Image.Image | None = None
) -> mx.array:
    """A mask at that size: (1, 1, height, width), 1 where something is to be painted, and 0 where not, see
    `read_mask`; `of` is the picture that it belongs to."""
    selected = read_mask(image)
    name = image if isinstance(image, str | os.PathLike) else "given"
    if of is not None:
        tell_of_its_shape(selected.size, of.size if isinstance(of, PIL.Image.Image) else oriented_size(of), name)
    found = ImageUtil.to_array(ImageUtil.scale_to_dimensions(selected, width, height), is_mask=True)
    tell_what_it_selects(np.array(found), name)
    return found


def pack_mask(mask: mx.array) -> mx.array:
    """(1, 1, H, W) → (1, H/16 · W/16, 256): the 16 x 16 pixels of each token, ordered as the channels of a latent pixel
    are that would hold 8 x 8 of them."""
    height, width = mask.shape[-2:]
    latent = mask.reshape(1, height // 8, 8, width // 8, 8).transpose(0, 2, 4, 1, 3)
    return FluxLatentCreator.pack_latents(latent.reshape(1, 64, height // 8, width // 8), height, width, 64)
