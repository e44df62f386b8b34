"""What a picture is to be drawn after: which picture, and what of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class ControlType(StrEnum):
    pose = "pose"
    canny = "canny"
    hed = "hed"
    depth = "depth"
    mlsd = "mlsd"


@dataclass(frozen=True)
class ControlSpec:
    """One picture to draw after.

    Attributes:
        type: what is taken of it: edges (`canny`) or depths (`depth`).
        image_path: the picture.
        strength: how much it counts; 0 is nothing.
    """

    type: ControlType
    image_path: Path | str
    strength: float = 1.0
