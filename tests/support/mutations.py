"""How sound files become unsound ones: bytes changed anywhere, and values exchanged inside what still parses."""

from __future__ import annotations

import copy
import json
import random
import struct
import zlib
from collections.abc import Iterator
from typing import Any

_TELLING = (b"\x00", b"\x01", b"\x7f", b"\x80", b"\xff", b"\xff\xff\xff\xff", b"\x00\x00\x00\x80", b"\xff" * 8)
# Of pickle's machine.
_INSTRUCTIONS = b"(.012FGIJKLMNPQRSTUVX]abcdeghijlopqrst}u" + bytes(range(0x80, 0x99))
HOSTILE = (
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 999, 2**31 - 1, 2**31, 2**63, 10**12, 10**400, 0.0, 0.5, -1e300, 1e-300,
    "", "x", "24", "\x1b[2J", "\ud800", "é" * 3, "x" * 5000, "(a+)+$", "../../x", "/dev/zero", [], [0], [1, 2, 3],
    [[1]], ["x"], [None], [-1, 2**31], [1] * 2000, {}, {"": None}, {"a": {"a": {}}}, {"rope_type": "yarn"},
)  # fmt: skip


def mutated(content: bytes, choose: random.Random) -> bytes:
    """One to four changes: bytes flipped, replaced by telling values or instructions, cut out, doubled, moved."""
    changed = bytearray(content)
    for _ in range(choose.choice((1, 1, 1, 2, 4))):
        at = choose.randrange(len(changed))
        length = choose.choice((1, 1, 2, 4, 8, 30))
        match choose.randrange(7):
            case 0:
                changed[at] ^= 1 << choose.randrange(8)
            case 1:
                changed[at : at + 1] = choose.choice(_TELLING)
            case 2:
                value = choose.choice(_TELLING)
                changed[at : at + len(value)] = value
            case 3:
                changed[at] = choose.choice(_INSTRUCTIONS)
            case 4:
                del changed[at : at + length]
            case 5:
                changed[at:at] = changed[at : at + length]
            case 6:
                other = choose.randrange(len(changed))
                changed[at : at + length] = changed[other : other + length]
        if not changed:
            return b""
    return bytes(changed)


def cut(content: bytes, choose: random.Random) -> bytes:
    """The beginning of it."""
    return content[: choose.randrange(len(content) + 1)]


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all values inside a value of JSON."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def put(value: Any, path: tuple, item: Any) -> Any:
    """A value with another one at a path."""
    if not path:
        return item
    inner = value
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = item
    return value


def at(value: Any, path: tuple) -> Any:
    for step in path:
        value = value[step]
    return value


def mutated_value(value: Any, choose: random.Random) -> Any:
    """One to three values exchanged for hostile ones, or for others of the same file, or left out; names changed."""
    value = json.loads(json.dumps(value))
    for _ in range(choose.choice((1, 1, 1, 2, 3))):
        found = list(places(value))
        path = choose.choice(found)
        parent = at(value, path[:-1]) if path else None
        match choose.randrange(8):
            case 0 if isinstance(parent, dict):
                del parent[path[-1]]
            case 1 if isinstance(parent, dict):
                parent[choose.choice((str(path[-1]) + "x", "", "__metadata__", "x" * 300))] = parent.pop(path[-1])
            case 2:
                value = put(value, path, json.loads(json.dumps(at(value, choose.choice(found)))))
            case 3 if isinstance(at(value, path), int | float) and abs(at(value, path)) < 2**64:
                value = put(value, path, at(value, path) * choose.choice((-1, 2, 0.5, 1000, 2**20)))
            case 4 if type(at(value, path)) is int and abs(at(value, path)) < 2**64:
                value = put(value, path, at(value, path) + choose.choice((-2, -1, 1, 2)))
            case _:
                value = put(value, path, copy.deepcopy(choose.choice(HOSTILE)))
    return value


def mutated_json(content: bytes, choose: random.Random) -> bytes:
    if choose.random() < 0.3:
        return choose.choice((mutated, cut))(content, choose)
    return json.dumps(mutated_value(json.loads(content), choose)).encode()


def mutated_safetensors(content: bytes, choose: random.Random) -> bytes:
    """Mostly the header, with its length put right; what it says of the data is then wrong."""
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    kind = choose.random()
    if kind < 0.15:
        return choose.choice((mutated, cut))(content, choose)
    if kind < 0.4:
        header = mutated(header, choose)
    elif kind < 0.5:
        data = mutated(data, choose) if data else data
    else:
        header = json.dumps(mutated_value(json.loads(header), choose)).encode()
    return struct.pack("<Q", len(header)) + header + data


def mutated_png(content: bytes, choose: random.Random) -> bytes:
    """A chunk of it changed, with its checksum put right."""
    if choose.random() < 0.25:
        return choose.choice((mutated, cut))(content, choose)
    chunks, start = [], 8
    while start < len(content):
        length = int.from_bytes(content[start : start + 4], "big")
        chunks.append((content[start + 4 : start + 8], content[start + 8 : start + 8 + length]))
        start += 12 + length
    number = choose.randrange(len(chunks))
    kind, data = chunks[number]
    match choose.randrange(4):
        case 0:
            chunks.insert(choose.randrange(len(chunks)), chunks[number])
        case 1:
            del chunks[number]
        case _ if data:
            chunks[number] = kind, mutated(data, choose)
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return content[:8] + b"".join(parts)
