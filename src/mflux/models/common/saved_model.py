"""`mflux_model.json`: what a folder that mflux saved was made from. Loads nothing heavy."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mflux.checkpoints.folders import read_json
from mflux.errors import CheckpointError, OutputError, UsageError
from mflux.models.common.registry import MODELS
from mflux.utils.paths import is_folder, is_there, snapshot_in, user_path

FILE_NAME = "mflux_model.json"
# Where mflux-save puts models when no --path is given, as in mflux 0.24.
FOLDER_VARIABLE = "MFLUX_MODELS_DIR"
_FORMAT = 1
# What an earlier save added to a name.
_SUFFIX = re.compile(r"-mflux-(q\d+|bf16|fp8)(-lora\d+)?$", re.IGNORECASE)


def recorded_base_model(model: str | None) -> str | None:
    """The built-in model that a folder was saved from, as its `mflux_model.json` says; None where nothing says it."""
    if model is None:
        return None
    try:
        record = read_json(snapshot_in(user_path(model)) / FILE_NAME)
    except (CheckpointError, UsageError, OSError):
        # UsageError: what no path can be.
        return None
    # mflux 0.24 left base_model empty for a built-in model.
    found = record.get("base_model") or record.get("model_name")
    return found if isinstance(found, str) and found in MODELS else None


def record(
    *,
    key: str,
    source: str | None,
    root: Path,
    bits: int | None,
    size: int,
    loras: Sequence[tuple[str, float, Path]] = (),
    sources: Mapping[str, tuple[str, Path]] | None = None,
) -> dict[str, Any]:
    """What `mflux_model.json` is to hold.

    Args:
        key: the built-in model that it is, or derives from.
        source: the folder or repository that its weights were taken from, None for the built-in model's own.
        root: the folder that they were read from.
        bits: what it is quantized to.
        size: bytes of the folder.
        loras: what the weights hold of LoRAs: their names, scales, and files.
        sources: of components that do not come from `root`, by their folders: the folder or repository that each was
            taken from, and where it was read.
    """
    import mflux

    source, upstream = _origin(source, root)
    components = _recorded_components(root)
    for part, taken in (sources or {}).items():
        name, place = _origin(*taken)
        components[part] = {"source": name, "upstream": place}
    return {
        "format_version": _FORMAT,
        "mflux_version": mflux.__version__,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "model_name": source or key,
        "base_model": key,
        "quantize": bits,
        "size_gb": round(size / 1e9, 2),
        "upstream": upstream,
        "loras": [
            {
                # As above, a whole path is nobody's business.
                "source": user_path(name).name if is_there(user_path(name)) else name,
                "scale": scale,
                "sha256": _sha256(file) if file.is_file() else None,
            }
            for name, scale, file in loras
        ],
    } | ({"components": components} if components else {})


def _origin(source: str | None, root: Path) -> tuple[str | None, dict[str, str | None] | None]:
    """What to call the folder or repository that something was taken from, and its place on Hugging Face."""
    repository, revision = _in_cache(root)
    if source is not None and is_there(user_path(source)):
        # The folder may be published, and a whole path names its owner.
        source = repository or user_path(source).resolve().name
    return source, {"repo_id": repository, "revision": revision} if repository else None


def _recorded_components(root: Path) -> dict[str, Any]:
    """What a folder that is saved anew says of its own components."""
    try:
        found = read_json(root / FILE_NAME).get("components")
    except CheckpointError:
        return {}
    return found if isinstance(found, dict) else {}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def models_folder() -> Path:
    """The folder that `MFLUX_MODELS_DIR` names.

    Raises:
        UsageError: it names none.
        OutputError: that is no folder, or one that cannot be written to.
    """
    value = os.environ.get(FOLDER_VARIABLE)
    if not value:
        raise UsageError(f"name the folder to write with --path, or set {FOLDER_VARIABLE} to the folder for all models")
    folder = user_path(value)
    if not is_folder(folder):
        raise OutputError(f"{FOLDER_VARIABLE} is {folder}, which is not a folder: create it, or name one with --path")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{FOLDER_VARIABLE} is {folder}, which cannot be written to: name another with --path")
    return folder


def folder_name(key: str, source: str | None, bits: int | None) -> str:
    """What a saved model is called, as mflux 0.24 names it: "FLUX.1-dev-mflux-q8"."""
    name = MODELS[key]["model_name"].split("/")[-1] if source is None else _source_name(source)
    return f"{name}-mflux-{'bf16' if bits is None else f'q{bits}'}"


def with_loras(folder: Path, has_loras: bool) -> Path:
    """The folder's name, and with LoRAs the first number behind it that is free: "FLUX.1-dev-mflux-q8-lora01"."""
    number = 1
    while has_loras and folder.with_name(f"{folder.name}-lora{number:02d}").exists():
        number += 1
    return folder.with_name(f"{folder.name}-lora{number:02d}") if has_loras else folder


def _source_name(source: str) -> str:
    path = user_path(source)
    name = source.rstrip("/").split("/")[-1]
    if is_there(path):
        path = path.resolve()
        name = (_in_cache(path)[0] or path.name).split("/")[-1]
    # "org--name" folders: Hugging Face allows no "--" in a name of its own.
    return _SUFFIX.sub("", name.split("--")[-1])


def _in_cache(path: Path) -> tuple[str | None, str | None]:
    """The repository and revision of a folder in Hugging Face's cache, `…/models--org--name/snapshots/REVISION`."""
    holder = path.parent.parent
    if path.parent.name == "snapshots" and holder.name.startswith("models--"):
        return holder.name.removeprefix("models--").replace("--", "/", 1), path.name
    return None, None
