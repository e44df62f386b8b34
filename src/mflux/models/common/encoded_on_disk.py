"""What encoders made of prompts, kept on disk: another command with the same prompt need not read them, which are more
than half of some models' weights.

An entry is found by everything that it follows from: the files of encoders and tokenizers, by their place, size and
times; how they are computed; the prompt itself. A prompt is private, and its encoding tells much of it, so folder and
files are this user's alone. Whatever is damaged, or looks like somebody else's, counts as not there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mflux import __version__
from mflux.backend import has_gpu, mx, on_gpu
from mflux.errors import MfluxError
from mflux.models.common.family import load_object
from mflux.utils.atomic_files import private_folder, remove_within, write_atomically
from mflux.utils.paths import cache_folder

log = logging.getLogger(__name__)

# How much is kept, and how large one entry may be: FLUX.1's has 4 MB on a GPU, one with several images 30.
MOST_ENTRIES, MOST_BYTES, LARGEST = 128, 512 << 20, 64 << 20
# A file that was changed as short a time ago could be changed once more without another time.
SETTLED_SECONDS = 2.0
_MAGIC = b"mflux encoded prompt 1\n"
_SUFFIX = ".prompt"
_DTYPES = {
    "bool": mx.bool_, "uint8": mx.uint8, "int32": mx.int32, "uint32": mx.uint32, "int64": mx.int64,
    "float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Unstorable(Exception):
    """No entry can be made of it."""


class EncodedOnDisk:
    """The entries of a folder; the one that was used longest ago goes first.

    Args:
        folder: None for `prompts` in mflux's cache folder.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = cache_folder() / "prompts" if folder is None else folder

    @staticmethod
    def is_wanted() -> bool:
        """Whether the environment leaves it on; MFLUX_PROMPT_CACHE=0 turns it off."""
        return os.environ.get("MFLUX_PROMPT_CACHE", "").strip().lower() not in ("0", "no", "off", "false")

    def get(self, key: str) -> tuple[Any] | None:
        """The value of a key; None where there is none."""
        path = self.folder / (key + _SUFFIX)
        try:
            found = _unpacked(_read(path), key)
        except (OSError, ValueError, LookupError, TypeError, MfluxError, RuntimeError) as error:
            if not isinstance(error, FileNotFoundError):
                log.info("an encoded prompt is not taken from %s: %s", path, error)
            return None
        with suppress(OSError):
            os.utime(path)
        return (found,)

    def put(self, key: str, value: Any) -> None:
        """Keep a value, if it can be kept; then let the oldest go that are too much."""
        try:
            data = _packed(value, key)
            if len(data) > LARGEST:
                return
            folder = private_folder(self.folder)
            write_atomically(folder / (key + _SUFFIX), lambda file: file.write(data), overwrite=True, private=True)
            self._shrink()
        except (OSError, MfluxError, Unstorable) as error:
            # Encoding it again is no harm.
            log.info("an encoded prompt is not kept in %s: %s", self.folder, error)

    def _shrink(self) -> None:
        entries = []
        with os.scandir(self.folder) as found:
            for entry in found:
                with suppress(FileNotFoundError):
                    if entry.name.endswith(_SUFFIX) and entry.is_file(follow_symlinks=False):
                        seen = entry.stat(follow_symlinks=False)
                        entries.append((seen.st_mtime_ns, seen.st_size, entry.name))
        entries.sort()
        total = sum(size for _, size, _ in entries)
        while len(entries) > MOST_ENTRIES or total > MOST_BYTES:
            _, size, name = entries.pop(0)
            total -= size
            remove_within(self.folder / name, self.folder)


# ---- what an entry follows from


def key_of(places: Iterable[Path], *facts: Any) -> str | None:
    """The name of an entry; None where it could be another one's, or stand for something that was changed.

    Args:
        places: the files and folders that the value follows from; those that are not there, are not.
        facts: what else it follows from: text, bytes, numbers, and tuples of these.
    """
    try:
        seen = [_identity(file) for place in places for file in _files(place)]
        machine = version("mlx"), platform.machine(), on_gpu(), has_gpu()
        told = _told((_MAGIC.decode(), __version__, machine, seen, facts))
    except (OSError, Unstorable):
        return None
    if not seen or time.time_ns() - max(changed for *_, changed in seen) < SETTLED_SECONDS * 1e9:
        return None
    return hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()


