"""Untrusted files: open regular files only, and recognise LFS pointers, web pages and zeros.

What stands in place of a model's file after something went wrong is the same for every kind of file: a pointer of Git
LFS, a web page, nothing, or zeros. `what_else` tells these apart by the first bytes, for every reader.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mflux.errors import CheckpointError
from mflux.text import shown, size
from mflux.utils.strict_json import NotJSON, parse

# Of a configuration, an index or a tokenizer. The largest published one is Gemma's tokenizer, of 34 MB.
LARGEST_TEXT = 64 << 20
# Open at once, where a process may raise its own limit: macOS's most.
_FILES = 10240
# As many of a file's first bytes as `what_else` looks at.
HEAD = 512
_WEB_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<[A-Za-z!?]")
_MISSING = "is missing: the folder is not a complete model in the diffusers layout"


def open_file(path: str | Path) -> BinaryIO:
    """A file, open for reading its bytes; folders, pipes and devices are none.

    Raises:
        CheckpointError: it cannot be opened, or is not a file.
    """
    try:
        # A pipe would otherwise be waited for.
        number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            if allow_more_files():
                return open_file(path)
            raise too_many_files(path) from None
        raise CheckpointError(f"cannot read {shown(path, 500)}: {error.strerror or error}") from None
    except ValueError:
        raise CheckpointError(f"cannot read {shown(path, 500)}: no file can have this name") from None
    mode = os.fstat(number).st_mode
    if not stat.S_ISREG(mode):
        os.close(number)
        what = os.strerror(errno.EISDIR) if stat.S_ISDIR(mode) else "it is a pipe or a device, not a file"
        raise CheckpointError(f"cannot read {shown(path, 500)}: {what}")
    return os.fdopen(number, "rb")


def allow_more_files() -> bool:
    """Let this process have as many files open as it may allow itself; false where it may no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    try:
        if soft == resource.RLIM_INFINITY or soft >= wanted:
            return False
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):
        return False
    return True


def too_many_files(path: str | Path) -> CheckpointError:
    """The error that it is not this file's fault."""
    return CheckpointError(
        f"cannot read {shown(path, 500)}: too many files are open at once; allow more, as `ulimit -n {_FILES}` does"
    )


def read_text(path: str | Path, *, most: int = LARGEST_TEXT) -> str:
    """A text file that belongs to a model, in UTF-8, with a byte-order mark or without.

    Raises:
        CheckpointError: it is missing, not what belongs there, too large, or not UTF-8.
    """
    if not os.path.lexists(path):
        raise CheckpointError(f"{shown(path, 500)} {_MISSING}")
    with open_file(path) as file:
        length = os.fstat(file.fileno()).st_size
        if length > most:
            raise CheckpointError(f"{path} has {size(length)}, and its kind has at most {size(most)}: fetch it again")
        try:
            data = file.read(most + 1)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    if other := what_else(data[:HEAD]):
        raise CheckpointError(f"{path} {other}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} is damaged: it is not UTF-8 text; fetch it again") from None


def read_json(path: str | Path) -> dict:
    """A JSON object from a file.

    Raises:
        CheckpointError: names the file and says what is wrong with it.
    """
    with naming_the_copy(path):
        try:
            content = parse(read_text(path))
        except NotJSON as error:
            raise CheckpointError(f"{path} {error}; fetch it again") from None
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} is damaged: it is not a JSON object; fetch it again")
        return content


@contextmanager
def naming_the_copy(path: str | Path) -> Iterator[None]:
    """Make "fetch it again" true for a file in Hugging Face's cache, which would be taken from there once more."""
    try:
        yield
    except CheckpointError as error:
        message = str(error)
        holder, in_cache, _ = Path(path).parent.as_posix().rpartition("/snapshots/")
        if message.endswith("fetch it again") and in_cache:
            # A link that leads out of the repository's folder leads to what is none of its business.
            target = Path(path).resolve()
            place = target if target.is_relative_to(Path(holder).resolve()) else path
            raise type(error)(f"{message} (delete {place}, and the same command does)") from None
        raise


def what_else(head: bytes) -> str | None:
    """What a file is that its first bytes show to be no model's file at all, as the rest of a sentence, or None."""
    if not head:
        return "is empty: fetch it again"
    if head.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the file itself: fetch it with `git lfs pull`"
    # The length that a safetensors file begins with may spell "<", but has zeros as well.
    if _WEB_PAGE.match(head) and b"\0" not in head[:16]:
        return "is a web page, not the file that belongs there: the download went wrong, fetch it again"
    if len(head) >= 16 and not any(head):
        return "holds nothing but zeros where it begins: the download broke off, fetch it again"
    return None


class Unchanged:
    """What a file was when it was opened. Its header is read once and its data later: they must belong together, and
    mapped pages that are no longer there would end the process."""

    def __init__(self, path: str | Path):
        self._path = path
        self._stamp = self._now()

    def check(self) -> None:
        """
        Raises:
            CheckpointError: the file has been written to, replaced or removed since.
        """
        if self._now() != self._stamp:
            raise CheckpointError(
                f"{self._path} was changed while it was read: wait until nothing writes to it, and run the same "
                "command again"
            )

    def _now(self) -> tuple[int, ...] | None:
        try:
            found = Path(self._path).stat()
        except (OSError, ValueError):
            return None
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
