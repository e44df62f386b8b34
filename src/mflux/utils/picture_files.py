"""Picture files in and out: which formats, how many bits, which way up, and the settings that go with them."""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL.Image
import PIL.ImageOps
from PIL import ImageCms

from mflux.errors import ImageError, OutputError, UsageError
from mflux.utils.atomic_files import Temporary, write_atomically
from mflux.utils.given_image import GivenImage
from mflux.utils.metadata_builder import MetadataBuilder
from mflux.utils.paths import recorded_file, user_path

log = logging.getLogger(__name__)

# The only formats whose readers are let at a file, whatever it is called: Pillow knows forty more, among them some
# that start other programs (EPS) or that few have looked at. JPEG brings MPO, which cameras write, with it.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM")
SIDECAR = ".metadata.json"
# Endings of names of files that can hold how opaque pixels are, and formats that can say what colours they mean.
TRANSPARENT = (".png", ".webp", ".tif", ".tiff", ".avif")
_PROFILED = ("PNG", "JPEG", "WEBP", "TIFF", "AVIF", "MPO")

_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
_WHITE_IS_ZERO, _PHOTOMETRIC, _BITS_PER_SAMPLE, _SAMPLE_FORMAT = 0, 262, 258, 339

# At a time, where pixels become larger on their way.
_STRIP_PIXELS = 1 << 18
# Cameras and programs write up to ten. Markers: of a scan, of the end, and those without a length.
_MOST_SCANS = 100
_SCAN, _END_OF_JPEG, _ALONE = 0xDA, 0xD9, frozenset((0xFF, 0x01, *range(0xD0, 0xD9)))
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)

# A path, a file that is open, or an image that a program hands over.
Source = str | bytes | os.PathLike | BinaryIO | GivenImage


