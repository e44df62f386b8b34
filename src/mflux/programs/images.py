"""mflux 0.24's helpers for images, at its names."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image

from mflux.backend import mx
from mflux.models.common.controls.canny import canny
from mflux.models.common.networks.autoencoders import tiling
from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator
from mflux.utils.image_util import ImageUtil, open_image, oriented_size

__all__ = ["ControlnetUtil", "VAETiler", "open_oriented", "oriented_size"]


def open_oriented(image_or_path: PIL.Image.Image | str | bytes | os.PathLike) -> PIL.Image.Image:
    """An image, turned as EXIF says, in the mode that it has.

    Raises:
        ImageError: it cannot be read.
    """
    return open_image(image_or_path)


class ControlnetUtil:
    """What a ControlNet of FLUX.1 is shown."""

    @staticmethod
    def preprocess_canny(img: PIL.Image.Image) -> PIL.Image.Image:
        """The edges of an image, white on black, in RGB."""
        return PIL.Image.fromarray(canny(np.asarray(img.convert("RGB")))).convert("RGB")

    @staticmethod
    def scale_image(height: int, width: int, img: PIL.Image.Image) -> PIL.Image.Image:
        """The image at that size."""
        return ImageUtil.scale_to_dimensions(img, width, height)

    @staticmethod
    def encode_image(
        vae: Any, height: int, width: int, controlnet_image_path: Any, is_canny: bool
    ) -> tuple[mx.array, PIL.Image.Image]:
        """The image as latents (1, L, 64), and as it is shown. Those of edges are not scaled as the autoencoder's are.

        Raises:
            ImageError: it cannot be read.
        """
        image = ControlnetUtil.scale_image(height, width, ImageUtil.load_image(controlnet_image_path))
        image = ControlnetUtil.preprocess_canny(image) if is_canny else image
        latents = vae.encode(ImageUtil.to_array(image))
        if is_canny:
            latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        return FluxLatentCreator.pack_latents(latents, height, width), image

    # mflux 0.24's own names.
    _preprocess_canny, _scale_image = preprocess_canny, scale_image


class VAETiler:
    """Large images in overlapping tiles, with an autoencoder of a program's own. Tiles are squares: of two sizes, in
    pixels, the smaller counts."""

    @staticmethod
    def encode_image_tiled(
        *,
        image: mx.array,
        encode_fn: Callable[[mx.array], mx.array],
        latent_channels: int = 0,
        tile_size: tuple[int, int] = (512, 512),
        tile_overlap: tuple[int, int] = (64, 64),
        spatial_scale: int = 8,
    ) -> mx.array:
        """(1, 3, H, W) → (1, C, 1, h, w). `encode_fn` takes (1, 3, 1, H, W), and gives latents with or without the
        frame; `latent_channels` follows from what it gives."""
        tile, overlap = min(tile_size) // spatial_scale, min(tile_overlap) // spatial_scale
        latents = tiling.in_tiles(
            lambda part: _without_frame(encode_fn(part[:, :, None])), image, tile, overlap, into=spatial_scale, out=1
        )
        return latents[:, :, None]

    @staticmethod
    def decode_image_tiled(
        *,
        latent: mx.array,
        decode_fn: Callable[[mx.array], mx.array],
        tile_size: tuple[int, int] = (512, 512),
        tile_overlap: tuple[int, int] = (64, 64),
        spatial_scale: int = 8,
    ) -> mx.array:
        """(1, C, 1, h, w) → (1, 3, H, W). `decode_fn` takes the former, and gives an image, with the frame or not."""
        tile, overlap = min(tile_size) // spatial_scale, min(tile_overlap) // spatial_scale
        return tiling.in_tiles(
            lambda part: _without_frame(decode_fn(part[:, :, None])),
            latent[:, :, 0],
            tile,
            overlap,
            into=1,
            out=spatial_scale,
        )


def _without_frame(array: mx.array) -> mx.array:
    return array[:, :, 0] if array.ndim == 5 else array
