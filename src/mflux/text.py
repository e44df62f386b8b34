"""Text as a person is shown it: nothing that moves a terminal's cursor, nothing endless, counts and sizes alike."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sized

# What holds an emoji or a word of some scripts together; the other invisible characters can reorder a line.
_JOINERS = "\u200c\u200d"
# Letters and marks that are drawn as nothing: joiners, fillers, selectors of a variant, the blank of Braille.
_UNSEEN = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0").union(
    map(chr, range(0xFE00, 0xFE10)), map(chr, range(0xE0100, 0xE01F0))
)
# What stands before the host of an address: a name and a password, or a token.
_USER_INFORMATION = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^\s/]*@")
_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def shown(text: object, most: int = 120) -> str:
    """Text from anywhere, fit for one line: control characters, unpaired surrogates and characters that change a
    line's direction are written as escapes, and what is longer than `most` is cut."""
    text = str(text)
    short = text if len(text) <= most else text[: most - 1] + "…"
    return short if short.isprintable() else "".join(map(_visible, short))


def brief(text: str, most: int, word: int) -> str:
    """A message with its beginning and its end, whatever it quotes: what has no space in it is cut to `word`."""
    if len(text) > word:
        text = re.sub(rf"\S{{{word + 1},}}", lambda found: f"{found[0][: word // 2]}…{found[0][-word // 4 :]}", text)
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 4 :]}"


def with_article(name: str) -> str:
    """A name after "a" or "an", by its first letter."""
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def written(value: object) -> str:
    """`repr`, which fails for numbers of thousands of digits, and may for objects of anyone's."""
    try:
        return repr(value)
    except Exception:
        return f"<{type(value).__name__}>"


def one_line(text: object, most: int = 2000) -> str:
    """A whole message as one line of a terminal, its line breaks as spaces, and addresses without passwords."""
    # Cut first: a megabyte is not worth splitting.
    return shown(without_password(" ".join(str(text)[: 4 * most].split())), most)


def lines_shown(text: object, most: int = 10**6) -> str:
    """As `shown`, of a text whose line breaks and tabs are meant; `most` is for each line."""
    return "".join(part if part in ("\n", "\t") else shown(part, most) for part in re.split(r"([\n\t])", str(text)))


def without_password(text: str) -> str:
    """A text whose addresses have "…" in place of a name, a password or a token: "https://…@example.org"."""
    return _USER_INFORMATION.sub(r"\1…@", text)


def plain(prompt: str) -> str:
    """A prompt in the one form that all that mean the same share: lines end with a line feed, there are no byte-order
    marks, and characters are composed (Unicode's NFC). Most tokenizers give each form ids of its own."""
    text = prompt.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n")
    return unicodedata.normalize("NFC", text)


def is_text(text: str) -> bool:
    """Whether a prompt can have been read as what it was written in: a NUL is what UTF-16 without a mark leaves, an
    unpaired surrogate what a shell hands over in another encoding."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def is_blank(text: str) -> bool:
    """Whether nothing of a text is seen: spaces, also those of no width, marks of direction, fillers."""
    return all(
        character.isspace() or character in _UNSEEN or unicodedata.category(character) in ("Cc", "Cf", "Zs")
        for character in text
    )


def some(items: Iterable[object], most: int = 5, each: int = 120, *, counted: bool = False) -> str:
    """The first of several things: "a, b, c, …", or "a, b, c and 4 more"."""
    items = list(items)
    rest = f" and {len(items) - most} more" if counted else ", …"
    return ", ".join(shown(item, each) for item in items[:most]) + (rest if len(items) > most else "")


def count(items: Sized | int, noun: str) -> str:
    """ "1 tensor", "2 tensors"."""
    number = items if isinstance(items, int) else len(items)
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size(number: float) -> str:
    """Bytes as a person reads them: "12.3 MB"."""
    for unit, factor in _UNITS:
        if number >= factor:
            return f"{number / factor:.1f}".removesuffix(".0") + f" {unit}"
    return f"{number:.0f} B"


def _visible(character: str) -> str:
    if character.isprintable() or character in _JOINERS or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape").decode("ascii")
