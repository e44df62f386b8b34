"""Images as vision towers take them: what each `preprocessor_config.json` says.

Reference classes: transformers' `Qwen2VLImageProcessorPil` and `SiglipImageProcessor`, value for value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import PIL.Image

from mflux.backend import mx
from mflux.errors import ImageError
from mflux.models.common.component_config import ComponentConfig
from mflux.models.common.networks.vision import Grid

# The reference refuses longer images; each would be a single row of tokens.
_LARGEST_ASPECT = 200
_BICUBIC = 3


@dataclass(frozen=True)
class ImageProcessor(ComponentConfig):
    """Base: how far each channel is shifted, and by what it is divided."""

    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def check(self) -> str | None:
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or 0 in self.image_std:
            return "image_mean and image_std are not three numbers, or one divides by zero"
        return None

    def normalized(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels from 0 to 1 as the tower takes them, (…, 3) float32."""
        return (pixels - np.asarray(self.image_mean, np.float32)) / np.asarray(self.image_std, np.float32)


@dataclass(frozen=True)
class VLImageProcessor(ImageProcessor):
    """Images of the Qwen-VL line, shrunk or enlarged to whole tokens and cut into patches; defaults are
    Qwen-Image-Edit's."""

    min_pixels: int = 3136
    max_pixels: int = 12_845_056
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    resample: int = _BICUBIC
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: object = "preprocessor_config.json") -> Self:
        # transformers 5 writes the two sizes, which are numbers of pixels, under names of sides.
        size = values.get("size")
        if isinstance(size, Mapping):
            names = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}
            values = {ours: size[theirs] for theirs, ours in names.items() if theirs in size} | dict(values)
        return super().from_dict(values, source=source)

    def check(self) -> str | None:
        if min(self.patch_size, self.temporal_patch_size, self.merge_size, self.min_pixels) < 1:
            return "a size in it is below 1"
        if self.max_pixels < max(self.min_pixels, self.token**2):
            return f"max_pixels {self.max_pixels} is less than min_pixels, or than one token has"
        if self.resample != _BICUBIC:
            return f"resample {self.resample} is not built, only bicubic ({_BICUBIC})"
        return super().check()

    @property
    def token(self) -> int:
        """A token's side in pixels."""
        return self.patch_size * self.merge_size

    def size(self, width: int, height: int) -> tuple[int, int]:
        """The width and height that an image is shown in: whole tokens, of about its shape.

        Raises:
            ImageError: it is too long and narrow.
        """
        if max(width, height) > _LARGEST_ASPECT * min(width, height):
            raise ImageError(
                f"a picture of {width}x{height} is too long and narrow: one side may be at most {_LARGEST_ASPECT} "
                "times the other"
            )
        sides = [round(side / self.token) * self.token for side in (width, height)]
        if sides[0] * sides[1] > self.max_pixels:
            shrink = math.sqrt(width * height / self.max_pixels)
            sides = [max(self.token, math.floor(side / shrink / self.token) * self.token) for side in (width, height)]
        elif sides[0] * sides[1] < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (width * height))
            sides = [math.ceil(side * grow / self.token) * self.token for side in (width, height)]
        return sides[0], sides[1]

    def __call__(self, image: PIL.Image.Image) -> tuple[np.ndarray, Grid]:
        """The patches of an image in RGB, (N, channels · time · height · width) float32, in the order of
        `vision.patch_places`, and how many rows and columns of them there are."""
        width, height = self.size(*image.size)
        pixels = np.asarray(image.resize((width, height), PIL.Image.Resampling.BICUBIC), np.float32) / 255
        pixels = self.normalized(pixels)
        rows, columns = height // self.patch_size, width // self.patch_size
        merge, side = self.merge_size, self.patch_size
        cut = pixels.reshape(rows // merge, merge, side, columns // merge, merge, side, 3)
        # Row and column of a token, of a patch in it, channel, row and column of a pixel.
        patches = cut.transpose(0, 3, 1, 4, 6, 2, 5)[..., None, :, :]
        patches = np.repeat(patches, self.temporal_patch_size, axis=5)
        return patches.reshape(rows * columns, -1), (rows, columns)

    def batch(self, images: Sequence[PIL.Image.Image]) -> tuple[mx.array, list[Grid]]:
        """The patches of several images, one after the other, and the grid of each."""
        seen = [self(image) for image in images]
        return mx.array(np.concatenate([patches for patches, _ in seen])), [grid for _, grid in seen]
