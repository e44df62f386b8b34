"""T5's unigram model out of sentencepiece's own file, as `tokenizer.json` has it, without the package of that name.

The file (Google 2018, https://arxiv.org/abs/1808.06226) is a protocol buffer, of which two parts are read: the pieces
with their scores, and the map by which characters are made alike.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mflux.checkpoints.readers.plain import open_file
from mflux.errors import CheckpointError

# T5's has 0.8 MB.
_LARGEST = 32 << 20
# Tokens for gaps in a text, which come after the pieces; the model's own configuration says how many.
GAPS = 100
_PIECES, _NORMALIZER = 1, 3
_TEXT, _SCORE, _MAP = 1, 2, 2
_UNKNOWN = "<unk>"


def t5_content(path: Path) -> dict[str, Any]:
    """What `tokenizer.json` would say of a `spiece.model`.

    Raises:
        CheckpointError: it is missing, damaged, or no such model.
    """
    with open_file(path) as file:
        data = file.read(_LARGEST + 1)
    try:
        if len(data) > _LARGEST:
            raise ValueError("length")
        pieces, characters = _read(data)
        vocabulary = [[piece, score] for piece, score in pieces]
        unknown = [piece for piece, _ in pieces].index(_UNKNOWN)
    except (ValueError, IndexError, struct.error, UnicodeDecodeError):
        raise CheckpointError(
            f"{path} is damaged: it is no sentencepiece model with {_UNKNOWN}; fetch it again"
        ) from None
    vocabulary += [[f"<extra_id_{number}>", 0.0] for number in reversed(range(GAPS))]
    normalizer = None
    if characters:
        normalizer = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(characters).decode()}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
        "model": {"type": "Unigram", "unk_id": unknown, "vocab": vocabulary, "byte_fallback": False},
    }


def _read(data: bytes) -> tuple[list[tuple[str, float]], bytes]:
    pieces: list[tuple[str, float]] = []
    characters = b""
    for field, value in _fields(data):
        if field == _PIECES and isinstance(value, bytes):
            parts = dict(_fields(value))
            text, score = parts[_TEXT], parts.get(_SCORE, b"\0\0\0\0")
            if not isinstance(text, bytes) or not isinstance(score, bytes):
                raise ValueError("piece")
            # What has no meaning of its own, and is not looked for in a text, scores nothing.
            pieces.append((text.decode(), struct.unpack("<f", score)[0] if len(pieces) > 2 else 0.0))
        elif field == _NORMALIZER and isinstance(value, bytes):
            found = dict(_fields(value)).get(_MAP, b"")
            characters = found if isinstance(found, bytes) else b""
    return pieces, characters


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """The numbered fields of a message: whole numbers as they are, all else as bytes."""
    at = 0
    while at < len(data):
        key, at = _number(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _number(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            length, at = _number(data, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError("kind")
        if at + length > len(data):
            raise ValueError("length")
        yield key >> 3, data[at : at + length]
        at += length


def _number(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("number")
