"""What denoising starts from: noise, or a picture with noise over it; at mflux 0.24's path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mflux.backend import mx, nn
from mflux.models.common.networks.autoencoders import tiling
from mflux.models.common.networks.autoencoders.tiling import TilingConfig
from mflux.utils.image_util import ImageUtil


@dataclass
class Img2Img:
    """Where the latents come from.

    Attributes:
        vae: encodes the picture.
        latent_creator: has `create_noise` and `pack_latents`, see `FluxLatentCreator`.
        sigmas: the schedule's.
        init_time_step: the first step that is taken; its sigma is how much noise lies over the picture.
        image_path: the picture; None for noise alone.
        tiling_config: whether the picture is encoded in tiles.
    """

    vae: nn.Module
    latent_creator: Any
    sigmas: mx.array
    init_time_step: int
    image_path: str | Path | None
    tiling_config: TilingConfig | None = None


class LatentCreator:
    @staticmethod
    def create_for_txt2img_or_img2img(seed: int, height: int, width: int, img2img: Img2Img) -> mx.array:
        """The latents to start from, packed as the transformer takes them."""
        noise = img2img.latent_creator.create_noise(seed, height, width)
        if img2img.image_path is None:
            return noise
        encoded = LatentCreator.encode_image(
            img2img.vae, img2img.image_path, height, width, tiling_config=img2img.tiling_config
        )
        packed = img2img.latent_creator.pack_latents(encoded, height, width)
        return LatentCreator.add_noise_by_interpolation(packed, noise, img2img.sigmas[img2img.init_time_step])

    @staticmethod
    def encode_image(
        vae: nn.Module,
        image_path: Any,
        height: int,
        width: int,
        tiling_config: TilingConfig | None = None,
    ) -> mx.array:
        """A picture, resized, as latents (1, C, height / scale, width / scale), float32.

        Raises:
            ImageError: it cannot be read.
        """
        picture = ImageUtil.scale_to_dimensions(ImageUtil.load_image(image_path), width, height)
        return tiling.encode(vae, ImageUtil.to_array(picture), tiling_config).astype(mx.float32)

    @staticmethod
    def add_noise_by_interpolation(clean: mx.array, noise: mx.array, sigma: float | mx.array) -> mx.array:
        """What lies at that noise level on the straight path from `clean` (0) to `noise` (1)."""
        return (1 - sigma) * clean + sigma * noise
