"""What a value may be: the types of command line options, and the checks of what a Python program passes.

Loads nothing heavy. Whole numbers are whatever counts as one in Python, numpy's included.
"""

from __future__ import annotations

import argparse
import math
import numbers
import operator
import os
from pathlib import Path
from typing import Any

from mflux.errors import UsageError
from mflux.utils.paths import user_path
from mflux.utils.scale_factor import GRID, LARGEST, ScaleFactor

QUANTIZE_CHOICES = (3, 4, 5, 6, 8)
LARGEST_SEED = 2**64 - 1


# ---- from the command line and from files of settings: text → value


def number(kind: type, *, above: float | None = None, least: float | None = None, most: float | None = None):
    """A type for `add_argument`: an int or float within bounds."""

    def read(text: str):
        try:
            value = kind(text)
            if not math.isfinite(value):
                raise ValueError
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(
                f"{text[:40]!r} is not a {'whole ' if kind is int else ''}number"
            ) from None
        if above is not None and value <= above:
            raise argparse.ArgumentTypeError(f"{text} is not above {above}")
        if least is not None and value < least:
            raise argparse.ArgumentTypeError(f"{text} is too small: at least {least}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"{text} is too large: at most {most}")
        return value

    read.__annotations__["return"] = kind.__name__
    return read


seed = number(int, least=0, most=LARGEST_SEED)
steps = number(int, least=1, most=10_000)
guidance = number(float, least=0)
strength = number(float, least=0, most=1)
pixels = number(int, least=GRID, most=LARGEST)


def dimension(text: str) -> int | ScaleFactor:
    """A side in pixels, "auto", or a scale factor such as "2x"."""
    if text.lower() == "auto":
        return ScaleFactor(1)
    try:
        return ScaleFactor.parse(text) if text.lower().endswith("x") else pixels(text)
    except argparse.ArgumentTypeError as error:
        detail = str(error)
        if "not a whole number" in detail:
            detail = f"{text!r} is neither a number of pixels, nor auto, nor a scale factor such as 2x"
        raise argparse.ArgumentTypeError(detail) from None
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def tile_size(text: str) -> int:
    value = number(int, least=128)(text)
    if value % 16:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of 16")
    return value


def bits(text: str) -> int:
    value = number(int)(text)
    if value not in QUANTIZE_CHOICES:
        raise argparse.ArgumentTypeError(f"{text} is not one of {', '.join(map(str, QUANTIZE_CHOICES))}")
    return value


def battery_limit(text: str) -> int:
    return max(1, min(99, number(int)(text)))


# ---- from a Python program: a value, checked; each raises a `UsageError` that names the argument


def whole(value: Any, name: str, *, least: int | None = None, most: int | None = None, optional: bool = False):
    """A whole number within bounds, or None where that is allowed."""
    if value is None and optional:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise UsageError(f"{name} is {_shown(value)}, which is not a whole number")
    value = operator.index(value)
    return _within(value, name, least, most)


def real(value: Any, name: str, *, least: float | None = None, most: float | None = None, optional: bool = False):
    """A finite number within bounds, or None where that is allowed."""
    if value is None and optional:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise UsageError(f"{name} is {_shown(value)}, which is not a number")
    value = float(value)
    if not math.isfinite(value):
        raise UsageError(f"{name} is {value}, which is not a finite number")
    return _within(value, name, least, most)


def _within(value, name: str, least, most):
    if least is not None and value < least:
        raise UsageError(f"{name} is {value}: it must be at least {least}")
    if most is not None and value > most:
        raise UsageError(f"{name} is {value}: it must be at most {most}")
    return value


def indices(value: Any, count: int, name: str, of: str) -> list[int]:
    """Numbers of some of so many things, each once and in order; [] where nothing is said."""
    if not isinstance(value, (list, tuple, range, type(None))):
        raise UsageError(f"{name} is {_shown(value)}, which is not a list of whole numbers")
    chosen = sorted({whole(one, name) for one in value or ()})
    if chosen and not 0 <= chosen[0] <= chosen[-1] < count:
        wrong = chosen[0] if chosen[0] < 0 else chosen[-1]
        raise UsageError(f"{name} says {wrong}, and the {of} are 0 to {count - 1}")
    return chosen


def side(value: Any, name: str) -> int | ScaleFactor | None:
    """A side of a picture: pixels, a scale factor, or None."""
    return value if isinstance(value, ScaleFactor) else whole(value, name, optional=True)


def text(value: Any, name: str, *, optional: bool = False):
    """Text, or None where that is allowed."""
    if (value is None and optional) or isinstance(value, str):
        return value
    raise UsageError(f"{name} is {_shown(value)}, which is not text")


def path(value: Any, name: str, *, optional: bool = False) -> Path | None:
    """A path as `user_path` has it, or None where that is allowed."""
    if value is None and optional:
        return None
    if not isinstance(value, (str, bytes, os.PathLike)):
        raise UsageError(f"{name} is {_shown(value)}, which is not a path")
    try:
        return user_path(value)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None


def _shown(value: Any) -> str:
    """A value in a message, with its type where that is what is wrong."""
    written = repr(value)
    return f"{written if len(written) <= 40 else written[:39] + '…'} ({type(value).__name__})"
