"""Paddings as CSS writes them: one to four values, in pixels or percent."""

from __future__ import annotations

import re
from dataclasses import dataclass


class BoxValueError(ValueError):
    """A padding makes no sense."""


@dataclass
class AbsoluteBoxValues:
    """Padding in pixels."""

    top: int
    right: int
    bottom: int
    left: int


@dataclass
class BoxValues:
    """Padding in pixels, or in percent of the side it is added to ("25%")."""

    top: int | str = 0
    right: int | str = 0
    bottom: int | str = 0
    left: int | str = 0

    @staticmethod
    def parse(value: str, delimiter: str = ",") -> BoxValues:
        """Read "20", "10,20", "10,20,30" or "10,20,30,40%": top, right, bottom, left, missing ones as in CSS.

        Raises:
            BoxValueError: not one to four whole numbers or percentages.
        """
        values = [_value(part.strip()) for part in value.split(delimiter)]
        if len(values) > 4:
            raise BoxValueError(f"{value!r} has {len(values)} values: a padding has one to four")
        top = values[0]
        right = values[1] if len(values) > 1 else top
        bottom = values[2] if len(values) > 2 else top
        left = values[3] if len(values) > 3 else right
        return BoxValues(top, right, bottom, left)

    def normalize_to_dimensions(self, width: int, height: int) -> AbsoluteBoxValues:
        """In pixels for a picture of that size."""
        return AbsoluteBoxValues(
            top=_pixels(self.top, height),
            right=_pixels(self.right, width),
            bottom=_pixels(self.bottom, height),
            left=_pixels(self.left, width),
        )


def _value(text: str) -> int | str:
    if re.fullmatch(r"\d+", text):
        return int(text)
    if re.fullmatch(r"\d+(\.\d+)?%", text):
        return text
    raise BoxValueError(f"{text!r} is neither a number of pixels nor a percentage")


def _pixels(value: int | str, side: int) -> int:
    if isinstance(value, str) and value.endswith("%"):
        return int(float(value[:-1]) / 100 * side)
    return int(value)
