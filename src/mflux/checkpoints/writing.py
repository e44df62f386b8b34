"""Safetensors files written tensor by tensor, complete or not at all.

The header, which holds every tensor's dtype, shape and place, comes first; so dtypes and shapes are announced before
any data, and then one tensor at a time is enough in memory. The bytes go to a temporary file in the same folder, which
takes the destination's name in one step when everything is written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from mflux.backend import mx
from mflux.errors import MfluxError, OutputError
from mflux.text import shown
from mflux.utils.atomic_files import Temporary
from mflux.utils.paths import user_path

CODES = {
    mx.bool_: "BOOL", mx.uint8: "U8", mx.int8: "I8", mx.uint16: "U16", mx.int16: "I16", mx.float16: "F16",
    mx.bfloat16: "BF16", mx.uint32: "U32", mx.int32: "I32", mx.float32: "F32", mx.uint64: "U64", mx.int64: "I64",
    mx.complex64: "C64",
}  # fmt: skip
_BY_WIDTH = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
_LARGEST_HEADER = 100_000_000

# What a tensor will be: its dtype and shape.
Spec = tuple[mx.Dtype, tuple[int, ...]]


class SafetensorsWriter:
    """Writes one safetensors file; a context manager.

        with SafetensorsWriter(path, {name: (array.dtype, array.shape), …}) as writer:
            for name, array in …:
                writer.write(name, array)

    Leaving the block normally puts the file in place, provided that every announced tensor was written; leaving it
    with an exception removes what was written. Until then nothing is seen at the destination.

    Args:
        path: the destination. Its folder must exist.
        specs: dtype and shape of every tensor, by name.
        metadata: text for the header's `__metadata__`.
        overwrite: whether a file that is already there may be replaced.

    Raises:
        OutputError: the destination exists, cannot be written, the disk is full, or a name cannot stand in the format.
    """

    def __init__(
        self,
        path: str | Path,
        specs: Mapping[str, Spec],
        *,
        metadata: Mapping[str, str] | None = None,
        overwrite: bool = False,
    ):
        self.path = user_path(path)
        self.specs = dict(specs)
        self._overwrite = overwrite
        self._header, self._places, self.size = _layout(self.path, self.specs, metadata)
        self._left = set(self.specs)
        self._temporary: Temporary | None = None

    def __enter__(self) -> Self:
        try:
            self._refuse_existing()
            self._temporary = Temporary(self.path.parent)
            self._require_room()
            self._write_at(self._temporary, 0, self._header)
            os.truncate(self._temporary.descriptor, self.size)
        except OSError as error:
            self._discard()
            raise self._cannot_write(error) from None
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, name: str, array: mx.array) -> None:
        """Write a tensor to its place; any order will do, once each.

        Raises:
            OutputError: the disk is full or gone.
            ValueError: the array is not what was announced.
        """
        if self._temporary is None:
            raise ValueError("a tensor can be written only within the block")
        dtype, shape = self.specs[name]
        if array.dtype != dtype or tuple(array.shape) != tuple(shape):
            raise ValueError(f"{name} was announced as {dtype} {list(shape)}, not {array.dtype} {list(array.shape)}")
        self._left.remove(name)
        if array.size == 0:
            return
        data = _bytes(array)
        try:
            self._write_at(self._temporary, self._places[name], data)
        except OSError as error:
            raise self._cannot_write(error) from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        temporary = self._temporary
        if kind is not None or temporary is None:
            self._discard()
            return
        try:
            if self._left:
                raise ValueError(f"{len(self._left)} tensors were announced and not written, such as {min(self._left)}")
            os.fsync(temporary.descriptor)
            self._refuse_existing()
            temporary.path.replace(self.path)
            temporary.close()
        except OSError as problem:
            self._discard()
            raise self._cannot_write(problem) from None
        except BaseException:
            self._discard()
            raise

    @staticmethod
    def _write_at(temporary: Temporary, place: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            # The system takes at most 2 GB at once.
            written = os.pwrite(temporary.descriptor, view[: 1 << 30], place)
            place += written
            view = view[written:]

    def _require_room(self) -> None:
        import shutil

        free = shutil.disk_usage(self.path.parent).free
        if free < self.size:
            raise OutputError(f"cannot write {self.path}: it needs {self.size:,} bytes and the disk has {free:,} left")

    def _refuse_existing(self) -> None:
        if self.path.is_dir():
            raise OutputError(f"{self.path} is a folder: name a file in it")
        if not self._overwrite and (self.path.exists() or self.path.is_symlink()):
            raise OutputError(f"{self.path} exists already: choose another name, or allow replacing it (--force)")

    def _discard(self) -> None:
        if self._temporary is not None:
            self._temporary.discard()

    def _cannot_write(self, error: OSError) -> MfluxError:
        if isinstance(error, FileNotFoundError):
            return OutputError(f"cannot write {self.path}: the folder {self.path.parent} does not exist")
        return OutputError(f"cannot write {self.path}: {error.strerror or error}")


def serialised(
    arrays: Mapping[str, mx.array], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """A safetensors file of these arrays, piece by piece, for what is written into another file.

    Raises:
        OutputError: a name cannot stand in the format.
    """
    specs = {name: (array.dtype, tuple(array.shape)) for name, array in arrays.items()}
    header, places, _ = _layout(Path(), specs, metadata)
    yield header
    for name in sorted(places, key=lambda name: (places[name], arrays[name].size)):
        if arrays[name].size:
            yield _bytes(arrays[name])


def _bytes(array: mx.array) -> memoryview:
    """An array's bytes as they lie in memory: row by row and, on every machine that MLX runs on, little-endian."""
    # Python's buffers do not know all of MLX's dtypes, so they see integers of the same width.
    data = mx.contiguous(array.reshape(1) if array.ndim == 0 else array).view(_BY_WIDTH[array.dtype.size])
    mx.eval(data)
    # MLX's stubs do not say that its arrays are buffers.
    return memoryview(cast(Any, data)).cast("B")


def _layout(
    path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, int], int]:
    """The header, each tensor's place in the file, and the file's length."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    starts: dict[str, int] = {}
    end = 0
    # Widest first, so that with a header of a multiple of eight bytes every tensor is aligned.
    for name, (dtype, shape) in sorted(specs.items(), key=lambda item: -item[1][0].size):
        if name == "__metadata__":
            raise OutputError(f"cannot write {path}: no tensor of a safetensors file can be called __metadata__")
        starts[name] = end
        end += prod(shape) * dtype.size
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError:
        bad = next(name for name in specs if not _is_unicode(name))
        raise OutputError(f"cannot write {path}: the tensor name {shown(bad)} is no valid text") from None
    text += b" " * (-len(text) % 8)
    if len(text) > _LARGEST_HEADER:
        raise OutputError(f"cannot write {path}: its header would be larger than the format allows; use several files")
    first = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: first + at for name, at in starts.items()}, first + end


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