def _files(place: Path) -> list[Path]:
    if not place.is_dir():
        return [place] if os.path.lexists(place) else []
    return sorted(path for path in place.rglob("*") if not path.is_dir())


def _identity(file: Path) -> tuple[str, str, int, int, int, int]:
    """Another one when the file is another, or was written to: then the system has set its last time."""
    seen = file.stat()
    return str(file), str(file.resolve()), seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns


def _told(fact: Any) -> str:
    """Different for different facts."""
    if isinstance(fact, (tuple, list)):
        return f"({','.join(map(_told, fact))})"
    if fact is None or isinstance(fact, (str, bytes, bool, int, float)):
        return f"{type(fact).__name__}:{fact!r}"
    raise Unstorable(f"a {type(fact).__name__} says nothing of itself")


# ---- an entry's bytes


def _packed(value: Any, key: str) -> bytes:
    """The value after what tells whether it is whole."""
    arrays: list[mx.array] = []
    form = _form(value, arrays)
    layout = [[_NAMES[array.dtype], list(array.shape)] for array in arrays]
    head = json.dumps({"key": key, "form": form, "arrays": layout}).encode() + b"\n"
    body = head + b"".join(np.array(array.reshape(-1).view(mx.uint8)).tobytes() for array in arrays)
    return _MAGIC + hashlib.sha256(body).digest() + body


def _form(value: Any, arrays: list[mx.array]) -> Any:
    if isinstance(value, mx.array):
        if value.size == 0 or value.dtype not in _NAMES:
            raise Unstorable(f"an array is of {value.dtype}, or empty")
        arrays.append(value)
        return {"array": len(arrays) - 1}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_form(one, arrays) for one in value]}
    if is_dataclass(value) and type(value).__module__.startswith("mflux."):
        name = f"{type(value).__module__}:{type(value).__qualname__}"
        return {"class": name, "fields": {one.name: _form(getattr(value, one.name), arrays) for one in fields(value)}}
    if value is None or isinstance(value, (bool, int, str)):
        return {"plain": value}
    raise Unstorable(f"a {type(value).__name__} is among them")


def _unpacked(data: bytes, key: str) -> Any:
    """
    Raises:
        ValueError: it is not this key's, or not whole.
    """
    start = len(_MAGIC) + hashlib.sha256().digest_size
    body = data[start:]
    if data[:start] != _MAGIC + hashlib.sha256(body).digest():
        raise ValueError("it is damaged")
    head, _, numbers = body.partition(b"\n")
    found = json.loads(head)
    if found["key"] != key:
        raise ValueError("it is another prompt's")
    arrays, place = [], 0
    for dtype, shape in found["arrays"]:
        kind = _DTYPES[dtype]
        size = kind.size * math.prod(shape)
        flat = mx.array(np.frombuffer(numbers, np.uint8, size, place))
        arrays.append(flat.view(kind).reshape(shape))
        place += size
    mx.eval(arrays)
    return _formed(found["form"], arrays)


def _formed(form: Any, arrays: Sequence[mx.array]) -> Any:
    if "array" in form:
        return arrays[form["array"]]
    if "class" in form:
        if not form["class"].startswith("mflux."):
            raise ValueError("it is no value of mflux's")
        return load_object(form["class"])(**{name: _formed(one, arrays) for name, one in form["fields"].items()})
    for kind in (list, tuple):
        if kind.__name__ in form:
            return kind(_formed(one, arrays) for one in form[kind.__name__])
    return form["plain"]


def _read(path: Path) -> bytes:
    """
    Raises:
        OSError: it cannot be read, or is not this user's alone.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        seen = os.fstat(descriptor)
        if not stat.S_ISREG(seen.st_mode) or seen.st_uid != os.geteuid() or seen.st_mode & 0o077:
            raise PermissionError("it is not this user's alone")
        if seen.st_size > LARGEST:
            raise OSError("it is too large")
        return file.read(LARGEST)


# ---- around encoding


class _Warned(logging.Handler):
    """Whether anything was said meanwhile that another command should be told as well."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.any = False

    def emit(self, record: logging.LogRecord) -> None:
        self.any = True


def encoded(encode: Callable[[], list[Any]]) -> tuple[list[Any], bool]:
    """What is encoded, and whether it may be kept: what warns of a prompt is to warn the next time."""
    watch, root = _Warned(), logging.getLogger("mflux")
    root.addHandler(watch)
    try:
        return encode(), not watch.any
    finally:
        root.removeHandler(watch)
