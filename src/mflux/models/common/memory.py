"""What is in memory when: components that load when a stage needs them, and encoded prompts that are kept.

A model's work has stages: encode the prompt, denoise, decode. Its components are `LazyComponent`s: reading the
attribute loads the component, assigning None releases it, so that peak memory is the largest stage and not the sum.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, overload

import PIL.Image

from mflux.backend import mx, named_arrays, nn, on_gpu

log = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)


class LazyComponent(Generic[M]):
    """A component as an attribute of a model; `transformer: LazyComponent[FluxTransformer]` declares one.

    Args:
        load: called with the model when the component is first read, and again after it was released.
    """

    def __init__(self, load: Callable[[Any], M]):
        self._load = load

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name
        self._slot = f"_component_{name}"

    @overload
    def __get__(self, model: None, owner: type | None = None) -> LazyComponent[M]: ...

    @overload
    def __get__(self, model: object, owner: type | None = None) -> M: ...

    def __get__(self, model: object | None, owner: type | None = None) -> LazyComponent[M] | M:
        if model is None:
            return self
        component = model.__dict__.get(self._slot)
        if component is None:
            with timed(f"load {self._name}") as note:
                component = self._load(model)
                note.append(f"{weight_bytes(component) / 1e9:.2f} GB")
            model.__dict__[self._slot] = component
        return component

    def __set__(self, model: object, component: M | None) -> None:
        if component is not None:
            model.__dict__[self._slot] = component
        elif model.__dict__.pop(self._slot, None) is not None:
            give_back_memory()


def is_loaded(model: object, name: str) -> bool:
    """Whether a `LazyComponent` is in memory; asking does not load it."""
    return f"_component_{name}" in model.__dict__


def release(model: object, *names: str) -> None:
    """Let go of components; a later use loads them again.

    Raises:
        AttributeError: the model has no component of that name.
    """
    for name in names:
        if not isinstance(getattr(type(model), name, None), LazyComponent):
            raise AttributeError(f"{type(model).__name__} has no component {name!r} to release")
    for name in names:
        setattr(model, name, None)


@dataclass(frozen=True)
class Keep:
    """Which components stay in memory past their stage.

    Attributes:
        text_encoders: once the prompt is encoded; a program that changes its prompt often spares loading them again.
        transformer: while another prompt is encoded.
        for_next_image: the transformer while an image is decoded; False where no other image follows.
    """

    text_encoders: bool = False
    transformer: bool = True
    for_next_image: bool = True


# Encoded prompts: FLUX.1's has 8 MB, one with several images 30.
_MOST_ENCODED = 32
_MOST_ENCODED_BYTES = 512 << 20


class Encoded(dict[Any, Any]):
    """What encoders made of prompts and images, by these; the one that was used longest ago goes first.

    Args:
        most: how many are kept at most.
        most_bytes: how large all of them may be together.
    """

    def __init__(self, most: int = _MOST_ENCODED, most_bytes: int = _MOST_ENCODED_BYTES):
        super().__init__()
        self._most = most
        self._most_bytes = most_bytes

    def used(self, key: Any) -> Any:
        """The value of a key, which becomes the one that was used last."""
        value = self[key] = self.pop(key)
        return value

    def shrink(self, least: int) -> None:
        """Let go of what is too much, but not of the `least` that were used last."""
        total = sum(map(_bytes_of, self.values()))
        while len(self) > least and (len(self) > self._most or total > self._most_bytes):
            total -= _bytes_of(self.pop(next(iter(self))))


def digest_of(image: PIL.Image.Image) -> bytes:
    """What tells an image from others: few bytes, where its pixels are millions."""
    return hashlib.sha256(image.tobytes()).digest() + f"{image.mode} {image.size}".encode("ascii")


def _bytes_of(value: Any) -> int:
    """Bytes of the arrays in a value, however nested; of an image its pixels'."""
    if isinstance(value, mx.array):
        return value.nbytes
    if isinstance(value, (list, tuple)):
        return sum(map(_bytes_of, value))
    if hasattr(value, "__dataclass_fields__"):
        return sum(_bytes_of(getattr(value, name)) for name in value.__dataclass_fields__)
    return 4 * value.width * value.height if isinstance(value, PIL.Image.Image) else 0


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


def recommended() -> int | None:
    """Bytes that Metal recommends a program to take at most on this Mac; None elsewhere.

    `sysctl iogpu.wired_limit_mb` is how its owner changes that; mflux never does.
    """
    if not (on_gpu() and mx.metal.is_available()):
        return None
    return int(mx.device_info().get("max_recommended_working_set_size", 0)) or None


@contextmanager
def keeping_memory() -> Iterator[None]:
    """Keep freed blocks of up to 512 MB for what is allocated next, and give them back at the end.

    On a CPU every layer's result is a block of its own, and at 1024 px most have more than the 32 MB from which on
    glibc has the system make new pages each time: a fifth of a denoising step (benchmarks/steps.md). A GPU's memory is
    MLX's own affair, which does the same; on a Mac it is kept from being paged out meanwhile, as far as Metal
    recommends, which is what mlx-lm does while it generates.
    """
    if (most := recommended()) is not None:
        before = mx.set_wired_limit(most)
        try:
            yield
        finally:
            # What still runs was promised it.
            mx.synchronize()
            mx.set_wired_limit(before)
        return
    mallopt = None if on_gpu() else _of_glibc("mallopt")
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
    return sum(value.nbytes for _, value in named_arrays(module.parameters()))


@contextmanager
def timed(what: str) -> Iterator[list[str]]:
    """Log what a stage took, at level INFO: a command shows it on stderr. Notes added to the list are shown as well."""
    note: list[str] = []
    start = time.perf_counter()
    yield note
    seconds = f"{time.perf_counter() - start:.1f} s"
    log.info("%s: %s", what, ", ".join([seconds, *note]))
