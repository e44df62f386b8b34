"""JSON from strangers: what the standard has, no deeper than anyone needs, and nothing that two readers read twice."""

from __future__ import annotations

import json
import math
from typing import Any

from mflux.text import shown

# Configurations nest some five deep, tokenizers some ten.
DEEPEST = 100
# Lists and tables; Gemma's tokenizer has half a million.
_MOST_CONTAINERS = 4_000_000


class NotJSON(ValueError):
    """The message says what is wrong, as the rest of a sentence: "is damaged: it is not JSON"."""


def parse(text: str | bytes, *, repeated: bool = True) -> Any:
    """A JSON value, as `json.loads` gives it.

    Args:
        text: the whole of it; bytes are UTF-8, with a byte-order mark or without.
        repeated: whether an object may say the same thing twice. Two different values under one name are refused
            in any case: readers differ in which they take.

    Raises:
        NotJSON: it is none, or nested deeper than `DEEPEST`, has a number that is not finite or of thousands of
            digits, or an ambiguous name.
    """

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: dict[str, Any] = {}
            for name, value in pairs:
                if name in seen and not (repeated and type(seen[name]) is type(value) and seen[name] == value):
                    raise NotJSON(f"is damaged: it says {shown(name, 60)} twice")
                seen[name] = value
        return found

    try:
        if isinstance(text, (bytes, bytearray, memoryview)):
            text = bytes(text).decode("utf-8-sig")
        if text.count("[") + text.count("{") > _MOST_CONTAINERS:
            raise NotJSON("is damaged: it holds more lists than any file here has")
        value = json.loads(
            text.removeprefix("\ufeff"), object_pairs_hook=table, parse_constant=_no_number, parse_float=_finite
        )
    except NotJSON:
        raise
    except json.JSONDecodeError as error:
        ended = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated string")
        if ended and error.doc.strip():
            raise NotJSON("is truncated: it ends in the middle of its JSON") from None
        raise NotJSON("is damaged: it is not JSON") from None
    except RecursionError:
        raise NotJSON("is damaged: its JSON is nested too deep") from None
    except UnicodeDecodeError:
        raise NotJSON("is damaged: it is not JSON") from None
    except ValueError:
        # Python turns no text of more than 4,300 digits into an integer.
        raise NotJSON("is damaged: it holds a number of thousands of digits") from None
    _check_depth(value)
    return value


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(shown(text, 40))


def _no_number(name: str) -> Any:
    raise NotJSON(f"is damaged: it holds {name}, which is no number in JSON")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        level = [
            item
            for container in level
            if isinstance(container, (dict, list))
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return
    raise NotJSON("is damaged: its JSON is nested too deep")
