"""GGUF files, written by the format's description: for tests of what reads them."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mflux.checkpoints.readers.gguf import KINDS

NUMBERS = {name: number for number, (name, _, _) in KINDS.items()}
_CODES = {"u32": (4, "I"), "i32": (5, "i"), "f32": (6, "f"), "u16": (2, "H"), "u64": (10, "Q")}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(key: str, value: Any) -> bytes:
    """A metadata entry: a text, a (kind, number), or a list of one kind as (kind, numbers)."""
    if isinstance(value, str):
        return text(key) + struct.pack("<I", 8) + text(value)
    kind, content = value
    number, code = _CODES[kind]
    if isinstance(content, list):
        return text(key) + struct.pack(f"<IIQ{len(content)}{code}", 9, number, len(content), *content)
    return text(key) + struct.pack(f"<I{code}", number, content)


def write_gguf(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]],
    metadata: Mapping[str, Any] | None = None,
    *,
    version: int = 3,
    alignment: int = 32,
) -> Path:
    """Write tensors, each a kind, a shape as numpy has it, and its bytes."""
    entries = dict(metadata or {})
    if alignment != 32:
        entries["general.alignment"] = ("u32", alignment)
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(entries))
    head += b"".join(entry(key, value) for key, value in entries.items())
    offset, data = 0, b""
    for name, (kind, shape, content) in tensors.items():
        head += text(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", NUMBERS[kind], offset)
        padded = content + bytes(-len(content) % alignment)
        data, offset = data + padded, offset + len(padded)
    head += bytes(-len(head) % alignment)
    path.write_bytes(head + data)
    return path


def f32(values: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    return "F32", values.shape, np.ascontiguousarray(values, np.float32).tobytes()


def q8_0(values: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    """Rounded to the nearest of 255 numbers a group of 32."""
    groups = np.ascontiguousarray(values, np.float32).reshape(-1, 32)
    scale = (np.abs(groups).max(axis=1, keepdims=True) / 127).astype(np.float16)
    safe = np.where(scale == 0, 1, scale).astype(np.float32)
    q = np.clip(np.rint(groups / safe), -127, 127).astype(np.int8)
    return "Q8_0", values.shape, b"".join(s.tobytes() + row.tobytes() for s, row in zip(scale, q, strict=True))


# Where a block has float16 scales.
_HALVES = {
    "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2),
    "Q3_K": (108,), "IQ4_NL": (0,), "IQ4_XS": (0,), "TQ2_0": (64,), "Q2_K": (80, 82), "Q6_K": (208,), "IQ2_XXS": (0,),
    "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ1_S": (0,), "TQ1_0": (52,),
}  # fmt: skip


def random_blocks(kind: str, shape: tuple[int, ...], seed: int = 0) -> tuple[str, tuple[int, ...], bytes]:
    """Blocks of random bytes with scales of a sane size: every such block is a valid one."""
    rng = np.random.default_rng(seed)
    _, size, width = KINDS[NUMBERS[kind]]
    count = int(np.prod(shape)) // size
    blocks = rng.integers(0, 256, (count, width), np.uint8)
    for at in _HALVES.get(kind, ()):
        blocks[:, at : at + 2] = (rng.standard_normal(count) * 0.05).astype(np.float16)[:, None].view(np.uint8)
    if kind == "MXFP4":
        blocks[:, 0] = rng.integers(110, 130, count)
    elif kind == "NVFP4":
        blocks[:, :4] = rng.integers(1, 0x7E, (count, 4))
    return kind, shape, blocks.tobytes()