@contextmanager
def opened(source: Source) -> Iterator[PIL.Image.Image]:
    """A picture file, its header read and its pixels not; errors of the block's own come out as they are.

    Raises:
        ImageError: there is no such file, it is no picture in one of `FORMATS`, or too large to be decoded.
        UsageError: the name is none that a file can have.
    """
    if isinstance(source, GivenImage):
        contents = source.source()
        if isinstance(contents, PIL.Image.Image):
            yield contents
            return
        with _image(contents, source) as image:
            yield image
        return
    if not isinstance(source, (str, bytes, os.PathLike)):
        with _image(source, source) as image:
            yield image
        return
    path = user_path(source)
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            # Not opened at all: a pipe would wait for ever.
            if stat.S_ISDIR(found.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            raise OSError(errno.EINVAL, "it is a pipe, a socket or a device")
        if not found.st_size:
            raise ImageError(f"the image {path} is empty: fetch it again, or give another")
        file = path.open("rb")
    except OSError as error:
        raise unreadable(path, error) from None
    with file, _image(file, path) as image:
        yield image


@contextmanager
def _image(file: BinaryIO, name: object) -> Iterator[PIL.Image.Image]:
    PIL.Image.init()
    try:
        image = PIL.Image.open(file, formats=[kind for kind in FORMATS if kind in PIL.Image.OPEN])
    except PIL.UnidentifiedImageError:
        file.seek(0)
        what = _what_else(file.read(512))
        raise ImageError(f"the image {name} is {what}") from None
    except Exception as error:
        raise unreadable(name, error) from None
    with image:
        _check_scans(image, file, name)
        yield image


def _check_scans(image: PIL.Image.Image, file: BinaryIO, name: object) -> None:
    """
    Raises:
        ImageError: a JPEG is small, and more work than any picture.
    """
    if image.format in ("JPEG", "MPO") and _scans(file) > _MOST_SCANS:
        raise ImageError(
            f"the image {name} comes in more than {_MOST_SCANS} scans, each of which is a whole picture's work: save "
            "it anew with another program"
        )


def _scans(file: BinaryIO) -> int:
    """How often a JPEG goes over its picture, counted by its markers; one more than `_MOST_SCANS` where it is more."""
    before, scans = file.tell(), 0
    try:
        place = 2
        while scans <= _MOST_SCANS:
            file.seek(place)
            head = file.read(4)
            if len(head) < 4 or head[0] != 0xFF or head[1] == _END_OF_JPEG:
                break
            if head[1] in _ALONE:
                # Without a length: it is filled up before the marker, or restarts.
                place += 1 if head[1] == 0xFF else 2
                continue
            place += 2 + int.from_bytes(head[2:], "big")
            if head[1] == _SCAN:
                scans += 1
                place = _next_marker(file, place)
    finally:
        file.seek(before)
    return scans


def _next_marker(file: BinaryIO, place: int) -> int:
    """Where the next marker stands, behind a scan's data, in which bytes of 255 are followed by a zero."""
    while True:
        file.seek(place)
        data = file.read(1 << 20)
        if found := _MARKER.search(data):
            return place + found.start()
        if len(data) < 2:
            return place + len(data)
        place += len(data) - 1


def _what_else(head: bytes) -> str:
    if head.startswith(b"version https://git-lfs"):
        return "only Git LFS's pointer to a picture: fetch the file itself (git lfs pull)"
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "a web page and not a picture: download the picture itself"
    return "not a picture that can be read: give a PNG, JPEG or WebP"


def unreadable(source: object, error: Exception) -> ImageError:
    if isinstance(error, FileNotFoundError):
        return ImageError(f"the image {source} does not exist: check its path")
    reason = getattr(error, "strerror", None) or error
    return ImageError(f"the image {source} cannot be read ({reason}): check the file, or give another")


def open_image(source: PIL.Image.Image | Source) -> PIL.Image.Image:
    """A picture of eight bits a channel, turned the way its EXIF orientation says it is to be seen.

    Of several frames it is the first. Deeper pixels are scaled, see `eight_bits`.

    Raises:
        ImageError: it does not exist, or is not a picture that can be decoded.
    """
    if isinstance(source, GivenImage) and not isinstance(source.image, bytes):
        source = source.image
    if isinstance(source, PIL.Image.Image):
        try:
            file = getattr(source, "fp", None)
            if getattr(source, "tile", None) and file is not None:
                _check_scans(source, file, "given")  # opened, and not yet decoded
            return PIL.ImageOps.exif_transpose(eight_bits(source, _stored_mode(source)))
        except (ValueError, OSError, SyntaxError) as error:
            raise unreadable("given", error) from None
    name = user_path(source) if isinstance(source, (str, bytes, os.PathLike)) else source
    with opened(source) as image:
        try:
            # How the file packs its pixels is forgotten once they are decoded.
            stored = _stored_mode(image)
            image.load()
            return PIL.ImageOps.exif_transpose(eight_bits(image, stored))
        except Exception as error:
            raise unreadable(name, error) from None


def oriented_size(source: Source) -> tuple[int, int]:
    """Width and height as displayed, from the file's header alone.

    Raises:
        ImageError: as `open_image`.
    """
    with opened(source) as image:
        try:
            width, height = image.size
            # Of a TIFF, Pillow gives the size as displayed.
            sideways = image.format != "TIFF" and image.getexif().get(_ORIENTATION, 1) in _SIDEWAYS
        except Exception as error:
            raise unreadable(source, error) from None
    return (height, width) if sideways else (width, height)


def as_rgb(image: PIL.Image.Image, *, on_white: bool) -> PIL.Image.Image:
    """A picture of eight bits a channel in RGB; what is transparent on white, or as if it were not."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "RGBA" and not on_white:
        return image.convert("RGB")

    def convert(part: PIL.Image.Image) -> PIL.Image.Image:
        part = _in_rgba(part)
        if on_white:
            part = PIL.Image.alpha_composite(PIL.Image.new("RGBA", part.size, "white"), part)
        return part.convert("RGB")

    return _in_strips(image, "RGB", convert)


def _in_rgba(image: PIL.Image.Image) -> PIL.Image.Image:
    # Pillow has no way from premultiplied grey straight to RGBA.
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


def alpha_of(image: PIL.Image.Image) -> PIL.Image.Image | None:
    """How opaque the pixels of a picture of eight bits a channel are, in mode L; None where all are wholly opaque."""
    if not image.has_transparency_data:
        return None
    alpha = _in_strips(image, "L", lambda part: _in_rgba(part).getchannel("A"))
    return None if alpha.getextrema() == (255, 255) else alpha


def _strips(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """A picture's rows, so many at a time that what they become on the way needs little room."""
    width, height = size
    rows = max(1, _STRIP_PIXELS // max(width, 1))
    for top in range(0, height, rows):
        yield 0, top, width, min(top + rows, height)


def _in_strips(
    image: PIL.Image.Image, mode: str, convert: Callable[[PIL.Image.Image], PIL.Image.Image]
) -> PIL.Image.Image:
    """What `convert` makes of a picture's pixels, a picture of `mode`: beside the two there is only a strip."""
    result = PIL.Image.new(mode, image.size)
    for box in _strips(image.size):
        result.paste(convert(image.crop(box)), box)
    if "icc_profile" in image.info:
        result.info["icc_profile"] = image.info["icc_profile"]
    return result


def in_rgb(image: PIL.Image.Image) -> tuple[PIL.Image.Image, bytes | None]:
    """A picture of eight bits a channel in RGB, as if nothing of it were transparent, and what its numbers stand for.

    Numbers that an ICC profile describes as red, green and blue stay as they are, so that no colour is lost that sRGB
    does not have; grey and CMYK with a profile become sRGB.

    Returns:
        The picture, and its ICC profile; None is sRGB.

    Raises:
        ValueError: its colours cannot be turned into RGB.
    """
    profile: bytes = image.info.get("icc_profile") or b""
    described = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK", b"Lab ": "LAB"}.get(profile[16:20])
    stored = {"CMYK": "CMYK", "LAB": "LAB"}.get(image.mode) or ("L" if image.mode[0] in "1L" else "RGB")
    if described == "RGB" and stored in ("RGB", "L"):
        return as_rgb(image, on_white=False), profile if _in_srgb(PIL.Image.new("RGB", (1, 1)), profile) else None
    if described == stored:
        # Pillow has no way from premultiplied grey straight to grey.
        plain = image.convert("LA") if image.mode == "La" else image
        plain = plain if plain.mode == stored else plain.convert(stored)
        if (converted := _in_srgb(plain, profile)) is not None:
            return converted, None
    return as_rgb(image, on_white=False), None


def _in_srgb(image: PIL.Image.Image, profile: bytes) -> PIL.Image.Image | None:
    """A picture whose numbers an ICC profile describes in sRGB; None, with a warning, where that cannot be done."""
    try:
        return ImageCms.profileToProfile(
            image,
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImportError, OSError, ValueError, TypeError, ImageCms.PyCMSError) as error:
        log.warning("a picture's ICC profile cannot be used (%s): its colours are taken for sRGB", error)
        return None


def eight_bits(image: PIL.Image.Image, stored: str = "") -> PIL.Image.Image:
    """A picture with more than eight bits a pixel of grey (Pillow's modes I;16…, I and F) as one with eight, L or LA.

    Pillow's own conversion cuts everything above 255 off. Here, what white is follows from what the pixels are:

    - sixteen bits: 65535 (or 4095, where a TIFF says twelve), in either byte order;
    - 32-bit integers: 65535 where the file's pixels have sixteen bits; 255 if no value is above it, for then they are
      bytes in a larger box; 65535 if none is above that; else the largest value, since no file says what the white of
      so wide a range is, and black the smallest if that is below zero;
    - floats: 1 if all lie between 0 and 1, as in a picture; else, as for a depth in metres, the largest value, and
      black the smallest if that is below zero. What is not a number is black.

    Args:
        image: any picture; one of eight bits or fewer comes back as it is.
        stored: how its file packs pixels, by Pillow's name, where that is known.

    Raises:
        ValueError: its floats are all infinite or not numbers.
    """
    if not image.mode.startswith(("I", "F")):
        return _with_whole_transparency(image, stored)
    tags = getattr(image, "tag_v2", {})
    bits = (tags.get(_BITS_PER_SAMPLE) or (0,))[0]
    # Pillow has no unsigned integers of 32 bits.
    unsigned = image.mode == "I" and bits == 32 and tags.get(_SAMPLE_FORMAT, (1,))[0] == 1

    def values_of(box: tuple[int, int, int, int]) -> np.ndarray:
        values = np.asarray(image.crop(box))
        return values.view(np.uint32) if unsigned and values.dtype == np.int32 else values

    black, white = _range((values_of(box) for box in _strips(image.size)), bits, stored, image.format)
    transparent = image.info.get("transparency")
    has_alpha = isinstance(transparent, int)
    result = PIL.Image.new("LA" if has_alpha else "L", image.size)
    for box in _strips(image.size):
        values = values_of(box)
        exact = np.float32 if values.dtype.itemsize == 2 else np.float64
        shades = np.nan_to_num(values.astype(exact), nan=black, posinf=white, neginf=black)
        shades = np.clip((shades - black) / (white - black), 0, 1)
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            shades = 1 - shades
        part = PIL.Image.fromarray(np.rint(shades * 255).astype(np.uint8))
        if has_alpha:
            part.putalpha(PIL.Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
        result.paste(part, box)
    if "icc_profile" in image.info:
        result.info["icc_profile"] = image.info["icc_profile"]
    if (orientation := image.getexif().get(_ORIENTATION)) is not None:
        result.getexif()[_ORIENTATION] = orientation
    return result


def _range(strips: Iterable[np.ndarray], bits: int, stored: str, kind: str | None) -> tuple[float, float]:
    """The values that mean black and white."""
    lowest, highest, are_floats = math.inf, -math.inf, False
    for values in strips:
        if values.dtype.itemsize == 2:
            return 0.0, 4095.0 if bits == 12 else 65535.0
        are_floats = values.dtype.kind == "f"
        finite = values[np.isfinite(values)] if are_floats else values
        if finite.size:
            lowest, highest = min(lowest, float(finite.min())), max(highest, float(finite.max()))
    if lowest > highest:
        raise ValueError("none of its pixels is a finite number")
    if are_floats:
        steps: tuple[float, ...] = (1.0,)
    else:
        sixteen = bits == 16 or stored.startswith("I;16") or kind in ("PNG", "PPM")
        steps = (65535.0,) if sixteen and lowest >= 0 else (255.0, 65535.0)
    for white in steps:
        if lowest >= 0 and highest <= white:
            return 0.0, white
    black = min(lowest, 0.0)
    white = highest if highest > black else black + 1.0
    log.info("a picture's pixels go from %g to %g: %g is taken as black and %g as white", lowest, highest, black, white)
    return black, white


def _stored_mode(image: PIL.Image.Image) -> str:
    """How the file packs pixels, as Pillow calls it: "I;16B", "L;2", …; "" where Pillow does not say."""
    for tile in getattr(image, "tile", ()):
        arguments = tile[3]
        mode = arguments if isinstance(arguments, str) else arguments[0] if arguments else ""
        return mode if isinstance(mode, str) else ""
    return ""


def _with_whole_transparency(image: PIL.Image.Image, stored: str) -> PIL.Image.Image:
    """The transparent colour of a PNG in the picture's own bits: Pillow scales the pixels and leaves it as it was."""
    transparent = image.info.get("transparency")
    if stored in ("L;2", "L;4") and isinstance(transparent, int):
        transparent = transparent * 255 // (2 ** int(stored[2:]) - 1)
    elif stored == "RGB;16B" and isinstance(transparent, tuple):
        # Of sixteen bits Pillow keeps the upper eight; so several colours are transparent that differ in the lower.
        transparent = tuple(value >> 8 for value in transparent)
    else:
        return image
    exif, image = image.getexif(), image.copy()
    image.info["transparency"] = transparent
    image.getexif()[_ORIENTATION] = exif.get(_ORIENTATION, 1)
    return image


# ---- writing


def check_output(path: str | bytes | os.PathLike) -> Path:
    """Make sure that a picture can be written to `path`, before any work is done for it; creates its folder.

    Returns:
        The path, `~` replaced.

    Raises:
        UsageError: the name has no ending that stands for a format that pictures can be written in.
        OutputError: the folder cannot be created or written to.
    """
    path = user_path(path)
    if not path.suffix:
        raise UsageError(f"cannot write a picture to {path}: its name has no ending; use .png, .jpg or .webp")
    try:
        # Some formats can only be read, or hold no colours.
        PIL.Image.new("RGB", (16, 16)).save(io.BytesIO(), format=format_of(path))
    except (KeyError, ValueError, OSError, NotImplementedError):
        raise UsageError(
            f"cannot write a picture to {path}: {path.suffix!r} is no format for that; use .png, .jpg or .webp"
        ) from None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Temporary(path.parent).discard()
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
    return path


def format_of(path: Path) -> str:
    """PIL's name for the format that an ending stands for, a `KeyError` if for none."""
    return PIL.Image.registered_extensions()[path.suffix.lower()]


def save_picture(
    image: PIL.Image.Image,
    path: str | bytes | os.PathLike,
    metadata: Mapping[str, Any] | None = None,
    *,
    export_json_metadata: bool = False,
    overwrite: bool = False,
    embed_metadata: bool = True,
) -> Path:
    """Write a picture, its settings inside it, and if asked beside it as `name.metadata.json`. Complete or absent;
    existing files are left alone unless `overwrite`. Settings never cost the picture: what cannot be written of them
    is left out, with a warning. An ICC profile in the picture's `info` goes along, or where the format has no room for
    one, the colours become sRGB.

    Returns:
        Where the picture went: `path`, or the next free name beside it.

    Raises:
        OutputError: it cannot be written.
        UsageError: the name's ending stands for no picture format.
    """
    path = check_output(path)
    picture_format = format_of(path)
    settings = None if metadata is None else plain_settings(metadata)
    embedded = settings if embed_metadata else None

    def write(file: BinaryIO) -> None:
        file.write(picture_bytes(image, embedded, picture_format=picture_format, name=path))

    with_sidecar = export_json_metadata and settings is not None
    path = write_atomically(path, write, overwrite=overwrite, beside=SIDECAR if with_sidecar else None)
    if with_sidecar:
        try:
            text = json.dumps(settings, indent=4, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # half a character, which only an escape can hold
            text = json.dumps(settings, indent=4).encode()
        write_atomically(path.with_suffix(SIDECAR), lambda file: file.write(text), overwrite=overwrite)
    return path


def picture_bytes(
    image: PIL.Image.Image,
    settings: Mapping[str, Any] | None = None,
    *,
    picture_format: str = "PNG",
    quality: int | None = None,
    name: object = "the image",
) -> bytes:
    """An image file's contents, with settings and colours as `save_picture` says.

    Args:
        settings: as `plain_settings` gives them; None for none.
        picture_format: PIL's name of it.
        quality: 0 to 100, for formats that have one; None for PIL's default.
        name: for messages.

    Raises:
        OutputError: the format cannot hold the image.
    """
    from mflux.utils.image_util import ImageUtil

    embedded = {}
    if settings is not None and ImageUtil.embed_metadata_enabled:
        embedded = MetadataBuilder.save_arguments(dict(settings), picture_format)
    options: dict[str, Any] = {} if quality is None or picture_format == "PNG" else {"quality": quality}
    if (profile := image.info.get("icc_profile")) and picture_format in _PROFILED:
        options["icc_profile"] = profile
    elif profile and image.mode == "RGB":
        image = _in_srgb(image, profile) or image
    file = io.BytesIO()
    try:
        image.save(file, format=picture_format, **embedded, **options)
    except ValueError as error:
        if not embedded:
            raise OutputError(f"cannot write {name}: {error}") from None
        # A JPEG holds 64 KB of settings; the picture is worth more than they are.
        log.warning("the settings do not fit into %s (%s): it is written without them", name, error)
        file = io.BytesIO()
        image.save(file, format=picture_format, **options)
    return file.getvalue()


def plain_settings(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON can hold them: numpy's and MLX's numbers and arrays as Python's, a path by its last part, a
    number that is not finite and anything else as text; left out with a warning what has no text either."""
    plain = {}
    for name, value in metadata.items():
        try:
            plain[str(name)] = _plain(value)
            json.dumps(plain[str(name)])
        except Exception as error:  # whatever a stranger's object raises
            plain.pop(str(name), None)
            log.warning("the setting %s cannot be written (%s): it is left out", name, error)
    return plain


def _plain(value: Any, depth: int = 0) -> Any:
    if depth > 50:
        raise ValueError("it is nested too deep")
    # Not a subclass, which may write itself in its own way.
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, (os.PathLike, GivenImage)):
        return recorded_file(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(item, depth + 1) for name, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item, depth + 1) for item in value]
    if hasattr(value, "tolist"):  # numpy's and MLX's numbers and arrays
        return _plain(value.tolist(), depth + 1)
    return str(value)
