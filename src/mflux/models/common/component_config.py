"""The base of all component configurations: a frozen dataclass read from a component's own `config.json`.

Every value is checked by `mflux.utils.typed_json` before anything is built from it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from mflux.errors import CheckpointError
from mflux.text import shown
from mflux.utils.typed_json import LARGEST_INTEGER, Wrong, checked_fields

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
        try:
            chosen = checked_fields(cls, values, most_of=_most_of)
        except Wrong as wrong:
            raise CheckpointError(f"{source}: {wrong}") from None
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


def _is_number(step: str) -> bool:
    return step.isascii() and step.isdecimal() and len(step) < 10


def _most_of(name: str) -> int:
    return _MOST_LAYERS if _COUNTS.search(name) else LARGEST_INTEGER
