"""The door to MLX: every module takes `mx` and `nn` from here.

On Linux MLX's CPU wheel is linked against the reference BLAS, which multiplies matrices some twenty to sixty times
slower than OpenBLAS. Symbols of a library that is already loaded process-wide win, so OpenBLAS, the system's or that of
the extra `openblas`, is loaded before MLX is. A program that imports MLX before mflux is told, once, that this was too
late. `MFLUX_BLAS=off` leaves MLX as it is.

On a CPU, MLX's compiler is turned off: it writes C++ into a temporary folder that users may share, under names that
anybody can tell, has a shell start g++, and loads whatever library lies there. For the activations that mflux could
have compiled it gains next to nothing (benchmarks/README.md). A program that wants it for functions of its own calls
`mx.enable_compile()` afterwards.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import sys
from typing import Any

from mflux.optional import file_of, pip_command

# The name that Debian's alternatives, Arch and a build of one's own have; Fedora's builds with threads and with OpenMP.
_OPENBLAS_NAMES = ("libopenblas.so.0", "libopenblasp.so.0", "libopenblaso.so.0", "libopenblas.so")
# What brings it, by the program that installs.
_OPENBLAS_COMMANDS = {"apt-get": "apt-get install libopenblas0", "dnf": "dnf install openblas-threads"}


log = logging.getLogger(__name__)


def _blas_is_off() -> bool:
    return os.environ.get("MFLUX_BLAS", "").lower() in ("off", "0", "no")


def _load_blas() -> str | None:
    if sys.platform != "linux" or "mlx.core" in sys.modules or _blas_is_off():
        return None
    return _find_blas()


def _find_blas() -> str | None:
    for name in (*_OPENBLAS_NAMES, *_openblas_of_the_extra()):
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return name
    return None


def _openblas_of_the_extra() -> list[str]:
    """The library that `mflux[openblas]` brings, if it is installed; no linker looks where it lies."""
    found = file_of("cmeel-openblas")
    return [] if found is None else [found]


def _mlx_was_first() -> bool:
    """Whether MLX is loaded already, with its own BLAS: nothing that is loaded now comes before that."""
    return "mlx.core" in sys.modules and not hasattr(ctypes.CDLL(None), "openblas_get_config")


_TOO_LATE = sys.platform == "linux" and _mlx_was_first()
# The library that was put before MLX's own BLAS, by name or by path, or None.
BLAS = _load_blas()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten, tree_map, tree_unflatten  # noqa: E402

__all__ = [
    "BLAS",
    "blas_advice",
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

    A GPU keeps the checkpoint's. MLX's CPU kernels for 16-bit floats are about 40 times slower than float32 with a
    good BLAS, so there everything is float32.
    """
    if has_gpu() and stored in (mx.float16, mx.bfloat16, mx.float32):
        return stored
    return mx.float32


def blas_advice() -> str | None:
    """How to make MLX compute faster here, or None: on a GPU, on macOS, with OpenBLAS, or if it was turned off."""
    if sys.platform != "linux" or BLAS is not None or _blas_is_off() or has_gpu():
        return None
    if (found := _find_blas()) is not None:
        if not _TOO_LATE:
            return None
        return (
            "this CPU would compute 20 times faster if mflux.backend were imported before mlx, or with "
            f"LD_PRELOAD={found} (MFLUX_BLAS=off: say this no more)"
        )
    commands = (command for program, command in _OPENBLAS_COMMANDS.items() if shutil.which(program))
    command = next(commands, "install it with the system's package manager")
    return (
        f"this CPU would compute 20 times faster with OpenBLAS: {pip_command('openblas')}, or {command} "
        "(MFLUX_BLAS=off: say this no more)"
    )


settle_compiling()
if _TOO_LATE and (_advice := blas_advice()) is not None:
    log.warning(_advice)


def named_arrays(tree: Any) -> list[tuple[str, mx.array]]:
    """The arrays of nested dictionaries and lists, such as a module's parameters, by dotted paths."""
    arrays: Any = tree_flatten(tree)
    return list(arrays)
