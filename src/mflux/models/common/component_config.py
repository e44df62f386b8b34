"""The base of all component configurations: a frozen dataclass read from a component's own `config.json`.

Every value is checked against its field's annotation and a range before anything is built from it. A field may narrow
or widen its range with `field(metadata={"least": 1, "most": 64})`.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import Field, dataclass, fields
from functools import cache
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from mflux.errors import CheckpointError
from mflux.text import shown

# Sides and ids: what MLX counts with. Magnitudes: far beyond any published constant, far below any overflow.
_LARGEST_INTEGER = 2**31 - 1
_LARGEST_FLOAT = 1e15
_LONGEST_TEXT = 1000
_LONGEST_LIST = 1000
# How many layers any model may have; the largest published one has 64.
_MOST_LAYERS = 1000
# Fields that say how many blocks are built one after the other.
_COUNTS = re.compile(r"(^|_)layers(_|$)|^depths?$|^(n|num)_(\w+_)?blocks$")


# Lists of such numbers; other lists name layers of another component.
_COUNTS_EACH = re.compile(r"^layers_per_|^num_|^depths$")


@dataclass(frozen=True)
class ComponentConfig:
    """Fields carry the file's names and the published model's values as defaults; keys that the model does not use are
    left alone. A subclass checks in `check` that it can build what the values ask for."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: object = "config.json") -> Self:
        """Build from a parsed `config.json`.

        Raises:
            CheckpointError: a value asks for something that this class cannot build, has the wrong type, or lies
                outside any sane range.
        """
        if not isinstance(values, Mapping):
            # A part of another configuration may be anything.
            raise CheckpointError(f"{source} is {shown(repr(values), 80)}, not a table of settings")
        kinds = _kinds(cls)
        chosen = {}
        for field in fields(cls):
            if field.name in values:
                try:
                    chosen[field.name] = _checked(values[field.name], kinds[field.name], field)
                except _Wrong as wrong:
                    value = shown(repr(values[field.name]), 80)
                    raise CheckpointError(f"{source}: {field.name} is {value}, not {wrong}") from None
        try:
            config = cls(**chosen)
            problem = config.check()
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise CheckpointError(f"{source} makes no sense for {cls.__name__}: {shown(error, 300)}") from None
        if problem:
            raise CheckpointError(f"{source}: {shown(problem, 1000)}")
        return config

    def check(self) -> str | None:
        """What this configuration asks for that cannot be built, as the rest of a sentence, or None."""
        return None

    def layer_counts(self) -> Iterator[tuple[str, int]]:
        """The fields that say how many blocks there are, nested configurations included."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, ComponentConfig):
                yield from ((f"{field.name}.{name}", number) for name, number in value.layer_counts())
            elif _COUNTS.search(field.name) and type(value) is int:
                yield field.name, value
            elif _COUNTS_EACH.search(field.name) and isinstance(value, tuple):
                yield from ((field.name, number) for number in value if type(number) is int)

    def beyond(self, names: Iterable[str]) -> str | None:
        """Where this configuration asks for more blocks than tensors of these names are for, as the rest of a
        sentence, or None. Blocks are numbered in the names of their tensors."""
        names = list(names)
        highest = max((int(step) for name in names for step in name.split(".") if _is_number(step)), default=-1)
        most = min(highest + 1, len(names))
        for field, number in self.layer_counts():
            if number > most:
                return f"{field} is {number:,}, and the weights are those of {most:,} at most"
        return None


class _Wrong(Exception):
    """A value is not what its field takes; the message says what that would be."""


@cache
def _kinds(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _checked(value: Any, kind: Any, field: Field) -> Any:
    """The value as the configuration holds it: lists as tuples, numbers as Python's own.

    Raises:
        _Wrong: it is not of the kind that the annotation names.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _of_any(value, inner, field)
    if origin is Literal:
        if value in inner and type(value) in map(type, inner):
            return value
        raise _Wrong(f"one of {', '.join(map(repr, inner))}")
    if kind is None or kind is types.NoneType:
        if value is None:
            return None
        raise _Wrong("null")
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise _Wrong("true or false")
    if kind is int:
        return _integer(value, field)
    if kind is float:
        return _float(value, field)
    if kind is str:
        if isinstance(value, str) and len(value) <= _LONGEST_TEXT:
            return value
        raise _Wrong("a text")
    if kind is tuple or origin is tuple or kind is list or origin is list:
        return _tuple(value, inner, field)
    if isinstance(kind, type) and issubclass(kind, ComponentConfig):
        if isinstance(value, (Mapping, kind)):
            return value
        raise _Wrong("a table")
    if kind is dict or kind is Mapping or origin in (dict, Mapping):
        if isinstance(value, Mapping):
            return {name: _plain(item, field) for name, item in value.items()}
        raise _Wrong("a table")
    return _plain(value, field)


def _of_any(value: Any, kinds: tuple[Any, ...], field: Field) -> Any:
    expected = []
    for kind in kinds:
        try:
            return _checked(value, kind, field)
        except _Wrong as wrong:
            expected.append(str(wrong))
    raise _Wrong(" or ".join(expected))


def _tuple(value: Any, inner: tuple[Any, ...], field: Field) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise _Wrong("a list")
    if len(value) > _LONGEST_LIST:
        raise _Wrong(f"a list of at most {_LONGEST_LIST:,}")
    if not inner or inner[-1] is Ellipsis or len(inner) == 1:
        kinds = (inner[0] if inner else Any,) * len(value)
    elif len(inner) != len(value):
        raise _Wrong(f"a list of {len(inner)}")
    else:
        kinds = inner
    try:
        return tuple(_checked(item, kind, field) for item, kind in zip(value, kinds, strict=True))
    except _Wrong as wrong:
        raise _Wrong(f"a list of which each is {wrong}") from None


def _integer(value: Any, field: Field) -> int:
    least = field.metadata.get("least", 0)
    most = field.metadata.get("most", _MOST_LAYERS if _COUNTS.search(field.name) else _LARGEST_INTEGER)
    number = _number(value)
    # Some programs write whole numbers as 24.0.
    if number is None or not least <= number <= most or number != int(number):
        raise _Wrong(f"a whole number from {least:,} to {most:,}")
    return int(number)


def _float(value: Any, field: Field) -> int | float:
    least, most = field.metadata.get("least", -_LARGEST_FLOAT), field.metadata.get("most", _LARGEST_FLOAT)
    number = _number(value)
    if number is None or not least <= number <= most:
        raise _Wrong("a finite number" if most == _LARGEST_FLOAT else f"a number from {least:,} to {most:,}")
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


def _plain(value: Any, field: Field) -> Any:
    """A value without a kind of its own: texts, finite numbers, and lists and tables of these."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _checked(value, str, field)
    if isinstance(value, (list, tuple)):
        return _tuple(value, (), field)
    if isinstance(value, Mapping):
        return {name: _plain(item, field) for name, item in value.items()}
    return _float(value, field)


def _is_number(step: str) -> bool:
    return step.isascii() and step.isdecimal() and len(step) < 10
