"""The BLAS inside numpy: which it is, and how many threads a product takes.

numpy's wheels carry an OpenBLAS of their own. It multiplies on all cores by itself. Where each of our threads has a
product of its own, small enough for a core's cache, it must not: `alone` has each multiply on the thread that asks.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, cast

import numpy as np

# numpy's wheels have OpenBLAS under names of their own, with 64-bit integers; a distribution's has the plain ones.
_NAMES = ("scipy_openblas_{}64_", "scipy_openblas_{}", "openblas_{}64_", "openblas_{}")


@dataclass(frozen=True)
class Library:
    """The OpenBLAS that numpy was linked with.

    Attributes:
        config: what it says of itself: version, options, the processor it computes for.
        threads: gives how many threads a product may take.
        set_threads: sets that, for the whole process.
    """

    config: str
    threads: Callable[[], int]
    set_threads: Callable[[int], None]


@cache
def library() -> Library | None:
    """None where numpy has another BLAS or none, as one that was built by hand may, or Apple's."""
    try:
        # What it was linked with is found through it, wherever that lies, and nothing else that is loaded.
        module = ctypes.CDLL(np.linalg._umath_linalg.__file__)
    except (AttributeError, OSError):
        return None
    for name in _NAMES:
        try:
            config, threads, set_threads = (
                getattr(module, name.format(what)) for what in ("get_config", "get_num_threads", "set_num_threads")
            )
        except AttributeError:
            continue
        config.restype = ctypes.c_char_p
        set_threads.restype = None
        set_threads.argtypes = [ctypes.c_int]
        return Library(config().decode(errors="replace").strip(), threads, set_threads)
    return None


# What numpy calls those of which it is known that they are fast.
_FAST = ("openblas", "mkl", "blis", "accelerate", "armpl", "nvpl")


def name() -> str:
    """What multiplies numpy's matrices, for people: "numpy's OpenBLAS 0.3.31 (Haswell)"."""
    if (found := library()) is None:
        return _built_with() or "no BLAS"
    words = found.config.split()
    processor = next((word for one, word in pairwise(words[::-1]) if one.startswith("MAX_THREADS")), None)
    return f"numpy's {' '.join(words[:2])}" + (f" ({processor})" if processor else "")


def is_fast() -> bool:
    """Whether that is a library made for this: wheels have one, what is built by hand or by some distributions none."""
    return library() is not None or any(fast in _built_with().lower() for fast in _FAST)


def _built_with() -> str:
    config = cast(dict[str, Any], np.show_config(mode="dicts"))
    found = config.get("Build Dependencies", {}).get("blas", {})
    return str(found.get("name", "")) if found.get("found") else ""


class _Alone:
    """How many want it, and what to go back to after the last."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.asked = 0
        self.before = 1

    def enter(self, found: Library) -> None:
        with self.lock:
            if self.asked == 0:
                self.before = found.threads()
                found.set_threads(1)
            self.asked += 1

    def leave(self, found: Library) -> None:
        with self.lock:
            self.asked -= 1
            if self.asked == 0:
                found.set_threads(self.before)

    def after_fork(self) -> None:
        """A child has none of the threads that asked."""
        found = library()
        if self.asked and found is not None:
            found.set_threads(self.before)
        self.lock, self.asked = threading.Lock(), 0


_alone = _Alone()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_alone.after_fork)


@contextlib.contextmanager
def alone() -> Iterator[bool]:
    """Have each product computed by the thread that asks for it, within the block; false where that cannot be had."""
    found = library()
    if found is None:
        yield False
        return
    _alone.enter(found)
    try:
        yield True
    finally:
        _alone.leave(found)
