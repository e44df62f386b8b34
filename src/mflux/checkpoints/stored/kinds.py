"""Which of a file's tensors are stored in a way of their own, told by names and dtypes.

float8 with and without scales, as ComfyUI and others write it; int8 with a scale a matrix, a row or a block;
bitsandbytes' four bits (NF4, FP4; Dettmers et al. 2023, https://arxiv.org/abs/2305.14314) and eight. What is known and
not read is refused by its own name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import numpy as np

from mflux.backend import mx
from mflux.checkpoints.quantization import Quantization
from mflux.checkpoints.readers.safetensors import SafetensorsFile, float8_values
from mflux.checkpoints.stored.tensors import Stored
from mflux.errors import CheckpointError
from mflux.text import shown
from mflux.utils.strict_json import NotJSON, parse

_FLOAT8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
# Scales of activations, and what says nothing that is needed.
_UNUSED = re.compile(r"(^|\.)(scale_input|input_scale|scaled_fp8|weight_format)$")
# Names of tensors that other programs' packed weights have, and what these are called.
_OTHERS = {
    r"\.(qweight|qzeros|g_idx)$": "GPTQ or AWQ",
    r"\.(wscales|smooth_factor(_orig)?|proj_down|proj_up)$": "SVDQuant (Nunchaku)",
    r"\.(weight_scale_2|weight_global_scale)$": "NVFP4 in a layout for tensor cores",
}
# ComfyUI's formats that are read; all others are refused by name.
_FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "int8_blockwise")
_LARGEST_NOTE = 1 << 16


class Float8(Stored):
    """float8, times a scale for the matrix, for each row, or for each square block; or without one."""

    bits = 8

    def __init__(self, dtype: str, shape: tuple[int, ...], read: Callable[[], np.ndarray], scale: np.ndarray | None):
        self.shape, self._read, self._scale = shape, read, scale
        self.kind = _FLOAT8[dtype] if scale is None else f"{_FLOAT8[dtype]} with scales"
        self._values = float8_values(dtype)
        # Numbers that are not finite are none that `mxfp8` has.
        if scale is None and dtype == "F8_E4M3":
            self.held = Quantization(8, 32, "mxfp8")
        self.block = shape[-1] if shape else 1

    def read(self) -> np.ndarray:
        return self._read().reshape(-1, self.block)

    def numbers(self, data: np.ndarray, start: int, stop: int) -> np.ndarray:
        found = self._values[data[start:stop]]
        if self._scale is not None:
            found *= _rows_of(self._scale, self.shape, start, stop)
        return found.reshape(-1)

    def codes(self, data: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, ...]:
        # A scale of 1.
        return data[start:stop], np.full((stop - start, self.block // 32), 127, np.uint8)


class Int8(Stored):
    """int8 times a scale: MLX's affine form, whose numbers start at zero, with the scale of each group written out."""

    bits = 8

    def __init__(self, kind: str, shape: tuple[int, ...], read: Callable[[], np.ndarray], scale: np.ndarray):
        self.kind, self.shape, self._read, self._scale = kind, shape, read, scale
        self.block = shape[-1]
        # Groups of 128 do not reach over the border of a block of 128.
        self.held = next((Quantization(8, size) for size in (128, 64, 32) if self.block % size == 0), None)

    def read(self) -> np.ndarray:
        return self._read().view(np.int8).reshape(-1, self.block)

    def numbers(self, data: np.ndarray, start: int, stop: int) -> np.ndarray:
        return (data[start:stop] * _rows_of(self._scale, self.shape, start, stop)).reshape(-1)

    def codes(self, data: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, ...]:
        assert self.held is not None
        scales = np.broadcast_to(_rows_of(self._scale, self.shape, start, stop), data[start:stop].shape)
        scales = np.ascontiguousarray(scales[:, :: self.held.group_size])
        return data[start:stop].view(np.uint8) ^ 0x80, scales, -128 * scales


