"""Safetensors files, read lazily and checked before a byte of data is touched.

The format is eight bytes of header length (little-endian), a JSON header with each tensor's dtype, shape and byte
range, then the data. MLX reads it, but says little when a file is damaged and refuses two dtypes; so the header is
read here, and those two are decoded with numpy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mflux.backend import mx
from mflux.checkpoints.readers.plain import (
    HEAD,
    Unchanged,
    allow_more_files,
    naming_the_copy,
    open_file,
    too_many_files,
    what_else,
)
from mflux.errors import CheckpointError
from mflux.text import shown
from mflux.utils.strict_json import NotJSON, parse

if TYPE_CHECKING:
    import numpy as np

# Bits per element, by the format's own dtype names.
_WIDTHS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
# What MLX itself does not read, or hands out as raw bytes.
_DECODED_HERE = ("F64", "F8_E4M3", "F8_E5M2")
# What tensors come out as.
_RESULTS = {"F64": mx.float32, "F8_E4M3": mx.float32, "F8_E5M2": mx.float32}
_MLX_NAMES = {
    "BOOL": "bool_", "U8": "uint8", "I8": "int8", "F16": "float16", "BF16": "bfloat16", "U16": "uint16", "I16": "int16",
    "U32": "uint32", "I32": "int32", "F32": "float32", "U64": "uint64", "I64": "int64", "C64": "complex64",
}  # fmt: skip
_LARGEST_HEADER = 100_000_000
# What MLX counts with.
_LARGEST_SIDE = 2**31 - 1


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies in its file. `start` and `end` count from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: str | Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read and check a safetensors header.

    Returns:
        The tensors by name in the file's order, and the file's metadata.

    Raises:
        CheckpointError: the file is missing, truncated, not safetensors, or its tensors share bytes.
    """
    path = Path(path)
    try:
        with open_file(path) as file:
            size = file.seek(0, 2)
            file.seek(0)
            if other := what_else(file.read(HEAD)):
                raise CheckpointError(f"{path} {other}")
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > _LARGEST_HEADER:
                raise CheckpointError(f"{path} is not a safetensors file: fetch it again")
            if length > size - 8:
                raise CheckpointError(
                    f"{path} is truncated: its header says {length:,} bytes but the file ends after {size:,}: "
                    "fetch it again"
                )
            header = parse(file.read(length), repeated=False)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except NotJSON as error:
        if "not JSON" in str(error) or "truncated" in str(error):
            raise CheckpointError(f"{path} is not a safetensors file: its header is not JSON; fetch it again") from None
        raise CheckpointError(f"{path} {error} in its header; fetch it again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is not a safetensors file: its header is not a table; fetch it again")

    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path} is damaged: its metadata is not a table of texts; fetch it again")
    tensors = {}
    for name, entry in header.items():
        try:
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            start, end = entry["data_offsets"]
            sound = isinstance(dtype, str) and all(type(value) is int and value >= 0 for value in (*shape, start, end))
            sound = sound and max(shape, default=0) <= _LARGEST_SIDE
        except (TypeError, KeyError, ValueError):
            sound = False
        if not sound:
            raise CheckpointError(f"{path} is damaged: its entry for {shown(name)} makes no sense; fetch it again")
        if dtype not in _WIDTHS:
            raise CheckpointError(f"{path}: {shown(name)} has the dtype {shown(dtype, 40)}, which mflux cannot read")
        if prod(shape) * _WIDTHS[dtype] != (end - start) * 8:
            raise CheckpointError(
                f"{path} is damaged: {shown(name)} has {end - start:,} bytes for the shape {shown(list(shape))}; "
                "fetch it again"
            )
        if 8 + length + end > size:
            raise CheckpointError(
                f"{path} is truncated: {shown(name)} should end at byte {8 + length + end:,} but the file ends after "
                f"{size:,}: fetch it again"
            )
        tensors[name] = TensorInfo(dtype, shape, 8 + length + start, 8 + length + end)
    _check_apart(tensors, path)
    return tensors, metadata


def _check_apart(tensors: Mapping[str, TensorInfo], path: Path) -> None:
    """No byte belongs to two tensors, so that all of them together are no more than the file."""
    taken, before = 0, ""
    for name, info in sorted(tensors.items(), key=lambda entry: (entry[1].start, entry[1].end)):
        if info.start < taken and info.end > info.start:
            raise CheckpointError(
                f"{path} is damaged: {shown(name)} lies on the bytes of {shown(before)}; fetch it again"
            )
        if info.end > taken:
            taken, before = info.end, name


