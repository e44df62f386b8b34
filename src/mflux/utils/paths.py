"""Paths as people give them, and names that tell nothing of this machine's folders."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from mflux.errors import UsageError
from mflux.text import shown
from mflux.utils.given_image import GivenImage

# What an entry of Hugging Face's cache lies in: `…/models--org--name/snapshots/REVISION/…`.
_IN_CACHE = re.compile(r"(?:^|[\\/])models--([^\\/]+?)--([^\\/]+)[\\/]snapshots[\\/][^\\/]+(?:[\\/](.+))?$")

# The entry itself, in which a snapshot is found.
_ENTRY = re.compile(r"(?:^|[\\/])models--([^\\/]+?)--([^\\/]+?)(?:[\\/]snapshots)?[\\/]?()$")


def is_homeless(path: str) -> bool:
    """Whether a path begins with the home folder of a user whom this machine does not know."""
    return os.path.expanduser(path).startswith("~")  # noqa: PTH111


def user_path(path: str | bytes | os.PathLike) -> Path:
    """The path that someone means: `~` and `~name` stand for a home folder, as in a shell.

    A name such as `~tmp.png`, with no user called so and no folder behind it, is a file's own.

    Raises:
        UsageError: it is empty, holds a NUL or what no file name can, or there is no such user.
    """
    try:
        path = os.fsdecode(path)
        os.fsencode(path)
    except UnicodeError:
        encoding = sys.getfilesystemencoding()
        half = encoding == "utf-8" or any("\ud800" <= letter <= "\udfff" for letter in str(path))
        why = "it holds half a character" if half else f"names are {encoding} here, and LC_ALL=C.UTF-8 takes all"
        raise UsageError(f"{shown(path)} is no name that a file can have: {why}") from None
    except TypeError:
        raise UsageError(f"{shown(path)} is no path: give text or a Path") from None
    if not path.strip():
        raise UsageError("a path is empty: give the name of a file")
    if "\0" in path:
        raise UsageError(f"{shown(path)} is no name that a file can have: it holds a NUL character")
    if not path.startswith("~"):
        return Path(path)
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = path[1:].partition("/")[0]
    if "/" not in path and user:
        return Path(path)
    reason = f"there is no user {shown(user)} here" if user else "this user has no home folder"
    raise UsageError(f"cannot tell what {shown(path)} is: {reason}; write ./{shown(path)} for a file called so")


def snapshot_in(folder: Path) -> Path:
    """The folder to read of an entry of Hugging Face's cache, `models--org--name` or its `snapshots`, wherever it lies:
    the snapshot that `refs/main` names, or the only one. Any other folder is itself.

    Raises:
        UsageError: there are several snapshots, or none, or the folder holds files without their names.
    """
    inner = folder.name in ("snapshots", "blobs", "refs")
    entry = folder.parent if inner else folder
    snapshots = entry / "snapshots"
    if not is_folder(snapshots) or not (entry.name.startswith("models--") or is_folder(entry / "blobs")):
        return folder
    found = sorted(path for path in snapshots.iterdir() if is_folder(path))
    if not found:
        raise UsageError(f"{entry} is an entry of Hugging Face's cache without a snapshot: fetch the model again")
    main = entry / "refs" / "main"
    commit = read_bounded(main, 100).decode(errors="replace").strip() if is_file(main) else ""
    named = next((path for path in found if path.name == commit), found[0] if len(found) == 1 else None)
    if folder.name in ("blobs", "refs"):
        raise UsageError(f"{folder} holds files without their names: give the folder {named or found[0]}")
    if named is None:
        raise UsageError(f"{folder} holds {len(found)} snapshots: give one of them, as {found[0]}")
    return named


def recorded_file(path: str | bytes | os.PathLike | GivenImage) -> str:
    """How a picture's settings name a file: without the folders that it lies in, which are nobody's business."""
    if isinstance(path, GivenImage):
        return _last_part(path.name)
    return _last_part(os.fsdecode(path))


def recorded_source(name: str | os.PathLike) -> str:
    """How a picture's settings name what a model or LoRA was taken from, as `mflux-save` records it.

    A file or folder of this machine is named by its last part, or, in Hugging Face's cache, by the repository; the
    name of a repository, or of a LoRA in a library, stays as it is.
    """
    text = os.fsdecode(name)
    if found := _IN_CACHE.search(text) or _ENTRY.search(text):
        org, repository, file = found.groups()
        return f"{org}/{repository}:{file}" if file else f"{org}/{repository}"
    if isinstance(name, os.PathLike) or text[:1] in ("/", "\\", "~", ".") or re.match(r"[A-Za-z]:[\\/]", text):
        return _last_part(text)
    try:
        local = os.path.lexists(text)
    except (OSError, ValueError):
        local = False
    return _last_part(text) if local else text


# Python's own raise an error for a name that is longer than a file can have.


def cache_folder() -> Path:
    """Where mflux keeps what it fetches itself: MFLUX_CACHE_DIR, or the platform's cache folder, as in mflux 0.24."""
    if chosen := os.environ.get("MFLUX_CACHE_DIR"):
        return Path(chosen).resolve()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mflux"
    caches = os.environ.get("XDG_CACHE_HOME", "").strip()
    return (Path(caches) if caches else Path.home() / ".cache") / "mflux"


def is_file(path: str | os.PathLike) -> bool:
    """Whether there is such a file; False as well for what no path can be."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: str | os.PathLike) -> bool:
    """Whether there is such a folder; False as well for what no path can be."""
    return os.path.isdir(path)  # noqa: PTH112


def is_there(path: str | os.PathLike) -> bool:
    """Whether something has this name; False as well for what no path can be."""
    return os.path.exists(path)  # noqa: PTH110


def read_bounded(path: str | os.PathLike, most: int) -> bytes:
    """A file's bytes, at most one more than `most`: a device has no end. What a shell's `<(…)` gives is read as well; a
    pipe that nothing writes to is empty.

    Raises:
        OSError: it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        os.set_blocking(descriptor, True)
        return file.read(most + 1)


def is_repository(name: str) -> bool:
    """Whether a model's or LoRA's name is written as a repository, `org/name`, and nothing here has it."""
    try:
        return re.fullmatch(r"(hf:)?[^\s/.~:][^\s/:]*/[^\s/].*", name) is not None and not os.path.lexists(name)
    except ValueError:
        return False


def is_bare(name: str, *, or_repository: bool = False) -> bool:
    """Whether a name from a stranger says nothing of where on this machine something lies: it has no folders.

    Args:
        or_repository: whether a repository is one as well, `org/name`, `org/name@revision` or `org/name:file`, unless
            something here has that name.
    """
    if or_repository and is_repository(name):
        return "\\" not in name and ".." not in name.replace(":", "/").split("/")
    return not re.search(r"[/\\\0]|^~|^\.{1,2}$|^[A-Za-z]:", name) and bool(name.strip())


def _last_part(path: str) -> str:
    """`a/b.png`, `a\\b.png` and `a/b.png/` → `b.png`; what has no name of its own, such as `..`, → the folder's."""
    name = path.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return name if name not in ("", ".", "..", "~") else Path(path).expanduser().resolve().name
