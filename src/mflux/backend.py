"""The door to MLX: every module takes `mx` and `nn` from here.

On a CPU, MLX's compiler is turned off: it writes C++ into a temporary folder that users may share, under names that
anybody can tell, has a shell start g++, and loads whatever library lies there. For the activations that mflux could
have compiled it gains next to nothing (benchmarks/README.md). A program that wants it for functions of its own calls
`mx.enable_compile()` afterwards.

Which device computes is decided here, when this module is first imported: `MFLUX_DEVICE=cpu` keeps to the CPU where
there is a GPU, `gpu` is an error where there is none, and `as-gpu`, which is for tests, computes on the CPU what a GPU
would compute: in the checkpoint's dtype, with MLX's own kernels. A command's `--device` comes before it (`use_device`).
"""

from __future__ import annotations

import os
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mflux.errors import UsageError
from mflux.text import shown
from mflux.utils.values import DEVICES

__all__ = [
    "compute_dtype",
    "has_gpu",
    "mx",
    "named_arrays",
    "nn",
    "on_gpu",
    "optimizers",
    "settle_compiling",
    "tree_flatten",
    "tree_map",
    "tree_unflatten",
    "use_device",
]

# What a variable may say and no option: there is nothing to gain from it but knowledge.
_AS_GPU = "as-gpu"
_pretends = False


def on_gpu() -> bool:
    """Whether MLX computes on a GPU (Metal or CUDA) unless told otherwise."""
    return mx.default_device().type == mx.gpu


def has_gpu() -> bool:
    """Whether to compute as a GPU does: on one, or, in tests, on a CPU in its place."""
    return _pretends or on_gpu()


def use_device(name: str) -> None:
    """Compute on a device from now on, in the whole process; what is loaded already stays as it is.

    Args:
        name: "cpu", "gpu", or "as-gpu": on the CPU, in the way of a GPU.

    Raises:
        UsageError: there is no such device.
    """
    global _pretends
    if name not in (*DEVICES, _AS_GPU):
        raise UsageError(f"there is no device {shown(repr(name), 40)}: it is {' or '.join(DEVICES)}")
    if name == "gpu" and not mx.is_available(mx.gpu):
        raise UsageError("MLX finds no GPU here, and gpu was asked for: take cpu, or see mflux doctor")
    mx.set_default_device(mx.gpu if name == "gpu" else mx.cpu)
    _pretends = name == _AS_GPU
    settle_compiling()


_is_settled = False


def settle_compiling() -> None:
    """Turn MLX's compiler off, once, if MLX computes on a CPU: now, or when a program has chosen that since."""
    global _is_settled
    if not _is_settled and not on_gpu():
        mx.disable_compile()
        _is_settled = True


def compute_dtype(stored: mx.Dtype) -> mx.Dtype:
    """The dtype to compute in for weights stored as `stored`.

    A GPU keeps the checkpoint's. MLX's CPU kernels for 16-bit floats are about 40 times slower than numpy's for
    float32, so there everything is float32.
    """
    if has_gpu() and stored in (mx.float16, mx.bfloat16, mx.float32):
        return stored
    return mx.float32


def _settle_device() -> None:
    """Take what `MFLUX_DEVICE` says, where it says something."""
    if name := os.environ.get("MFLUX_DEVICE"):
        try:
            use_device(name)
        except UsageError as error:
            raise UsageError(f"MFLUX_DEVICE: {error}") from None


_settle_device()
settle_compiling()


def named_arrays(tree: Any) -> list[tuple[str, mx.array]]:
    """The arrays of nested dictionaries and lists, such as a module's parameters, by dotted paths."""
    arrays: Any = tree_flatten(tree)
    return list(arrays)
