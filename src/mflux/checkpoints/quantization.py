"""Weights in 3 to 8 bits: which layers, and how they get there without the full-precision model ever in memory.

MLX's affine quantization: each group of 64 neighbouring weights has a scale and an offset. A quantized linear layer or
embedding holds three arrays where the plain one holds `weight`: the packed `weight`, `scales` and `biases`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mflux import chips, cpu, fused
from mflux.backend import mx, nn, tree_unflatten
from mflux.errors import CheckpointError, UsageError
from mflux.text import shown, written

BITS = (3, 4, 5, 6, 8)
_GROUP_SIZES = (32, 64, 128)
# Rows of a product from which on cutting a packed matrix costs less than writing its input together. By bytes: FLUX.1's
# 3,072 x 15,360 at 4 bits are 27 MB to copy, 512 rows of its input 16 MB to write.
_ROWS_WORTH_A_CUT = 1024


@dataclass(frozen=True)
class Quantization:
    """How many bits a weight has, how many weights share a scale, and in which of MLX's forms: "affine" is a scale and
    an offset, the others are small floating-point numbers, whose scale is one byte."""

    bits: int
    group_size: int = 64
    mode: str = "affine"

    @property
    def is_known(self) -> bool:
        """Whether MLX has it."""
        if self.mode != "affine":
            return self in FLOATS
        return self.bits in (2, *BITS) and self.group_size in _GROUP_SIZES

    @staticmethod
    def asked(bits: int | None) -> Quantization | None:
        """From what a person asks for.

        Raises:
            UsageError: MLX has no such number of bits.
        """
        if bits is not None and bits not in BITS:
            known = ", ".join(map(str, BITS))
            raise UsageError(f"cannot quantize to {shown(written(bits), 40)} bits: there are {known}")
        return None if bits is None else Quantization(bits)

    @staticmethod
    def is_mixed(config: Mapping[str, Any]) -> bool:
        """Whether that entry tells only what most layers are quantized to."""
        entry = config.get("quantization")
        return isinstance(entry, Mapping) and entry.get("mixed") is True

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
            found = Quantization(int(entry["bits"]), int(entry["group_size"]), entry.get("mode", "affine"))
        except (TypeError, KeyError, ValueError, OverflowError):
            found = None
        if found is None or not found.is_known:
            raise CheckpointError(
                f"{source}: its quantization {shown(repr(entry), 100)} makes no sense; fetch it again"
            )
        return found


# MLX's floating-point forms. Nothing is quantized to them here: they are what some files hold.
FLOATS = (Quantization(8, 32, "mxfp8"), Quantization(4, 32, "mxfp4"), Quantization(4, 16, "nvfp4"))


class QuantizedLinear(nn.QuantizedLinear):
    """MLX's, with its product by `mflux.cpu` on a CPU, where MLX's own takes a hundred times as long as a dense one;
    and by MLX with unpacked weights where `chips.UNPACKED` says so."""

    def __call__(self, x: mx.array) -> mx.array:
        if self._is_unpacked_for(x):
            return product_by_columns([x], self._unpacked(x.dtype), self.get("bias"))
        if not cpu.quantized_serves(x, self.weight, self.bits, self.mode):
            # Scales may have more digits than x, and MLX's result has theirs.
            return super().__call__(x).astype(x.dtype)
        y = cpu.quantized_product(x, self.weight, self.scales, self.biases, self.group_size, self.bits, self.mode)
        return y + self.bias if "bias" in self else y

    def _is_unpacked_for(self, x: mx.array) -> bool:
        return x.size >= chips.UNPACKED.rows * x.shape[-1] and chips.UNPACKED.applies and self.biases is not None

    def _unpacked(self, dtype: mx.Dtype) -> mx.array:
        return mx.dequantize(
            self.weight, self.scales, self.biases, group_size=self.group_size, bits=self.bits, mode=self.mode
        ).astype(dtype)

    def takes_parts(self, *parts: mx.array) -> bool:
        """Whether its columns can be cut where these parts of its input, (…, n) each, meet, and there are rows enough
        for that to be worth a copy of them."""
        rows = parts[0].size // parts[0].shape[-1]
        return rows >= _ROWS_WORTH_A_CUT and all(
            part.shape[-1] % self.group_size == 0 and part.shape[-1] * self.bits % 32 == 0 for part in parts
        )

    def of_parts(self, *parts: mx.array) -> mx.array:
        """The product with parts that stand beside each other in its input, each with its own columns, on a GPU."""
        if self._is_unpacked_for(parts[0]):
            return product_by_columns(parts, self._unpacked(parts[0].dtype), self.get("bias"))
        products, start = [], 0
        for part in parts:
            end = start + part.shape[-1]
            groups = slice(start // self.group_size, end // self.group_size)
            products.append(
                mx.quantized_matmul(
                    part,
                    self.weight[:, start * self.bits // 32 : end * self.bits // 32],
                    scales=self.scales[:, groups],
                    biases=None if self.biases is None else self.biases[:, groups],
                    transpose=True, group_size=self.group_size, bits=self.bits, mode=self.mode,
                )
            )  # fmt: skip
            start = end
        first, *others = products
        # As many as there are, in one kernel.
        total = fused.summed(first, *others, *([self.bias] if "bias" in self else []))
        return total.astype(parts[0].dtype)


def product_by_columns(parts: Sequence[mx.array], weight: mx.array, bias: mx.array | None) -> mx.array:
    """A linear layer (out, in) of parts (…, n) that stand beside each other in its input, each with its own columns."""
    out, start = bias, 0
    for part in parts:
        columns = weight[:, start : start + part.shape[-1]].T
        out = part @ columns if out is None else mx.addmm(out, part, columns)
        start += part.shape[-1]
    assert out is not None
    return out


class QuantizedEmbedding(nn.QuantizedEmbedding):
    """MLX's, which unpacks the rows that are asked for; as a linear layer it is a `QuantizedLinear`."""

    def as_linear(self, x: mx.array) -> mx.array:
        if not cpu.quantized_serves(x, self.weight, self.bits, self.mode):
            return super().as_linear(x).astype(x.dtype)
        return cpu.quantized_product(x, self.weight, self.scales, self.biases, self.group_size, self.bits, self.mode)


