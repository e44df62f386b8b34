"""An image that a program hands over itself, where else it would name a file.

Loads nothing heavy.
"""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import PIL.Image

# No path is longer on the systems that mflux runs on.
_LONGEST_PATH = 4096


class GivenImage:
    """An opened image, or the contents of an image file, with the name that settings record for it.

    Args:
        image: PIL's image, or bytes in a format that images are read in.
        name: without folders. It is told and recorded, and never looked up.
    """

    def __init__(self, image: PIL.Image.Image | bytes, name: str = "image.png"):
        self.image = image
        self.name = name

    def __str__(self) -> str:
        return self.name

    __repr__ = __str__

    def source(self) -> PIL.Image.Image | io.BytesIO:
        """What PIL reads it from."""
        return io.BytesIO(self.image) if isinstance(self.image, bytes) else self.image


def given(value: Any) -> GivenImage | None:
    """What an argument gives in the place of a path; None where it is none of it, and so perhaps a path.

    Bytes may be a path as well, as Python's own functions take them: one with a NUL, or longer than any path, is an
    image's contents.
    """
    if isinstance(value, GivenImage):
        return value
    if isinstance(value, (bytearray, memoryview)):
        return GivenImage(bytes(value))
    if isinstance(value, bytes):
        return GivenImage(value) if b"\0" in value or len(value) > _LONGEST_PATH else None
    if callable(getattr(value, "read", None)) and callable(getattr(value, "seek", None)):
        value.seek(0)
        contents = value.read()
        return GivenImage(contents, _name_of(value)) if isinstance(contents, bytes) else None
    # Who has one has loaded PIL.
    pil = sys.modules.get("PIL.Image")
    return GivenImage(value, _name_of(value)) if pil is not None and isinstance(value, pil.Image) else None


def _name_of(value: Any) -> str:
    """The last part of the name of the file that it was read from."""
    name = getattr(value, "filename", "") or getattr(value, "name", "")
    name = name.replace("\\", "/").rpartition("/")[2] if isinstance(name, str) else ""
    return name or "image.png"
