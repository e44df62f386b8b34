"""What a value may be, as data: one bound for a command line, for a file of settings, and for a Python program.

A kind reads what was typed (`of_text`, and called like a function, as argparse does), checks what a file of settings
says (`of_setting`) and what a program passes (`of_value`). Each raises `Wrong`, and whoever asked adds the name.

Loads nothing heavy. Whole numbers are whatever counts as one in Python, numpy's included.
"""

from __future__ import annotations

import argparse
import math
import numbers
import operator
import os
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any, ClassVar, TypeVar

from mflux.errors import UsageError
from mflux.text import shown, written
from mflux.utils.given_image import given
from mflux.utils.paths import user_path
from mflux.utils.scale_factor import GRID, LARGEST, ScaleFactor

QUANTIZE_CHOICES = (3, 4, 5, 6, 8)
# What can be chosen to compute, see `mflux.backend.use_device`.
DEVICES = ("cpu", "gpu")
LARGEST_SEED = 2**64 - 1

T = TypeVar("T")


class Wrong(argparse.ArgumentTypeError, ValueError):
    """A value is not what it may be. Of a text or a setting the message is a sentence, of a Python value the rest of
    one that begins with the argument's name."""


class Kind:
    """What a value may be. Plain classes: a dataclass for each would be felt in how soon `--help` answers."""

    @abstractmethod
    def of_setting(self, value: Any) -> Any:
        """The value that a setting of JSON stands for."""


class _Number(Kind):
    read: ClassVar[Callable[[str], Any]]
    gives: ClassVar[str]
    noun: ClassVar[str]

    def __init__(
        self,
        least: float | None = None,
        most: float | None = None,
        above: float | None = None,
        below: float | None = None,
    ):
        self.least, self.most, self.above, self.below = least, most, above, below

    def of_text(self, text: str) -> Any:
        try:
            value = type(self).read(text)
            if not math.isfinite(value):
                raise ValueError
        except (ValueError, OverflowError):
            raise Wrong(f"{text[:40]!r} is not a {self.noun}") from None
        if bound := self._beyond(value):
            raise Wrong(f"{text} is {bound[0]}")
        return value

    __call__ = of_text

    def of_setting(self, value: Any) -> Any:
        if type(value) not in (int, float):
            raise Wrong(f"{str(value)[:40]!r} is not a number")
        return self.of_text(str(value))

    def of_value(self, value: Any) -> Any:
        value = self._plain(value)
        if bound := self._beyond(value):
            raise Wrong(f"is {shown(written(value), 40)}: it must be {bound[1]}")
        return value

    @abstractmethod
    def _plain(self, value: Any) -> Any:
        """Python's own number for one of another library."""

    def _beyond(self, value: Any) -> tuple[str, str] | None:
        """How a value is outside the bounds, and what it must be."""
        if self.above is not None and value <= self.above:
            return f"not above {self.above}", f"above {self.above}"
        if self.below is not None and value >= self.below:
            return f"not below {self.below}", f"below {self.below}"
        if self.least is not None and value < self.least:
            return f"too small: at least {self.least}", f"at least {self.least}"
        if self.most is not None and value > self.most:
            return f"too large: at most {self.most}", f"at most {self.most}"
        return None