def _rows_of(scale: np.ndarray, shape: tuple[int, ...], start: int, stop: int) -> np.ndarray:
    """The scales of rows: one for all, one a row, or one for each square of 128."""
    if scale.size == 1:
        return scale.reshape(1, 1)
    if scale.size == prod(shape[:-1]):
        return scale.reshape(-1, 1)[start:stop]
    rows = scale[np.arange(start, stop) // 128]
    return np.repeat(rows, 128, axis=1)[:, : shape[-1]]


class FourBits(Stored):
    """bitsandbytes: sixteen values, two numbers in a byte, the first in its high half, and a factor for each block.

    Blocks run over the whole matrix, across its rows.
    """

    def __init__(
        self,
        kind: str,
        shape: tuple[int, ...],
        read: Callable[[], np.ndarray],
        values: np.ndarray,
        factors: Callable[[], np.ndarray],
        block: int,
    ):
        self.kind, self.shape, self._read, self._values, self._factors = kind, shape, read, values, factors
        self.block = block
        self.bits = 4 + 32 / block

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        return self._read().reshape(-1, self.block // 2), self._factors()

    def numbers(self, data: tuple[np.ndarray, np.ndarray], start: int, stop: int) -> np.ndarray:
        codes, factors = data[0][start:stop], data[1][start:stop, None]
        return (self._values[np.stack([codes >> 4, codes & 15], -1)].reshape(len(codes), -1) * factors).reshape(-1)


class _Files:
    """The tensors of safetensors files, looked at by name, and which of them belong to others."""

    def __init__(self, files: Mapping[str, SafetensorsFile], source: object):
        self.files, self.source = files, source
        self.used: set[str] = set()

    def dtype(self, name: str) -> str:
        return self.files[name].infos[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self.files[name].infos[name].shape

    def bytes_of(self, name: str) -> np.ndarray:
        return self.files[name].read(name)

    def small(self, name: str) -> np.ndarray | None:
        """A tensor of scales as float32, noted as used; None if there is none."""
        if name not in self.files:
            return None
        self.used.add(name)
        value = self.files[name][name]
        return np.array(value.astype(mx.float32))

    def json(self, name: str) -> dict[str, Any]:
        """A tensor that is JSON text."""
        self.used.add(name)
        if self.dtype(name) not in ("U8", "I8") or prod(self.shape(name)) > _LARGEST_NOTE:
            raise self.damaged(name, "is no note in JSON")
        try:
            found = parse(self.bytes_of(name).tobytes())
        except NotJSON as error:
            raise self.damaged(name, str(error)) from None
        if not isinstance(found, dict):
            raise self.damaged(name, "is no table")
        return found

    def damaged(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.source} is damaged: {shown(name)} {what}; fetch it again")


def told_apart(files: Mapping[str, SafetensorsFile], source: object) -> tuple[dict[str, Stored], set[str]]:
    """The tensors that are stored in a way of their own, and the names of those that only belong to them.

    Args:
        files: tensor → the file that holds it.
        source: for messages.

    Raises:
        CheckpointError: the file is packed in a way that is not read, or its scales do not fit.
    """
    every = _Files(files, source)
    for pattern, title in _OTHERS.items():
        if name := next((name for name in files if re.search(pattern, name)), None):
            raise CheckpointError(
                f"{source} is quantized by {title} ({shown(name)}), which mflux does not read: take a version in "
                "bfloat16, fp8 or GGUF"
            )
    stored: dict[str, Stored] = {}
    formats = _formats(every)
    scaled = _with_marker(every)
    for name in files:
        if _UNUSED.search(name):
            continue
        stem = name.removesuffix(".weight")
        dtype = every.dtype(name)
        if name.endswith(".weight") and f"{name}.absmax" in files:
            stored[name] = _four_bits(every, name)
        elif name.endswith(".weight") and dtype == "I8" and f"{stem}.SCB" in files:
            stored[name] = _int8(every, name, "int8 (bitsandbytes)", f"{stem}.SCB", 1 / 127)
        elif (
            dtype in _FLOAT8
            or (formats.get(stem, "").startswith("float8") and dtype in ("U8", "I8"))
            or (dtype == "U8" and f"{stem}.weight_scale" in files)  # mflux 0.24, which reads float8 as bytes
        ):
            stored[name] = _float8(every, name, formats.get(stem), scaled)
        elif formats.get(stem, "").startswith("int8") and name.endswith(".weight"):
            stored[name] = _int8(every, name, formats[stem], f"{stem}.weight_scale", 1)
    beside = every.used | ({name for name in files if _UNUSED.search(name)} if stored else set())
    return stored, beside


def _formats(every: _Files) -> dict[str, str]:
    """Layer → ComfyUI's name of how it is packed.

    Raises:
        CheckpointError: it is one that is not read.
    """
    notes: dict[str, Any] = {
        name.removesuffix(".comfy_quant"): every.json(name) for name in every.files if name.endswith(".comfy_quant")
    }
    for file in {id(file): file for file in every.files.values()}.values():
        if "_quantization_metadata" in file.metadata:
            try:
                layers = parse(file.metadata["_quantization_metadata"].encode()).get("layers")
            except (NotJSON, AttributeError):
                layers = None
            if not isinstance(layers, dict):
                raise CheckpointError(f"{every.source} is damaged: its _quantization_metadata makes no sense")
            # With the prefix of the names or without.
            stems = {name.removesuffix(".weight") for name in file if name.endswith(".weight")}
            for layer, note in layers.items():
                for stem in [layer] if layer in stems else [s for s in stems if s.endswith(f".{layer}")]:
                    notes.setdefault(stem, note)
    formats = {}
    for layer, note in notes.items():
        name = note.get("format") if isinstance(note, dict) else None
        if name not in _FORMATS or (isinstance(note, dict) and note.get("convrot")):
            rotated = " and rotated" if isinstance(note, dict) and note.get("convrot") else ""
            raise CheckpointError(
                f"{every.source}: {shown(layer)} is packed as {shown(name, 60)}{rotated}, which mflux does not read: "
                "take a version in bfloat16, fp8 or GGUF"
            )
        formats[layer] = name
    return formats


def _with_marker(every: _Files) -> tuple[str, ...]:
    """The prefixes below which ComfyUI's first form says that every float8 matrix has a scale."""
    return tuple(name.removesuffix("scaled_fp8") for name in every.files if re.search(r"(^|\.)scaled_fp8$", name))


def _float8(every: _Files, name: str, said: str | None, scaled: tuple[str, ...]) -> Float8:
    stem, shape = name.removesuffix(".weight"), every.shape(name)
    dtype = every.dtype(name)
    if dtype not in _FLOAT8:
        dtype = "F8_E5M2" if said == "float8_e5m2" else "F8_E4M3"
    scale = None
    if stem != name:
        for leaf in ("scale_weight", "weight_scale", "weight_scale_inv"):
            if (scale := every.small(f"{stem}.{leaf}")) is not None:
                break
        needs = said is not None or any(name.startswith(prefix) for prefix in scaled)
        if scale is None and needs and len(shape) == 2:
            raise CheckpointError(
                f"{every.source}: {shown(name)} is float8 that a scale belongs to, and there is none: fetch it again"
            )
        _check_scale(every, stem, shape, scale)
    return Float8(dtype, shape, lambda: every.bytes_of(name), scale)


def _int8(every: _Files, name: str, kind: str, scales: str, factor: float) -> Int8:
    stem, shape = name.removesuffix(".weight"), every.shape(name)
    scale = every.small(scales)
    if scale is None:
        raise CheckpointError(f"{every.source}: {shown(name)} is int8 without a scale: fetch it again")
    if every.dtype(name) != "I8" or len(shape) != 2:
        raise every.damaged(name, f"is {every.dtype(name)} of shape {list(shape)} where a matrix of int8 belongs")
    _check_scale(every, stem, shape, scale)
    return Int8(kind, shape, lambda: every.bytes_of(name), scale * np.float32(factor))


def _check_scale(every: _Files, stem: str, shape: tuple[int, ...], scale: np.ndarray | None) -> None:
    if scale is None or scale.size == 1 or (scale.size == prod(shape[:-1]) and len(shape) == 2):
        return
    if len(shape) == 2 and scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128)):
        return
    raise every.damaged(stem, f"of shape {list(shape)} has scales of shape {list(scale.shape)}")


def _four_bits(every: _Files, name: str) -> FourBits:
    state = next((key for key in every.files if key.startswith(f"{name}.quant_state.bitsandbytes__")), None)
    if state is None:
        raise every.damaged(name, "is packed by bitsandbytes, and what says how is missing")
    note = every.json(state)
    kind: Any = note.get("quant_type")
    block: Any = note.get("blocksize")
    shape: Any = note.get("shape")
    values = every.small(f"{name}.quant_map")
    sound = (
        kind in ("nf4", "fp4")
        and isinstance(block, int)
        and block in (32, 64, 128, 256, 512, 1024, 2048, 4096)
        and isinstance(shape, list)
        and all(isinstance(side, int) and 0 < side < 1 << 31 for side in shape)
        and values is not None
        and values.size == 16
        and prod(shape) % block == 0
        and prod(shape) == 2 * prod(every.shape(name))
        and every.dtype(name) in ("U8", "I8")
    )
    if not sound:
        raise every.damaged(name, f"is said to be packed as {shown(json.dumps(note), 120)}, which makes no sense")
    assert values is not None
    count, absmax = prod(shape) // block, f"{name}.absmax"
    every.used.add(absmax)
    if prod(every.shape(absmax)) != count:
        raise every.damaged(absmax, f"has {prod(every.shape(absmax)):,} factors for {count:,} blocks")
    if f"{name}.nested_absmax" not in every.files:
        return FourBits(
            kind.upper(), tuple(shape), lambda: every.bytes_of(name), values.ravel(),
            lambda: _floats(every, absmax), block,
        )  # fmt: skip
    nested, table = every.small(f"{name}.nested_absmax"), every.small(f"{name}.nested_quant_map")
    each, offset = note.get("nested_blocksize"), note.get("nested_offset")
    if (
        nested is None
        or table is None
        or table.size != 256
        or not isinstance(each, int)
        or not 0 < each <= 4096
        or not isinstance(offset, (int, float))
        or nested.size != -(-count // each)
        or every.dtype(absmax) not in ("U8", "I8")
    ):
        raise every.damaged(name, "is packed by bitsandbytes twice, and the second time makes no sense")
    outer, codes = nested.ravel(), table.ravel()

    def factors() -> np.ndarray:
        # As bitsandbytes adds them up: the offset last.
        found = codes[every.bytes_of(absmax).ravel()] * np.repeat(outer, each)[:count]
        return found + np.float32(offset)

    return FourBits(kind.upper(), tuple(shape), lambda: every.bytes_of(name), values.ravel(), factors, block)


def _floats(every: _Files, name: str) -> np.ndarray:
    return np.array(every.files[name][name].astype(mx.float32)).ravel()