class SafetensorsFile(Mapping[str, mx.array]):
    """One file as a mapping from names to lazy arrays: data are read when an array is evaluated.

    float64 and the two float8 dtypes come out as float32; everything else as it is stored.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._unchanged = Unchanged(self.path)
        with naming_the_copy(self.path):
            self.infos, self.metadata = read_header(path)
        self._lazy: dict[str, mx.array] = {}
        # One such entry makes mx.load refuse the whole file.
        self._decode_here = any(info.dtype in _DECODED_HERE for info in self.infos.values())

    def __getitem__(self, name: str) -> mx.array:
        self._unchanged.check()
        if self._decode_here:
            return _read_one(self.path, self.infos[name])
        if name not in self._lazy:
            self._lazy = self._load()
        # Handed out and let go of: an array that is kept here would keep its data once someone evaluates it.
        return self._lazy.pop(name)

    def spec(self, name: str) -> mx.array:
        """An array of the dtype and shape that a tensor comes out with, and no numbers: nothing is read."""
        info = self.infos[name]
        return mx.zeros(info.shape, _RESULTS.get(info.dtype) or getattr(mx, _MLX_NAMES[info.dtype]))

    def read(self, name: str) -> np.ndarray:
        """A tensor's bytes, uint8.

        Raises:
            CheckpointError: the file was changed, or became shorter.
        """
        import numpy as np

        self._unchanged.check()
        return np.frombuffer(_bytes_of(self.path, self.infos[name]), np.uint8)

    def _load(self) -> dict[str, mx.array]:
        try:
            return cast(dict[str, mx.array], mx.load(str(self.path), format="safetensors"))
        except (RuntimeError, ValueError) as error:
            if "open file" in str(error):
                # It opens a file several times, and says no more than that it could not.
                if allow_more_files():
                    return self._load()
                open_file(self.path).close()
                raise too_many_files(self.path) from None
            # Its reading of JSON is stricter in small things: half of a surrogate pair.
            raise CheckpointError(f"{self.path} is damaged: {shown(error, 300)}; fetch it again") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)


def _bytes_of(path: Path, info: TensorInfo) -> bytes:
    with open_file(path) as file:
        file.seek(info.start)
        data = file.read(info.end - info.start)
    if len(data) != info.end - info.start:
        raise CheckpointError(f"{path} is truncated: it became shorter while it was read; fetch it again")
    return data


def _read_one(path: Path, info: TensorInfo) -> mx.array:
    import numpy as np

    data = _bytes_of(path, info)
    if info.dtype == "F64":
        return mx.array(np.frombuffer(data, "<f8").astype(np.float32)).reshape(info.shape)
    if info.dtype in ("F8_E4M3", "F8_E5M2"):
        return mx.array(float8_values(info.dtype)[np.frombuffer(data, np.uint8)]).reshape(info.shape)
    if info.dtype == "BF16":
        return mx.array(np.frombuffer(data, "<u2")).view(mx.bfloat16).reshape(info.shape)
    names = {"BOOL": "?", "C64": "<c8"}
    code = names.get(info.dtype) or f"<{info.dtype[0].lower()}{_WIDTHS[info.dtype] // 8}"
    return mx.array(np.frombuffer(data, code)).reshape(info.shape)


def float8_values(dtype: str) -> np.ndarray:
    """The 256 values of a float8 dtype as float32: 1 sign bit, 4 or 5 of exponent, 3 or 2 of mantissa.

    Source: Micikevicius et al. 2022, "FP8 formats for deep learning". E4M3 has no infinity (torch's float8_e4m3fn).
    """
    import numpy as np

    exponent_bits, mantissa_bits = (4, 3) if dtype == "F8_E4M3" else (5, 2)
    codes = np.arange(256)
    sign = np.where(codes & 0x80, -1.0, 1.0)
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    bias = (1 << (exponent_bits - 1)) - 1
    values = np.where(exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - bias))
    top = exponent == (1 << exponent_bits) - 1
    if dtype == "F8_E4M3":
        values = np.where(top & (mantissa == 0.875), np.nan, values)
    else:
        values = np.where(top, np.where(mantissa == 0, np.inf, np.nan), values)
    return (sign * values).astype(np.float32)