def layers(module: nn.Module) -> dict[str, nn.Module]:
    """The layers of a module that MLX can quantize, by their paths."""
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, (nn.Linear, nn.Embedding))}


# No layer has so many: it stays as it is.
UNQUANTIZED = 16


def raised(path: str, quantization: Quantization, least_bits: Mapping[str, int]) -> Quantization | None:
    """What a layer is quantized to where that is asked for: a class may have layers that bear no fewer bits than some.

    Args:
        path: of the layer.
        least_bits: a pattern of paths → the bits, or `UNQUANTIZED`.

    Returns:
        None if it stays as it is.
    """
    bits = max((bits for pattern, bits in least_bits.items() if re.search(pattern, path)), default=0)
    if bits >= UNQUANTIZED:
        return None
    return replace(quantization, bits=max(bits, quantization.bits))


def planned(module: nn.Module, quantization: Quantization) -> dict[str, Quantization]:
    """The layers of a module that are quantized, by path, and to what: `least_bits` of its class may raise it.

    What is read late is left out: it is not in memory, and its file would have to be packed anew each time.
    """
    least_bits = getattr(module, "least_bits", {})
    plan = {
        path: raised(path, quantization, least_bits)
        for path, layer in layers(module).items()
        if divides(layer.weight.shape[-1], quantization.group_size) and not getattr(layer, "read_late", False)
    }
    return {path: found for path, found in plan.items() if found is not None}


def divides(width: int, group_size: int) -> bool:
    """Whether rows of this width fall into whole groups; MLX quantizes no others."""
    return width > 0 and width % group_size == 0


def inferred(
    width: int, packed: tuple[int, ...], scales: tuple[int, ...], *, floats: bool = False
) -> Quantization | None:
    """What a stored layer was quantized to, from its shapes; None where they make no sense.

    Args:
        width: weights in a row before it was packed.
        packed: the shape of the packed weight, (rows, width · bits / 32).
        scales: the shape of the scales, (rows, width / group size).
        floats: whether it is one of `FLOATS`, whose scales are bytes.
    """
    if len(packed) != 2 or len(scales) != 2 or packed[0] != scales[0] or not scales[1] or width % scales[1]:
        return None
    bits, rest = divmod(32 * packed[1], width)
    group_size = width // scales[1]
    if floats:
        known = (form for form in FLOATS if (form.bits, form.group_size) == (bits, group_size))
        return None if rest else next(known, None)
    found = Quantization(bits, group_size)
    return None if rest or not found.is_known else found


def make_room(module: nn.Module, plan: Mapping[str, Quantization]) -> None:
    """Exchange the layers at these paths for quantized ones. Nothing is computed: their arrays are still to be filled.

    Args:
        plan: for each path, what the layer is quantized to.
    """
    found = layers(module)
    packed = {
        path: (
            QuantizedLinear.from_linear(found[path], *_as_mlx_has_it(quantization))
            if isinstance(found[path], nn.Linear)
            else QuantizedEmbedding.from_embedding(found[path], *_as_mlx_has_it(quantization))
        )
        for path, quantization in plan.items()
    }
    if packed:
        module.update_modules(tree_unflatten(list(packed.items())))


def _as_mlx_has_it(quantization: Quantization) -> tuple[int, int, str]:
    return quantization.group_size, quantization.bits, quantization.mode


def pack(weight: mx.array, quantization: Quantization) -> dict[str, mx.array]:
    """A matrix as `weight`, `scales` and `biases`; the last two in the matrix's own dtype, as they would be saved."""
    packed, scales, biases = mx.quantize(weight, group_size=quantization.group_size, bits=quantization.bits)
    return {"weight": packed, "scales": scales, "biases": biases}


def packed_specs(
    dtype: mx.Dtype, shape: tuple[int, ...], quantization: Quantization
) -> dict[str, tuple[mx.Dtype, tuple[int, ...]]]:
    """The dtypes and shapes of what `pack` makes of a matrix, without the matrix."""
    rows, width = shape
    groups = dtype, (rows, width // quantization.group_size)
    return {"weight": (mx.uint32, (rows, width * quantization.bits // 32)), "scales": groups, "biases": groups}
