"""Components that are in memory only while a stage needs them.

A pipeline runs in stages: encode the prompt, denoise, decode. Its components are `Part`s: reading the attribute loads
the component, assigning None releases it, so that peak memory is the largest stage and not the sum.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mflux.backend import has_gpu, mx, nn, tree_flatten

log = logging.getLogger(__name__)


class Part:
    """A component as an attribute of a pipeline.

    Args:
        load: called with the pipeline when the component is first read, and again after it was released.
    """

    def __init__(self, load: Callable[[Any], nn.Module]):
        self._load = load

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name
        self._slot = f"_part_{name}"

    def __get__(self, pipeline: Any, owner: type | None = None):
        if pipeline is None:
            return self
        component = pipeline.__dict__.get(self._slot)
        if component is None:
            with timed(f"load {self._name}") as note:
                component = self._load(pipeline)
                note.append(f"{weight_bytes(component) / 1e9:.2f} GB")
            pipeline.__dict__[self._slot] = component
        return component

    def __set__(self, pipeline: Any, component: nn.Module | None) -> None:
        if component is not None:
            pipeline.__dict__[self._slot] = component
        elif pipeline.__dict__.pop(self._slot, None) is not None:
            give_back_memory()


def is_loaded(pipeline: Any, name: str) -> bool:
    """Whether a `Part` is in memory; asking does not load it."""
    return f"_part_{name}" in pipeline.__dict__


def release(pipeline: Any, *names: str) -> None:
    """Let go of components; a later use loads them again.

    Raises:
        AttributeError: the pipeline has no component of that name.
    """
    for name in names:
        if not isinstance(getattr(type(pipeline), name, None), Part):
            raise AttributeError(f"{type(pipeline).__name__} has no component {name!r} to release")
    for name in names:
        setattr(pipeline, name, None)


# What mallopt(3) calls M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, the bytes that glibc's own adjusting ends at, and those
# that are set while memory is kept.
_TRIM, _MMAP = -1, -3
_MOST = 32 << 20
_KEPT = 512 << 20


def give_back_memory() -> None:
    """Return to the system what released components took.

    glibc keeps freed blocks below 32 MB for itself (M_MMAP_THRESHOLD in mallopt(3)), which is most of a model's
    tensors: only `malloc_trim` hands them back. Other C libraries do without.
    """
    gc.collect()
    mx.clear_cache()
    if (trim := _of_glibc("malloc_trim")) is not None:
        trim(0)


@contextmanager
def keeping_memory() -> Iterator[None]:
    """Keep freed blocks of up to 512 MB for what is allocated next, and give them back at the end.

    On a CPU every layer's result is a block of its own, and at 1024 px most have more than the 32 MB from which on
    glibc has the system make new pages each time: a fifth of a denoising step (benchmarks/steps.md). A GPU's memory is
    MLX's own affair, which does the same.
    """
    mallopt = None if has_gpu() else _of_glibc("mallopt")
    if mallopt is None:
        yield
        return
    mallopt(_MMAP, _KEPT)
    mallopt(_TRIM, 2 * _KEPT)
    try:
        yield
    finally:
        mallopt(_MMAP, _MOST)
        mallopt(_TRIM, 2 * _MOST)
        give_back_memory()


def _of_glibc(name: str) -> Any:
    """A function that other C libraries do without."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(value.nbytes for _, value in tree_flatten(module.parameters()))


@contextmanager
def timed(what: str):
    """Log what a stage took, at level INFO: a command shows it on stderr. Notes added to the list are shown as well."""
    note: list[str] = []
    start = time.perf_counter()
    yield note
    seconds = f"{time.perf_counter() - start:.1f} s"
    log.info("%s: %s", what, ", ".join([seconds, *note]))
