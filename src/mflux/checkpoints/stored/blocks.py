"""ggml's kinds of blocks: what their bytes mean, and which of MLX's forms hold the same numbers.

A block is some numbers that share a scale. Where these are the form scale · q + bias of MLX's affine quantization, or
one of its floating-point forms, the numbers are only put in another order; all else becomes float32. Source: ggml's
`ggml-common.h` and `ggml-quants.c` for the layouts; the tests compare with the package `gguf`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mflux.checkpoints.quantization import Quantization


@dataclass(frozen=True)
class Groups:
    """Numbers as MLX's affine form has them: scale · q + bias.

    Attributes:
        q: (groups, numbers in each) uint8.
        scales, biases: (groups,) float16 or float32.
    """

    q: np.ndarray
    scales: np.ndarray
    biases: np.ndarray

    def dense(self) -> np.ndarray:
        scales, biases = self.scales.astype(np.float32), self.biases.astype(np.float32)
        return self.q * scales[:, None] + biases[:, None]


@dataclass(frozen=True)
class Form:
    """How a kind reads.

    Attributes:
        held: what holds the same numbers, None if nothing of MLX's does.
        groups: blocks (n, bytes) → groups; None where `held` is no affine form, or nothing.
        dense: blocks → numbers (n, numbers of a block) float32; None where `groups` gives them.
        codes: blocks → the bytes of a floating-point form: packed numbers, and scales, both (n, …) uint8.
    """

    held: Quantization | None
    groups: Callable[[np.ndarray], Groups] | None = None
    dense: Callable[[np.ndarray], np.ndarray] | None = None
    codes: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None

    def numbers(self, blocks: np.ndarray) -> np.ndarray:
        """Blocks (n, bytes) as float32 (n, numbers of a block)."""
        if self.dense is not None:
            return self.dense(blocks)
        assert self.groups is not None
        return self.groups(blocks).dense().reshape(len(blocks), -1)


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """(n,) float16, from two bytes of each block."""
    return blocks[:, at : at + 2].copy().view("<f2")[:, 0]


def _nibbles(numbers: np.ndarray) -> np.ndarray:
    """(…, bytes) → (…, 2 · bytes): the low halves, then the high ones."""
    return np.concatenate([numbers & 15, numbers >> 4], axis=-1)


# ---- blocks of 32


def _q8_0(blocks: np.ndarray) -> Groups:
    d = _half(blocks, 0)
    return Groups(blocks[:, 2:] ^ 0x80, d, d * np.float16(-128))


def _q4_0(blocks: np.ndarray) -> Groups:
    d = _half(blocks, 0)
    return Groups(_nibbles(blocks[:, 2:]), d, d * np.float16(-8))


def _q4_1(blocks: np.ndarray) -> Groups:
    return Groups(_nibbles(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2))


def _fifth_bits(blocks: np.ndarray, at: int) -> np.ndarray:
    return np.unpackbits(blocks[:, at : at + 4], axis=-1, bitorder="little") << 4


def _q5_0(blocks: np.ndarray) -> Groups:
    d = _half(blocks, 0)
    return Groups(_nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2), d, d * np.float16(-16))


def _q5_1(blocks: np.ndarray) -> Groups:
    return Groups(_nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4), _half(blocks, 0), _half(blocks, 2))


# The sixteen values of IQ4's codes.
_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int16)
_IQ4_AS_BYTES = (_IQ4 + 128).astype(np.uint8)


def _iq4_nl(blocks: np.ndarray) -> Groups:
    d = _half(blocks, 0)
    return Groups(_IQ4_AS_BYTES[_nibbles(blocks[:, 2:])], d, d * np.float16(-128))


# ---- blocks of 256


def _scales_and_mins(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Twelve bytes of each block as eight scales and eight minima of six bits."""
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6) << 4], axis=1)
    mins = np.concatenate([second & 63, (third >> 4) | (second >> 6) << 4], axis=1)
    return scales, mins


def _with_mins(blocks: np.ndarray, q: np.ndarray) -> Groups:
    scales, mins = _scales_and_mins(blocks[:, 4:16])
    d, least = (_half(blocks, at).astype(np.float32)[:, None] for at in (0, 2))
    return Groups(q.reshape(-1, 32), (d * scales).ravel(), -(least * mins).ravel())


def _q4_k(blocks: np.ndarray) -> Groups:
    return _with_mins(blocks, _nibbles(blocks[:, 16:].reshape(len(blocks), 4, 32)))


def _q5_k(blocks: np.ndarray) -> Groups:
    high = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[None, :, None]) & 1
    low = _nibbles(blocks[:, 48:].reshape(len(blocks), 4, 32)).reshape(len(blocks), 8, 32)
    return _with_mins(blocks, low | high << 4)


def _crumbs(numbers: np.ndarray) -> np.ndarray:
    """Two halves of 32 bytes, four numbers of two bits in each byte → (n, 8, 32), in the order of the numbers."""
    parts = numbers.reshape(len(numbers), 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]
    return (parts & 3).reshape(len(numbers), 8, 32)


