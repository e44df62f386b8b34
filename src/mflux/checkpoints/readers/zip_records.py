"""The records of a zip archive as torch writes it: stored, never compressed, each in a place of its own.

torch maps its archives into memory, so every record lies there as it is. An archive in which a record is compressed,
stands twice or overlaps another was not written by torch; such archives are refused instead of interpreted.
Source: PKWARE's APPNOTE.TXT, sections 4.3.7 (local header), 4.3.12 (directory), 4.3.14 to 4.3.16 (its end).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from mflux.errors import CheckpointError, UnsafeCheckpointError
from mflux.text import shown

LOCAL_MAGIC = b"PK\x03\x04"
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_LONGEST_COMMENT = 0xFFFF


@dataclass(frozen=True)
class Record:
    """Where a record's bytes lie in the file, and whether they lie there as they are."""

    start: int
    length: int
    stored: bool = True


def read_records(data: memoryview, source: object) -> dict[str, Record]:
    """The records of an archive by name, from its directory, each checked against the file.

    Raises:
        CheckpointError: the archive is truncated or damaged.
        UnsafeCheckpointError: it is not as torch writes it: encrypted, repeated or overlapping records.
    """
    count, start, size = _directory(data, source)
    records: dict[str, Record] = {}
    position, end = start, start + size
    for _ in range(count):
        if position + _ENTRY.size > end:
            raise _damaged(source)
        (
            magic, _, _, flags, method, _, _, _, packed, length, name_length, extra_length, comment_length,
            disk, _, _, header,
        ) = _ENTRY.unpack_from(data, position)  # fmt: skip
        position += _ENTRY.size
        after = position + name_length + extra_length + comment_length
        if magic != b"PK\x01\x02" or after > end or disk not in (0, 0xFFFF):
            raise _damaged(source)
        raw_name = bytes(data[position : position + name_length])
        extra = data[position + name_length : position + name_length + extra_length]
        position = after
        length, packed, header = _large(extra, length, packed, header, source)
        try:
            # A name that is not UTF-8 is none of torch's: it numbers its records and names the folder after the file.
            name = raw_name.decode("utf-8")
        except UnicodeDecodeError:
            raise _damaged(source) from None
        if flags & 1:
            raise _unsafe(source, f"its record {shown(name)} is encrypted")
        if name in records:
            raise _unsafe(source, f"its record {shown(name)} stands twice")
        stored = method == 0 and packed == length
        records[name] = Record(_data_start(data, header, raw_name, method, source), packed, stored)
    if position != end:
        raise _damaged(source)
    taken = 0
    for record in sorted(records.values(), key=lambda record: (record.start, record.length)):
        if record.start + record.length > start:
            raise CheckpointError(f"{source} is damaged: a record reaches past the end of the data; fetch it again")
        if record.length and record.start < taken:
            raise _unsafe(source, "two of its records overlap")
        taken = max(taken, record.start + record.length)
    return records


def require_stored(records: dict[str, Record], source: object) -> None:
    """
    Raises:
        UnsafeCheckpointError: a record is compressed. Little could then become much, and nothing could be mapped.
    """
    for name, record in records.items():
        if not record.stored:
            raise _unsafe(source, f"its record {shown(name)} is compressed, which torch never does")


def _directory(data: memoryview, source: object) -> tuple[int, int, int]:
    """How many entries the directory has, where it begins and how long it is."""
    tail_start = max(0, len(data) - _END.size - _LONGEST_COMMENT)
    at = bytes(data[tail_start:]).rfind(b"PK\x05\x06")
    if at < 0 or tail_start + at + _END.size > len(data):
        raise CheckpointError(f"{source} is truncated: it is an archive without its directory; fetch it again")
    at += tail_start
    _, disk, first_disk, here, count, size, start, comment = _END.unpack_from(data, at)
    if disk not in (0, 0xFFFF) or first_disk not in (0, 0xFFFF) or at + _END.size + comment != len(data):
        raise _damaged(source)
    end = at
    locator = at - _LOCATOR.size
    if locator >= 0 and bytes(data[locator : locator + 4]) == b"PK\x06\x07":
        end = _LOCATOR.unpack_from(data, locator)[2]
        if end + _END64.size > locator:
            raise _damaged(source)
        magic, _, _, _, _, _, here, count, size, start = _END64.unpack_from(data, end)
        if magic != b"PK\x06\x06":
            raise _damaged(source)
    # Each entry takes at least its fixed part, so a count can never ask for more work than the file has bytes.
    if here != count or start + size != end or count * _ENTRY.size > size:
        raise _damaged(source)
    return count, start, size


def _large(extra: memoryview, length: int, packed: int, header: int, source: object) -> tuple[int, int, int]:
    """Sizes and place of an entry, from its zip64 field where the fixed ones are full."""
    if 0xFFFFFFFF not in (length, packed, header):
        return length, packed, header
    position = 0
    while position + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, position)
        if kind == 1 and position + 4 + size <= len(extra):
            values = list(struct.unpack_from(f"<{size // 8}Q", extra, position + 4))
            wide = [length, packed, header]
            for index, value in enumerate(wide):
                if value == 0xFFFFFFFF:
                    if not values:
                        raise _damaged(source)
                    wide[index] = values.pop(0)
            return wide[0], wide[1], wide[2]
        position += 4 + size
    raise _damaged(source)


def _data_start(data: memoryview, header: int, name: bytes, method: int, source: object) -> int:
    """Where the bytes begin. Only the local header knows: torch pads it so that they are aligned."""
    if header + _LOCAL.size > len(data):
        raise _damaged(source)
    magic, _, _, its_method, *_, name_length, extra_length = _LOCAL.unpack_from(data, header)
    at = header + _LOCAL.size
    if magic != LOCAL_MAGIC or its_method != method or bytes(data[at : at + name_length]) != name:
        raise _damaged(source)
    return at + name_length + extra_length


def _damaged(source: object) -> CheckpointError:
    return CheckpointError(f"{source} is damaged: its archive's directory makes no sense; fetch it again")


def _unsafe(source: object, what: str) -> UnsafeCheckpointError:
    return UnsafeCheckpointError(f"{source} was refused: {what}")
