"""PyTorch's files read without torch: what `torch.save` wrote, as a mapping from names to arrays.

A file is a pickle that describes the tensors, and their storages beside it: since torch 1.6 as records of a zip
archive, before that one after the other behind the pickle. The pickle runs in `Unpickler`, against a table (`NAMES`) of
everything that it may mention; every call in it only notes down what a tensor is. Its place, size and strides are
checked against its storage there and then, and its bytes are read when the tensor is asked for.

Source of the layouts: what torch.serialization (`_save`, `_legacy_save`) and torch._utils (`_rebuild_*`) write.
"""

from __future__ import annotations

import errno
import logging
import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

from mflux.backend import mx
from mflux.checkpoints.readers.plain import HEAD, Unchanged, allow_more_files, open_file, too_many_files, what_else
from mflux.checkpoints.readers.safetensors import float8_values
from mflux.checkpoints.readers.unpickler import LARGEST_PICKLE, Name, Opaque, Refused, Table, Unpickler
from mflux.checkpoints.readers.zip_records import LOCAL_MAGIC, read_records, require_stored
from mflux.errors import CheckpointError, UnsafeCheckpointError
from mflux.text import shown

_log = logging.getLogger(__name__)

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
# The dictionaries in which training programs keep the weights.
WRAPPERS = (
    "state_dict", "model_state_dict", "model", "module", "net", "network", "params", "params_ema", "weights",
)  # fmt: skip
_DEEPEST = 64
_MOST_AXES = 32
_LARGEST_AXIS = 2**31 - 1
_LONGEST_NAME = 4096
_MOST_TENSORS = 1 << 20
# Names may share a storage, and a stride of zero repeats an element: what all names together hold may exceed the
# file, but only by so much.
_MOST_REPETITION = 8
_FREE_REPETITION = 64 << 20
# Mapped pages count as this process's memory until they are given back.
_MAPPED_AT_MOST = 32 << 20


@dataclass(frozen=True)
class DType:
    """One of torch's dtypes: its name, bytes per element, and how its bytes are seen by numpy ("" if not read here)."""

    name: str
    width: int
    code: str = ""

    @property
    def result(self) -> mx.Dtype:
        """The dtype that comes out: float64 and float8 as float32, everything else as it is."""
        return getattr(mx, _RESULTS.get(self.name) or {"bool": "bool_"}.get(self.name, self.name))


_RESULTS = {"float64": "float32", "float8_e4m3fn": "float32", "float8_e5m2": "float32"}
_FLOAT8 = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
DTYPES = {
    dtype.name: dtype
    for dtype in (
        DType("float64", 8, "<f8"), DType("float32", 4, "<f4"), DType("float16", 2, "<f2"), DType("bfloat16", 2, "<u2"),
        DType("int64", 8, "<i8"), DType("int32", 4, "<i4"), DType("int16", 2, "<i2"), DType("int8", 1, "i1"),
        DType("uint64", 8, "<u8"), DType("uint32", 4, "<u4"), DType("uint16", 2, "<u2"), DType("uint8", 1, "u1"),
        DType("bool", 1, "u1"), DType("complex64", 8, "<c8"),
        DType("float8_e4m3fn", 1, "u1"), DType("float8_e5m2", 1, "u1"),
        # Known, so that the error can name them.
        DType("complex128", 16), DType("complex32", 4), DType("float8_e4m3fnuz", 1), DType("float8_e5m2fnuz", 1),
        DType("float8_e8m0fnu", 1), DType("float4_e2m1fn_x2", 1), DType("bits8", 1), DType("bits16", 2),
        DType("bits1x8", 1), DType("bits2x4", 1), DType("bits4x2", 1),
        *(DType(f"{kind}{bits}", 1) for kind in ("int", "uint") for bits in range(1, 8)),
        # Quantized: storages of these occur only below a quantized tensor.
        DType("qint8", 1), DType("quint8", 1), DType("qint32", 4), DType("quint4x2", 1), DType("quint2x4", 1),
    )
}  # fmt: skip
_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128", "QInt8Storage": "qint8", "QUInt8Storage": "quint8", "QInt32Storage": "qint32",
    "QUInt4x2Storage": "quint4x2", "QUInt2x4Storage": "quint2x4",
}  # fmt: skip


