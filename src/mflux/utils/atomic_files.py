"""Files and folders that appear under their names only when they are complete, and replace nothing they should not.

What is being written lies beside its destination as `.mflux-….part` and is locked by the process that writes it. The
lock goes with the process, however that ends; so whoever writes into the folder next can tell what was left behind by
a killed run from what is still being written, and removes it.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from mflux.errors import OutputError

_PREFIX = ".mflux-"
_SUFFIXES = (".part", ".partial")
# Before a file system that gives one answer and then another is given up.
_ATTEMPTS = 100
# Of links that lead to links, as the system follows them.
_MOST_LINKS = 40


class Temporary:
    """A new hidden file (or folder) in `folder`, locked until it is closed.

    Args:
        private: of a file: nobody else may read it, whatever the umask says.

    Attributes:
        path: where it is.
        descriptor: of the open file; -1 once closed.

    Raises:
        OSError: it cannot be created.
    """

    def __init__(self, folder: Path, *, is_folder: bool = False, private: bool = False):
        remove_abandoned(folder)
        for _ in range(_ATTEMPTS):
            self.path = folder / f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIXES[0]}"
            self.descriptor = -1
            try:
                if is_folder:
                    self.path.mkdir()
                    self.descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW)
                else:
                    # 0o666 less the umask, as for any new file; O_EXCL so that nothing of anybody's is written through.
                    mode = 0o600 if private else 0o666
                    self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
                # Where there are no locks nothing is taken for abandoned either.
                with suppress(OSError):
                    fcntl.flock(self.descriptor, fcntl.LOCK_EX)
                if _is_same(self.descriptor, self.path):
                    return
            except FileNotFoundError:
                if not folder.is_dir():
                    raise
            except BaseException:
                self.discard()
                raise
            # Between creating and locking, another run has taken it for abandoned.
            self.close()
        raise OSError(errno.EIO, "what is created there is another file the next moment")

    def close(self) -> None:
        """Let go of the lock."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def discard(self) -> None:
        """Remove it, unless it has been given another name."""
        _remove(self.path)
        self.close()


def remove_abandoned(folder: Path) -> None:
    """Remove from a folder what runs that were killed have left there; what cannot be removed stays."""
    try:
        with os.scandir(folder) as entries:
            left = [entry.path for entry in entries if _is_temporary(entry.name)]
    except OSError:
        return
    for path in left:
        try:
            # A pipe by that name must not make this wait.
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_same(descriptor, path):
                _remove(Path(path))
        except OSError:
            pass  # its writer lives, or there are no locks here
        finally:
            os.close(descriptor)


def write_atomically(
    path: Path,
    write: Callable[[BinaryIO], object],
    *,
    overwrite: bool,
    beside: str | None = None,
    private: bool = False,
) -> Path:
    """Let `write(file)` fill a file that appears under its name only when complete.

    Args:
        path: the name; folders above it are created.
        write: called with a binary file.
        overwrite: replace what has that name.
        beside: an ending that must be free as well, for what goes with the file.
        private: nobody else may read it.

    Returns:
        Where it went: `path`, or the next free name beside it (`name_1.png`) unless `overwrite`.

    Raises:
        OutputError: it cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Temporary(path.parent, private=private)
        try:
            # The lock belongs to the descriptor, which stays open until the file has its name.
            with os.fdopen(os.dup(temporary.descriptor), "w+b") as file:
                write(file)
            if overwrite:
                name = next(_names(path, beside))
                temporary.path.replace(name)
                return name
            return _move_to_free_name(temporary.path, path, beside)
        finally:
            temporary.discard()
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from None


def private_folder(path: Path) -> Path:
    """A folder of this user's alone, made if need be. One that others may enter is closed to them.

    Raises:
        OSError: it cannot be made, or what has its name is somebody else's, or no folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        path.mkdir(0o700)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "it is somebody else's")
        if found.st_mode & 0o077:
            os.fchmod(descriptor, 0o700)
    finally:
        os.close(descriptor)
    return path


def remove_within(path: Path, root: Path, *, follow: bool = False) -> list[Path]:
    """Remove what has a name in a folder.

    Args:
        path: the name; nothing need have it.
        root: the folder. What lies outside stays, whatever a link or a name says.
        follow: of a link, remove what it leads to as well, as far as that lies in the folder.

    Returns:
        What was removed, the last end of the links first.

    Raises:
        OSError: something cannot be removed.
    """
    inside = root.resolve()
    places: list[Path] = []
    while len(places) < _MOST_LINKS and path.parent.resolve().is_relative_to(inside):
        places.append(path)
        if not follow or not path.is_symlink():
            break
        target = path.parent / path.readlink()
        path = target.parent.resolve() / target.name
    removed = []
    for place in reversed(places):
        with suppress(FileNotFoundError):
            place.unlink()
            removed.append(place)
    return removed


def remove_empty(*folders: Path) -> None:
    """Remove folders in the order given, an inner one first; one in which somebody has put something stays."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def free_name(path: Path) -> Path:
    """`path`, or the first of `name_1.png`, `name_2.png`, … that nothing has."""
    return next(name for name in _names(path) if not os.path.lexists(name))


def _move_to_free_name(temporary: Path, wanted: Path, beside: str | None) -> Path:
    contradictions = 0
    for path in _names(wanted, beside):
        if contradictions == _ATTEMPTS:
            raise OSError(errno.EIO, "names that nothing has are taken there")
        if os.path.lexists(path) or (beside and os.path.lexists(path.with_suffix(beside))):
            continue
        try:
            # A link fails where a rename would replace what another process has put there meanwhile.
            os.link(temporary, path)
            return path
        except FileExistsError:
            contradictions += 1
            continue
        except OSError:
            pass  # a file system without links
        try:
            # An empty file of our own takes the name, so that the rename replaces nothing else.
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            contradictions += 1
            continue
        try:
            temporary.replace(path)
        except BaseException:
            _remove(path)
            raise
        return path
    raise AssertionError("numbers do not end")


def _names(path: Path, beside: str | None = None) -> Iterator[Path]:
    """name.png, name_1.png, name_2.png, …, shortened where the number, or what goes beside it, makes it too long."""
    try:
        longest = os.pathconf(path.parent, "PC_NAME_MAX")
    except (OSError, ValueError):
        longest = 255
    room = longest - max(len(os.fsencode(ending)) for ending in (path.suffix, beside or ""))
    # A name that is too long by itself is told when it is written, and not silently another.
    fits = len(os.fsencode(path.name)) <= longest
    for number in itertools.count():
        tail = f"_{number}" if number else ""
        stem = _cut(path.stem, room - len(tail)) if fits else path.stem
        yield path.with_name(f"{stem}{tail}{path.suffix}")


def _cut(text: str, most: int) -> str:
    """As much of a text as takes `most` bytes in a file name, in whole characters."""
    if len(os.fsencode(text)) <= most:
        return text
    cut = os.fsencode(text)[:most]
    # Only the end can be half a character: bytes that are no text are as they were.
    for end in range(most, max(most - 4, 0), -1):
        if text.startswith(start := os.fsdecode(cut[:end])):
            return start
    return os.fsdecode(cut)


def _is_temporary(name: str) -> bool:
    return name.startswith(_PREFIX) and name.endswith(_SUFFIXES)


def _is_same(descriptor: int, path: str | Path) -> bool:
    """Whether what was opened still has its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
