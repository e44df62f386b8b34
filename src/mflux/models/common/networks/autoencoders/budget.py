"""How much of a machine's memory an autoencoder's maps may take."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from mflux.backend import has_gpu, mx

# A map that is normalised is stored if it and what it is made of take no more bytes than this; a GPU with much memory
# gives this part of what it may have.
ROOM = 900 * 10**6
_PART = 1 / 8
# Arrays of its size that there are while one strip is computed.
_BESIDE = 4


def room() -> int:
    """Bytes that maps may take: a second pass over a map's layers costs more than memory that nothing else needs."""
    if not has_gpu():
        return ROOM
    may_have = mx.device_info().get("max_recommended_working_set_size", 0)
    return max(ROOM, int(_PART * may_have)) if isinstance(may_have, int) else ROOM


class UnderWay:
    """What a GPU was given to compute and nobody has waited for: so much that there is room for all of it, and two at
    least, so that it never stands still.

    Args:
        size: bytes of one.
        wait: waits for one.
    """

    def __init__(self, size: int, wait: Callable[[Any], Any]):
        self._most = max(2, room() // (_BESIDE * size)) if has_gpu() else 2
        self._wait = wait
        self._begun: deque[Any] = deque()

    def add(self, one: Any) -> None:
        """Take another one, and wait for the earliest if there are too many now."""
        self._begun.append(one)
        if len(self._begun) == self._most:
            self._wait(self._begun.popleft())
