"""Any file or folder of weights as one mapping from names to arrays.

What a file is, its first bytes say; names and suffixes decide nothing but which files of a folder hold weights.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

from mflux.backend import mx
from mflux.checkpoints.folders import weight_files
from mflux.checkpoints.readers.gguf import GgufFile, GgufInfo
from mflux.checkpoints.readers.pytorch import DTYPES, DeclinedInfo, PytorchFile
from mflux.checkpoints.readers.safetensors import TensorInfo as SafetensorsInfo
from mflux.checkpoints.stored.opened import open_container, understood
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

    def __init__(self, paths: list[Path], source: Path, key: str | None = None, *, packs: bool = False):
        self.files = [open_container(path) for path in paths]
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
        self._tensors = understood(self.files, source, packs=packs, prefix=prefix)

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
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        # In the files' order; parts of what is packed behind their whole.
        return iter(sorted(self._tensors, key=lambda name: self._order[self._whole(name)]))

    def __len__(self) -> int:
        return len(self._tensors)

    @cached_property
    def _order(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self._where)}

    def _whole(self, name: str) -> str:
        """The tensor in the file that a part of a packed one belongs to."""
        stem, _, leaf = name.rpartition(".")
        return f"{stem}.weight" if name not in self._where and leaf in ("scales", "biases") else name

    def describe(self, name: str) -> Description:
        """What is known of a tensor without reading it."""
        whole = self._whole(name)
        number, inner = self._where[whole]
        file = self.files[number]
        if whole in self._tensors.stored or isinstance(file, GgufFile):
            told = self._tensors.spec(name)
            one = self._tensors.stored.get(whole)
            start = cast(SafetensorsInfo | GgufInfo, file.infos[inner]).start
            kind = one.kind if one is not None else cast(GgufInfo, file.infos[inner]).kind
            return Description(kind, told.dtype, told.shape, (number, start), (number, inner, name))
        info = file.infos[inner]
        if isinstance(info, DeclinedInfo):
            return Description(info.kind, None, None, (number, -1), (number, inner))
        if isinstance(info, SafetensorsInfo):
            stored = _SAFETENSORS_DTYPES[info.dtype]
            same = number, info.start, inner
            return Description(stored, DTYPES[stored].result, info.shape, (number, info.start), same)
        dtype = info.dtype.result if info.dtype.code else None
        place = (number, info.storage.start + info.offset * info.dtype.width)
        return Description(info.dtype.name, dtype, info.shape, place, (number, info))


def open_checkpoint(path: str | Path, key: str | None = None, *, packs: bool = False) -> Checkpoint:
    """Open weights for reading tensor by tensor.

    Args:
        path: a file of safetensors, GGUF or `torch.save` (zip archive or legacy stream), told apart by content; an
            index of shards (`….index.json`); or a folder that holds one of these.
        key: take only what lies under this name, without it: "state_dict", "model.ema"; "" takes everything as it is
            named. By default a wrapper around all weights of a PyTorch file ("state_dict", "model", "module.") is taken
            off and everything else kept.
        packs: leave matrices packed that the file has packed, as MLX holds them: `weight`, `scales`, `biases`. False
            gives every tensor dense.

    Returns:
        A mapping from names to arrays. float64, float8 and what is packed come out as float32.

    Raises:
        CheckpointError: something is missing, damaged, or not weights.
        UnsafeCheckpointError: a PyTorch file asks for more than weights need. Nothing of it was run.
        MissingExtraError: (on access) a sparse, quantized or nested tensor, and torch is not installed.
    """
    path = user_path(path)
    return Checkpoint(weight_files(path), path, key, packs=packs)


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
