"""As on a GPU: its way of computing on this CPU, and what a program asks of MLX while it computes.

`as_gpu` makes mflux compute on the CPU what a GPU would: in the checkpoint's dtype, with MLX's own kernels. Tests that
are marked with `both_ways` run so as well (tests/conftest.py). `recording` lists every call of MLX, with the dtypes and
shapes that went in and came out, so that a test can hold it against what Metal and CUDA take.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mflux import backend
from mflux.backend import mx

SOURCE = str(Path(backend.__file__).parent)


@contextmanager
def as_gpu() -> Iterator[None]:
    """Compute as a GPU does within the block; on a GPU, nothing changes."""
    if backend.on_gpu():
        yield
        return
    with device_restored():
        backend.use_device("as-gpu")
        yield


@contextmanager
def device_restored() -> Iterator[None]:
    """Whatever a command or a test chooses to compute with holds within the block alone."""
    before = mx.default_device(), backend._pretends
    try:
        yield
    finally:
        mx.set_default_device(before[0])
        backend._pretends = before[1]


# How models compute in tests: as on this machine, and as on a GPU where that is something else.
WAYS = ("plain",) if backend.has_gpu() else ("plain", "as-gpu")
# A test that runs in each way. A model that outlives a test was loaded by whichever came first, so it makes its own.
both_ways = pytest.mark.parametrize("way", WAYS, indirect=True)


def computing(way: str) -> AbstractContextManager[None]:
    """Compute in one of `WAYS` within the block."""
    return as_gpu() if way == "as-gpu" else nullcontext()


# ---- what is asked of MLX


@dataclass(frozen=True)
class Form:
    """An array's dtype and shape."""

    dtype: mx.Dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=object)) if self.shape else 1

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.size

    def __str__(self) -> str:
        return f"{str(self.dtype).rpartition('.')[2]}{list(self.shape)}"


@dataclass(frozen=True)
class Call:
    """One call of MLX.

    Attributes:
        name: as in Python: "matmul", "fast.rms_norm", "array.__add__", "numpy.asarray".
        inputs, outputs: of all arrays, in order, lists of them included.
        options: what is said by name and is no array: {"scale": 0.125, "mask": "causal"}; arrays as their forms.
        place: where in mflux, "models/common/pipeline.py:386"; empty where nothing of mflux is on the stack.
    """

    name: str
    inputs: tuple[Form, ...]
    outputs: tuple[Form, ...]
    options: dict[str, Any] = field(default_factory=dict, compare=False)
    place: str = ""

    @property
    def forms(self) -> tuple[Form, ...]:
        return (*self.inputs, *self.outputs)

    @property
    def waits(self) -> bool:
        """Whether Python stands still until everything that the arrays depend on is computed."""
        return self.name in WAITS

    def __str__(self) -> str:
        taken, given = (", ".join(map(str, forms)) for forms in (self.inputs, self.outputs))
        return f"{self.name}({taken}) -> {given} at {self.place or '?'}"


# `async_eval` only begins. numpy reads MLX's memory by the buffer protocol, which Python cannot watch: so numpy is.
_READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__array__", "__dlpack__")
_NUMPY = ("array", "asarray", "ascontiguousarray")
WAITS = {"eval", *(f"array.{name}" for name in _READS), *(f"numpy.{name}" for name in _NUMPY)}
# What looks at an array and computes nothing.
_PLAIN = {
    "__class__", "__new__", "__init__", "__init_subclass__", "__subclasshook__", "__getattribute__", "__setattr__",
    "__delattr__", "__dir__", "__doc__", "__module__", "__hash__", "__repr__", "__str__", "__format__", "__sizeof__",
    "__len__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__copy__", "__deepcopy__", "__iter__",
    "__array_namespace__", "__dlpack_device__", "__bytes__",
}  # fmt: skip
# Functions of MLX that make no array, or make other functions.
_OTHER = {
    "compile", "custom_function", "checkpoint", "grad", "value_and_grad", "vjp", "jvp", "vmap", "stream", "new_stream",
    "default_device", "default_stream", "set_default_device", "set_default_stream", "device_info", "device_count",
    "is_available", "synchronize", "issubdtype", "finfo", "iinfo", "export_function", "import_function", "exporter",
    "export_to_dot", "depends", "disable_compile", "enable_compile", "save", "savez", "savez_compressed",
    "save_safetensors", "save_gguf",
}  # fmt: skip


@contextmanager
def recording() -> Iterator[list[Call]]:
    """Every call of MLX within the block, in order, and of numpy where it is given an array of MLX's.

    What is looked up in `mx`, `mx.fast`, `mx.random` and `mx.linalg`, and the methods and operators of arrays, are
    counted, whoever calls: layers of `mlx.nn` and mflux. Functions that C++ calls are not, so each is told once.
    """
    calls: list[Call] = []
    undo: list[tuple[Any, str, Any]] = []

    def put(holder: Any, name: str, value: Any) -> None:
        undo.append((holder, name, vars(holder)[name]))
        setattr(holder, name, value)

    try:
        for prefix, module in (("", mx), ("fast.", mx.fast), ("random.", mx.random), ("linalg.", mx.linalg)):
            for name, function in list(vars(module).items()):
                if type(function).__name__ == "nb_func" and not name.startswith("_") and name not in _OTHER:
                    put(module, name, _watched(prefix + name, function, calls))
        for name, method in list(vars(mx.array).items()):
            if type(method).__name__ in ("nb_method", "nb_func") and name not in _PLAIN:
                put(mx.array, name, _watched(f"array.{name}", method, calls))
        for name in _NUMPY:
            put(np, name, _watched(f"numpy.{name}", getattr(np, name), calls, only_with_arrays=True))
        yield calls
    finally:
        for holder, name, value in reversed(undo):
            setattr(holder, name, value)


def _watched(name: str, function: Callable[..., Any], calls: list[Call], *, only_with_arrays: bool = False) -> Any:
    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        given = forms_of((args, options))
        if only_with_arrays and not given:
            return function(*args, **options)
        result = function(*args, **options)
        # In numpy's answer there is nothing of MLX.
        told = {key: next(iter(forms_of(value)), value) for key, value in options.items()}
        calls.append(Call(name, given, () if only_with_arrays else forms_of(result), told, _place()))
        return result

    return call


def forms_of(value: Any) -> tuple[Form, ...]:
    """The forms of the arrays in a value, however nested."""
    if isinstance(value, mx.array):
        return (Form(value.dtype, tuple(value.shape)),)
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return ()
    return tuple(form for part in value for form in forms_of(part))


def _place() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith(SOURCE):
            return f"{frame.f_code.co_filename[len(SOURCE) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