def _q3_k(blocks: np.ndarray) -> Groups:
    high = (blocks[:, None, :32] >> np.arange(8, dtype=np.uint8)[None, :, None]) & 1
    q = _crumbs(blocks[:, 32:96]).astype(np.int16) - 4 + 4 * high.astype(np.int16)
    low, top = blocks[:, 96:104], blocks[:, 104:108]
    scales = np.concatenate([low & 15, low >> 4], axis=1).reshape(len(blocks), 4, 4)
    scales = scales | ((top[:, None] >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3) << 4
    scales = scales.reshape(len(blocks), 16).astype(np.int16) - 32
    # A scale for each sixteen numbers, -32 to 31, times -4 to 3: what is left is one factor for the whole block.
    values = q.reshape(len(blocks), 16, 16) * scales[:, :, None]
    d = np.repeat(_half(blocks, 108), 8)
    return Groups((128 - values).astype(np.uint8).reshape(-1, 32), -d, d * np.float16(128))


def _iq4_xs(blocks: np.ndarray) -> Groups:
    high = blocks[:, 2:4].copy().view("<u2").astype(np.int32)
    places = np.arange(8)
    low = np.repeat(blocks[:, 4:8], 2, axis=1) >> (4 * (places % 2)).astype(np.uint8) & 15
    scales = (low | (high >> 2 * places & 3) << 4) - 32
    d = _half(blocks, 0).astype(np.float32)[:, None] * scales.astype(np.float32)
    q = _IQ4_AS_BYTES[_nibbles(blocks[:, 8:].reshape(len(blocks), 8, 16))]
    return Groups(q.reshape(-1, 32), d.ravel(), -128 * d.ravel())


def _tq2_0(blocks: np.ndarray) -> Groups:
    d = np.repeat(_half(blocks, 64), 2)
    return Groups(_crumbs(blocks[:, :64]).reshape(-1, 128), d, -d)


def _q2_k(blocks: np.ndarray) -> np.ndarray:
    scales, mins = blocks[:, :16] & 15, blocks[:, :16] >> 4
    d, least = (_half(blocks, at).astype(np.float32)[:, None] for at in (80, 82))
    q = _crumbs(blocks[:, 16:80]).reshape(len(blocks), 16, 16)
    return (q * (d * scales)[:, :, None] - (least * mins)[:, :, None]).reshape(len(blocks), 256)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    low = _nibbles(blocks[:, :128].reshape(len(blocks), 2, 64)).reshape(len(blocks), 8, 32)
    q = (low | _crumbs(blocks[:, 128:192]) << 4).astype(np.int8) - 32
    scales = blocks[:, 192:208].view(np.int8)
    d = _half(blocks, 208).astype(np.float32)[:, None] * scales
    return (q.reshape(len(blocks), 16, 16) * d[:, :, None]).reshape(len(blocks), 256)


# ---- floating-point codes

# What four bits mean: a sign, two of exponent, one of mantissa.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def _in_order(codes: np.ndarray) -> np.ndarray:
    """Codes of four bits (…, count), two in a byte, the first in the low half."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def _mxfp4(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return _in_order(_nibbles(blocks[:, 1:])), blocks[:, :1]


def _mxfp4_dense(blocks: np.ndarray) -> np.ndarray:
    return E2M1[_nibbles(blocks[:, 1:])] * np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 127)


def _nvfp4(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    codes = _nibbles(blocks[:, 4:].reshape(len(blocks), 4, 8))
    return _in_order(codes).reshape(len(blocks), 32), blocks[:, :4]


def _nvfp4_dense(blocks: np.ndarray) -> np.ndarray:
    from mflux.checkpoints.readers.safetensors import float8_values

    codes = _nibbles(blocks[:, 4:].reshape(len(blocks), 4, 8))
    scales = float8_values("F8_E4M3")[blocks[:, :4]]
    return (E2M1[codes] * scales[:, :, None]).reshape(len(blocks), 64)


def _affine(bits: int, groups: Callable[[np.ndarray], Groups], size: int = 32) -> Form:
    return Form(Quantization(bits, size), groups)


FORMS = {
    "Q8_0": _affine(8, _q8_0),
    "Q4_0": _affine(4, _q4_0),
    "Q4_1": _affine(4, _q4_1),
    "Q5_0": _affine(5, _q5_0),
    "Q5_1": _affine(5, _q5_1),
    "Q4_K": _affine(4, _q4_k),
    "Q5_K": _affine(5, _q5_k),
    "Q3_K": _affine(8, _q3_k),
    "IQ4_NL": _affine(8, _iq4_nl),
    "IQ4_XS": _affine(8, _iq4_xs),
    "TQ2_0": _affine(2, _tq2_0, 128),
    "MXFP4": Form(Quantization(4, 32, "mxfp4"), dense=_mxfp4_dense, codes=_mxfp4),
    "NVFP4": Form(Quantization(4, 16, "nvfp4"), dense=_nvfp4_dense, codes=_nvfp4),
    "Q2_K": Form(None, dense=_q2_k),
    "Q6_K": Form(None, dense=_q6_k),
}


def packed_numbers(q: np.ndarray, bits: int) -> np.ndarray:
    """Numbers (rows, width) uint8 as MLX packs them, (rows, width · bits / 32) uint32: the first in the lowest bits."""
    rows = len(q)
    if bits == 8:
        out = np.ascontiguousarray(q)
    elif bits in (2, 4):
        out = q[:, 0 :: 8 // bits].copy()
        for place in range(1, 8 // bits):
            out |= q[:, place :: 8 // bits] << place * bits
    else:
        # Eight numbers are `bits` bytes.
        eights = q.reshape(rows, -1, 8).astype(np.uint64)
        whole = eights[..., 0]
        for place in range(1, 8):
            whole |= eights[..., place] << np.uint64(place * bits)
        out = np.ascontiguousarray(whole.astype("<u8").view(np.uint8).reshape(rows, -1, 8)[..., :bits]).reshape(
            rows, -1
        )
    return out.view("<u4")
