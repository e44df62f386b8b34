"""What is broken in Hugging Face's cache, and how it is mended there without a network.

The cache keeps each file once, in `models--org--name/blobs`, under its SHA-256 (large files) or its git id, and gives
it its name by a link in `snapshots/COMMIT`. Only what is found by `broken_entries` is ever removed, and only inside
that folder: a link goes, what it leads to stays unless it is a blob of the same repository.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mflux.checkpoints.folders import read_json
from mflux.checkpoints.readers.plain import HEAD, LARGEST_TEXT, what_else
from mflux.checkpoints.readers.safetensors import read_header
from mflux.errors import CheckpointError, OutputError
from mflux.hub.library import huggingface
from mflux.text import size
from mflux.utils.atomic_files import remove_within, write_atomically

_SHA256, _GIT_ID = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Broken:
    """One thing that is wrong in the cache.

    Attributes:
        path: where.
        what: what is wrong, as the rest of a sentence that begins with the path.
        remove: what has to go so that it is fetched again; of a snapshot's link, what it leads to as well.
        is_fault: whether the model cannot do without; a download that was broken off only takes room.
    """

    path: Path
    what: str
    remove: tuple[Path, ...]
    is_fault: bool = True

    def __str__(self) -> str:
        return f"{self.path} {self.what}"


def cache_folder() -> Path:
    """Where huggingface_hub keeps what it fetched."""
    return Path(huggingface().constants.HF_HUB_CACHE)


def repository_in_cache(path: Path, *, linked: bool = False) -> Path | None:
    """The `models--org--name` folder of the cache that a path lies in, or None if it lies elsewhere.

    Args:
        linked: look for one that is itself a link, which is not the cache's own, instead of a folder.
    """
    cache = cache_folder().resolve()
    for folder in (path, *path.parents):
        # The folder that holds a file, not what its link leads to.
        named = folder.name.startswith("models--") and folder.parent.resolve() == cache
        if named and folder.is_symlink() == linked:
            return folder
    return None


def broken_entries(holder: Path) -> list[Broken]:
    """What is wrong in one repository's folder; nothing is sent, and large files are not read beyond their headers."""
    return [*_broken_references(holder), *_broken_files(holder), *_leftovers(holder)]


def _broken_references(holder: Path) -> Iterator[Broken]:
    for reference in sorted((holder / "refs").rglob("*")):
        if not reference.is_file():
            continue
        with suppress(OSError, ValueError):
            commit = reference.read_text(encoding="utf-8").strip()
            if not commit or "/" in commit or not (holder / "snapshots" / commit).is_dir():
                yield Broken(reference, "names a snapshot that is not there", (reference,))


def _broken_files(holder: Path) -> Iterator[Broken]:
    for snapshot in sorted((holder / "snapshots").glob("*/")):
        sizes = _announced_sizes(holder, snapshot.name)
        for folder, _, names in os.walk(snapshot):
            for path in sorted(Path(folder, name) for name in names):
                if not path.exists():
                    yield Broken(path, "is a link to nothing", (path,))
                elif path.is_file() and (fault := _fault(path, sizes.get(path.relative_to(snapshot).as_posix()))):
                    yield Broken(path, fault, (path,))


def _announced_sizes(holder: Path, commit: str) -> dict[str, int]:
    """Bytes of a commit's files, where huggingface_hub has noted what the Hub said."""
    path = holder / "trees" / f"{commit}.json"
    if not path.is_file():
        return {}
    with suppress(CheckpointError, TypeError, AttributeError):
        table = read_json(path)["files"] if path.is_file() else {}
        found = {name: entry.get("lfs_size") or entry.get("size") for name, entry in table.items()}
        return {name: number for name, number in found.items() if isinstance(number, int)}
    return {}


def _fault(path: Path, announced: int | None) -> str | None:
    """What is wrong with a file that is there, as the rest of a sentence, or None."""
    try:
        found = path.stat().st_size
        if announced is not None and found != announced:
            return f"has {size(found)} ({found:,} bytes) where {announced:,} were announced"
        blob = path.resolve()
        if _GIT_ID.fullmatch(blob.name) and found <= LARGEST_TEXT:
            content = blob.read_bytes()
            if hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() != blob.name:
                return "holds other bytes than its git id says"
        if path.suffix == ".safetensors":
            read_header(path)
        elif path.suffix == ".json":
            with path.open("rb") as file:
                return what_else(file.read(HEAD))
    except CheckpointError as error:
        return str(error).removeprefix(f"{path} ").removeprefix(f"{path}: ")
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return None


def _leftovers(holder: Path) -> Iterator[Broken]:
    for path in sorted((holder / "blobs").glob("*")):
        if path.suffix in (".incomplete", ".partial") and not _is_being_written(holder, path):
            length = size(path.lstat().st_size)
            yield Broken(path, f"is what a download left that broke off ({length})", (path,), is_fault=False)


def _is_being_written(holder: Path, path: Path) -> bool:
    """Whether a download that runs holds huggingface_hub's lock on this blob."""
    lock = holder.parent / ".locks" / holder.name / f"{path.name.partition('.')[0]}.lock"
    try:
        number = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(number)
    return False


def repair(holder: Path, entries: list[Broken]) -> list[str]:
    """Remove what is broken, or bring it back from another snapshot that holds the very same file.

    Args:
        holder: the repository's folder, as `repository_in_cache` gives it.
        entries: what `broken_entries` found in it.

    Returns:
        What was done, a line for each thing.

    Raises:
        OutputError: something cannot be removed.
    """
    done = []
    for entry in entries:
        if source := _same_elsewhere(holder, entry.path):
            blob = entry.path.parent / entry.path.readlink()
            with source.open("rb") as file:
                write_atomically(blob, partial(shutil.copyfileobj, file), overwrite=True)
            done.append(f"brought back {entry.path} from {source}")
            continue
        for path in entry.remove:
            try:
                follow = path.is_relative_to(holder / "snapshots")
                done += [f"removed {place}" for place in remove_within(path, holder, follow=follow)]
            except OSError as error:
                raise OutputError(f"cannot remove {path}: {error.strerror or error}; remove it by hand") from None
    return list(dict.fromkeys(done))


def _same_elsewhere(holder: Path, path: Path) -> Path | None:
    """Another snapshot's own copy of the file that a link leads to in vain. Only the sum in the link's name proves that
    it is the same."""
    if not path.is_symlink() or path.exists():
        return None
    blob = path.parent / path.readlink()
    if not _SHA256.fullmatch(blob.name) or blob.parent.resolve() != (holder / "blobs").resolve():
        return None
    snapshots = holder / "snapshots"
    inside = Path(*path.relative_to(snapshots).parts[1:])
    for snapshot in sorted(snapshots.iterdir()):
        other = snapshot / inside
        if other.is_file():
            with other.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == blob.name:
                    return other
    return None
