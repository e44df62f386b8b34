"""From modules to a folder in the published layout, complete or absent: the way back of `loading`."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from mflux.backend import mx, nn, tree_flatten
from mflux.checkpoints.loading import published_turns
from mflux.checkpoints.quantization import Quantization, divides, packed_specs
from mflux.checkpoints.readers.plain import open_file
from mflux.checkpoints.stored.tensors import spec
from mflux.checkpoints.writing import SafetensorsWriter
from mflux.errors import OutputError
from mflux.text import size
from mflux.utils.atomic_files import Temporary, remove_empty, write_atomically
from mflux.utils.paths import user_path

# A file of weights is cut where it would become larger than this.
SHARD_BYTES = 5 * 10**9
# Configuration, tokenizers and headers; generously.
_BESIDE_WEIGHTS = 10**7


def save_component(
    module: nn.Module,
    folder: str | Path,
    config: Mapping[str, Any],
    *,
    stem: str = "model",
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write a component as `load_component` reads it: `config.json`, safetensors, and an index of them.

    Tensors are written as the module has them, one at a time; only convolution kernels are turned back to the
    published layout.

    Args:
        module: the component.
        folder: created.
        config: what its `config.json` held; how it is quantized is noted in it.
        stem: what the files of weights are called.
        shard_bytes: no file holds more than this, unless a single tensor does.

    Returns:
        Bytes of weights written.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    folder = Path(folder)
    parameters = dict(tree_flatten(module.parameters()))
    turns = published_turns(module)
    # Turned lazily: nothing is computed before it is written.
    tensors = {name: turns[name](value) if name in turns else value for name, value in parameters.items()}
    shards = _shards(tensors, shard_bytes)
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [f"{stem}-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, shard in zip(names, shards, strict=True):
        specs = {tensor: (tensors[tensor].dtype, tensors[tensor].shape) for tensor in shard}
        with SafetensorsWriter(folder / name, specs, metadata={"format": "pt"}) as writer:
            for tensor in shard:
                writer.write(tensor, tensors.pop(tensor))
    size = sum(value.nbytes for value in parameters.values())
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    # As mflux 0.24 has it: for a single file as well, and under one name for all components.
    write_json(folder / "model.safetensors.index.json", index)
    if len(shards) > 1 and stem != "model":
        # diffusers looks for shards under their own name.
        write_json(folder / f"{stem}.safetensors.index.json", index)
    write_json(folder / "config.json", _with_quantization(config, module))
    return size


def _shards(tensors: Mapping[str, mx.array], most: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, value in tensors.items():
        if shards[-1] and size + value.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += value.nbytes
    return shards


def _with_quantization(config: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """The configuration with an entry that says how the module is quantized, or most of its layers, if others are
    quantized in another way ("mixed")."""
    noted = {name: value for name, value in config.items() if name != "quantization"}
    kinds = Counter(
        Quantization(layer.bits, layer.group_size, layer.mode)
        for _, layer in module.named_modules()
        if isinstance(layer, (nn.QuantizedLinear, nn.QuantizedEmbedding))
    )
    if kinds:
        most = kinds.most_common(1)[0][0]
        noted["quantization"] = {"bits": most.bits, "group_size": most.group_size}
        noted["quantization"] |= {} if most.mode == "affine" else {"mode": most.mode}
        noted["quantization"] |= {"mixed": True} if len(kinds) > 1 else {}
    return noted


def estimated_bytes(
    tensors: Mapping[str, mx.array],
    quantization: Quantization | None,
    plan: Mapping[str, Quantization] | None = None,
) -> int:
    """About how large a component of these tensors would be when saved; none of them is read.

    Args:
        plan: which layers are quantized, and to what, as `planned` says; without it all whose width that allows.
    """
    total = 0
    for name in tensors:
        value = spec(tensors, name)
        specs = {"weight": (value.dtype, value.shape)}
        stem, _, leaf = name.rpartition(".")
        found = quantization if plan is None else plan.get(stem)
        if (
            quantization is not None
            and found is not None
            and (value.ndim, leaf) == (2, "weight")
            and mx.issubdtype(value.dtype, mx.floating)
            and divides(value.shape[-1], found.group_size)
        ):
            specs = packed_specs(value.dtype, value.shape, found)
        total += sum(prod(shape) * dtype.size for dtype, shape in specs.values())
    return total


@contextmanager
def new_folder(path: str | Path, *, needed: int = 0) -> Iterator[Path]:
    """A folder to fill, which takes its name in one step when the block ends normally, and vanishes when it does not.

    Args:
        path: where it will be; folders above it are created.
        needed: about how many bytes will be written.

    Raises:
        OutputError: there is such a file or folder, it cannot be written, or the disk has too little room.
    """
    path = user_path(path)
    refuse_existing(path)
    made = [folder for folder in path.parents if not folder.exists()]
    temporary: Temporary | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Temporary(path.parent, is_folder=True)
        free = shutil.disk_usage(temporary.path).free
        if free < needed + _BESIDE_WEIGHTS:
            raise OutputError(
                f"cannot write {path}: it needs about {size(needed + _BESIDE_WEIGHTS)} and the disk has {size(free)} "
                "left: make room, or name a folder on another disk"
            )
        yield temporary.path
        refuse_existing(path)
        # Takes the place of an empty folder, which a program may have made for it.
        temporary.path.rename(path)
        temporary.close()
    except BaseException as error:
        if temporary is not None:
            temporary.discard()
        remove_empty(*made)
        if isinstance(error, OSError):
            what = f" ({error.filename})" if error.filename else ""
            raise OutputError(f"cannot write {path}: {error.strerror or error}{what}") from None
        raise


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def refuse_existing(path: Path) -> None:
    """
    Raises:
        OutputError: there is something at this path that is not an empty folder, or nothing can be.
    """
    try:
        path.lstat()
        empty = path.is_dir() and not path.is_symlink() and not any(path.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}; choose another name") from None
    if not empty:
        raise OutputError(f"{path} exists already and is not empty: name a folder that does not exist, or remove it")


def copy_beside(source: Path, destination: Path, names: tuple[str, ...]) -> None:
    """Copy files and folders that a model needs besides its weights, as new files of this user's; what the source lacks
    is left out.

    Links are followed where they stay in the model's folder, or in Hugging Face's cache, where every file is one.

    Raises:
        OutputError: a link leads out of the model's folder: what it leads to would be published with the model.
        CheckpointError: something is no file.
    """
    for name in names:
        place = source / name
        if place.is_dir():
            for folder, _, files in os.walk(place, followlinks=False):
                for file in sorted(files):
                    path = Path(folder, file)
                    _copy(path, destination / path.relative_to(source), source)
        elif place.is_file():
            _copy(place, destination / name, source)


def _copy(path: Path, target: Path, root: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    leads_to, inside = path.resolve(), root.resolve()
    if not any(leads_to.is_relative_to(folder) for folder in (inside, *_cached_with(inside))):
        raise OutputError(f"{path} leads out of the model's folder, to {leads_to}: put the file itself there")
    with open_file(path) as file:
        write_atomically(target, partial(shutil.copyfileobj, file), overwrite=True)


def _cached_with(folder: Path) -> list[Path]:
    """Where files of a snapshot in Hugging Face's cache lie: their repository's blobs, and those that all share."""
    if folder.parent.name != "snapshots" or not folder.parent.parent.name.startswith("models--"):
        return []
    return [folder.parent.parent / "blobs", folder.parent.parent.parent / "blobs"]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    write_atomically(path, lambda file: file.write(text), overwrite=True)
