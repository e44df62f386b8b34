"""Depth Pro: how far away everything in a photo is, in metres, and the camera's focal length."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image

from mflux.backend import mx
from mflux.checkpoints.quantization import Quantization
from mflux.models.common.controls.depth_pro import weights
from mflux.models.common.controls.depth_pro.network import resize_bilinear
from mflux.utils.picture_files import as_rgb, open_image

# The nearest and farthest inverse distances, in 1/m, that metric depth tells apart.
_INVERSE_RANGE = (1e-4, 1e4)


@dataclass
class DepthResult:
    """What Depth Pro says about one photo.

    Attributes:
        depth_image: canonical inverse depth, stretched over 0 to 255 and then resized to the photo: near is bright.
        depth_array: canonical inverse depth as the network gives it, (1, 1, side, side) float32. It is the inverse
            distance in 1/m that would be true if the focal length were the picture's width.
        min_depth: the smallest value of `depth_array`, that of the farthest point.
        max_depth: the largest value of `depth_array`, that of the nearest point.
        metric_depth: the distance in metres, (height, width) float32 at the photo's size, between 0.0001 and 10,000;
            None for a network without a field-of-view head.
        focal_length_px: the focal length in pixels of the photo, None for a network without a field-of-view head.
    """

    depth_image: Image.Image
    depth_array: mx.array
    min_depth: float
    max_depth: float
    metric_depth: mx.array | None = None
    focal_length_px: float | None = None

    def relative_depth(self) -> np.ndarray:
        """`depth_image` before it is rounded: (height, width) float32 from 0, farthest, to 1, nearest."""
        return _relative(self.depth_array, self.min_depth, self.max_depth, self.depth_image.size)


class DepthPro:
    """Apple's monocular depth network.

    Source: Bochkovskii et al. 2024, https://arxiv.org/abs/2410.02073.

    Args:
        quantize: 3, 4, 5, 6 or 8 bits for the weights of linear layers, quantized while they load. The convolutions,
            which are most of the work behind the three encoders, stay as they are.
        model_path: a `.pt` or `.safetensors` file, a folder or Hugging Face repository in the layout of
            apple/DepthPro-hf; by default Apple's published file, fetched once into mflux's cache folder.

    Raises:
        UsageError: no such number of bits.
        CheckpointError: the weights are missing, damaged or not Depth Pro's.
        DownloadError: the weights cannot be fetched.
    """

    def __init__(self, quantize: int | None = None, model_path: str | Path | None = None):
        Quantization.asked(quantize)  # before anything is fetched
        self._network, self._preprocessing = weights.load(weights.locate(model_path), quantize)

    def create_depth_map(self, image_path: str | Path) -> DepthResult:
        """Estimate the depth of a photo, turned as its EXIF orientation says.

        Raises:
            ImageError: there is no such file, or it is not a picture that can be read.
        """
        return self.depth_of(open_photo(image_path))

    def depth_of(self, photo: Image.Image) -> DepthResult:
        """The same of an RGB picture that is open already."""
        depth, degrees = self._network(self._pixels(photo))
        depth = depth[:, None].astype(mx.float32)
        low, high = cast(float, depth.min().item()), cast(float, depth.max().item())

        metric = focal_length = None
        if degrees is not None:
            # The photo's width by its focal length; 1/f alone would be undefined for a field of view of zero.
            width_by_focal = 2 * math.tan(math.radians(cast(float, degrees.item())) / 2)
            focal_length = photo.width / width_by_focal if width_by_focal else math.inf
            inverse = resize_bilinear(depth[0, 0][None, :, :, None] * width_by_focal, (photo.height, photo.width))
            metric = 1 / mx.clip(inverse[0, :, :, 0], *_INVERSE_RANGE)
        shades = np.rint(_relative(depth, low, high, photo.size) * 255).astype(np.uint8)
        return DepthResult(Image.fromarray(shades), depth, low, high, metric, focal_length)

    def _pixels(self, photo: Image.Image) -> mx.array:
        """(1, side, side, 3), normalised. Resizing first gives the same and touches fewer numbers."""
        settings = self._preprocessing
        side = settings.side(self._network.config)
        pixels = resize_bilinear(mx.array(np.asarray(photo))[None], (side, side)) * settings.rescale_factor
        pixels = (pixels - mx.array(settings.image_mean)) / mx.array(settings.image_std)
        return pixels.astype(self._network.head.layers[0].weight.dtype)


def open_photo(path: str | Path) -> Image.Image:
    """A photo as 8-bit RGB, upright.

    Raises:
        ImageError: there is no such file, or it is not a picture that can be read.
    """
    return as_rgb(open_image(path), on_white=False)


def _relative(depth: mx.array, low: float, high: float, size: tuple[int, int]) -> np.ndarray:
    """(1, 1, side, side) → (height, width), stretched to 0…1; a flat map is all zero."""
    stretched = (np.array(depth)[0, 0] - low) / ((high - low) or 1.0)
    # Bicubic, as mflux resizes this map, overshoots at edges.
    resized = Image.fromarray(stretched.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    return np.clip(np.asarray(resized), 0, 1)