class Whole(_Number):
    """A whole number within bounds, perhaps a multiple of one, or one of a few."""

    read = int
    gives = "int"
    noun = "whole number"

    def __init__(
        self, least: int | None = None, most: int | None = None, multiple: int = 1, choices: tuple[int, ...] = ()
    ):
        super().__init__(least, most)
        self.multiple, self.choices = multiple, choices

    def _plain(self, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise Wrong(f"is {_shown(value)}, which is not a whole number")
        return operator.index(value)

    def _beyond(self, value: int) -> tuple[str, str] | None:
        if bound := super()._beyond(value):
            return bound
        if value % self.multiple:
            return f"not a multiple of {self.multiple}", f"a multiple of {self.multiple}"
        if self.choices and value not in self.choices:
            known = ", ".join(map(str, self.choices))
            return f"not one of {known}", f"one of {known}"
        return None


class Real(_Number):
    """A finite number within bounds."""

    read = float
    gives = "float"
    noun = "number"

    def _plain(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise Wrong(f"is {_shown(value)}, which is not a number")
        try:
            value = float(value)
        except OverflowError:
            raise Wrong(f"is {_shown(value)}, which is not a finite number") from None
        if not math.isfinite(value):
            raise Wrong(f"is {value}, which is not a finite number")
        return value


class Side:
    """A side of an image: pixels, or a scale factor such as "2x"; "auto" is 1x."""

    gives: ClassVar[str] = "int | ScaleFactor"

    def of_text(self, text: str) -> int | ScaleFactor:
        if text.lower() == "auto":
            return ScaleFactor(1)
        try:
            return ScaleFactor.parse(text) if text.lower().endswith("x") else pixels.of_text(text)
        except ValueError as error:
            detail = str(error)
        if "not a whole number" in detail:
            detail = f"{text!r} is neither a number of pixels, nor auto, nor a scale factor such as 2x"
        raise Wrong(detail)

    __call__ = of_text

    def of_value(self, value: Any) -> int | ScaleFactor:
        # Which sizes an image may have is checked with both sides.
        return value if isinstance(value, ScaleFactor) else Whole().of_value(value)


class Text(Kind):
    def of_setting(self, value: Any) -> str:
        if not isinstance(value, str):
            raise Wrong(f"{str(value)[:40]} is not text")
        return value

    def of_value(self, value: Any) -> str:
        if not isinstance(value, str):
            raise Wrong(f"is {_shown(value)}, which is not text")
        return value


class Switch(Kind):
    def of_setting(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise Wrong(f"{str(value)[:40]} is neither true nor false")
        return value


class Several(Kind):
    """A list of one kind."""

    def __init__(self, of: Kind):
        self.of = of

    def of_setting(self, value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise Wrong(f"{str(value)[:40]} is not a list")
        return [self.of.of_setting(item) for item in value]


seed = Whole(0, LARGEST_SEED)
steps = Whole(1, 10_000)
guidance = Real(0)
strength = Real(0, 1)
# Of an image's steps: some of them, and not all; some, or all.
some_of_them, part_of_them = Real(above=0, below=1), Real(above=0, most=1)
pixels = Whole(GRID, LARGEST)
dimension = Side()
tile_size = Whole(128, multiple=16)
bits = Whole(choices=QUANTIZE_CHOICES)


def battery_limit(text: str) -> int:
    return max(1, min(99, Whole().of_text(text)))


# ---- from a Python program: a value, checked; each raises a `UsageError` that names the argument


def argument(read: Callable[[Any], T], value: Any, name: str) -> T:
    """What `of_value` of a kind gives.

    Raises:
        UsageError: the value is none of the kind.
    """
    try:
        return read(value)
    except Wrong as wrong:
        raise UsageError(f"{name} {wrong}") from None


def whole(value: Any, name: str, *, least: int | None = None, most: int | None = None, optional: bool = False) -> Any:
    """A whole number within bounds, or None where that is allowed."""
    return None if value is None and optional else argument(Whole(least, most).of_value, value, name)


def real(
    value: Any, name: str, *, least: float | None = None, most: float | None = None, optional: bool = False
) -> Any:
    """A finite number within bounds, or None where that is allowed."""
    return None if value is None and optional else argument(Real(least, most).of_value, value, name)


def side(value: Any, name: str) -> int | ScaleFactor | None:
    """A side of an image: pixels, a scale factor, or None."""
    return None if value is None else argument(dimension.of_value, value, name)


def text(value: Any, name: str, *, optional: bool = False) -> Any:
    """Text, or None where that is allowed."""
    return None if value is None and optional else argument(Text().of_value, value, name)


def path(value: Any, name: str, *, optional: bool = False) -> Any:
    """A path as `user_path` has it, or None where that is allowed."""
    if value is None and optional:
        return None
    if not isinstance(value, (str, bytes, os.PathLike)):
        raise UsageError(f"{name} is {_shown(value)}, which is not a path")
    try:
        return user_path(value)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None


def image(value: Any, name: str, *, optional: bool = False) -> Any:
    """A path as `user_path` has it; or an image itself, opened or as a file's contents, as a `GivenImage`."""
    found = given(value)
    return path(value, name, optional=optional) if found is None else found


def images(value: Any, name: str) -> list[Any]:
    """Several of them; one counts as a list of one."""
    if (found := given(value)) is not None:
        return [found]
    several = _several(value, name, (str, bytes, os.PathLike), "a path, nor a list of some")
    return [image(one, name) for one in several]


def paths(value: Any, name: str) -> list[Any]:
    """Several paths as `user_path` has them; one counts as a list of one."""
    return [path(one, name) for one in _several(value, name, (str, bytes, os.PathLike), "a path, nor a list of some")]


def texts_or_paths(value: Any, name: str) -> list[str]:
    """Several names or paths, as text as they are; one counts as a list of one."""
    found = _several(value, name, (str, os.PathLike), "a name or path, nor a list of some")
    return [text(os.fspath(one) if isinstance(one, os.PathLike) else one, f"one of {name}") for one in found]


def number(value: Any, name: str, kind: _Number) -> Any:
    """What a kind of numbers has, or None."""
    return None if value is None else argument(kind.of_value, value, name)


def reals(value: Any, name: str) -> list[float]:
    """Several finite numbers; one counts as a list of one."""
    found = _several(value, name, numbers.Real, "a number, nor a list of some")
    return [real(one, f"a number in {name}") for one in found]


def _several(value: Any, name: str, one: Any, what: str) -> list[Any]:
    if isinstance(value, one) and not isinstance(value, bool):
        return [value]
    if isinstance(value, Collection) and not isinstance(value, (str, bytes, Mapping)):
        # An array of no dimension has a length that it cannot tell.
        with suppress(TypeError):
            return list(value)
    raise UsageError(f"{name} is {_shown(value)}, which is neither {what}")


def switch(value: Any, name: str) -> bool:
    """True or False; a text such as "no" would be true."""
    if type(value).__name__ in ("bool", "bool_") or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise UsageError(f"{name} is {_shown(value)}, which is neither True nor False")


def name(value: Any, argument: str) -> str:
    """What names a model: text as it is, for it may be a repository's, or a path."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    return text(value, argument)


def indices(value: Any, count: int, name: str, of: str) -> list[int]:
    """Numbers of some of so many things, each once and in order; [] where nothing is said."""
    if not isinstance(value, (list, tuple, range, type(None))):
        raise UsageError(f"{name} is {_shown(value)}, which is not a list of whole numbers")
    chosen = sorted({argument(Whole().of_value, one, name) for one in value or ()})
    if chosen and not 0 <= chosen[0] <= chosen[-1] < count:
        wrong = shown(written(chosen[0] if chosen[0] < 0 else chosen[-1]), 40)
        raise UsageError(f"{name} says {wrong}, and the {of} are 0 to {count - 1}")
    return chosen


def _shown(value: Any) -> str:
    """A value in a message, with its type where that is what is wrong."""
    return f"{shown(written(value), 40)} ({type(value).__name__})"
