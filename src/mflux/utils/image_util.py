"""Pictures in and out: files, PIL images, and the arrays that models work on."""

from __future__ import annotations

import io
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageOps

from mflux.backend import mx
from mflux.errors import ImageError, OutputError, UsageError
from mflux.utils.box_values import AbsoluteBoxValues, BoxValues
from mflux.utils.metadata_builder import MetadataBuilder

if TYPE_CHECKING:
    from mflux.models.common.config.config import Config
    from mflux.utils.generated_image import GeneratedImage

log = logging.getLogger(__name__)
_SIDECAR = ".metadata.json"
_LANCZOS = PIL.Image.Resampling.LANCZOS


def open_image(source: PIL.Image.Image | str | bytes | os.PathLike) -> PIL.Image.Image:
    """A picture turned the way its EXIF orientation says it is to be seen.

    Raises:
        ImageError: it does not exist, or is not a picture that can be decoded.
    """
    if isinstance(source, PIL.Image.Image):
        return PIL.ImageOps.exif_transpose(source)
    try:
        with PIL.Image.open(source) as image:
            image.load()
            return PIL.ImageOps.exif_transpose(image)
    except Exception as error:
        raise _unreadable(source, error) from None


def oriented_size(source: str | bytes | os.PathLike) -> tuple[int, int]:
    """Width and height as displayed, from the file's header alone.

    Raises:
        ImageError: as `open_image`.
    """
    try:
        with PIL.Image.open(source) as image:
            width, height = image.size
            sideways = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except Exception as error:
        raise _unreadable(source, error) from None
    return (height, width) if sideways else (width, height)


def _unreadable(source: object, error: Exception) -> ImageError:
    name = os.fsdecode(source) if isinstance(source, (str, bytes, os.PathLike)) else source
    if isinstance(error, FileNotFoundError):
        return ImageError(f"the image {name} does not exist: check its path")
    if isinstance(error, PIL.UnidentifiedImageError):
        return ImageError(f"the image {name} is not a picture that can be read: give a PNG, JPEG or WebP")
    reason = getattr(error, "strerror", None) or error
    return ImageError(f"the image {name} cannot be read ({reason}): check the file, or give another")


def check_output(path: str | Path) -> None:
    """Make sure that a picture can be written to `path`, before any work is done for it; creates its folder.

    Raises:
        UsageError: the name has no ending that stands for a format that pictures can be written in.
        OutputError: the folder cannot be created or written to.
    """
    path = Path(path)
    if not path.suffix:
        raise UsageError(f"cannot write a picture to {path}: its name has no ending; use .png, .jpg or .webp")
    try:
        # Some formats can only be read, or hold no colours.
        PIL.Image.new("RGB", (16, 16)).save(io.BytesIO(), format=_format_of(path))
    except (KeyError, ValueError, OSError, NotImplementedError):
        raise UsageError(
            f"cannot write a picture to {path}: {path.suffix!r} is no format for that; use .png, .jpg or .webp"
        ) from None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except FileExistsError:
        raise OutputError(f"cannot write to the folder {path.parent}: it is a file; choose another folder") from None
    except OSError as error:
        raise OutputError(
            f"cannot write to the folder {path.parent}: {error.strerror or error}; choose another folder"
        ) from None
    try:
        path.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}; choose another name") from None


def _format_of(path: Path) -> str:
    """PIL's name for the format that an ending stands for, a `KeyError` if for none."""
    return PIL.Image.registered_extensions()[path.suffix.lower()]


