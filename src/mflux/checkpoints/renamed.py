"""Tensors under the names that their file has, as a mapping from the published ones.

What a file calls a tensor is data: patterns (`by_patterns`), or a table of layers (`Table`), the one that LoRAs have
for the same names. From both follows where each published tensor stands: under which name, and in which rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from mflux.backend import mx
from mflux.checkpoints.quantization import Quantization, inferred
from mflux.checkpoints.stored.tensors import spec
from mflux.errors import CheckpointError

# Patterns and what they become, applied in order.
Patterns = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Place:
    """Where a tensor stands.

    Attributes:
        name: the file's.
        rows: which of that tensor's rows, from where to where, in units of which it has `of`; None is all.
    """

    name: str
    rows: tuple[tuple[int, int], ...] | None = None
    of: int = 1


# From the names in a file to where each published tensor stands; None where the file has the published names.
Names = Callable[[Iterable[str]], dict[str, Place] | None]


class Renamed(Mapping[str, mx.array]):
    """Tensors by their published names, read when they are asked for, and what their shapes tell of a configuration.

    Args:
        tensors: by the file's names.
        places: published name → where it stands; None where the names are the same.
        source: where they come from, for messages.
        square: layers whose input is as wide as a vector, and that vector: from these the bits of quantized tensors
            follow, since a vector is never quantized.
        change: called with a tensor's published name and the tensor; what it returns takes its place.
    """

    def __init__(
        self,
        tensors: Mapping[str, mx.array],
        places: Mapping[str, Place] | None = None,
        *,
        source: object = "",
        square: Sequence[tuple[str, str]] = (),
        change: Callable[[str, mx.array], mx.array] | None = None,
    ):
        self._tensors = tensors
        self._places = {name: Place(name) for name in tensors} if places is None else places
        self._source = source
        self._square = square
        self._change = change

    def __getitem__(self, name: str) -> mx.array:
        place = self._places[name]
        value = self._part(place, self._tensors[place.name])
        return value if self._change is None else self._change(name, value)

    def _part(self, place: Place, value: mx.array) -> mx.array:
        if place.rows is None:
            return value
        if value.ndim == 0 or value.shape[0] % place.of:
            shape = list(value.shape)
            raise CheckpointError(f"{self._source}: {place.name} of shape {shape} does not divide into {place.of}")
        unit = value.shape[0] // place.of
        parts = [value[start * unit : stop * unit] for start, stop in place.rows]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def spec(self, name: str) -> mx.array:
        """As `self[name]`, without its numbers: nothing of it is read."""
        place = self._places[name]
        value = spec(self._tensors, place.name)
        value = self._part(place, mx.zeros(value.shape, value.dtype))
        return value if self._change is None else self._change(name, value)

    def rows(self, name: str) -> int:
        return self.spec(name).shape[0]

    def width(self, layer: str) -> int:
        """How many weights a row of a layer has, quantized or not."""
        columns = self.spec(f"{layer}.weight").shape[-1]
        if f"{layer}.scales" not in self:
            return columns
        if self.quantization is None:
            raise KeyError(f"a layer that tells the bits of {layer}")
        return columns * 32 // self.quantization.bits

    def count(self, pattern: str) -> int:
        """How many numbers occur where `pattern` has a group."""
        return len({match[1] for name in self if (match := re.match(pattern, name))})

    @property
    def quantization(self) -> Quantization | None:
        """What the layers are quantized to, as far as the shape of a square one tells."""
        for weight, rows in self._square:
            if f"{weight}.scales" in self and f"{weight}.weight" in self and rows in self:
                scales = self.spec(f"{weight}.scales")
                packed = self.spec(f"{weight}.weight").shape
                return inferred(self.rows(rows), packed, scales.shape, floats=scales.dtype == mx.uint8)
        return None


def parts(name: str, ours: Sequence[str], shares: Sequence[int] = ()) -> dict[str, Place]:
    """Where our tensors stand of which a file's holds several, one below the other: in equal parts, or by shares."""
    if len(ours) == 1:
        return {ours[0]: Place(name)}
    shares = shares or [1] * len(ours)
    ends = [sum(shares[: number + 1]) for number in range(len(ours))]
    return {
        one: Place(name, ((end - share, end),), ends[-1]) for one, share, end in zip(ours, shares, ends, strict=True)
    }


