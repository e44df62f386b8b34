"""The door to MLX: every module takes `mx` and `nn` from here.

On Linux MLX's CPU wheel is linked against the reference BLAS, which multiplies matrices some twenty to sixty times
slower than OpenBLAS. Symbols of a library that is already loaded process-wide win, so the system's OpenBLAS, if there
is one, is loaded before MLX is. `MFLUX_BLAS=off` leaves MLX as it is.
"""

from __future__ import annotations

import ctypes
import os
import sys

_OPENBLAS_NAMES = ("libopenblas.so.0", "libopenblas.so")


def _load_blas() -> str | None:
    if sys.platform != "linux" or "mlx.core" in sys.modules:
        return None
    if os.environ.get("MFLUX_BLAS", "").lower() in ("off", "0", "no"):
        return None
    for name in _OPENBLAS_NAMES:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return name
    return None


# The library that was put before MLX's own BLAS, or None.
BLAS = _load_blas()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

__all__ = ["BLAS", "compute_dtype", "has_gpu", "mx", "nn", "tree_flatten"]


def has_gpu() -> bool:
    """Whether MLX computes on a GPU (Metal or CUDA) unless told otherwise."""
    return mx.default_device().type == mx.gpu


def compute_dtype(stored: mx.Dtype) -> mx.Dtype:
    """The dtype to compute in for weights stored as `stored`.

    A GPU keeps the checkpoint's. MLX's CPU kernels for 16-bit floats are about 40 times slower than float32 with a
    good BLAS, so there everything is float32.
    """
    if has_gpu() and stored in (mx.float16, mx.bfloat16, mx.float32):
        return stored
    return mx.float32
