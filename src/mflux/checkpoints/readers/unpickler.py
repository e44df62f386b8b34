"""A pickle machine for files from strangers: it builds plain values and looks names up in one table, nothing else.

Python's own unpickler imports what a stream names and calls it. Here a name is a key of the table that the caller
hands in; what a call to it means is decided by that table, and a name outside it ends the reading. A pickle has no
loops, so every instruction costs at least one byte of the file; together with the limits below that bounds time and
memory by the file's own length.

The instructions are those of protocols 1 to 5 as the standard library's `pickletools` describes them, less what reaches
outside (the extension registry, instances of old-style classes, buffers handed over out of band) and less what only
protocol 0 has, in which torch cannot save.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mflux.errors import CheckpointError, UnsafeCheckpointError
from mflux.text import shown

# A model of 100,000 tensors takes about 15 MB of pickle, 5 million instructions and 0.6 million containers.
LARGEST_PICKLE = 64 << 20
MOST_CONTAINERS = 4 << 20
MOST_INSTRUCTIONS = 24 << 20
# torch's magic number has 10 bytes; numpy's generators keep integers of 16.
_LARGEST_INTEGER = 64
_LONGEST_INTEGER_IN_TEXT = 160


class Table:
    """A dictionary as the stream spells it: pairs in order, repetitions included.

    Nothing is hashed while the machine runs, so no choice of keys can make it slow, and nothing is copied, so no list
    can be multiplied: Python 2 hands an `OrderedDict` its first pairs in a list, which is kept as it is in `initial`.
    """

    __slots__ = ("initial", "pairs")

    def __init__(self, initial: list[Any] | tuple[()] = ()):
        self.initial = initial
        self.pairs: list[tuple[Any, Any]] = []

    def __len__(self) -> int:
        return len(self.initial) + len(self.pairs)

    def items(self) -> Iterator[tuple[Any, Any]]:
        for pair in self.initial:
            if isinstance(pair, (list, tuple)) and len(pair) == 2:
                yield pair[0], pair[1]
        yield from self.pairs


class Opaque:
    """A value of which only the kind is known: a set, a device, an array's dtype."""

    __slots__ = ("kind",)

    def __init__(self, kind: str):
        self.kind = kind


class Refused(Exception):
    """Raised by a call of the table: the stream asks for more than it may have. The message continues a sentence."""


class Name:
    """An entry of the table of names: what the stream may mention and, where `call` is given, call."""

    __slots__ = ("call", "value")

    def __init__(self, call: Callable[..., Any] | None = None, value: Any = None):
        self.call = call
        self.value = value


