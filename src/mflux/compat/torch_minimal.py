"""The only door to torch: tensors that the native reader declines, made dense by torch itself.

torch loads with `weights_only=True`, and only what the native reader has already found to be sound: every name that the
file mentions is in the reader's own table, and every tensor lies inside its storage.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from mflux.backend import mx
from mflux.errors import CheckpointError, UnsafeCheckpointError
from mflux.optional import require

# A sparse tensor may be far smaller in the file than dense, but not without end.
_MOST_GROWTH = 64
_FREE_GROWTH = 1 << 30


def load_tensors(path: str | Path, wanted: Mapping[str, tuple[Any, ...]], *, feature: str) -> dict[str, mx.array]:
    """Load a few tensors of a PyTorch file through torch, dense and dequantized.

    Args:
        path: the file, zip archive or legacy stream.
        wanted: for each tensor's name, the keys that lead to it from the object that was saved.
        feature: what needs torch, for the sentence that says so when it is missing.

    Returns:
        The wanted tensors. Nested ones are padded with zeros to their largest member. float64 becomes float32.

    Raises:
        MissingExtraError: torch is not installed.
        CheckpointError: torch refuses the file too, or a tensor cannot be made dense.
        UnsafeCheckpointError: a tensor would be out of all proportion to the file.
    """
    torch = require("torch", extra="torch-lite", feature=feature)
    limit = _MOST_GROWTH * Path(path).stat().st_size + _FREE_GROWTH
    try:
        # Without the check torch trusts the indices of a sparse tensor, wherever they point.
        with torch.sparse.check_sparse_tensor_invariants(), warnings.catch_warnings(action="ignore"):
            root = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch raises: it has no class of its own for this
        raise CheckpointError(f"{path}: torch cannot load it either: {_first_line(error)}") from None
    tensors = {}
    for name, keys in wanted.items():
        try:
            value = root
            for key in keys:
                value = value[key]
            tensors[name] = _array(torch, _dense(torch, value, limit, f"{path}: {name}"))
        except (RuntimeError, NotImplementedError, TypeError, ValueError, LookupError) as error:
            raise CheckpointError(f"{path}: torch cannot make {name} dense: {_first_line(error)}") from None
    return tensors


def _dense(torch: Any, value: Any, limit: int, what: str) -> Any:
    value = value.detach()
    if value.is_nested:
        members = value.unbind()
        shape = (len(members), *(max(lengths) for lengths in zip(*(m.shape for m in members), strict=True)))
        _check_size(shape, value.element_size(), limit, what)
        return torch.nested.to_padded_tensor(value, 0.0)
    _check_size(value.shape, 4 if value.is_quantized else value.element_size(), limit, what)
    if value.is_quantized:
        return value.dequantize()
    return value.to_dense() if value.layout is not torch.strided else value


def _check_size(shape: tuple[int, ...], width: int, limit: int, what: str) -> None:
    if prod(shape) * width > limit:
        raise UnsafeCheckpointError(f"{what} was refused: made dense it would take {prod(shape) * width:,} bytes")


def _array(torch: Any, value: Any) -> mx.array:
    value = value.contiguous()
    if value.dtype is torch.bfloat16:
        return mx.array(value.view(torch.uint16).numpy()).view(mx.bfloat16)
    if value.dtype is torch.float64:
        value = value.float()
    return mx.array(value.numpy())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
