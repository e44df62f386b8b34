"""Work for numpy: what it serves, how threads share it, where its results lie, and how gradients pass."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import cache
from typing import Any, cast

import numpy as np

from mflux.backend import has_gpu, mx
from mflux.cpu import blas

# With fewer elements than this MLX is as fast.
LEAST = 1 << 16
# Elements of an array in a block: what a kernel touches stays in the second cache, and a thread seldom needs Python.
BLOCK = 1 << 16
# Bytes that a thread writes down at once of attention's scores, or of a quantized layer's dense weights.
ROOM = 4 << 20

Plain = Callable[..., mx.array]
_LAZY: ContextVar[bool] = ContextVar("lazy", default=False)
_FIRST_ORDER: ContextVar[bool] = ContextVar("first order", default=False)


@contextlib.contextmanager
def lazily() -> Iterator[None]:
    """Leave everything to MLX within the block, so that its graph is kept whole: a checkpointed block of a model can
    then forget what it computed, and compute it again for its gradient."""
    token = _LAZY.set(True)
    try:
        yield
    finally:
        _LAZY.reset(token)


@contextlib.contextmanager
def first_order() -> Iterator[None]:
    """Gradients within the block are asked for no gradients of their own: each is computed as it is reached, and lets
    go of what it was computed from. Outside, they may be differentiated again, and keep all of that."""
    token = _FIRST_ORDER.set(True)
    try:
        yield
    finally:
        _FIRST_ORDER.reset(token)


def is_first_order() -> bool:
    """Whether `first_order` holds."""
    return _FIRST_ORDER.get()


def serves(*arrays: mx.array) -> bool:
    """Whether numpy is to compute with these: on the CPU, in float32, and there is enough of the first."""
    return is_here(*arrays) and arrays[0].size >= LEAST


def is_here(*arrays: mx.array) -> bool:
    """Whether these are on the CPU and in float32."""
    return not (has_gpu() or _LAZY.get()) and all(array.dtype == mx.float32 for array in arrays)


def mlx_multiplies_slowly() -> bool:
    """Whether products are numpy's as well: everywhere but on a Mac, where MLX has Apple's BLAS."""
    return sys.platform != "darwin"


# ---- threads


def threads() -> int:
    """As many as this process may have, and as it lets BLAS have."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    # Python refuses to read a number of thousands of digits.
    return max(1, min(cores, int(asked)) if asked.isdecimal() and len(asked) < 10 else cores)


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="mflux-cpu")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


def share(work: Callable[[int, int], None], rows: int, step: int, *, multiplies: bool = False) -> None:
    """Call `work(start, stop)` for blocks of at most `step` rows, on all cores; numpy's functions leave Python free.

    Args:
        multiplies: the work is products of matrices, each of which is to stay on its thread. All are computed on one
            thread of ours where BLAS does not let itself be told.
    """
    with blas.alone() if multiplies and threads() > 1 else contextlib.nullcontext(not multiplies) as are_apart:
        workers = max(1, min(threads(), -(-rows // step))) if are_apart else 1
        # Each takes the next block when it is done with one: blocks are the same for any number of threads.
        starts = iter(range(0, rows, step))

        def take(_: int) -> None:
            # As MLX, without a word: what is not finite is found where it matters, and said there.
            with np.errstate(all="ignore"):
                for start in starts:
                    work(start, min(start + step, rows))

        if workers == 1:
            take(0)
        else:
            list(_pool(workers).map(take, range(workers)))


def share_rows(work: Callable[[tuple[int, ...], int, int], None], shape: tuple[int, ...]) -> None:
    """Call `work(index, start, stop)` for blocks of rows of an array (…, rows, channels), on all cores."""
    places, rows = list(np.ndindex(shape[:-2])), shape[-2]

    def part(start: int, stop: int) -> None:
        for number in range(start // rows, -(-stop // rows)):
            first = number * rows
            work(places[number], max(start - first, 0), min(stop - first, rows))

    whole = len(places) * rows
    share(part, whole, max(1, min(BLOCK // shape[-1], -(-whole // threads()))))


# ---- memory


class _Spare(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[int, np.ndarray] = {}


_spare = _Spare()


def spare(shape: tuple[int, ...], number: int = 0) -> np.ndarray:
    """Memory of this thread's own that a kernel may write to, always the same: new pages cost more than the work."""
    size = math.prod(shape)
    buffers = _spare.buffers
    if number not in buffers or buffers[number].size < size:
        buffers[number] = np.empty(max(size, BLOCK), np.float32)
    return buffers[number][:size].reshape(shape)


def room(shape: tuple[int, ...]) -> tuple[mx.array, np.ndarray]:
    """Allocate a float32 array; returns MLX's and numpy's view of it."""
    array = mx.from_dlpack(np.empty(shape, np.float32))
    mx.eval(array)
    # Of MLX's and not the array that was given: older releases of MLX copy.
    return array, np.asarray(array)


# ---- gradients


def apart(value: mx.array) -> mx.array:
    """A copy of a computed array that knows nothing of what it was computed from: while a gradient is prepared, MLX
    lets nothing go that an array leads back to, and each gradient leads back to the one before it."""
    wide = value.view(mx.uint16) if value.dtype == mx.bfloat16 else value
    copy = mx.array(np.array(wide))
    return copy.view(mx.bfloat16) if value.dtype == mx.bfloat16 else copy


def differentiable(
    compute: Plain, plain: Plain, gradient: Callable[[Sequence[mx.array], mx.array], Sequence[mx.array]] | None = None
) -> Plain:
    """`compute` of arrays, with a gradient; `plain` itself where nothing can be computed yet.

    Args:
        compute: is given arrays with values.
        plain: the same by MLX.
        gradient: of the arrays and the result's cotangent, each array's; MLX's of `plain` unless given.
    """

    def run(*arrays: mx.array) -> mx.array:
        try:
            mx.eval(arrays)
        except ValueError:  # inside mx.compile or mx.vmap
            return plain(*arrays)
        return compute(*arrays)

    traced = mx.custom_function(run)

    @traced.vjp
    def backward(primals: Any, cotangent: mx.array, _: Any) -> Any:
        primals = list(primals) if isinstance(primals, (list, tuple)) else [primals]
        found = mx.vjp(plain, primals, [cotangent])[1] if gradient is None else gradient(primals, cotangent)
        if is_first_order():
            with contextlib.suppress(ValueError):  # inside mx.compile or mx.vmap
                mx.eval(found)
                found = [apart(value) for value in found]
        return found[0] if len(found) == 1 else tuple(found)

    def call(*arrays: mx.array) -> mx.array:
        result = cast(mx.array, traced(*arrays))
        with contextlib.suppress(ValueError):
            mx.eval(result)  # else it keeps what it was made of, in case of a gradient
        return result

    return call
