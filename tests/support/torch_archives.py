"""Files as `torch.save` writes them, and as it never would, put together byte by byte without torch.

`pickled` spells a value out instruction by instruction, so a test decides what stands in the stream.
"""

from __future__ import annotations

import io
import struct
import zipfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


@dataclass(frozen=True)
class Global:
    module: str
    name: str


@dataclass(frozen=True)
class Call:
    function: Any
    arguments: Any


@dataclass(frozen=True)
class Persistent:
    identity: Any


@dataclass(frozen=True)
class Raw:
    """Instructions that are put into the stream as they are."""

    code: bytes


def pickled(value: Any) -> bytes:
    """A whole stream of protocol 2."""
    return b"\x80\x02" + spelled(value) + b"."


def spelled(value: Any) -> bytes:
    match value:
        case Raw(code):
            return code
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int() if -(2**31) <= value < 2**31:
            return b"J" + struct.pack("<i", value)
        case int():
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(raw)]) + raw
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            raw = value.encode("utf-8", "surrogatepass")
            return b"X" + struct.pack("<I", len(raw)) + raw
        case bytes():
            return b"B" + struct.pack("<I", len(value)) + value
        case tuple():
            return b"(" + b"".join(map(spelled, value)) + b"t"
        case list():
            return b"](" + b"".join(map(spelled, value)) + b"e"
        case dict():
            return b"}(" + b"".join(spelled(key) + spelled(item) for key, item in value.items()) + b"u"
        case Global(module, name):
            return f"c{module}\n{name}\n".encode()
        case Call(function, arguments):
            return spelled(function) + spelled(arguments) + b"R"
        case Persistent(identity):
            return spelled(identity) + b"Q"
    raise TypeError(value)


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def storage(key: str, kind: str = "FloatStorage", count: int = 6, module: str = "torch") -> Persistent:
    return Persistent(("storage", Global(module, kind), key, "cpu", count))


def tensor(
    key: str,
    shape: Any = (2, 3),
    strides: Any = None,
    offset: Any = 0,
    *,
    kind: str = "FloatStorage",
    count: int | None = None,
    metadata: Any = None,
) -> Call:
    """A tensor as `_rebuild_tensor_v2` is told of it."""
    count = prod(shape) if count is None else count
    arguments = (storage(key, kind, count), offset, shape, contiguous(shape) if strides is None else strides, False)
    return Call(
        Global("torch._utils", "_rebuild_tensor_v2"),
        (*arguments, Call(Global("collections", "OrderedDict"), ()), *((metadata,) if metadata is not None else ())),
    )


def tensor_v3(key: str, dtype: str, shape: tuple[int, ...], length: int) -> Call:
    """A tensor of a dtype that has no storage class."""
    return Call(
        Global("torch._utils", "_rebuild_tensor_v3"),
        (
            storage(key, "UntypedStorage", length, "torch.storage"),
            *(0, shape, contiguous(shape), False),
            *(Call(Global("collections", "OrderedDict"), ()), Global("torch", dtype)),
        ),
    )


def parameter(data: Any) -> Call:
    hooks = Call(Global("collections", "OrderedDict"), ())
    return Call(Global("torch._utils", "_rebuild_parameter"), (data, True, hooks))


def zipped(records: dict[str, bytes], prefix: str = "archive/", method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in records.items():
            archive.writestr(prefix + name, data)
    return file.getvalue()


def archive(root: Any, storages: dict[str, bytes], byteorder: str | None = "little") -> bytes:
    """The zip container; `root` may be a stream that is pickled already."""
    records = {"data.pkl": root if isinstance(root, bytes) else pickled(root)}
    if byteorder is not None:
        records["byteorder"] = byteorder.encode()
    records |= {f"data/{key}": data for key, data in storages.items()}
    return zipped(records | {"version": b"3\n"})


def legacy(root: Any, storages: dict[str, tuple[int, bytes]], keys: Any = None) -> bytes:
    """The stream of torch before 1.6; each storage with its number of elements."""
    header = pickled(LEGACY_MAGIC) + pickled(1001) + pickled({"little_endian": True})
    body = root if isinstance(root, bytes) else pickled(root)
    data = b"".join(struct.pack("<q", count) + raw for count, raw in storages.values())
    return header + body + pickled(list(storages) if keys is None else keys) + data


def save(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
