"""GGUF files, checked before a byte of data is touched.

The format (ggml's, version 2 and 3): a count of tensors and of metadata entries, the entries, a table of tensors with
shape, kind and offset, then the data. What a file announces is compared with the bytes that it has before anything is
allocated: it is a stranger's. A file may be one of several, `NAME-00001-of-00003.gguf`, of which each is whole.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mflux.checkpoints.readers.plain import Unchanged, naming_the_copy, open_file
from mflux.errors import CheckpointError
from mflux.text import shown

if TYPE_CHECKING:
    import numpy as np

MAGIC = b"GGUF"
# Kinds of tensors by their numbers: the name, how many numbers stand in a block, and how many bytes that takes.
KINDS = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4),
    27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
}  # fmt: skip
# Of metadata: what `struct` calls a number of that type.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# A table of a large language model's words is some ten megabytes; of an image model's tensors, a few hundred kilobytes.
_LARGEST_HEADER = 200_000_000
_LONGEST_NAME = 1000
_LARGEST_SIDE = 2**31 - 1
_MOST_DIMENSIONS = 4
# Of a longer list of numbers or words only the length is kept: vocabularies.
_LONGEST_LIST = 64
_PART = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")


@dataclass(frozen=True)
class GgufInfo:
    """Where one tensor lies, and how its numbers are stored.

    Attributes:
        kind: ggml's name, such as "Q4_K".
        stored: the shape in the file, as torch and MLX have it: the last axis is the one that blocks run along.
        shape: the tensor's own, which converters for images write down where the file has another.
        start, end: from the beginning of the file.
        path: the file.
    """

    kind: str
    stored: tuple[int, ...]
    shape: tuple[int, ...]
    start: int
    end: int
    path: Path


class _Header:
    """The bytes of a header, read in order, no more of them than there are."""

    def __init__(self, file: BinaryIO, path: Path, size: int):
        self._file, self._path, self._size = file, path, size
        self.at = 0

    @property
    def left(self) -> int:
        return self._size - self.at

    def next(self, count: int, what: str) -> bytes:
        if count <= self.left and self.at + count > _LARGEST_HEADER:
            raise self.damaged(f"its header is larger than {_LARGEST_HEADER:,} bytes")
        data = self._file.read(count) if count <= self.left else b""
        if len(data) != count:
            raise CheckpointError(
                f"{self._path} is truncated: {what} should take {count:,} bytes and {self.left:,} are left: "
                "fetch it again"
            )
        self.at += count
        return data

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.next(struct.calcsize(code), what))[0]

    def text(self, what: str, most: int | None = None) -> str:
        length = self.number("Q", what)
        if most is not None and length > most:
            raise self.damaged(f"{what} is {length:,} bytes long")
        try:
            return self.next(length, what).decode()
        except UnicodeDecodeError:
            raise self.damaged(f"{what} is not UTF-8") from None

    def value(self, kind: int, what: str) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind], what)
        if kind == _STRING:
            return self.text(what)
        if kind != _ARRAY:
            raise self.damaged(f"{what} has the type {kind}, which there is not")
        inner, length = self.number("I", what), self.number("Q", what)
        if inner in _NUMBERS:
            code = _NUMBERS[inner]
            data = self.next(length * struct.calcsize(code), what)
            return list(struct.unpack(f"<{length}{code}", data)) if length <= _LONGEST_LIST else length
        if inner != _STRING:
            raise self.damaged(f"{what} is a list of lists")
        if 8 * length > self.left:
            raise self.damaged(f"{what} is said to have {length:,} entries")
        words = []
        for _ in range(length):
            word = self.next(self.number("Q", what), what)
            if length <= _LONGEST_LIST:
                words.append(word.decode(errors="replace"))
        return words if length <= _LONGEST_LIST else length

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path} is damaged: {what}; fetch it again")


def read_header(path: str | Path) -> tuple[dict[str, GgufInfo], dict[str, Any]]:
    """Read and check a GGUF header.

    Returns:
        The tensors by name in the file's order, and the metadata; of long lists only the length.

    Raises:
        CheckpointError: the file is missing, truncated, of another kind or version, or says what cannot be.
    """
    path = Path(path)
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            return _read_header(_Header(file, path, size), path, size)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None


def _read_header(header: _Header, path: Path, size: int) -> tuple[dict[str, GgufInfo], dict[str, Any]]:
    if header.next(4, "its first word") != MAGIC:
        raise CheckpointError(f"{path} is not a GGUF file: fetch it again")
    _check_version(header.number("I", "its version"), path)
    tensors, entries = header.number("Q", "the count of tensors"), header.number("Q", "the count of entries")
    # The least that each of them takes.
    if tensors * 24 + entries * 13 > size:
        raise header.damaged(f"it is said to hold {tensors:,} tensors and {entries:,} entries in {size:,} bytes")
    metadata: dict[str, Any] = {}
    for number in range(entries):
        key = header.text(f"the name of its entry {number}", 65_535)
        what = f"its entry {shown(key, 60)}"
        metadata[key] = header.value(header.number("I", what), what)
    table = []
    for number in range(tensors):
        name = header.text(f"the name of its tensor {number}", _LONGEST_NAME)
        what = f"its entry for {shown(name)}"
        dimensions = header.number("I", what)
        if not 0 < dimensions <= _MOST_DIMENSIONS:
            raise header.damaged(f"{shown(name)} has {dimensions:,} dimensions")
        shape = tuple(reversed([header.number("Q", what) for _ in range(dimensions)]))
        table.append((name, shape, header.number("I", what), header.number("Q", what)))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise header.damaged(f"its alignment of {shown(alignment, 40)} makes no sense")
    base = -(-header.at // alignment) * alignment
    return _placed(table, metadata, base, size, path), metadata


def _check_version(version: int, path: Path) -> None:
    if version & 0xFFFF == 0 and version:
        raise CheckpointError(f"{path} is a GGUF file for big-endian machines, which mflux does not read: take another")
    if version not in (2, 3):
        raise CheckpointError(f"{path} is of version {version} of GGUF, and mflux reads 2 and 3: take another file")


def _placed(
    table: list[tuple[str, tuple[int, ...], int, int]], metadata: dict[str, Any], base: int, size: int, path: Path
) -> dict[str, GgufInfo]:
    infos: dict[str, GgufInfo] = {}
    for name, stored, number, offset in table:
        if name in infos:
            raise CheckpointError(f"{path} is damaged: {shown(name)} stands in it twice; fetch it again")
        if number not in KINDS:
            raise CheckpointError(f"{path}: {shown(name)} is stored as ggml's type {number}, which mflux cannot read")
        kind, block, width = KINDS[number]
        if stored[-1] % block or max(stored) > _LARGEST_SIDE:
            raise CheckpointError(
                f"{path} is damaged: {shown(name)} has the shape {shown(list(stored))}, which {kind} cannot have; "
                "fetch it again"
            )
        start = base + offset
        end = start + prod(stored) // block * width
        if end > size:
            raise CheckpointError(
                f"{path} is truncated: {shown(name)} should end at byte {end:,} but the file ends after {size:,}: "
                "fetch it again"
            )
        shape = metadata.get(f"comfy.gguf.orig_shape.{name}", stored)
        sound = isinstance(shape, (list, tuple)) and all(isinstance(side, int) and side > 0 for side in shape)
        if not sound or prod(shape) != prod(stored):
            raise CheckpointError(
                f"{path} is damaged: {shown(name)} of shape {shown(list(stored))} is said to be {shown(shape, 80)}; "
                "fetch it again"
            )
        infos[name] = GgufInfo(kind, stored, tuple(shape), start, end, path)
    taken, before = 0, ""
    for name, info in sorted(infos.items(), key=lambda entry: (entry[1].start, entry[1].end)):
        if info.start < taken and info.end > info.start:
            raise CheckpointError(
                f"{path} is damaged: {shown(name)} lies on the bytes of {shown(before)}; fetch it again"
            )
        if info.end > taken:
            taken, before = info.end, name
    return infos


def parts_of(path: Path) -> list[Path]:
    """A file, or all files of one that is split.

    Raises:
        CheckpointError: some are missing.
    """
    found = _PART.match(path.name)
    if found is None:
        return [path]
    count = int(found["count"])
    if not 0 < count <= 9999:
        raise CheckpointError(f"{path} is said to be one of {count} files: give it its own name again")
    parts = [path.with_name(f"{found['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise CheckpointError(
            f"{path} is one of {count} files, and {len(missing)} of them are not beside it, such as {missing[0]}: "
            "fetch them into the same folder"
        )
    return parts


class GgufFile:
    """A file, or all parts of a split one: what its tensors are, and their bytes.

    Attributes:
        infos: the tensors by name.
        metadata: of the first part.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        parts = parts_of(self.path)
        self._unchanged = {part: Unchanged(part) for part in parts}
        self.infos: dict[str, GgufInfo] = {}
        self.metadata: dict[str, Any] = {}
        for number, part in enumerate(parts):
            with naming_the_copy(part):
                infos, metadata = read_header(part)
            if number == 0:
                self.metadata = metadata
            for name, info in infos.items():
                if name in self.infos:
                    raise CheckpointError(f"{self.path}: the tensor {shown(name)} stands in two files")
                self.infos[name] = info
        said = self.metadata.get("split.tensors.count")
        if isinstance(said, int) and len(parts) > 1 and said != len(self.infos):
            raise CheckpointError(
                f"{self.path} and the parts beside it hold {len(self.infos)} tensors of {said}: fetch them again"
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def read(self, name: str) -> np.ndarray:
        """A tensor's bytes, uint8.

        Raises:
            CheckpointError: the file was changed, or became shorter.
        """
        import numpy as np

        info = self.infos[name]
        self._unchanged[info.path].check()
        with open_file(info.path) as file:
            file.seek(info.start)
            data = np.fromfile(file, np.uint8, info.end - info.start)
        if len(data) != info.end - info.start:
            raise CheckpointError(f"{info.path} is truncated: it became shorter while it was read; fetch it again")
        return data
