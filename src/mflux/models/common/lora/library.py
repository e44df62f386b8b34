"""Where a LoRA lies: a path, a name from the library of the person's own, or a file on Hugging Face.

Nothing here loads MLX, so that a command can answer a wrong name at once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from mflux.errors import DownloadError, UsageError
from mflux.text import shown
from mflux.utils import values
from mflux.utils.paths import snapshot_in, user_path

log = logging.getLogger(__name__)

VARIABLE = "LORA_LIBRARY_PATH"


def library_folders() -> list[Path]:
    """The folders that LORA_LIBRARY_PATH names, separated by colons (on Windows by semicolons)."""
    return [user_path(part.strip()) for part in os.environ.get(VARIABLE, "").split(os.pathsep) if part.strip()]


def library(folders: Iterable[Path]) -> dict[str, Path]:
    """Every .safetensors file under these folders by its name without the ending; the first folder's comes first.

    The numbered shards of a model's transformer, which mflux ≤ 0.24 writes, are no LoRAs.

    Raises:
        UsageError: a folder cannot be looked into.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        try:
            paths = sorted(folder.rglob("*.safetensors"))
        except OSError as error:
            raise UsageError(
                f"cannot look for LoRAs in {shown(folder, 200)} ({error.strerror}): correct {VARIABLE}, or the folder"
            ) from None
        for path in paths:
            if path.is_file() and not (path.stem.isdigit() and path.parent.name == "transformer"):
                found.setdefault(path.stem, path.resolve())
    return found


def find_lora(name: str) -> Path:
    """The file that a LoRA's name means, downloaded if need be.

    Args:
        name: a file; what the library has, by its name or by its path there, with or without the ending; a folder that
            holds one; `org/name:file.safetensors`, also written `hf:org/name/file.safetensors`; or `org/name`, if that
            repository holds one .safetensors file. What comes first here is taken.

    Raises:
        DownloadError: there is none, or it cannot be had.
    """
    if not name.strip():
        raise DownloadError("the path of a LoRA is empty: give a file, or a Hugging Face repository as org/name")
    try:
        path = user_path(name)
        like_a_path = path.is_absolute() or name[0] in ".~"
        # A folder that happens to have the name is not what the library has.
        found = None if path.is_file() or like_a_path else _in_library(name)
        if found is not None or path.exists():
            return found or snapshot_in(path)
    except (OSError, UsageError, ValueError) as error:
        raise DownloadError(f"cannot look for the LoRA {name}: {error}") from None
    if "/" not in name and ":" not in name:
        raise DownloadError(_not_there(name))
    repository, file = _split(name)
    like_a_path = like_a_path or repository.count("/") != 1 or repository.endswith("/")
    if like_a_path or (file is None and path.suffix == ".safetensors"):
        raise DownloadError(
            f"there is no LoRA {name}: check the path, or give a file on Hugging Face as org/name:file.safetensors"
        )
    from mflux import hub

    if file is None:
        return hub.fetch_only_file(repository, ".safetensors", beside="adapter_config.json")
    found = hub.fetch_file(repository, file)
    if found.name.startswith("adapter_model"):
        # PEFT keeps alpha in a file of its own.
        try:
            hub.fetch_file(repository, file.removesuffix(found.name) + "adapter_config.json")
        except DownloadError as error:
            log.warning("%s: without its adapter_config.json its strength is taken as 1 (%s)", name, error)
    return found


def _split(name: str) -> tuple[str, str | None]:
    """A repository, and the file in it that a name asks for."""
    if name.startswith("hf:"):
        rest = name.removeprefix("hf:")
        if ":" not in rest and rest.count("/") >= 2:
            org, repository, file = rest.split("/", 2)
            return f"{org}/{repository}", file
        name = rest
    repository, colon, file = name.partition(":")
    return repository, file if colon else None


def _in_library(name: str) -> Path | None:
    """What the library has under a name that `mflux-lora-library list` shows, or under its path in a folder there."""
    folders = library_folders()
    loras = library(folders)
    bare = name.removesuffix(".safetensors")
    if bare in loras:
        return loras[bare]
    files = (folder / f"{bare}.safetensors" for folder in folders)
    return next((file.resolve() for file in files if file.is_file()), None)


def _not_there(name: str) -> str:
    """Why there is no LoRA of that name."""
    folders = library_folders()
    if not folders:
        return f"there is no file {name} here, and {VARIABLE} is not set: give a path, or set it to folders with LoRAs"
    known = sorted(library(folders))
    hint = f"it has {', '.join(known[:5])}{', …' if len(known) > 5 else ''}" if known else "it is empty"
    return f"there is no file {name} here, and no LoRA of that name in {VARIABLE}: {hint}"


def find_loras(
    names: Collection[str | os.PathLike[str]] | None, scales: Collection[float] | None
) -> tuple[list[str], list[Path], list[float]]:
    """What a program asks for: names, the files that they mean, see `find_lora`, and a scale for each.

    Raises:
        UsageError: a name is no text, a scale is no number, or there are more scales than names.
        DownloadError: a LoRA cannot be had.
    """
    said = [] if names is None else values.texts_or_paths(names, "lora_paths")
    settled = settle_scales([] if scales is None else values.reals(scales, "lora_scales"), len(said))
    return said, [find_lora(name) for name in said], settled


def settle_scales(scales: Sequence[float] | None, count: int) -> list[float]:
    """A scale for each of `count` LoRAs: 1 where none is given.

    Raises:
        UsageError: there are more scales than LoRAs.
    """
    scales = list(scales or ())
    if len(scales) > count:
        raise UsageError(
            f"there are {len(scales)} LoRA scales for {count} LoRAs: give one for each (--lora PATH SCALE says both)"
        )
    if scales and len(scales) < count:
        log.warning("there are %d LoRA scales for %d LoRAs: the others have 1", len(scales), count)
    return scales + [1.0] * (count - len(scales))