def write_atomically(path: Path, write, *, overwrite: bool, beside: str | None = None) -> Path:
    """Let `write(file)` fill a file that appears under its name only when complete.

    Args:
        path: the name.
        write: called with a binary file.
        overwrite: replace what has that name.
        beside: an ending that must be free as well, for what goes with the file.

    Returns:
        Where it went: `path`, or the next free name beside it (`name_1.png`) unless `overwrite`.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".mflux-", suffix=".partial")
        try:
            with os.fdopen(handle, "wb") as file:
                write(file)
            umask = os.umask(0)
            os.umask(umask)
            Path(temporary).chmod(0o666 & ~umask)
            if overwrite:
                Path(temporary).replace(path)
                return path
            return _move_to_free_name(Path(temporary), path, beside)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from None


def _move_to_free_name(temporary: Path, wanted: Path, beside: str | None) -> Path:
    names = _numbered(wanted)
    while True:
        path = next(names)
        if os.path.lexists(path) or (beside and os.path.lexists(path.with_suffix(beside))):
            continue
        try:
            # A link fails where a rename would replace what another process has put there meanwhile.
            os.link(temporary, path)
        except FileExistsError:
            continue
        except OSError:  # a file system without links
            temporary.replace(path)
        return path


def _numbered(path: Path) -> Iterator[Path]:
    """name.png, name_1.png, name_2.png, …"""
    yield path
    for number in itertools.count(1):
        yield path.with_name(f"{path.stem}_{number}{path.suffix}")


class ImageUtil:
    """mflux's helpers for pictures, at mflux's path."""

    @staticmethod
    def resolve_output_path(path: str | Path, overwrite: bool = False) -> Path:
        """`path` if it is free or may be overwritten, else the first free of `name_1.png`, `name_2.png`, …"""
        if overwrite:
            return Path(path)
        return next(name for name in _numbered(Path(path)) if not os.path.lexists(name))

    @staticmethod
    def to_image(
        decoded_latents: mx.array,
        config: Config,
        seed: int,
        prompt: str,
        quantization: int,
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
        """A decoder's output (1, 3, H, W) in [-1, 1] as a picture that knows how it was made."""
        from mflux.utils.generated_image import GeneratedImage

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
        """(1, 3, H, W), or (1, 3, 1, H, W), in [-1, 1] to an 8-bit picture; what lies outside is clipped."""
        array = decoded_latents.astype(mx.float32)
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
        image = open_image(image_or_path)
        if composite_alpha and image.has_transparency_data:
            # Pillow has no way from premultiplied grey straight to RGBA.
            image = image.convert("LA") if image.mode == "La" else image
            image = image.convert("RGBA")
            image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")

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
    def create_outpaint_mask_image(orig_width: int, orig_height: int, **create_bordered_image_kwargs):
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
        """Write a picture, its settings inside it (unless `embed_metadata` is false), and if asked the settings
        beside it as `name.metadata.json`. Complete or absent; existing files are left alone unless `overwrite`.

        Returns:
            Where the picture went.

        Raises:
            OutputError: it cannot be written.
            UsageError: the name's ending stands for no picture format.
        """
        path = Path(path)
        check_output(path)
        picture_format = _format_of(path)
        embedded = {}
        if metadata is not None and embed_metadata:
            embedded = MetadataBuilder.save_arguments(metadata, picture_format)

        def write(file):
            try:
                image.save(file, format=picture_format, **embedded)
            except ValueError as error:
                if not embedded:
                    raise OutputError(f"cannot write {path}: {error}") from None
                # A JPEG holds 64 KB of settings; the picture is worth more than they are.
                log.warning("the settings do not fit into %s (%s): it is written without them", path, error)
                file.seek(0)
                file.truncate()
                image.save(file, format=picture_format)

        with_sidecar = export_json_metadata and metadata is not None
        path = write_atomically(path, write, overwrite=overwrite, beside=_SIDECAR if with_sidecar else None)
        if with_sidecar:
            text = json.dumps(metadata, indent=4, ensure_ascii=False)
            write_atomically(path.with_suffix(_SIDECAR), lambda file: file.write(text.encode()), overwrite=overwrite)
        return path


def _side_by_side(images: list[PIL.Image.Image]) -> PIL.Image.Image:
    strip = PIL.Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)))
    x = 0
    for image in images:
        strip.paste(image, (x, 0))
        x += image.width
    return strip
