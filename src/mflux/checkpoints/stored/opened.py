"""Files of any container as one mapping of tensors, whatever way each is stored in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mflux.backend import mx
from mflux.checkpoints.readers.gguf import KINDS, MAGIC, GgufFile, GgufInfo
from mflux.checkpoints.readers.plain import naming_the_copy, open_file
from mflux.checkpoints.readers.pytorch import PytorchFile
from mflux.checkpoints.readers.safetensors import SafetensorsFile
from mflux.checkpoints.readers.zip_records import LOCAL_MAGIC
from mflux.checkpoints.stored.blocks import FORMS
from mflux.checkpoints.stored.kinds import told_apart
from mflux.checkpoints.stored.tensors import Blocks, Chosen, Stored, Understood, spec
from mflux.errors import CheckpointError
from mflux.optional import require
from mflux.text import shown

Container = SafetensorsFile | PytorchFile | GgufFile
# ggml's plain numbers: what numpy calls them, and what they come out as.
_PLAIN = {
    "F32": ("<f4", mx.float32), "F16": ("<f2", mx.float16), "BF16": ("<u2", mx.bfloat16), "F64": ("<f8", mx.float32),
    "I8": ("i1", mx.int8), "I16": ("<i2", mx.int16), "I32": ("<i4", mx.int32), "I64": ("<i8", mx.int64),
}  # fmt: skip
_BLOCK = {name: (size, width) for name, size, width in KINDS.values()}


def open_container(path: Path) -> Container:
    """A file of weights of whichever kind its first bytes show.

    Raises:
        CheckpointError: it is damaged, or none.
    """
    with open_file(path) as file:
        head = file.read(9)
    if head.startswith(MAGIC):
        return GgufFile(path)
    # A safetensors header is JSON behind its length.
    is_torch = head.startswith((LOCAL_MAGIC, b"\x80"))
    if head[8:] == b"{" or (path.suffix == ".safetensors" and not is_torch):
        return SafetensorsFile(path)
    with naming_the_copy(path):
        return PytorchFile(path)


def understood(files: list[Container], source: object, *, packs: bool = True, prefix: str | None = None) -> Understood:
    """The tensors of files, of which none stands in two.

    Args:
        source: the file or folder, for messages.
        packs: False gives every tensor dense, for whoever packs it anew.
        prefix: take only names that begin so, without it; by default what wraps the weights of a PyTorch file.

    Raises:
        CheckpointError: a tensor stands in two files, or is packed in a way that is not read.
    """
    where: dict[str, Container | Chosen] = {}
    for file in files:
        wrapper = file.wrapper if isinstance(file, PytorchFile) and prefix is None else ""
        names = {name.removeprefix(wrapper): name for name in file}
        for name in names:
            if name in where:
                raise CheckpointError(f"{source}: the tensor {shown(name)} stands in two files")
            where[name] = Chosen(file, names) if wrapper and not isinstance(file, GgufFile) else file
    safetensors = {name: file for name, file in where.items() if isinstance(file, SafetensorsFile)}
    stored, beside = told_apart(safetensors, source)
    plain: dict[str, Mapping[str, mx.array]] = {}
    for name, holder in where.items():
        if name in stored or name in beside:
            continue
        if not isinstance(holder, GgufFile):
            plain[name] = holder
        elif holder.infos[name].kind in _PLAIN:
            plain[name] = _Numbers(holder)
        else:
            stored[name] = _blocks(holder, name)
    if prefix:
        chosen = {name.removeprefix(prefix): one for name, one in stored.items() if name.startswith(prefix)}
        names = {name.removeprefix(prefix): name for name in plain if name.startswith(prefix)}
        return Understood(chosen, Chosen(Joined(plain), names), packs=packs, source=source)
    return Understood(stored, Joined(plain), packs=packs, source=source)


def _blocks(file: GgufFile, name: str) -> Stored:
    info = file.infos[name]
    made = Blocks if info.kind in FORMS else ByPackage
    return made(info.kind, info.shape, *_BLOCK[info.kind], partial(file.read, name))


class ByPackage(Blocks):
    """A tensor in blocks whose numbers stand in tables that the package `gguf` has.

    Raises:
        MissingExtraError: (on access) it is not installed.
    """

    _form = None  # type: ignore[assignment]

    def __init__(self, kind: str, shape: tuple[int, ...], block: int, width: int, read: Any):
        self.kind, self.shape, self.block, self._width, self._read = kind, shape, block, width, read
        self.bits = 8 * width / block

    def read(self) -> np.ndarray:
        require("gguf", extra="gguf", feature=f"A GGUF file with weights of the type {self.kind}")
        return super().read()

    def numbers(self, data: np.ndarray, start: int, stop: int) -> np.ndarray:
        import gguf

        kind = gguf.GGMLQuantizationType[self.kind]
        found: np.ndarray = gguf.quants.dequantize(data[start:stop], kind)
        return found.reshape(-1)


class _Numbers(Mapping[str, mx.array]):
    """The plain tensors of a GGUF file."""

    def __init__(self, file: GgufFile):
        self._file = file

    def _info(self, name: str) -> GgufInfo:
        return self._file.infos[name]

    def __getitem__(self, name: str) -> mx.array:
        info = self._info(name)
        code, dtype = _PLAIN[info.kind]
        values = self._file.read(name).view(code)
        if info.kind == "F64":
            values = values.astype(np.float32)
        array = mx.array(values)
        return (array.view(mx.bfloat16) if info.kind == "BF16" else array.astype(dtype)).reshape(info.shape)

    def spec(self, name: str) -> mx.array:
        return mx.zeros(self._info(name).shape, _PLAIN[self._info(name).kind][1])

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._file if self._info(name).kind in _PLAIN)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Joined(Mapping[str, mx.array]):
    """Tensors from several places, read when they are asked for."""

    def __init__(self, where: Mapping[str, Mapping[str, mx.array]]):
        self._where = where

    def __getitem__(self, name: str) -> mx.array:
        return self._where[name][name]

    def spec(self, name: str) -> mx.array:
        return spec(self._where[name], name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def bits_stored(tensors: Understood) -> float | None:
    """How many bits a weight of the matrices that are stored in a way of their own takes; None if there are none."""
    numbers = sum(prod(one.shape) for one in tensors.stored.values())
    return sum(one.bits * prod(one.shape) for one in tensors.stored.values()) / numbers if numbers else None
