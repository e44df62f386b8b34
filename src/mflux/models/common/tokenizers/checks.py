"""What a tokenizer's files are checked for before the `tokenizers` library sees them.

The library is written in Rust. What it does not expect ends in a panic, which is no `Exception` in Python, or in the
end of the process; so its calls go through `library_call`, and what is known to kill it is refused first.
"""

from __future__ import annotations

import base64
import binascii
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mflux.checkpoints.folders import read_json
from mflux.errors import CheckpointError, UsageError
from mflux.text import is_text, shown, written

# Published vocabularies have pieces of up to some 250 characters; from megabytes on the library's recursion ends the
# process.
LONGEST_PIECE = 1000
# Patterns from a file run over the whole prompt. The longest that any model takes are some thousands of characters.
LONGEST_PROMPT = 100_000
# A normalizer's; one that matches nothing at all can double a text.
_MOST_REPLACEMENTS = 8
# Bytes of a text that stands for one character; Unicode's longest has 33.
_LONGEST_REPLACEMENT = 256
# Normalizers, pre-tokenizers and so on; published tokenizers have up to ten. No list among them is longer.
_MOST_STEPS = 32
# Put before each part of a text; the published one is "▁".
_LONGEST_BEGINNING = 8
# Steps that write each byte as a character, and so can double a text; published tokenizers have one.
_MOST_BYTE_LEVELS = 2
# Places of templates that a whole prompt is put into: one where there is one text, two where there are two.
_MOST_INSERTIONS = 4
# The library bounds one pattern at one place of a text, not several at all places. These are the published ones, of
# CLIP, T5, Qwen2, Llama 3 and Mistral's tekken.
_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_KNOWN_PATTERNS = frozenset(
    (" {2,}", _TEKKEN, r"\s+", _SPLIT % r"\p{N}", _SPLIT % r"\p{N}{1,3}",
     r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
     r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
)  # fmt: skip
# How long any other pattern may take with a prompt.
PATIENCE_S = 20
_ELSEWHERE = """
import json, sys
from tokenizers import Tokenizer
tokenizer, text = json.load(sys.stdin)
Tokenizer.from_str(tokenizer).encode(text)
"""
_LARGEST_ID = 2**31 - 1


@contextmanager
def library_call(source: object, what: str = "is damaged") -> Iterator[None]:
    """Turn whatever the library throws into one sentence.

    Raises:
        CheckpointError: says of `source` what `what` says, and the library's reason.
    """
    try:
        yield
    except (MemoryError, Exception) as error:
        raise CheckpointError(f"{source} {what}: {shown(error, 300)}") from None
    except BaseException as error:
        # PyO3's, which derives from BaseException so that nobody catches it by accident.
        if type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{source} {what}: {shown(error, 300)}; fetch it again") from None


def check_prompt(prompt: str, name: str = "prompt") -> None:
    """
    Args:
        name: of the argument.

    Raises:
        UsageError: the prompt is no text, or longer than anyone needs.
    """
    spoken = name.replace("_", " ")
    if not isinstance(prompt, str):
        raise UsageError(f"a {spoken} is a text, not {shown(written(prompt), 60)}")
    if len(prompt) > LONGEST_PROMPT:
        raise UsageError(
            f"the {spoken} has {len(prompt):,} characters and at most {LONGEST_PROMPT:,} can be read: cut it"
        )
    if not is_text(prompt):
        raise UsageError(f"the {spoken} is not text in UTF-8: save it as UTF-8, or type it anew")


def check_pieces(pieces: Iterable[object], source: object) -> None:
    """
    Raises:
        CheckpointError: a piece of the vocabulary is no text, or longer than any published one.
    """
    for piece in pieces:
        if not isinstance(piece, str):
            raise CheckpointError(f"{source} is damaged: a piece of its vocabulary is no text; fetch it again")
        if len(piece) > LONGEST_PIECE:
            raise CheckpointError(
                f"{source} was refused: a piece of its vocabulary has {len(piece):,} characters, and {LONGEST_PIECE:,} "
                "is the most; fetch it again"
            )


def check_vocabulary(vocabulary: Mapping[str, Any], source: object) -> None:
    """
    Raises:
        CheckpointError: it is not a table of token ids.
    """
    check_pieces(vocabulary, source)
    if not all(type(number) is int and 0 <= number <= _LARGEST_ID for number in vocabulary.values()):
        raise CheckpointError(f"{source} is damaged: it is not a table of token ids")


def check_tokenizer(content: Mapping[str, Any], source: object) -> None:
    """A parsed `tokenizer.json`: its vocabulary, its added tokens, its tables of characters.

    Raises:
        CheckpointError: they are not what they should be.
    """
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, Mapping):
        check_vocabulary(vocabulary, source)
    elif isinstance(vocabulary, list):
        if not all(isinstance(entry, list) and len(entry) == 2 for entry in vocabulary):
            raise CheckpointError(
                f"{source} is damaged: its vocabulary is not one of pieces and scores; fetch it again"
            )
        check_pieces((entry[0] for entry in vocabulary), source)
    added = content.get("added_tokens") or ()
    if not isinstance(added, (list, tuple)) or not all(isinstance(token, Mapping) for token in added):
        raise CheckpointError(f"{source} is damaged: its added tokens are not what they should be; fetch it again")
    check_vocabulary({token.get("content"): token.get("id", 0) for token in added if _is_hashable(token)}, source)
    replacements = 0
    for step in _steps(content):
        check_character_map(step.get("precompiled_charsmap"), source)
        if "content" in step and "pattern" in step:
            replacements += 1
            pattern = step["pattern"].get("String") if isinstance(step["pattern"], Mapping) else step["pattern"]
            room = max(len(pattern) if isinstance(pattern, str) else 1, 1)
            if not isinstance(step["content"], str) or len(step["content"]) > room or replacements > _MOST_REPLACEMENTS:
                raise CheckpointError(f"{source} was refused: its replacements would make a prompt grow without end")
    if sum("type" in step for step in _work(content)) > _MOST_STEPS:
        raise CheckpointError(f"{source} was refused: it has more than {_MOST_STEPS} steps; fetch it again")
    _check_growth(content, source)


