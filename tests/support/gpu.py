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
# What chooses between numpy and MLX says nothing of who asked.
KERNELS = f"{SOURCE}/cpu/"


@contextmanager
def as_gpu() -> Iterator[None]:
    """Compute as a GPU does within the block; on a GPU, nothing changes."""
    if backend.on_gpu():
        yield
        return
    with device_restored(), pytest.MonkeyPatch.context() as patch:
        backend.use_device("as-gpu")
        for name in ROUNDED_ONCE:
            patch.setattr(mx.fast, name, rounded_once(getattr(mx.fast, name)))
        yield


# Each is one kernel on a GPU, and several operations on a CPU.
ROUNDED_ONCE = ("layer_norm", "rms_norm", "scaled_dot_product_attention")


def rounded_once(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """An operation of MLX's as its kernels for GPUs compute: in float32, and rounded once at the end.

    What takes their place on a CPU rounds after each of its steps, which in 16 bits is no GPU's result.
    """

    @wraps(function)
    def call(*values: Any, **options: Any) -> mx.array:
        told = function(*values, **options)
        if told.dtype == mx.float32:
            return told
        return _ASTYPE(
            function(*map(_wide, values), **{key: _wide(value) for key, value in options.items()}), told.dtype
        )

    return call


# Of MLX's own, so that no recorder takes it for mflux's.
_ASTYPE = mx.array.astype


def _wide(value: Any) -> Any:
    is_narrow = isinstance(value, mx.array) and value.dtype in (mx.bfloat16, mx.float16)
    return _ASTYPE(value, mx.float32) if is_narrow else value


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
                if _is_mlx(function) and not name.startswith("_") and name not in _OTHER:
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


def _is_mlx(function: Any) -> bool:
    """Whether it is a function of MLX's, or one that stands for it."""
    return type(getattr(function, "__wrapped__", function)).__name__ == "nb_func"


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
        if frame.f_code.co_filename.startswith(SOURCE) and not frame.f_code.co_filename.startswith(KERNELS):
            return f"{frame.f_code.co_filename[len(SOURCE) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


# ---- what a GPU takes

# Bytes from which on an array may be more than one buffer of Metal holds: `max_buffer_length` of `mx.device_info()` is
# memory's share of the machine, and never below 4 GB on those that mflux is used on.
LARGEST = 1 << 32
# Elements from which on a kernel counts with 64 bits, and those that know only 32 go wrong.
MOST = 1 << 31


def refusal(call: Call) -> str | None:
    """Why Metal or CUDA would not compute this call, or not as it is meant; None where it would.

    What MLX's documentation and sources say, as of 0.32: float64 works on the CPU alone (docs, "Data Types"); nothing
    is scattered into 64-bit integers (`Scatter::eval_gpu` in backend/metal/indexing.cpp refuses types of 8 bytes);
    factorisations and inverses are the CPU's (backend/metal/primitives.cpp); fused attention takes queries, keys and
    values of one dtype (backend/metal/scaled_dot_product_attention.cpp). complex64 and integers of 64 bits have
    kernels, but not in every operation, and nothing here needs them: they come from numpy by accident.
    """
    dtypes = {form.dtype for form in call.forms}
    if mx.float64 in dtypes:
        return "float64 is the CPU's alone"
    if mx.complex64 in dtypes:
        return "complex64 is not in every kernel"
    if call.name.startswith("linalg.") and call.name != "linalg.norm":
        return "factorisations are the CPU's alone"
    if dtypes & {mx.int64, mx.uint64} and call.name not in INDEX:
        return "64-bit integers are not in every kernel"
    if call.name == "array.__setitem__" and call.inputs[0].dtype.size == 8:
        return "nothing scatters into 64-bit integers"
    for form in call.forms:
        if form.size >= MOST or form.nbytes >= LARGEST:
            return f"{form} is more than a buffer, or a 32-bit index, holds"
    if call.name == "fast.scaled_dot_product_attention":
        if len({form.dtype for form in call.inputs[:3]}) > 1:
            return "queries, keys and values differ in dtype"
        mask = call.options.get("mask")
        if isinstance(mask, Form) and mask.dtype not in (mx.bool_, call.inputs[0].dtype):
            return "the mask is neither truth values nor of the queries' dtype"
    return None


# What numbers rows: reading them, and checking that there are such rows.
INDEX = {"array.__getitem__", "take", "array.min", "array.max", "array.__int__", "array.astype", "array.item"}
