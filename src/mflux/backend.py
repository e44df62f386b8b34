"""The door to MLX: every module takes `mx` and `nn` from here.

On a CPU, MLX's compiler is turned off: it writes C++ into a temporary folder that users may share, under names that
anybody can tell, has a shell start g++, and loads whatever library lies there. For the activations that mflux could
have compiled it gains next to nothing (benchmarks/README.md). A program that wants it for functions of its own calls
`mx.enable_compile()` afterwards.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

__all__ = [
    "compute_dtype",
    "has_gpu",
    "mx",
    "named_arrays",
    "nn",
    "settle_compiling",
    "tree_flatten",
    "tree_map",
    "tree_unflatten",
]


def has_gpu() -> bool:
    """Whether MLX computes on a GPU (Metal or CUDA) unless told otherwise."""
    return mx.default_device().type == mx.gpu


_is_settled = False


def settle_compiling() -> None:
    """Turn MLX's compiler off, once, if MLX computes on a CPU: now, or when a program has chosen that since."""
    global _is_settled
    if not _is_settled and not has_gpu():
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


settle_compiling()


def named_arrays(tree: Any) -> list[tuple[str, mx.array]]:
    """The arrays of nested dictionaries and lists, such as a module's parameters, by dotted paths."""
    arrays: Any = tree_flatten(tree)
    return list(arrays)