def _check_growth(content: Mapping[str, Any], source: object) -> None:
    """What the steps add to a text, replacements aside.

    Raises:
        CheckpointError: a text or list is longer than any published one, or together they can multiply a prompt.
    """
    beginnings = insertions = byte_levels = 0
    for step in _work(content):
        for name, value in step.items():
            most = LONGEST_PIECE if isinstance(value, str) else _MOST_STEPS
            if name != "precompiled_charsmap" and isinstance(value, (str, list)) and len(value) > most:
                what = "characters" if isinstance(value, str) else "entries"
                raise CheckpointError(
                    f"{source} was refused: {shown(name, 60)} in its steps has {len(value):,} {what}, and {most:,} is "
                    "the most; fetch it again"
                )
        beginning = step.get("prepend")
        beginnings += isinstance(beginning, str)
        insertions += "Sequence" in step
        too_long = isinstance(beginning, str) and len(beginning) > _LONGEST_BEGINNING
        if too_long or beginnings > _MOST_REPLACEMENTS or insertions > _MOST_INSERTIONS:
            raise CheckpointError(f"{source} was refused: its steps would make a prompt grow without end")
    for name in ("normalizer", "pre_tokenizer"):
        byte_levels += sum(step.get("type") == "ByteLevel" for step in _steps([content.get(name)]))
    if byte_levels > _MOST_BYTE_LEVELS:
        raise CheckpointError(f"{source} was refused: its steps would make a prompt grow without end")


