"""JSON of a known shape: a table checked against the annotations of a frozen dataclass.

A field may narrow or widen its range with `field(metadata={"least": 1, "most": 64})`.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mflux.text import shown

# Sides and ids: what MLX counts with. Magnitudes: far beyond any published constant, far below any overflow.
LARGEST_INTEGER = 2**31 - 1
LARGEST_FLOAT = 1e15
_LONGEST_TEXT = 1000
_LONGEST_LIST = 1000


class Wrong(ValueError):
    """A table is not what the dataclass takes; the message is a sentence that begins with the field's name."""


def checked_fields(
    cls: type, table: Mapping[str, Any], *, strict: bool = False, most_of: Callable[[str], int] | None = None
) -> dict[str, Any]:
    """The fields of a dataclass that a table says something of, as the dataclass holds them: lists as tuples, numbers
    as Python's own. A table for a field that is a dataclass is left to that one.

    Args:
        strict: whether every key has to be a field's.
        most_of: the largest whole number that a field takes, by its name, where its metadata says none.

    Raises:
        Wrong: a value is not of the kind that the annotation names, or outside its range, or there is no such field.
    """
    known = {field.name: field for field in fields(cls)}
    if strict and (strange := [name for name in table if name not in known]):
        near = difflib.get_close_matches(str(strange[0]), known, n=1)
        meant = f": did you mean {near[0]}?" if near else f": there are {', '.join(known)}"
        raise Wrong(f"{shown(strange[0], 80)} is not known{meant}")
    kinds = _kinds(cls)
    chosen = {}
    for name, field in known.items():
        if name in table:
            try:
                chosen[name] = _checked(table[name], kinds[name], _Range.of(field, most_of))
            except _Unlike as unlike:
                value = unlike.value if unlike.inside else table[name]
                raise Wrong(f"{name}{unlike.inside} is {shown(repr(value), 80)}, not {unlike}") from None
    return chosen


@dataclass(frozen=True)
class _Range:
    """What numbers in a field may be."""

    least: float | None
    most: float | None
    most_whole: int

    @staticmethod
    def of(field: Field[Any], most_of: Callable[[str], int] | None) -> _Range:
        most_whole = LARGEST_INTEGER if most_of is None else most_of(field.name)
        return _Range(field.metadata.get("least"), field.metadata.get("most"), most_whole)


class _Unlike(Exception):
    """A value is not what its field takes; the message says what that would be.

    Attributes:
        inside: where in the field's table it stands, ".key"; "" where it is the field's own.
        value: what stands there.
    """

    def __init__(self, expected: str, inside: str = "", value: Any = None):
        super().__init__(expected)
        self.inside, self.value = inside, value


@cache
def _kinds(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _checked(value: Any, kind: Any, numbers: _Range) -> Any:
    """The value as the configuration holds it: lists as tuples, numbers as Python's own.

    Raises:
        _Unlike: it is not of the kind that the annotation names.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _of_any(value, inner, numbers)
    if origin is Literal:
        if value in inner and type(value) in map(type, inner):
            return value
        raise _Unlike(f"one of {', '.join(map(repr, inner))}")
    if kind is None or kind is types.NoneType:
        if value is None:
            return None
        raise _Unlike("null")
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise _Unlike("true or false")
    if kind is int:
        return _integer(value, numbers)
    if kind is float:
        return _float(value, numbers)
    if kind is str:
        if isinstance(value, str) and len(value) <= _LONGEST_TEXT:
            return value
        raise _Unlike("a text")
    if kind is tuple or origin is tuple or kind is list or origin is list:
        return _tuple(value, inner, numbers)
    if isinstance(kind, type) and is_dataclass(kind):
        if isinstance(value, (Mapping, kind)):
            return value
        raise _Unlike("a table")
    if kind is dict or kind is Mapping or origin in (dict, Mapping):
        if isinstance(value, Mapping):
            return {name: _inside(name, item, numbers) for name, item in value.items()}
        raise _Unlike("a table")
    return _plain(value, numbers)


def _of_any(value: Any, kinds: tuple[Any, ...], numbers: _Range) -> Any:
    expected = []
    for kind in kinds:
        try:
            return _checked(value, kind, numbers)
        except _Unlike as wrong:
            if wrong.inside:
                raise
            expected.append(str(wrong))
    raise _Unlike(" or ".join(expected))


def _inside(name: Any, value: Any, numbers: _Range) -> Any:
    try:
        return _plain(value, numbers)
    except _Unlike as unlike:
        found = unlike.value if unlike.inside else value
        raise _Unlike(str(unlike), f".{shown(name, 40)}{unlike.inside}", found) from None


def _tuple(value: Any, inner: tuple[Any, ...], numbers: _Range) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise _Unlike("a list")
    if len(value) > _LONGEST_LIST:
        raise _Unlike(f"a list of at most {_LONGEST_LIST:,}")
    if not inner or inner[-1] is Ellipsis or len(inner) == 1:
        kinds = (inner[0] if inner else Any,) * len(value)
    elif len(inner) != len(value):
        raise _Unlike(f"a list of {len(inner)}")
    else:
        kinds = inner
    try:
        return tuple(_checked(item, kind, numbers) for item, kind in zip(value, kinds, strict=True))
    except _Unlike as wrong:
        raise _Unlike(f"a list of which each is {wrong}") from None


def _integer(value: Any, numbers: _Range) -> int:
    least = 0 if numbers.least is None else numbers.least
    most = numbers.most_whole if numbers.most is None else numbers.most
    number = _number(value)
    # Some programs write whole numbers as 24.0.
    if number is None or not least <= number <= most or number != int(number):
        raise _Unlike(f"a whole number from {least:,} to {most:,}")
    return int(number)


def _float(value: Any, numbers: _Range) -> int | float:
    least = -LARGEST_FLOAT if numbers.least is None else numbers.least
    most = LARGEST_FLOAT if numbers.most is None else numbers.most
    number = _number(value)
    if number is None or not least <= number <= most:
        raise _Unlike("a finite number" if most == LARGEST_FLOAT else f"a number from {least:,} to {most:,}")
    return number


def _number(value: Any) -> int | float | None:
    """Python's own integers and floats, and numpy's as these; None for anything else."""
    if isinstance(value, (bool, str, bytes)):
        return None
    if isinstance(value, (int, float)):
        return value
    item = getattr(value, "item", None)
    value = item() if item is not None and getattr(value, "ndim", None) == 0 else None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _plain(value: Any, numbers: _Range) -> Any:
    """A value without a kind of its own: texts, finite numbers, and lists and tables of these."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _checked(value, str, numbers)
    if isinstance(value, (list, tuple)):
        return _tuple(value, (), numbers)
    if isinstance(value, Mapping):
        return {name: _plain(item, numbers) for name, item in value.items()}
    return _float(value, numbers)
