"""Weights in 3 to 8 bits: which layers, and how they get there without the full-precision model ever in memory.

MLX's affine quantization: each group of 64 neighbouring weights has a scale and an offset. A quantized linear layer or
embedding holds three arrays where the plain one holds `weight`: the packed `weight`, `scales` and `biases`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mflux.backend import mx, nn
from mflux.errors import CheckpointError, UsageError

log = logging.getLogger(__name__)

BITS = (3, 4, 5, 6, 8)
_GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Quantization:
    """How many bits a weight has, and how many weights share a scale."""

    bits: int
    group_size: int = 64

    @staticmethod
    def asked(bits: int | None) -> Quantization | None:
        """From what a person asks for.

        Raises:
            UsageError: MLX has no such number of bits.
        """
        if bits is not None and bits not in BITS:
            raise UsageError(f"cannot quantize to {bits} bits: there are {', '.join(map(str, BITS))}")
        return None if bits is None else Quantization(bits)

    @staticmethod
    def stored(config: Mapping[str, Any], source: object) -> Quantization | None:
        """From the `quantization` entry of a component's `config.json`, None where there is none.

        Raises:
            CheckpointError: the entry makes no sense.
        """
        entry = config.get("quantization")
        if entry is None:
            return None
        try:
            found = Quantization(int(entry["bits"]), int(entry["group_size"]))
        except (TypeError, KeyError, ValueError):
            found = None
        if found is None or found.bits not in (2, *BITS) or found.group_size not in _GROUP_SIZES:
            raise CheckpointError(f"{source}: its quantization {entry!r} makes no sense; fetch it again")
        return found


def quantizable(module: nn.Module, group_size: int) -> tuple[list[str], list[str]]:
    """The paths of the layers that can be quantized, and of those whose rows do not divide into groups."""
    fitting, odd = [], []
    for path, layer in module.named_modules():
        if isinstance(layer, (nn.Linear, nn.Embedding)):
            (odd if layer.weight.shape[-1] % group_size else fitting).append(path)
    return fitting, odd


def make_room(module: nn.Module, quantization: Quantization, paths: list[str]) -> None:
    """Exchange these layers for quantized ones. Nothing is computed: their arrays are still to be filled."""
    chosen = set(paths)
    nn.quantize(
        module,
        group_size=quantization.group_size,
        bits=quantization.bits,
        class_predicate=lambda path, _: path in chosen,
    )


def pack(weight: mx.array, quantization: Quantization) -> dict[str, mx.array]:
    """A matrix as `weight`, `scales` and `biases`; the last two in the matrix's own dtype, as they would be saved."""
    packed, scales, biases = mx.quantize(weight, group_size=quantization.group_size, bits=quantization.bits)
    return {"weight": packed, "scales": scales, "biases": biases}