def as_published(names: Iterable[str]) -> None:
    """The names of files that have the published ones."""


def by_patterns(*patterns: tuple[str, str], left_out: str | None = None) -> Names:
    """Names that patterns turn into the published ones; a name that none fits is one already.

    Args:
        patterns: and what they become, applied in order.
        left_out: a pattern of the file's names that hold nothing a published file has.
    """

    def places(names: Iterable[str]) -> dict[str, Place]:
        return {
            _translated(name, patterns): Place(name) for name in names if not (left_out and re.match(left_out, name))
        }

    return places


def where(marker: str, names: Names) -> Names:
    """Names that a file has if one of its own fits a pattern."""

    def places(found: Iterable[str]) -> dict[str, Place] | None:
        return names(found) if any(re.search(marker, name) for name in found) else None

    return places


def either(*known: Names) -> Names:
    """Names of several layouts, of which a file has the first that fits, or else the published ones."""

    def places(found: Iterable[str]) -> dict[str, Place] | None:
        return next((told for names in known if (told := names(found)) is not None), None)

    return places


_BEFORE = r"^((model\.)?diffusion_model|transformer)\."
# The published names of a transformer in a file that may hold more, or that a trainer wrote.
PREFIXED = where(_BEFORE, by_patterns((_BEFORE, "")))


@cache
def _translated(name: str, patterns: Patterns) -> str:
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name


@dataclass(frozen=True)
class Table:
    """Names that a table of layers turns into the published ones, as single files of one component have them.

    A file has these names if it has one of the table; a name that the table does not know stays, for the loader to
    judge.

    Attributes:
        layers: name in the file → the layers whose rows it holds, one below the other; `{i}` stands for a block's
            number. As `lora.names.Spelling` has it.
        prefix: a pattern of what may stand before all names.
        shares: how the rows are shared out, where that is not equally.
        swapped: layers whose two halves of rows are the other way round in the file.
        leaves: what the file calls a layer's tensors, where that is not as published: {"scale": "weight"}.
        left_out: names that hold nothing a published file has.
    """

    layers: Mapping[str, tuple[str, ...]]
    prefix: str = r"(model\.)?diffusion_model\."
    shares: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    swapped: tuple[str, ...] = ()
    leaves: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def __call__(self, names: Iterable[str]) -> dict[str, Place] | None:
        places: dict[str, Place] = {}
        known = False
        for name in names:
            short = re.sub(f"^{self.prefix}", "", name)
            layer, _, leaf = short.rpartition(".")
            # One number of a name is a block's; others belong to it.
            block = re.search(r"(?<=\.)\d+(?=\.)", layer)
            pattern = layer if block is None else f"{layer[: block.start()]}{{i}}{layer[block.end() :]}"
            key = layer if layer in self.layers else pattern
            if key not in self.layers:
                if short not in self.left_out:
                    places[short] = Place(name)
                continue
            known = True
            number = block[0] if block else ""
            leaf = self.leaves.get(leaf, leaf)
            ours = [f"{target.replace('{i}', number)}.{leaf}" for target in self.layers[key]]
            if self.layers[key][0] in self.swapped:
                places[ours[0]] = Place(name, ((1, 2), (0, 1)), 2)
            else:
                places |= parts(name, ours, self.shares.get(key, ()))
        return places if known else None


def renamed(tensors: Mapping[str, mx.array], names: Names, **options: Any) -> Renamed:
    """A file's tensors by the published names; `options` as `Renamed` has them."""
    return Renamed(tensors, names(tensors), **options)
