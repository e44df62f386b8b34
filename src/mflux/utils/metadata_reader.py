"""The settings that a picture made with mflux carries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from xml.etree import ElementTree

import PIL.Image

from mflux.errors import ImageError, MfluxError
from mflux.utils.given_image import GivenImage
from mflux.utils.metadata_builder import COMMENT_PREFIX, XMP_KEY
from mflux.utils.paths import user_path
from mflux.utils.picture_files import opened
from mflux.utils.strict_json import NotJSON, parse

_EXIF_IFD = 0x8769
_USER_COMMENT = 0x9286
# Names that mflux 0.24 gives to what stands in the XMP packet.
_XMP_NAMES = {
    "description": "description",
    "creator": "creator",
    "rights": "rights",
    "CreatorTool": "creator_tool",
    "Category": "category",
    "Credit": "credit",
    "seed": "seed",
    "steps": "steps",
    "guidance": "guidance",
    "model": "model",
    "loras": "loras",
    "generationTime": "generation_time",
    "generationTimeSeconds": "generation_time",
}


# No settings are longer than this by far; a file that is has something else in it.
_LARGEST_SIDECAR = 16 << 20
_LARGEST_XMP, _DEEPEST_XMP = 1 << 20, 30


def read_settings(path: str | Path) -> dict:
    """The settings that a picture carries, or that a `.metadata.json` holds.

    Raises:
        ImageError: it is neither, or cannot be read.
        MfluxError: it is a picture without settings.
    """
    path = user_path(path)
    settings = _read_sidecar(path) if path.suffix.lower() == ".json" else None
    if settings is None:
        with opened(path):  # what is no picture at all is told as such
            settings = MetadataReader.read_exif_metadata(path)
    if settings is None:
        raise MfluxError(f"{path} carries no settings: it was not made with mflux, or with --no-metadata")
    return settings


def _read_sidecar(path: Path) -> dict | None:
    """None for what may be a picture, whatever its name."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            content = file.read(_LARGEST_SIDECAR + 1)
    except OSError as error:
        raise ImageError(f"the settings in {path} cannot be read ({error.strerror or error})") from None
    if not content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        return None
    if len(content) > _LARGEST_SIDECAR:
        raise ImageError(f"the settings in {path} cannot be read: it is larger than any .metadata.json")
    try:
        return parse(content)
    except NotJSON as error:
        raise ImageError(f"the settings in {path} cannot be read: it {error}") from None


T = TypeVar("T")


class MetadataReader:
    @staticmethod
    def read_exif_metadata(image_path: str | Path | GivenImage) -> dict | None:
        """All settings, from EXIF's UserComment; None where there are none, or no such picture. mflux 0.24's pictures
        read as well.

        Raises:
            ImageError: the picture is too large to be decoded.
        """
        comment = _of_picture(image_path, lambda image: image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT, b""))
        if isinstance(comment, str):
            comment = comment.encode(errors="surrogatepass")
        if comment is None:
            return None
        try:
            settings = parse(bytes(comment).removeprefix(COMMENT_PREFIX))
        except (NotJSON, TypeError):
            return None
        return settings if isinstance(settings, dict) else None

    @staticmethod
    def read_xmp_metadata(image_path: str | Path) -> dict | None:
        """What stands in the XMP packet, as text; None where there is none.

        Raises:
            ImageError: the picture is too large to be decoded.
        """
        packet = _of_picture(image_path, lambda image: image.info.get(XMP_KEY) or image.info.get("xmp"))
        try:
            if isinstance(packet, bytes):
                packet = packet.decode()
            # A document type could make a small file expand without end.
            if not packet or "<!DOCTYPE" in packet:
                return None
            if len(packet) > _LARGEST_XMP:
                return None
            elements = _elements(packet[packet.index("<x:xmpmeta") : packet.rindex("<?xpacket")])
        except (ValueError, TypeError, SyntaxError):
            return None
        found = {}
        for element in elements:
            name = _XMP_NAMES.get(element.tag.rpartition("}")[2])
            if name and (text := "".join(element.itertext()).strip()):
                found[name] = text
        return found or None

    @staticmethod
    def read_all_metadata(image_path: str | Path) -> dict:
        """{"exif": …, "xmp": …}, each None where the picture has none."""
        return {
            "exif": MetadataReader.read_exif_metadata(image_path),
            "xmp": MetadataReader.read_xmp_metadata(image_path),
        }


def _elements(text: str) -> Iterator[ElementTree.Element]:
    """The elements of a text in XML, the outer ones first; a `ValueError` if they are nested deeper than any is."""
    parser: Any = ElementTree.XMLPullParser(("start", "end"))
    parser.feed(text)
    parser.close()
    depth, found = 0, []
    for event, element in parser.read_events():
        depth += 1 if event == "start" else -1
        if depth > _DEEPEST_XMP:
            raise ValueError
        found += [element] if event == "start" else []
    return iter(found)


def _of_picture(path: str | Path | GivenImage, take: Callable[[PIL.Image.Image], T]) -> T | None:
    """What `take(image)` finds in a picture file, None in anything else."""
    try:
        with opened(path) as image:
            return take(image)
    except ImageError as error:
        if isinstance(error.__context__, PIL.Image.DecompressionBombError):
            raise
        return None
    except Exception:  # damaged settings, of which Pillow has many ways to complain
        return None
