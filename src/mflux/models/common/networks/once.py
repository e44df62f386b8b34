"""What belongs to an image and not to its steps: where its tokens are, and what becomes of its prompt before them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Once:
    """Keeps what a model makes of one image's inputs, the first time that it does."""

    def __init__(self) -> None:
        # With what it was made of, so that no other one gets its number.
        self._made: dict[tuple[str, int], tuple[object, Any]] = {}

    def kept(self, name: str, source: object, make: Callable[[], T]) -> T:
        key = name, id(source)
        if key not in self._made:
            self._made[key] = source, make()
        made: T = self._made[key][1]
        return made


def kept(once: Once | None, name: str, source: object, make: Callable[[], T]) -> T:
    """What `make` gives for a source, from `once` if there is one and it has that."""
    return make() if once is None else once.kept(name, source, make)
