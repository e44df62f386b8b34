"""Pictures in and out: files, PIL images, and the arrays that models work on."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image

from mflux.backend import mx
from mflux.errors import MfluxError
from mflux.utils.atomic_files import free_name, write_atomically
from mflux.utils.box_values import AbsoluteBoxValues, BoxValues
from mflux.utils.generated_image import GeneratedImage
from mflux.utils.paths import user_path
from mflux.utils.picture_files import as_rgb, check_output, open_image, oriented_size, save_picture

if TYPE_CHECKING:
    from mflux.models.common.config.config import Config

# What commands and programs take from here.
__all__ = ["ImageUtil", "check_output", "open_image", "oriented_size", "write_atomically"]

_LANCZOS = PIL.Image.Resampling.LANCZOS


class ImageUtil:
    """mflux's helpers for pictures, at mflux's path.

    Attributes:
        embed_metadata_enabled: a program's way to have no image carry its settings, whoever saves it.
    """

    embed_metadata_enabled = True

    @staticmethod
    def resolve_output_path(path: str | Path, overwrite: bool = False) -> Path:
        """`path` if it is free or may be overwritten, else the first free of `name_1.png`, `name_2.png`, …"""
        path = user_path(path)
        return path if overwrite else free_name(path)

    @staticmethod
    def to_image(
        decoded_latents: mx.array,
        config: Config,
        seed: int,
        prompt: str,
        quantization: int | None,
        generation_time: float,
        lora_paths: list[str] | None = None,
        lora_scales: list[float] | None = None,
        controlnet_image_path: str | Path | None = None,
        image_path: str | Path | None = None,
        image_paths: list[str] | list[Path] | None = None,
        redux_image_paths: list[str] | list[Path] | None = None,
        redux_image_strengths: list[float] | None = None,
        image_strength: float | None = None,
        masked_image_path: str | Path | None = None,
        depth_image_path: str | Path | None = None,
        concept_heatmap: Any | None = None,
        negative_prompt: str | None = None,
        init_metadata: dict | None = None,
        pid_decode: bool = False,
        pid_degrade_sigma: float = 0.0,
        generation_parameters: dict | None = None,
    ) -> GeneratedImage:
        """A decoder's output (1, 3, H, W) in [-1, 1] as a picture that knows how it was made.

        Raises:
            MfluxError: it holds numbers that are not finite.
        """
        return GeneratedImage(
            image=ImageUtil.to_pil(decoded_latents),
            model_config=config.model_config,
            seed=seed,
            prompt=prompt,
            steps=config.num_inference_steps,
            guidance=config.guidance,
            precision=config.precision,
            quantization=quantization,
            generation_time=generation_time,
            lora_paths=lora_paths,
            lora_scales=lora_scales,
            height=config.height,
            width=config.width,
            controlnet_image_path=controlnet_image_path,
            controlnet_strength=config.controlnet_strength,
            image_path=image_path,
            image_paths=image_paths,
            image_strength=image_strength,
            masked_image_path=masked_image_path,
            depth_image_path=depth_image_path,
            redux_image_paths=redux_image_paths,
            redux_image_strengths=redux_image_strengths,
            concept_heatmap=concept_heatmap,
            negative_prompt=negative_prompt,
            init_metadata=init_metadata,
            pid_decode=pid_decode,
            pid_degrade_sigma=pid_degrade_sigma,
            generation_parameters=generation_parameters,
        )

    @staticmethod
    def to_composite_image(generated_images: list[GeneratedImage]) -> PIL.Image.Image:
        """Pictures side by side."""
        images = [generated.image for generated in generated_images]
        return _side_by_side(images)

    @staticmethod
    def to_pil(decoded_latents: mx.array) -> PIL.Image.Image:
        """(1, 3, H, W), or (1, 3, 1, H, W), in [-1, 1] to an 8-bit picture; what lies outside is clipped.

        Raises:
            MfluxError: it holds numbers that are not finite, which would come out as black.
        """
        array = decoded_latents.astype(mx.float32)
        if broken := array.size - mx.isfinite(array).sum().item():
            raise MfluxError(
                f"the decoded picture holds {broken:,} numbers of {array.size:,} that are not finite, so there is no "
                "picture: the model's weights or a LoRA are damaged, or a LoRA's scale is too large"
            )
        if array.ndim == 5:
            array = array.squeeze(2)
        pixels = mx.clip(array[0].transpose(1, 2, 0) / 2 + 0.5, 0, 1)
        return PIL.Image.fromarray(np.array(mx.round(pixels * 255).astype(mx.uint8)))

    @staticmethod
    def to_array(image: PIL.Image.Image, is_mask: bool = False) -> mx.array:
        """A picture as (1, channels, H, W): in [-1, 1], or 0 and 1 with the border at one half for a mask."""
        pixels = np.asarray(image, dtype=np.float32) / 255.0
        if pixels.ndim == 2:
            pixels = pixels[..., None]
        array = mx.array(pixels.transpose(2, 0, 1)[None])
        return mx.where(array < 0.5, 0.0, 1.0) if is_mask else 2.0 * array - 1.0

    @staticmethod
    def load_image(
        image_or_path: PIL.Image.Image | str | bytes | os.PathLike, composite_alpha: bool = True
    ) -> PIL.Image.Image:
        """A picture in RGB, turned as EXIF says, what is transparent on white (unless `composite_alpha` is false, as
        for masks, where white means something).

        Raises:
            ImageError: it cannot be read.
        """
        return as_rgb(open_image(image_or_path), on_white=composite_alpha)

    @staticmethod
    def scale_to_dimensions(image: PIL.Image.Image, target_width: int, target_height: int) -> PIL.Image.Image:
        """The picture at that size (Lanczos); itself if it has it."""
        size = (target_width, target_height)
        return image if image.size == size else image.resize(size, _LANCZOS)

    @staticmethod
    def expand_image(
        image: PIL.Image.Image,
        box_values: AbsoluteBoxValues | None = None,
        top: int | str = 0,
        right: int | str = 0,
        bottom: int | str = 0,
        left: int | str = 0,
        fill_color: tuple = (255, 255, 255),
    ) -> PIL.Image.Image:
        """The picture with a margin, in pixels or percent."""
        box = box_values or BoxValues(top, right, bottom, left).normalize_to_dimensions(*image.size)
        size = (image.width + box.left + box.right, image.height + box.top + box.bottom)
        expanded = PIL.Image.new(image.mode, size, fill_color)
        expanded.paste(image, (box.left, box.top))
        return expanded

    @staticmethod
    def create_outpaint_mask_image(
        orig_width: int, orig_height: int, **create_bordered_image_kwargs: Any
    ) -> PIL.Image.Image:
        """A mask for `expand_image`: the margin white, to be painted; the picture black, to be kept."""
        return ImageUtil.create_bordered_image(
            orig_width,
            orig_height,
            border_color=(255, 255, 255),
            content_color=(0, 0, 0),
            **create_bordered_image_kwargs,
        )

    @staticmethod
    def create_bordered_image(
        orig_width: int,
        orig_height: int,
        border_color: tuple,
        content_color: tuple,
        box_values: AbsoluteBoxValues | None = None,
        top: int | str = 0,
        right: int | str = 0,
        bottom: int | str = 0,
        left: int | str = 0,
    ) -> PIL.Image.Image:
        """A plain rectangle of that size inside a margin."""
        content = PIL.Image.new("RGB", (orig_width, orig_height), content_color)
        return ImageUtil.expand_image(content, box_values, top, right, bottom, left, fill_color=border_color)

    @staticmethod
    def preprocess_for_model(
        image: PIL.Image.Image,
        target_size: tuple = (384, 384),
        mean: Iterable[float] = (0.5, 0.5, 0.5),
        std: Iterable[float] = (0.5, 0.5, 0.5),
        resample: int = _LANCZOS,
    ) -> mx.array:
        """Resized to (width, height) and normalised: (1, 3, H, W)."""
        return ImageUtil.preprocess_for_depth_pro(image.resize(target_size, resample), mean=mean, std=std)[None]

    @staticmethod
    def preprocess_for_depth_pro(
        image: PIL.Image.Image,
        target_size: tuple = (384, 384),
        mean: Iterable[float] = (0.5, 0.5, 0.5),
        std: Iterable[float] = (0.5, 0.5, 0.5),
        resample: int = _LANCZOS,
    ) -> mx.array:
        """Normalised at its own size, (3, H, W); Depth Pro resizes later, so `target_size` and `resample` say nothing
        here, as in mflux."""
        pixels = np.asarray(image, dtype=np.float32) / 255.0
        normalised = (pixels - np.array(list(mean), np.float32)) / np.array(list(std), np.float32)
        return mx.array(normalised.transpose(2, 0, 1))

    @staticmethod
    def save_image(
        image: PIL.Image.Image,
        path: str | Path,
        metadata: dict | None = None,
        export_json_metadata: bool = False,
        overwrite: bool = False,
        embed_metadata: bool = True,
    ) -> Path:
        """Write a picture, its settings inside it (if `embed_metadata`), and if asked beside it as
        `name.metadata.json`. Complete or absent; existing files are left alone unless `overwrite`. Settings never cost
        the picture.

        Returns:
            Where the picture went.

        Raises:
            OutputError: it cannot be written.
            UsageError: the name's ending stands for no picture format.
        """
        return save_picture(
            image,
            path,
            metadata,
            export_json_metadata=export_json_metadata,
            overwrite=overwrite,
            embed_metadata=embed_metadata,
        )

    @staticmethod
    def _denormalize(images: mx.array) -> mx.array:
        """From -1 to 1 to 0 to 1, as mflux 0.24 has it."""
        return mx.clip(images / 2 + 0.5, 0, 1)

    @staticmethod
    def _to_numpy(images: mx.array) -> np.ndarray:
        """(B, C, H, W) → (B, H, W, C), float32, as mflux 0.24 has it."""
        return np.array(images.astype(mx.float32)).transpose(0, 2, 3, 1)


def _side_by_side(images: list[PIL.Image.Image]) -> PIL.Image.Image:
    strip = PIL.Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)))
    x = 0
    for image in images:
        strip.paste(image, (x, 0))
        x += image.width
    return strip