class Storage:
    """A run of bytes in the file that tensors share.

    Where it begins is known once the file's layout is: `place` counts from the file's beginning, or from the beginning
    of `root` where this is a part of another storage.
    """

    __slots__ = ("dtype", "key", "length", "place", "root")

    def __init__(self, key: str, dtype: DType, length: int, place: int | None = None, root: Storage | None = None):
        self.key = key
        self.dtype = dtype
        self.length = length
        self.place = place
        self.root = root

    @property
    def start(self) -> int:
        if self.place is None:
            raise AssertionError("a storage without a place must not survive opening the file")
        return self.place + (self.root.start if self.root else 0)


@dataclass(frozen=True)
class TensorInfo:
    """A tensor that can be read here. `offset` and `strides` count elements of `dtype` from its storage's start."""

    storage: Storage
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    conjugated: bool = False
    negated: bool = False

    @property
    def result_bytes(self) -> int:
        return prod(self.shape) * (self.dtype.result.size if self.dtype.code else self.dtype.width)


@dataclass(frozen=True)
class DeclinedInfo:
    """A tensor that cannot be read here, and what makes it so: "sparse", "quantized", "nested" or "meta"."""

    kind: str


class PytorchFile(Mapping[str, mx.array]):
    """One file of `torch.save` as a mapping from dotted names to arrays, each read when it is asked for.

    float64 and float8 come out as float32, everything else as it is stored. Sparse, quantized and nested tensors are
    left to torch, if it is installed, and come out dense.

    Attributes:
        infos: what is known of each tensor without reading it.
        dropped: names of what is not a tensor, a branch without any tensor as one.
        wrapper: the prefix that all names share because the file wraps its weights ("state_dict.module."), or "".

    Raises:
        CheckpointError: the file is missing, truncated, damaged, or not one of torch's.
        UnsafeCheckpointError: it asks for more than weights need: a name outside `NAMES`, data outside its storage.
        MissingExtraError: (on access) the tensor needs torch, which is not installed.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._unchanged = Unchanged(self.path)
        self._data = map_file(self.path)
        self._big_endian = False
        self._storages: dict[str, Storage] = {}
        self._touched = 0
        self._from_torch: dict[str, mx.array] | None = None
        self._said_float64 = False
        head = bytes(self._data[:4])
        if head == LOCAL_MAGIC:
            root, length = self._read_archive()
        elif head[:1] == b"\x80":
            root, length = self._read_legacy()
        else:
            raise CheckpointError(f"{self.path} {_what_else(self._data)}")
        tree = _Flattened(root, length, self.path)
        self.infos, self.dropped, self.wrapper = tree.infos, tree.dropped, tree.wrapper()
        self._declined_paths = tree.declined_paths
        self._check_total()

    def __getitem__(self, name: str) -> mx.array:
        info = self.infos[name]
        if isinstance(info, DeclinedInfo):
            if info.kind == "meta":
                raise CheckpointError(f"{self.path}: {shown(name)} is a tensor without data, of torch's device meta")
            return self._ask_torch(name, info)
        if not info.dtype.code:
            hint = ": save it as complex64" if info.dtype.name == "complex128" else ""
            raise CheckpointError(
                f"{self.path}: {shown(name)} has the dtype {info.dtype.name}, which mflux cannot read{hint}"
            )
        if info.dtype.name == "float64" and not self._said_float64:
            self._said_float64 = True
            _log.warning("%s: its float64 tensors become float32", self.path)
        value = self._read(info)
        self._give_back_pages(info.result_bytes)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    # The two containers

    def _read_archive(self) -> tuple[Any, int]:
        """The zip archive of torch 1.6 and later."""
        records = read_records(self._data, self.path)
        found = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(found) != 1:
            raise CheckpointError(f"{self.path} is a zip archive, but not one that torch.save wrote")
        prefix = found[0].removesuffix("data.pkl")
        if any(name == f"{prefix}constants.pkl" or name.startswith(f"{prefix}code/") for name in records):
            raise UnsafeCheckpointError(
                f"{self.path} was refused: it is a TorchScript archive, which holds code; "
                "ask its author for safetensors or a plain state_dict"
            )
        require_stored(records, self.path)
        if order := records.get(f"{prefix}byteorder"):
            text = bytes(self._data[order.start : order.start + min(order.length, 16)])
            if text not in (b"little", b"big"):
                raise CheckpointError(f"{self.path} is damaged: its byte order makes no sense; fetch it again")
            self._big_endian = text == b"big"

        def storage(identity: Any) -> Storage:
            key, dtype, count, _ = self._storage_identity(identity, 5)
            record = records.get(f"{prefix}data/{key}")
            if record is None:
                raise CheckpointError(f"{self.path} is incomplete: it has no record {shown(key)}; fetch it again")
            if count * dtype.width > record.length:
                raise UnsafeCheckpointError(
                    f"{self.path} was refused: its storage {shown(key)} claims {count * dtype.width:,} bytes "
                    f"and has {record.length:,}"
                )
            # Names that share a storage must be seen to share it.
            known = self._storages.get(key)
            if known is None or (known.dtype, known.length) != (dtype, count * dtype.width):
                known = self._storages[key] = Storage(key, dtype, count * dtype.width, record.start)
            return known

        pickle = records[found[0]]
        if pickle.length > LARGEST_PICKLE:
            raise UnsafeCheckpointError(f"{self.path} was refused: its pickle has {pickle.length:,} bytes")
        stream = self._data[pickle.start : pickle.start + pickle.length]
        return Unpickler(stream, names=NAMES, persistent=storage, source=self.path).load(), pickle.length

    def _read_legacy(self) -> tuple[Any, int]:
        """The stream of torch 0.4 to 1.5: five pickles, then each storage behind its number of elements."""

        def storage(identity: Any) -> Storage:
            key, dtype, count, view = self._storage_identity(identity, 6)
            known = self._storages.get(key)
            if known is None:
                known = self._storages[key] = Storage(key, dtype, count * dtype.width)
            elif (known.dtype, known.length) != (dtype, count * dtype.width):
                raise self._no_sense()
            return known if view is None else self._legacy_view(known, view)

        start = 0
        results, lengths = [], []
        window = self._data[:LARGEST_PICKLE]
        for _ in range(5):
            machine = Unpickler(window, start, names=NAMES, persistent=storage, source=self.path)
            results.append(machine.load())
            lengths.append(machine.end - start)
            start = machine.end
            if results[0] != _LEGACY_MAGIC:
                raise CheckpointError(f"{self.path} is a pickle, but not one that torch.save wrote")
        _, version, _, root, keys = results
        if version != _LEGACY_VERSION:
            raise CheckpointError(f"{self.path} is a PyTorch file of an unknown version: save it with a newer torch")
        if not isinstance(keys, list):
            raise self._no_sense()
        for key in keys:
            found = self._storages.get(key) if isinstance(key, str) else None
            if found is None or found.place is not None:
                raise self._no_sense()
            count = int.from_bytes(self._data[start : start + 8], "little", signed=True)
            if count * found.dtype.width != found.length:
                raise self._no_sense()
            found.place = start + 8
            start = found.place + found.length
            if start > len(self._data):
                raise CheckpointError(
                    f"{self.path} is truncated: its data should end at byte {start:,} or later, "
                    f"but the file ends after {len(self._data):,}; fetch it again"
                )
        if any(found.place is None for found in self._storages.values()):
            raise self._no_sense()
        return root, lengths[3]

    def _legacy_view(self, root: Storage, view: Any) -> Storage:
        """Part of another storage, as torch up to 0.4 could share them: (its own key, first element, elements)."""
        if not isinstance(view, tuple) or len(view) != 3 or not _are_counts(view[1:]):
            raise self._no_sense()
        first, count = view[1] * root.dtype.width, view[2] * root.dtype.width
        if first + count > root.length:
            raise UnsafeCheckpointError(
                f"{self.path} was refused: a part of its storage {shown(root.key)} lies outside it"
            )
        return Storage(root.key, root.dtype, count, first, root)

    def _storage_identity(self, identity: Any, parts: int) -> tuple[str, DType, int, Any]:
        if not isinstance(identity, tuple) or len(identity) not in (5, parts) or identity[0] != "storage":
            raise self._no_sense()
        _, dtype, key, _, count = identity[:5]
        if not isinstance(dtype, _StorageType) or not isinstance(key, str) or not _are_counts((count,)):
            raise self._no_sense()
        if count * dtype.dtype.width > len(self._data):
            raise UnsafeCheckpointError(
                f"{self.path} was refused: its storage {shown(key)} claims {count * dtype.dtype.width:,} bytes "
                f"and the whole file has {len(self._data):,}"
            )
        return key, dtype.dtype, count, identity[5] if len(identity) == 6 else None

    def _no_sense(self) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged: its description of the tensors makes no sense; fetch it again")

    def _check_total(self) -> None:
        total = sum(info.result_bytes for info in self.infos.values() if isinstance(info, TensorInfo))
        if total > _MOST_REPETITION * len(self._data) + _FREE_REPETITION:
            raise UnsafeCheckpointError(
                f"{self.path} was refused: its tensors take {total:,} bytes and the whole file has {len(self._data):,}"
            )

    # Data

    def _read(self, info: TensorInfo) -> mx.array:
        import numpy as np

        if 0 in info.shape:
            return mx.zeros(info.shape, info.dtype.result)
        # Reading a page that the file no longer has would end the process.
        self._unchanged.check()
        width = info.dtype.width
        # numpy checks once more that shape and strides stay inside the file.
        values = np.ndarray(
            info.shape,
            info.dtype.code,
            self._data,
            info.storage.start + info.offset * width,
            tuple(stride * width for stride in info.strides),
        )
        if self._big_endian and width > 1:
            values = values.byteswap()
        name = info.dtype.name
        if name == "float64":
            with np.errstate(over="ignore"):
                values = values.astype(np.float32)
        elif name in _FLOAT8:
            values = float8_values(_FLOAT8[name])[values]
        elif name == "bool":
            # A byte other than 0 and 1 is no value of C's bool.
            values = values != 0
        elif not values.flags.aligned:
            values = values.copy()
        value = mx.array(values)
        if name == "bfloat16":
            value = value.view(mx.bfloat16)
        if info.conjugated:
            value = mx.conjugate(value)
        if info.negated:
            value = mx.negative(value)
        return value

    def _give_back_pages(self, count: int) -> None:
        self._touched += count
        if self._touched > _MAPPED_AT_MOST and hasattr(mmap, "MADV_DONTNEED"):
            cast(mmap.mmap, self._data.obj).madvise(mmap.MADV_DONTNEED)
            self._touched = 0

    def _ask_torch(self, name: str, info: DeclinedInfo) -> mx.array:
        if self._from_torch is None:
            from mflux.compat import torch_minimal

            feature = f"{self.path}: the {info.kind} tensor {shown(name)}"
            self._from_torch = torch_minimal.load_tensors(self.path, self._declined_paths, feature=feature)
        return self._from_torch[name]


def map_file(path: str | Path) -> memoryview:
    """A file's bytes, mapped into memory read-only.

    Raises:
        CheckpointError: it is missing, empty, or cannot be read.
    """
    with open_file(path) as file:
        try:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except OSError as error:
            if error.errno == errno.EMFILE:
                if allow_more_files():
                    return map_file(path)
                raise too_many_files(path) from None
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
        except ValueError:
            raise CheckpointError(f"{path} {what_else(b'')}") from None


def _what_else(data: memoryview) -> str:
    """What a file is that torch.save did not write, as the rest of a sentence."""
    head = bytes(data[:HEAD])
    if head[257:262] == b"ustar":
        return "is a tar archive, which torch wrote before version 0.4: load and save it with a newer torch"
    return what_else(head) or "is neither a file of torch.save nor safetensors"


# What is left of the pickle: the tree of dictionaries, flattened


class _Flattened:
    """The tensors of a tree of dictionaries and lists by dotted names, in the tree's order.

    `budget` is the pickle's length. A tree that was written out takes at least a byte for each of its entries; only one
    that contains itself, or the same branch over and over, has more.
    """

    def __init__(self, root: Any, budget: int, source: object):
        self.infos: dict[str, TensorInfo | DeclinedInfo] = {}
        self.dropped: list[str] = []
        # For torch, which has the tree and not the names: the keys that lead to what it is asked for.
        self.declined_paths: dict[str, tuple[Any, ...]] = {}
        # The keys of the dictionaries that all tensors lie in.
        self.common: list[Any] | None = None
        self._budget = budget
        self._visited = 0
        self._characters = 0
        self._source = source
        self._walk(root)

    def _walk(self, root: Any) -> None:
        if isinstance(root, (TensorInfo, DeclinedInfo)):
            self._take("tensor", root, [])
            return
        path: list[Any] = []
        # For each open branch: its entries still to come, its name, how much had been found before it.
        open_branches = [(iter(self._entries(root) or ()), "", 0, 0)]
        while open_branches:
            entries, name, infos_before, dropped_before = open_branches[-1]
            for key, value in entries:
                below = f"{name}.{key}" if path else str(key)
                self._charge_name(below)
                path.append(key)
                if isinstance(value, (TensorInfo, DeclinedInfo)):
                    self._take(below, value, path)
                elif (inner := self._entries(value)) is None:
                    self.dropped.append(below)
                else:
                    if len(path) >= _DEEPEST:
                        raise self._unsafe(f"its dictionaries are nested more than {_DEEPEST} deep")
                    open_branches.append((iter(inner), below, len(self.infos), len(self.dropped)))
                    break
                path.pop()
            else:
                open_branches.pop()
                if path:
                    path.pop()
                    if len(self.infos) == infos_before and len(self.dropped) > dropped_before:
                        self.dropped[dropped_before:] = [name]

    def _entries(self, value: Any) -> list[tuple[Any, Any]] | None:
        """The entries of a branch, or None if `value` is none. A list of plain values counts as a value."""
        if isinstance(value, (Table, list, tuple)):
            self._visited += len(value)
            if self._visited > self._budget:
                raise self._unsafe("its dictionaries contain each other over and over")
        if isinstance(value, Table):
            # As in a dictionary, a repeated key keeps its place and takes the last value.
            found: dict[Any, tuple[Any, Any]] = {}
            for number, (key, item) in enumerate(value.items()):
                if key is None or isinstance(key, (str, int, float)):
                    found[type(key), str(key)] = key, item
                else:
                    found[number] = f"<{type(key).__name__}>", item
            return list(found.values())
        if isinstance(value, (list, tuple)):
            branches = (TensorInfo, DeclinedInfo, Table, list, tuple)
            if any(isinstance(item, branches) for item in value):
                return list(enumerate(value))
        return None

    def _take(self, name: str, info: TensorInfo | DeclinedInfo, path: list[Any]) -> None:
        if name in self.infos:
            raise CheckpointError(f"{self._source} holds two tensors that would both be called {shown(name)}")
        if len(self.infos) == _MOST_TENSORS:
            raise self._unsafe(f"it has more than {_MOST_TENSORS:,} tensors")
        self.infos[name] = info
        if isinstance(info, DeclinedInfo):
            self.declined_paths[name] = tuple(path)
        if self.common is None:
            self.common = path[:-1]
        else:
            shared = zip(self.common, path[:-1], strict=False)
            same = next((i for i, (a, b) in enumerate(shared) if a != b), min(len(self.common), len(path) - 1))
            del self.common[same:]

    def _charge_name(self, name: str) -> None:
        self._characters += len(name)
        if len(name) > _LONGEST_NAME or self._characters > 16 * self._budget + (1 << 20):
            raise self._unsafe(f"its names are endless, such as {shown(name, 60)}")

    def _unsafe(self, what: str) -> UnsafeCheckpointError:
        return UnsafeCheckpointError(f"{self._source} was refused: {what}")

    def wrapper(self) -> str:
        """The prefix that stands before every name only because the weights were wrapped.

        A dictionary of a usual name that holds all tensors is a wrapper; so is the `module.` that
        `torch.nn.DataParallel` puts before every key.
        """
        prefix = ""
        for key in self.common or ():
            if key not in WRAPPERS:
                break
            prefix += f"{key}."
        if self.infos and all(name.startswith(prefix + "module.") for name in self.infos):
            prefix += "module."
        return prefix


# What a pickle may mention


@dataclass(frozen=True)
class _StorageType:
    dtype: DType


def _are_counts(values: Any) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _tensor(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any = None,
    hooks: Any = None,
    metadata: Any = None,
    *,
    dtype: Any = None,
) -> TensorInfo:
    """A tensor that is a view of a storage, checked: no element may lie outside it."""
    if not isinstance(storage, Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise ValueError
    dtype = dtype or storage.dtype
    if len(size) != len(stride) or len(size) > _MOST_AXES or not _are_counts((offset, *size, *stride)):
        raise Refused("a tensor's shape or strides are negative or make no sense")
    if any(length > _LARGEST_AXIS for length in size):
        raise Refused(f"a tensor's shape is beyond all bounds, {shown(list(size))}")
    if 0 not in size:
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if (last + 1) * dtype.width > storage.length:
            raise Refused(
                f"a tensor of the shape {shown(list(size))} reaches to byte {(last + 1) * dtype.width:,} of a "
                f"storage of {storage.length:,}"
            )
    marks = {"conj": False, "neg": False}
    if metadata is not None:
        if not isinstance(metadata, Table):
            raise ValueError
        for mark, value in metadata.items():
            if mark not in marks or not isinstance(value, bool):
                raise Refused("a tensor has marks that are unknown")
            marks[mark] = value
    return TensorInfo(storage, dtype, offset, size, stride, marks["conj"], marks["neg"])


def _tensor_v3(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> TensorInfo:
    """The form for dtypes that have no storage class of their own: the storage counts bytes."""
    if not isinstance(dtype, DType):
        raise ValueError
    return _tensor(storage, offset, size, stride, metadata=metadata, dtype=dtype)


def _parameter(data: Any, requires_grad: Any = None, hooks: Any = None, state: Any = None) -> Any:
    if not isinstance(data, (TensorInfo, DeclinedInfo)):
        raise ValueError
    return data


def _typed(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """A tensor with attributes. Its class is one of the table's, which means torch's own."""
    rebuild = function.call if isinstance(function, Name) else None
    if rebuild is None or rebuild is _typed or not isinstance(arguments, tuple):
        raise ValueError
    return _parameter(rebuild(*arguments))


def _quantized(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> DeclinedInfo:
    # torch enlarges a storage that is too small for its tensor, so the check cannot be left to it.
    _tensor(storage, offset, size, stride)
    return DeclinedInfo("quantized")


def _declined(kind: str) -> Callable[..., DeclinedInfo]:
    return lambda *arguments: DeclinedInfo(kind)


def _wrapped(kind: Any = None, *arguments: Any) -> Any:
    raise Refused("it holds a tensor of a subclass that wraps others, which cannot be read without that class's code")


def _opaque(kind: str) -> Callable[..., Opaque]:
    return lambda *arguments: Opaque(kind)


def _ordered(initial: Any = ()) -> Table:
    if not isinstance(initial, (list, tuple)):
        raise ValueError
    return Table(initial)


def _size(values: Any) -> tuple[Any, ...]:
    if not isinstance(values, tuple):
        raise ValueError
    return values


def _names() -> dict[tuple[str, str], Name]:
    names = {
        ("collections", "OrderedDict"): Name(_ordered),
        ("collections", "Counter"): Name(_opaque("counter")),
        ("torch", "Size"): Name(_size),
        ("torch", "Tensor"): Name(_wrapped),
        ("torch.nn.parameter", "Parameter"): Name(_parameter),
        ("torch.nn", "Parameter"): Name(_parameter),
        ("torch._utils", "_rebuild_tensor"): Name(_tensor),
        ("torch._utils", "_rebuild_tensor_v2"): Name(_tensor),
        ("torch._utils", "_rebuild_tensor_v3"): Name(_tensor_v3),
        ("torch._utils", "_rebuild_parameter"): Name(_parameter),
        ("torch._utils", "_rebuild_parameter_with_state"): Name(_parameter),
        ("torch._utils", "_rebuild_meta_tensor_no_storage"): Name(_declined("meta")),
        ("torch._utils", "_rebuild_sparse_tensor"): Name(_declined("sparse")),
        ("torch._utils", "_rebuild_nested_tensor"): Name(_declined("nested")),
        ("torch._utils", "_rebuild_qtensor"): Name(_quantized),
        ("torch._utils", "_rebuild_wrapper_subclass"): Name(_wrapped),
        ("torch._tensor", "_rebuild_from_type_v2"): Name(_typed),
        ("torch.storage", "UntypedStorage"): Name(value=_StorageType(DTYPES["uint8"])),
        # Values that are no tensors: they are dropped, so nothing has to be built.
        ("torch", "device"): Name(_opaque("device")),
        ("torch.serialization", "_get_layout"): Name(_opaque("layout")),
        ("_codecs", "encode"): Name(_opaque("bytes")),
        ("numpy", "dtype"): Name(_opaque("numpy dtype")),
        ("numpy.core.multiarray", "scalar"): Name(_opaque("numpy scalar")),
        ("numpy._core.multiarray", "scalar"): Name(_opaque("numpy scalar")),
    }
    for module in ("builtins", "__builtin__"):
        for kind in ("set", "frozenset", "bytes", "bytearray", "complex"):
            names[module, kind] = Name(_opaque(kind))
    for storage, stored in _STORAGES.items():
        for module in ("torch", "torch.cuda"):
            names[module, storage] = Name(value=_StorageType(DTYPES[stored]))
    for dtype in DTYPES.values():
        names["torch", dtype.name] = Name(value=dtype)
    for scheme in ("per_tensor_affine", "per_tensor_symmetric", "per_channel_affine", "per_channel_symmetric",
                   "per_channel_affine_float_qparams"):  # fmt: skip
        names["torch", scheme] = Name(value=Opaque("quantization scheme"))
    return names


NAMES = _names()