class Unpickler:
    """One stream. `load` runs it to its end; `end` then is the offset of the byte after it.

    Args:
        data: holds the stream; a legacy file holds several, one after the other.
        start: where the stream begins.
        names: `(module, name)` → `Name`: all that the stream may mention.
        persistent: what a persistent id stands for; called with the id, raises if it makes no sense.
        source: the file's name, for messages.
    """

    def __init__(
        self,
        data: bytes | memoryview,
        start: int = 0,
        *,
        names: Mapping[tuple[str, str], Name],
        persistent: Callable[[Any], Any] | None = None,
        source: object = "the file",
    ):
        self._data = memoryview(data)
        self._position = start
        self._length = len(self._data)
        self._names = names
        self._persistent = persistent
        self._source = source
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._containers = 0
        self.instructions = 0
        self.end = start

    def load(self) -> Any:
        """Run the stream and return the value it leaves.

        Raises:
            CheckpointError: the stream is damaged or ends early.
            UnsafeCheckpointError: it mentions a name outside the table, or goes past a limit.
        """
        table, data, length = _INSTRUCTIONS, self._data, self._length
        count = 0
        try:
            while True:
                if self._position >= length:
                    raise self._damaged("its pickle ends early")
                code = data[self._position]
                self._position += 1
                if code == 0x2E:  # STOP
                    break
                instruction = table.get(code)
                if instruction is None:
                    if code in _REFUSED:
                        raise self._unsafe(f"its pickle {_REFUSED[code]}")
                    raise self._damaged(f"its pickle has an unknown instruction, {code:#04x}")
                instruction(self)
                count += 1
                if count > MOST_INSTRUCTIONS:
                    raise self._unsafe(f"its pickle has more than {MOST_INSTRUCTIONS:,} instructions")
        except (IndexError, struct.error, UnicodeDecodeError, ValueError, OverflowError):
            raise self._damaged("its pickle makes no sense") from None
        finally:
            self.instructions = count
        self.end = self._position
        if not self._stack or self._marks:
            raise self._damaged("its pickle makes no sense")
        return self._stack[-1]

    # Errors

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._source} is damaged: {what}; fetch it again")

    def _unsafe(self, what: str) -> UnsafeCheckpointError:
        return UnsafeCheckpointError(f"{self._source} was refused and nothing of it was run: {what}")

    # Reading

    def _take(self, count: int) -> memoryview:
        end = self._position + count
        if end > self._length:
            raise self._damaged("its pickle ends early")
        piece = self._data[self._position : end]
        self._position = end
        return piece

    def _unsigned(self, width: int) -> int:
        return int.from_bytes(self._take(width), "little")

    def _line(self, most: int = 512) -> str:
        """The text up to the next newline."""
        window = bytes(self._data[self._position : self._position + most + 1])
        stop = window.find(b"\n")
        if stop < 0:
            raise self._damaged("its pickle has an endless line")
        self._position += stop + 1
        return window[:stop].decode("utf-8")

    # Values

    def _push_text(self, count: int) -> None:
        self._stack.append(str(self._take(count), "utf-8", "surrogatepass"))

    def _push_bytes(self, count: int) -> None:
        self._stack.append(bytes(self._take(count)))

    def _push_old_text(self, count: int) -> None:
        """Python 2's strings: text where they are UTF-8, as torch reads them, bytes otherwise."""
        raw = bytes(self._take(count))
        try:
            self._stack.append(raw.decode("utf-8"))
        except UnicodeDecodeError:
            self._stack.append(raw)

    def _push_integer(self, count: int) -> None:
        if count > _LARGEST_INTEGER:
            raise self._unsafe(f"its pickle has an integer of {count:,} bytes")
        self._stack.append(int.from_bytes(self._take(count), "little", signed=True))

    def _push_integer_in_text(self) -> None:
        line = self._line(_LONGEST_INTEGER_IN_TEXT).removesuffix("L")
        self._stack.append({"00": False, "01": True}[line] if line in ("00", "01") else int(line))

    def _container(self, value: Any) -> None:
        self._containers += 1
        if self._containers > MOST_CONTAINERS:
            raise self._unsafe(f"its pickle has more than {MOST_CONTAINERS:,} containers")
        self._stack.append(value)

    # The stack. Below the last mark nothing may be taken.

    def _pop(self) -> Any:
        if self._marks and len(self._stack) <= self._marks[-1]:
            raise self._damaged("its pickle makes no sense")
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        if not self._marks:
            raise self._damaged("its pickle makes no sense")
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _top(self) -> Any:
        if self._marks and len(self._stack) <= self._marks[-1]:
            raise self._damaged("its pickle makes no sense")
        return self._stack[-1]

    def _frozen_set(self) -> None:
        self._pop_to_mark()
        self._container(Opaque("set"))

    def _mark(self) -> None:
        self._marks.append(len(self._stack))

    def _drop(self) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def _tuple(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self._container(tuple(reversed(items)))

    def _remember(self, index: int) -> None:
        # Writers number what they remember from 0 (Python 2: from 1), one instruction each.
        if index < 0 or index > self._length:
            raise self._unsafe(f"its pickle remembers a value under the number {index:,}")
        self._memo[index] = self._top()

    def _recall(self, index: int) -> None:
        try:
            self._stack.append(self._memo[index])
        except KeyError:
            raise self._damaged("its pickle recalls what it never remembered") from None

    # Containers

    def _append(self, items: list[Any]) -> None:
        target = self._top()
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Opaque):
            raise self._damaged("its pickle makes no sense")

    def _set_items(self, flat: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, Table) or len(flat) % 2:
            raise self._damaged("its pickle makes no sense")
        target.pairs.extend(zip(flat[::2], flat[1::2], strict=True))

    def _set_item(self) -> None:
        value = self._pop()
        self._set_items([self._pop(), value])

    # Names and calls

    def _global(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise self._damaged("its pickle makes no sense")
        found = self._names.get((module, name))
        if found is None:
            raise self._unsafe(
                f"it asks for {shown(module)}.{shown(name)}, which a file of weights has no need of; "
                "ask its author for safetensors or a plain state_dict"
            )
        self._stack.append(found if found.value is None else found.value)

    def _global_from_stack(self) -> None:
        name = self._pop()
        self._global(self._pop(), name)

    def _call(self) -> None:
        arguments = self._pop()
        function = self._pop()
        if not isinstance(arguments, tuple):
            raise self._damaged("its pickle makes no sense")
        if not isinstance(function, Name) or function.call is None:
            raise self._unsafe("it calls something that is no function")
        try:
            self._container(function.call(*arguments))
        except Refused as error:
            raise self._unsafe(str(error)) from None
        except TypeError:
            raise self._damaged("its pickle makes no sense") from None

    def _call_with_keywords(self) -> None:
        keywords = self._pop()
        if not isinstance(keywords, Table) or len(keywords):
            raise self._unsafe("it calls a function with keywords, which torch never writes")
        self._call()

    def _state(self) -> None:
        """Attributes that a tensor, an `OrderedDict` or an array's dtype carries along; none of them is a weight."""
        self._pop()
        if isinstance(self._top(), (Name, str, bytes, int, float, list, tuple, type(None))):
            raise self._unsafe("it sets attributes of something that has none")

    def _persistent_id(self) -> None:
        if self._persistent is None:
            raise self._damaged("its pickle refers to data where there can be none")
        self._container(self._persistent(self._pop()))


_Step = Callable[[Unpickler], None]


def _instructions() -> dict[int, _Step]:
    u = Unpickler
    steps: dict[str, _Step] = {
        # Numbers and constants
        "N": lambda m: m._stack.append(None),
        "\x88": lambda m: m._stack.append(True),
        "\x89": lambda m: m._stack.append(False),
        "I": u._push_integer_in_text,
        "L": u._push_integer_in_text,
        "J": lambda m: m._stack.append(int.from_bytes(m._take(4), "little", signed=True)),
        "K": lambda m: m._stack.append(m._unsigned(1)),
        "M": lambda m: m._stack.append(m._unsigned(2)),
        "G": lambda m: m._stack.append(struct.unpack(">d", m._take(8))[0]),
        "\x8a": lambda m: m._push_integer(m._unsigned(1)),
        "\x8b": lambda m: m._push_integer(m._unsigned(4)),
        # Text and bytes
        "X": lambda m: m._push_text(m._unsigned(4)),
        "\x8c": lambda m: m._push_text(m._unsigned(1)),
        "\x8d": lambda m: m._push_text(m._unsigned(8)),
        "T": lambda m: m._push_old_text(m._unsigned(4)),
        "U": lambda m: m._push_old_text(m._unsigned(1)),
        "B": lambda m: m._push_bytes(m._unsigned(4)),
        "C": lambda m: m._push_bytes(m._unsigned(1)),
        "\x8e": lambda m: m._push_bytes(m._unsigned(8)),
        "\x96": lambda m: m._push_bytes(m._unsigned(8)),
        # Containers
        "}": lambda m: m._container(Table()),
        "]": lambda m: m._container([]),
        ")": lambda m: m._stack.append(()),
        "\x85": lambda m: m._tuple(1),
        "\x86": lambda m: m._tuple(2),
        "\x87": lambda m: m._tuple(3),
        "t": lambda m: m._container(tuple(m._pop_to_mark())),
        "a": lambda m: m._append([m._pop()]),
        "e": lambda m: m._append(m._pop_to_mark()),
        "s": u._set_item,
        "u": lambda m: m._set_items(m._pop_to_mark()),
        "\x8f": lambda m: m._container(Opaque("set")),
        "\x90": lambda m: m._append(m._pop_to_mark()),
        "\x91": u._frozen_set,
        # The stack and the memo
        "(": u._mark,
        "0": u._drop,
        "1": lambda m: _nothing(m._pop_to_mark()),
        "q": lambda m: m._remember(m._unsigned(1)),
        "r": lambda m: m._remember(m._unsigned(4)),
        "\x94": lambda m: m._remember(len(m._memo)),
        "h": lambda m: m._recall(m._unsigned(1)),
        "j": lambda m: m._recall(m._unsigned(4)),
        # Names, calls and references to data
        "c": lambda m: m._global(m._line(), m._line()),
        "\x93": u._global_from_stack,
        "R": u._call,
        "\x81": u._call,
        "\x92": u._call_with_keywords,
        "b": u._state,
        "Q": u._persistent_id,
        # The protocol's number and the lengths of frames change nothing here.
        "\x80": lambda m: _nothing(m._take(1)),
        "\x95": lambda m: _nothing(m._take(8)),
    }
    return {ord(code): step for code, step in steps.items()}


def _nothing(_: Any) -> None:
    pass


_INSTRUCTIONS = _instructions()
_REFUSED = {
    **dict.fromkeys(b"PSVFpgld2", "is of a kind that torch never writes"),
    **dict.fromkeys(b"io", "makes an instance of a class"),
    **dict.fromkeys(b"\x82\x83\x84", "uses Python's extension registry"),
    **dict.fromkeys(b"\x97\x98", "expects data from outside the file"),
}
