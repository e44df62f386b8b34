"""Which files of a folder hold its weights, and the JSON that lies beside them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mflux.checkpoints.readers.plain import read_json
from mflux.errors import CheckpointError
from mflux.text import shown

__all__ = ["SUFFIXES", "read_json", "shards_of", "weight_files"]

# In a folder that holds both, safetensors are the ones to take.
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_INDEX_SUFFIX = ".index.json"


def weight_files(path: Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The files to read for a path: itself, the shards that an index names, or those of a folder.

    Args:
        path: a file, an index (`….index.json`), or a folder with one file or an index. Variants may lie beside the
            plain files ("model.fp16.safetensors"); the plain ones are taken.
        suffixes: the kinds of file to look for in a folder, the first that is there.

    Raises:
        CheckpointError: there are none, some are missing, or there are several and nothing says which to take.
    """
    # pathlib's own test raises for a name that is too long.
    if not os.path.isdir(path):  # noqa: PTH112
        return _shards(path) if path.name.endswith(_INDEX_SUFFIX) else [path]
    for suffix in suffixes:
        indexes = path.glob(f"*{suffix}{_INDEX_SUFFIX}")
        if index := min(indexes, key=lambda index: (index.name.count("."), index.name), default=None):
            return _shards(index)
        files = sorted(file for file in path.glob(f"*{suffix}") if file.is_file())
        plain = [file for file in files if file.name.count(".") == 1]
        if len(plain or files) == 1:
            return plain or files
        if files:
            raise CheckpointError(
                f"{path} holds {len(files)} {suffix} files and no index that says which to take: leave one there"
            )
    kinds = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}" if len(suffixes) > 1 else suffixes[0]
    raise CheckpointError(f"{path} holds no weights, no {kinds} file: fetch them, or name a folder that has them")


def shards_of(index: Path) -> dict[str, str]:
    """What an index says: tensor → the name of the file that holds it.

    Raises:
        CheckpointError: it is damaged, or no index.
    """
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise CheckpointError(f"{index} is damaged: it has no table of shards; fetch it again")
    return table


def _shards(index: Path) -> list[Path]:
    names = sorted(set(shards_of(index).values()))
    # pathlib's own test raises for a name that is too long.
    missing = [name for name in names if Path(name).name != name or not os.path.isfile(index.parent / name)]  # noqa: PTH113
    if missing:
        raise CheckpointError(
            f"{index.parent} is incomplete: {len(missing)} of {len(names)} weight files are missing, such as "
            f"{shown(missing[0])}: fetch it again"
        )
    return [index.parent / name for name in names]