def _work(content: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The tables of a `tokenizer.json` that say what is done with a text, in whatever depth."""
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        yield from _steps([content.get(name)])


def has_strange_patterns(content: Mapping[str, Any]) -> bool:
    """Whether a parsed `tokenizer.json` has patterns that no published one has."""
    patterns = (step["pattern"].get("Regex") for step in _work(content) if isinstance(step.get("pattern"), Mapping))
    return any(pattern is not None and pattern not in _KNOWN_PATTERNS for pattern in patterns)


def check_time(tokenizer: Any, text: str, source: object) -> None:
    """See in another process, which can be ended, that a tokenizer comes to an end with a text.

    Args:
        tokenizer: the library's.

    Raises:
        CheckpointError: it does not within `PATIENCE_S`.
    """
    try:
        subprocess.run(
            [sys.executable, "-c", _ELSEWHERE],
            input=json.dumps([tokenizer.to_str(), text]).encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=PATIENCE_S,
            check=False,  # what goes wrong there is told when it goes wrong here
        )
    except subprocess.TimeoutExpired:
        raise CheckpointError(
            f"{source} was refused: its patterns took more than {PATIENCE_S} seconds with this prompt, and no "
            "published tokenizer has them; take another copy of the model"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{source} has patterns of its own, which cannot be tried here: {error}") from None


def check_folder(folder: Path) -> bool:
    """The `tokenizer.json` of a folder, if it has one, before another library reads it.

    Returns:
        `has_strange_patterns`.

    Raises:
        CheckpointError: as `check_tokenizer`.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return False
    content = read_json(path)
    check_tokenizer(content, path)
    return has_strange_patterns(content)


def check_character_map(text: object, source: object) -> None:
    """A `precompiled_charsmap` of sentencepiece: the length of a double-array trie in bytes, the trie, and the texts
    that its values point into, each with a zero behind it. The library follows it without looking where it leads.

    Layout: darts-clone's units of 32 bits (label in the lowest 8, "has a value" in bit 8, offset from bit 10 on).

    Raises:
        CheckpointError: a step of the trie leads outside it, or a value to no text.
    """
    import numpy as np

    damaged = CheckpointError(f"{source} is damaged: its table of characters makes no sense; fetch it again")
    if text is None or text == "":
        return
    if not isinstance(text, str):
        raise damaged
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise damaged from None
    length = int.from_bytes(data[:4], "little")
    texts = data[4 + length :]
    if len(data) < 8 or length % 4 or not length or 4 + length > len(data) or texts[-1:] != b"\0":
        raise damaged
    if max(map(len, texts.split(b"\0"))) > _LONGEST_REPLACEMENT:
        raise CheckpointError(f"{source} was refused: its table of characters would make a prompt grow without end")
    try:
        texts.decode("utf-8")
    except UnicodeDecodeError:
        raise damaged from None
    units = np.frombuffer(data, "<u4", length // 4, 4).astype(np.int64)
    inner = np.flatnonzero(units >> 31 == 0)
    target = inner ^ (units[inner] >> 10 << ((units[inner] & 0x200) >> 6))
    if (target | 0xFF).max(initial=0) >= len(units):
        raise damaged
    values = units[target[(units[inner] & 0x100) != 0]] & 0x7FFFFFFF
    if values.max(initial=0) >= len(texts) or ((np.frombuffer(texts, np.uint8)[values] & 0xC0) == 0x80).any():
        raise damaged


def _steps(value: object) -> Iterator[Mapping[str, Any]]:
    """All tables of a `tokenizer.json` but those of its vocabulary: normalizers and pre-tokenizers are among them."""
    open_values: list[Any] = [value]
    while open_values:
        table = open_values.pop()
        if isinstance(table, Mapping):
            yield table
            items = [item for name, item in table.items() if name not in ("vocab", "merges")]
        else:
            items = table
        open_values += [item for item in items if isinstance(item, (dict, list))]


def _is_hashable(token: Mapping[str, Any]) -> bool:
    return isinstance(token.get("content"), (str, int, float, type(None)))
