"""Any file or folder of weights as one mapping from names to arrays.

What a file is, its first bytes say; names and suffixes decide nothing but which files of a folder hold weights.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mflux.backend import mx
from mflux.checkpoints.folders import weight_files
from mflux.checkpoints.readers.plain import naming_the_copy, open_file
from mflux.checkpoints.readers.pytorch import DTYPES, DeclinedInfo, PytorchFile
from mflux.checkpoints.readers.safetensors import SafetensorsFile
from mflux.checkpoints.readers.safetensors import TensorInfo as SafetensorsInfo
from mflux.errors import CheckpointError
from mflux.text import shown, some
from mflux.utils.paths import user_path

_SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64",
    "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
}  # fmt: skip


@dataclass(frozen=True)
class Description:
    """What is known of a tensor without reading it.

    Attributes:
        stored: the dtype in the file by torch's name, or what makes torch necessary ("sparse", "quantized", "nested").
        dtype: the dtype it comes out with, None where only reading tells.
        shape: None where only reading tells.
        place: equal for tensors that are the same bytes under several names, and in the order of the file.
    """

    stored: str
    dtype: mx.Dtype | None
    shape: tuple[int, ...] | None
    place: tuple[int, ...]
    same: Hashable


class Checkpoint(Mapping[str, mx.array]):
    """The tensors of one or several files under the names that are left once wrappers are off; each is read on access.

    Attributes:
        files: what was opened, in the order of its names.
        dropped: what the files hold beside tensors, by name.
    """

    def __init__(self, paths: list[Path], source: Path, key: str | None = None):
        self.files = [_open_file(path) for path in paths]
        self.source = source
        self.dropped = [name for file in self.files if isinstance(file, PytorchFile) for name in file.dropped]
        prefix = self._prefix(key)
        self._where: dict[str, tuple[int, str]] = {}
        for number, file in enumerate(self.files):
            for name in file:
                if not name.startswith(prefix):
                    continue
                short = name[len(prefix) :]
                if short in self._where:
                    raise CheckpointError(f"{source}: the tensor {shown(short)} stands in two files")
                self._where[short] = number, name
        if not self._where:
            raise CheckpointError(self._nothing(key))

    def _prefix(self, key: str | None) -> str:
        if key is not None:
            return key.rstrip(".") + "." if key.rstrip(".") else ""
        wrappers = {file.wrapper if isinstance(file, PytorchFile) else "" for file in self.files}
        return wrappers.pop() if len(wrappers) == 1 else ""

    def _nothing(self, key: str | None) -> str:
        if not key:
            return f"{self.source} holds no tensors"
        branches = sorted({name.rpartition(".")[0].split(".")[0] for file in self.files for name in file} - {""})
        beside = f"; it has {some(branches, 8)}" if branches else ""
        return f"{self.source} holds no tensors under {shown(key)}{beside}"

    def __getitem__(self, name: str) -> mx.array:
        number, inner = self._where[name]
        return self.files[number][inner]

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def describe(self, name: str) -> Description:
        """What is known of a tensor without reading it."""
        number, inner = self._where[name]
        info = self.files[number].infos[inner]
        if isinstance(info, DeclinedInfo):
            return Description(info.kind, None, None, (number, -1), (number, inner))
        if isinstance(info, SafetensorsInfo):
            stored = _SAFETENSORS_DTYPES[info.dtype]
            same = number, info.start, inner
            return Description(stored, DTYPES[stored].result, info.shape, (number, info.start), same)
        dtype = info.dtype.result if info.dtype.code else None
        place = (number, info.storage.start + info.offset * info.dtype.width)
        return Description(info.dtype.name, dtype, info.shape, place, (number, info))


def open_checkpoint(path: str | Path, key: str | None = None) -> Checkpoint:
    """Open weights for reading tensor by tensor.

    Args:
        path: a file of safetensors or of `torch.save` (zip archive or legacy stream), told apart by content; an index
            of shards (`….index.json`); or a folder that holds one of these.
        key: take only what lies under this name, without it: "state_dict", "model.ema"; "" takes everything as it is
            named. By default a wrapper around all weights of a PyTorch file ("state_dict", "model", "module.") is taken
            off and everything else kept.

    Returns:
        A mapping from names to arrays. float64 and float8 come out as float32.

    Raises:
        CheckpointError: something is missing, damaged, or not weights.
        UnsafeCheckpointError: a PyTorch file asks for more than weights need. Nothing of it was run.
        MissingExtraError: (on access) a sparse, quantized or nested tensor, and torch is not installed.
    """
    path = user_path(path)
    return Checkpoint(weight_files(path), path, key)


def load_checkpoint(path: str | Path, key: str | None = None) -> dict[str, mx.array]:
    """Read all tensors of a file or folder; see `open_checkpoint`.

    One tensor at a time is read, so the peak is the result plus the largest tensor. Names that share a tensor (tied
    weights) share its memory.
    """
    checkpoint = open_checkpoint(path, key)
    seen: dict[Hashable, mx.array] = {}
    result = {}
    for name in checkpoint:
        same = checkpoint.describe(name).same
        if same in seen:
            # Its own handle: assigning to an element of one name must not change the other.
            result[name] = seen[same].reshape(seen[same].shape)
        else:
            result[name] = seen[same] = checkpoint[name]
            mx.eval(result[name])
    return result


def _open_file(path: Path) -> SafetensorsFile | PytorchFile:
    with open_file(path) as file:
        head = file.read(9)
    # A safetensors header is JSON behind its length.
    if head[8:] == b"{":
        return SafetensorsFile(path)
    with naming_the_copy(path):
        return PytorchFile(path)
