"""Sizes relative to a source picture: "2x", "0.5x"."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PATTERN = re.compile(r"(\d+(?:\.\d+)?)x", re.IGNORECASE)
# Sides of pictures: multiples of GRID pixels; beyond LARGEST what belongs to a picture overflows MLX's counting.
GRID = 16
LARGEST = 16384


@dataclass
class ScaleFactor:
    """How many times as large as the source a side is to be."""

    value: int | float

    def __post_init__(self) -> None:
        if not self.value > 0:
            raise ValueError(f"a scale factor of {self.value} leaves nothing: it must be above 0")

    def __str__(self) -> str:
        return f"{self.value:g}x"

    def get_scaled_value(self, orig_value: int, pixel_steps: int = GRID) -> int:
        """The scaled side, rounded down to a multiple of `pixel_steps`."""
        scaled = self.value * orig_value
        return int(scaled - scaled % pixel_steps)

    @staticmethod
    def parse(text: str) -> ScaleFactor:
        """Read "2x" or "1.5x".

        Raises:
            ValueError: it is not a number followed by x, or not above 0.
        """
        match = _PATTERN.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"{text!r} is not a scale factor such as 2x or 1.5x")
        number = match.group(1)
        return ScaleFactor(float(number) if "." in number else int(number))
