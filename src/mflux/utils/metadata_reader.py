"""The settings that a picture made with mflux carries."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import PIL.Image

from mflux.utils.metadata_builder import COMMENT_PREFIX, XMP_KEY

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


class MetadataReader:
    @staticmethod
    def read_exif_metadata(image_path: str | Path) -> dict | None:
        """All settings, from EXIF's UserComment; None where there are none. mflux 0.24's pictures read as well."""
        try:
            with PIL.Image.open(image_path) as image:
                comment = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT, b"")
        except (OSError, ValueError, SyntaxError):
            return None
        if isinstance(comment, str):
            comment = comment.encode()
        try:
            settings = json.loads(bytes(comment).removeprefix(COMMENT_PREFIX).decode())
        except (ValueError, TypeError, RecursionError):
            return None
        return settings if isinstance(settings, dict) else None

    @staticmethod
    def read_xmp_metadata(image_path: str | Path) -> dict | None:
        """What stands in the XMP packet, as text; None where there is none."""
        try:
            with PIL.Image.open(image_path) as image:
                packet = image.info.get(XMP_KEY) or image.info.get("xmp")
            if isinstance(packet, bytes):
                packet = packet.decode()
            # A document type could make a small file expand without end.
            if not packet or "<!DOCTYPE" in packet:
                return None
            tree = ElementTree.fromstring(packet[packet.index("<x:xmpmeta") : packet.rindex("<?xpacket")])
        except (OSError, ValueError, SyntaxError):
            return None
        found = {}
        for element in tree.iter():
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
