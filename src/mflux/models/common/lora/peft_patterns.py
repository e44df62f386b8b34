"""PEFT's patterns of layer names, matched without compiling anything that a file says.

PEFT takes the keys of `alpha_pattern` and `rank_pattern` for regular expressions and asks whether one matches a layer's
name, whole or from a dot on (`peft.utils.get_pattern_key`). Python's matcher can be made to run for ever by a few
characters; so only what such keys need is understood: characters, `.`, `\\d`, `\\w`, `\\.` and such, each once or with
`*`, `+` or `?`, alternatives with `|`, and `^` and `$` at the ends. That is matched in one pass over the name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

_LONGEST = 1000
_CLASSES: dict[str, Callable[[str], bool]] = {
    "d": str.isdecimal,
    "w": lambda character: character.isalnum() or character == "_",
}
_PUNCTUATION = set("._-/^$*+?|()[]{}\\ ")
# A character's test (a character stands for itself), and how often it may occur.
_Step = tuple[str | Callable[[str], bool], str]


class Pattern:
    """One key. `matches` tells whether PEFT would take it for a layer.

    Raises:
        ValueError: the key says more than is understood here.
    """

    def __init__(self, text: str):
        if len(text) > _LONGEST:
            raise ValueError(f"is longer than {_LONGEST:,} characters")
        self._ways = [(way.startswith("^"), _steps(way.removeprefix("^"))) for way in _alternatives(text)]

    def matches(self, layer: str) -> bool:
        # At its beginning, or behind any of its dots.
        starts = [0, *(place + 1 for place, character in enumerate(layer) if character == ".")]
        return any(_fits(steps, layer, starts[:1] if anchored else starts) for anchored, steps in self._ways)


def _alternatives(text: str) -> list[str]:
    parts, escaped = [""], False
    for character in text:
        if character == "|" and not escaped:
            parts.append("")
        else:
            parts[-1] += character
        escaped = character == "\\" and not escaped
    return parts


@cache
def _steps(text: str) -> tuple[_Step, ...]:
    steps: list[_Step] = []
    place = 0
    while place < len(text):
        character = text[place]
        place += 1
        if character == "$" and place == len(text):
            break
        test: str | Callable[[str], bool] = character
        if character == "\\" and place < len(text):
            escaped = text[place]
            place += 1
            if escaped not in _CLASSES and escaped not in _PUNCTUATION:
                raise ValueError(f"has \\{escaped}, which is not built")
            test = _CLASSES.get(escaped, escaped)
        elif character == ".":
            test = _anything
        elif character in "^$*+?()[]{}\\":
            raise ValueError(f"has {character} in a place where it is not built")
        often = ""
        if place < len(text) and text[place] in "*+?":
            often = text[place]
            place += 1
        steps.append((test, often))
    return tuple(steps)


def _anything(character: str) -> bool:
    return character != "\n"


def _fits(steps: tuple[_Step, ...], layer: str, starts: list[int]) -> bool:
    """Whether the steps take all of the name from one of these places on: all ways at once, one bit for each step."""
    written = [test for test, often in steps if isinstance(test, str) and not often]
    if len(written) == len(steps):
        # Names written out: the usual case, and one comparison.
        text = "".join(written)
        return layer.endswith(text) and len(layer) - len(text) in starts
    open_at = set(starts)
    states = 0
    for place in range(len(layer) + 1):
        if place in open_at:
            states |= 1
        states = _past_optional(steps, states)
        if place == len(layer):
            break
        character, following = layer[place], 0
        for number, (test, often) in enumerate(steps):
            if states >> number & 1 and (test == character if isinstance(test, str) else test(character)):
                following |= 1 << number + 1
                if often in ("*", "+"):
                    following |= 1 << number
        states = following
    return bool(states >> len(steps) & 1)


def _past_optional(steps: tuple[_Step, ...], states: int) -> int:
    for number, (_, often) in enumerate(steps):
        if often in ("*", "?") and states >> number & 1:
            states |= 1 << number + 1
    return states
