"""Tensors as a file stores them, and as MLX holds them: dense, or packed with the same numbers.

Most files hold plain numbers. Others hold float8 with scales beside it, bitsandbytes' tables, int8, or ggml's blocks.
Each such tensor is a `Stored`, decoded when it is asked for, one at a time. A matrix stays packed where nobody asks for
other bits: in the form of MLX's that holds its numbers, else in 8 bits, which costs what `_say` tells.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from mflux.backend import mx
from mflux.checkpoints.quantization import Quantization, divides, packed_specs
from mflux.checkpoints.stored.blocks import FORMS, packed_numbers
from mflux.cpu import work

log = logging.getLogger(__name__)
# Numbers that are decoded together, by each thread.
_TOGETHER = 1 << 20
# What a matrix becomes that no form of MLX's holds: half a thousandth of noise, which nothing that it is made from is
# as small as.
_ANEW = (Quantization(8, 64), Quantization(8, 32))
_PARTS = ("weight", "scales", "biases")
_said: set[tuple[str, str]] = set()


class Stored(ABC):
    """One tensor in a file.

    Attributes:
        kind: what its numbers are called: "Q4_K", "NF4", "scaled float8_e4m3fn".
        shape: its own.
        bits: of the file for each number, scales included.
        block: numbers that are decoded together; they follow one another along the last axis.
        held: what holds the same numbers, None if nothing of MLX's does.
    """

    kind: str
    shape: tuple[int, ...]
    bits: float
    block: int = 1
    held: Quantization | None = None

    @abstractmethod
    def read(self) -> Any:
        """What is in the file, for `numbers` and `codes`."""

    @abstractmethod
    def numbers(self, data: Any, start: int, stop: int) -> np.ndarray:
        """The numbers of blocks, float32 in one row."""

    def codes(self, data: Any, start: int, stop: int) -> tuple[np.ndarray, ...]:
        """The same of blocks as `held` has them: packed (bytes in one row), scales, and biases of an affine form."""
        raise AssertionError(f"{self.kind} is held in no form, and has no codes")

    @property
    def becomes(self) -> Quantization | None:
        """What it is packed to, None if it has to be dense."""
        if len(self.shape) != 2:
            return None
        for form in (self.held, *_ANEW):
            if form is not None and divides(self.shape[-1], form.group_size):
                return form
        return None

    def dense(self) -> mx.array:
        """(…) float32."""
        return self._rows(self.read(), 0, prod(self.shape) // self.block).reshape(self.shape)

    def _rows(self, data: Any, first: int, last: int) -> mx.array:
        """The numbers of blocks from one to another, float32 in one row."""
        out, into = work.room(((last - first) * self.block,))

        def decode(start: int, stop: int) -> None:
            into[start * self.block : stop * self.block] = self.numbers(data, first + start, first + stop)

        work.share(decode, last - first, max(1, _TOGETHER // self.block))
        return out

    def packed(self) -> dict[str, mx.array]:
        """`weight`, `scales` and, of an affine form, `biases`, as MLX's quantized layers have them."""
        form, (rows, width) = self.becomes, self.shape
        assert form is not None
        data = self.read()
        if form is not self.held:
            return self._anew(data, form)
        first = self.codes(data, 0, 1)
        parts = [
            np.empty((rows, width * form.bits // 8), np.uint8),
            *(np.empty((rows, width // form.group_size), part.dtype) for part in first[1:]),
        ]
        # Of one block, so that a block's part of each array is known.
        sizes = [part.size for part in first]

        def decode(start: int, stop: int) -> None:
            for part, size, found in zip(parts, sizes, self.codes(data, start, stop), strict=True):
                part.reshape(-1)[start * size : stop * size] = found.reshape(-1)

        work.share(decode, prod(self.shape) // self.block, max(1, _TOGETHER // self.block))
        parts[0] = parts[0].view("<u4")
        return {name: mx.array(part) for name, part in zip(_PARTS, parts, strict=False)}

    def _anew(self, data: Any, form: Quantization) -> dict[str, mx.array]:
        rows, width = self.shape
        # Some rows at a time, where they are whole blocks.
        step = max(1, 8 * _TOGETHER // width) if width % self.block == 0 else rows
        found: list[tuple[mx.array, ...]] = []
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            part = self._rows(data, start * width // self.block, stop * width // self.block)
            packed, scales, biases = mx.quantize(part.reshape(-1, width), group_size=form.group_size, bits=form.bits)
            found.append((packed, scales, biases))
            mx.eval(*found[-1])
        packed, scales, biases = (
            parts[0] if len(parts) == 1 else mx.concatenate(list(parts)) for parts in zip(*found, strict=True)
        )
        if _bears_16_bits(scales, biases):
            scales, biases = scales.astype(mx.float16), biases.astype(mx.float16)
        return {"weight": packed, "scales": scales, "biases": biases}

    def specs(self) -> dict[str, tuple[mx.Dtype, tuple[int, ...]]]:
        """The dtypes and shapes of what `packed` gives, without reading anything but a block."""
        form = self.becomes
        assert form is not None
        rows, width = self.shape
        if form.mode != "affine":
            groups = mx.uint8, (rows, width // form.group_size)
            return {"weight": (mx.uint32, (rows, width * form.bits // 32)), "scales": groups}
        return packed_specs(self.scales_dtype if form is self.held else mx.float16, self.shape, form)

    scales_dtype: mx.Dtype = mx.float32


class Understood(Mapping[str, mx.array]):
    """The tensors of files of which some are stored in a way of their own.

    Args:
        stored: those, by name; matrices end in ".weight".
        plain: all others.
        packs: False gives every tensor dense, for whoever packs it anew.
        source: the file or folder, for messages.
    """

    def __init__(
        self, stored: Mapping[str, Stored], plain: Mapping[str, mx.array], *, packs: bool = True, source: object = ""
    ):
        self.stored, self.plain, self._packs, self.source = stored, plain, packs, source
        # What was decoded last: the loader asks for its parts, and for rows of them, one after the other.
        self._last: tuple[str, dict[str, mx.array]] = "", {}

    @cached_property
    def _names(self) -> dict[str, tuple[str, str] | None]:
        """What there is → the tensor that it is a part of, and which; None of what is plain, or dense."""
        names: dict[str, tuple[str, str] | None] = {}
        for name, one in self.stored.items():
            if self.is_packed(name):
                stem = name.removesuffix("weight")
                names |= {stem + leaf: (name, leaf) for leaf in one.specs()}
            else:
                names[name] = None
        return names | dict.fromkeys(self.plain)

    def is_packed(self, name: str) -> bool:
        """Whether a tensor of `stored` is given in packed form."""
        return self._packs and name.endswith(".weight") and self.stored[name].becomes is not None

    def __getitem__(self, name: str) -> mx.array:
        part = self._names[name]
        if part is None and name not in self.stored:
            return self.plain[name]
        whole, leaf = part or (name, "weight")
        if self._last[0] != whole:
            self._last = "", {}
            if part is None:
                self._last = whole, {leaf: self.stored[whole].dense()}
            else:
                self._say()
                self._last = whole, self.stored[whole].packed()
        return self._last[1][leaf]

    def spec(self, name: str) -> mx.array:
        """An array of a tensor's dtype and shape, with no numbers in it: nothing is read."""
        part = self._names[name]
        if part is not None:
            dtype, shape = self.stored[part[0]].specs()[part[1]]
            return mx.zeros(shape, dtype)
        return mx.zeros(self.stored[name].shape) if name in self.stored else spec(self.plain, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _say(self) -> None:
        """What cannot stay as it is stored, once for each file and kind."""
        changed: Counter[str] = Counter()
        bits: dict[str, float] = {}
        for one in self.stored.values():
            if one.becomes is not None and one.becomes is not one.held:
                changed[one.kind] += 1
                bits[one.kind] = one.bits
        for kind, number in changed.items():
            if (str(self.source), kind) in _said:
                continue
            _said.add((str(self.source), kind))
            log.warning(
                "%s: %d matrices are stored as %s, which MLX does not hold: they take 8.5 bits a weight in memory for "
                "%.3g in the file; -q 4 takes less, and less precisely",
                self.source, number, kind, bits[kind],
            )  # fmt: skip


class Chosen(Mapping[str, mx.array]):
    """Some of the tensors of a mapping, by other names.

    Args:
        names: the name here → the name there.
    """

    def __init__(self, tensors: Mapping[str, mx.array], names: Mapping[str, str]):
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> mx.array:
        return self._tensors[self._names[name]]

    def spec(self, name: str) -> mx.array:
        return spec(self._tensors, self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _bears_16_bits(scales: mx.array, biases: mx.array) -> bool:
    """Whether float16 has eleven digits of all of these: the least that it has so many of is 6.1e-5."""
    least = mx.where(scales == 0, 1, mx.abs(scales)).min()
    return bool((least > 2**-14).item() and (mx.abs(biases).max() < 65504).item())


def spec(tensors: Mapping[str, mx.array], name: str) -> mx.array:
    """An array of a tensor's dtype and shape; its numbers, if it has any, are not to be looked at."""
    told = getattr(tensors, "spec", None)
    return tensors[name] if told is None else told(name)


class Blocks(Stored):
    """A tensor in ggml's blocks.

    Args:
        kind: a key of `FORMS`.
        read: gives the bytes, uint8.
        width: bytes of a block.
    """

    def __init__(self, kind: str, shape: tuple[int, ...], block: int, width: int, read: Any):
        self.kind, self.shape, self.block, self._width, self._read = kind, shape, block, width, read
        self.bits = 8 * width / block
        self._form = FORMS[kind]
        self.held = self._form.held

    @property
    def scales_dtype(self) -> mx.Dtype:  # type: ignore[override]
        assert self._form.groups is not None
        scales = self._form.groups(np.zeros((1, self._width), np.uint8)).scales
        return mx.float16 if scales.dtype == np.float16 else mx.float32

    def read(self) -> np.ndarray:
        return self._read().reshape(-1, self._width)

    def numbers(self, data: np.ndarray, start: int, stop: int) -> np.ndarray:
        return self._form.numbers(data[start:stop]).reshape(-1)

    def codes(self, data: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, ...]:
        if self._form.codes is not None:
            return self._form.codes(data[start:stop])
        assert self._form.groups is not None
        assert self.held is not None
        groups = self._form.groups(data[start:stop])
        return packed_numbers(groups.q.reshape(1, -1), self.held.bits).view(np.uint8), groups.scales, groups.biases
