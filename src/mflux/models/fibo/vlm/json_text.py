"""The JSON object in a model's answer: found, mended where that is safe, checked, or refused with what is wrong.

Mended is what leaves no doubt about what was meant: text and code fences around the object, commas too many, raw line
breaks and wrong escapes in strings, and an end that is missing because the answer was cut off.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mflux.errors import MfluxError
from mflux.models.fibo.vlm.prompts import FIELDS
from mflux.text import size
from mflux.utils.exceptions import PromptFileReadError
from mflux.utils.paths import read_bounded, user_path
from mflux.utils.strict_json import NotJSON, parse

# A prompt has three levels; an answer that goes beyond this is brackets and nothing else.
_DEEPEST = 64
# Of a prompt's file, in bytes.
_LARGEST = 16 << 20
_BLANK = re.compile(r"[ \t\r\n]*")
_STRING = re.compile(r'(?:[^"\\]|\\.)*', re.DOTALL)
_ESCAPE = re.compile(r'\\(["\\/bfnrt]|u[0-9a-fA-F]{4})?')
_CUT_ESCAPE = re.compile(r"(?<!\\)((?:\\\\)*)\\u[0-9a-fA-F]{0,3}$")
_CONTROL = re.compile(r"[\x00-\x1f]")
_WORD = re.compile(r"[^\s,:{}\[\]\"]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_CONSTANTS = {"true": True, "false": False, "null": None}
_KINDS: dict[type, str] = {str: "text", list: "a list", dict: "an object"}
_ABSENT = object()

CUT_OFF = "its end was missing"


class AnswerError(MfluxError, ValueError):
    """The model's answer is not the JSON that was asked for, and cannot be mended.

    Attributes:
        problem: what is wrong with it.
        answer: what the model said.
    """

    def __init__(self, problem: str, answer: str = "", advice: str = "try again with another seed"):
        super().__init__(f"{problem}: {advice}")
        self.problem, self.answer = problem, answer


@dataclass(frozen=True)
class Found:
    """A JSON object, and what had to be mended for it, in words."""

    value: dict[str, Any]
    mended: tuple[str, ...] = ()


def read_object(answer: str) -> Found:
    """The JSON object in an answer; of several, the one with the most of a prompt's fields, then the longest.

    Raises:
        AnswerError: there is none, or it is broken in a way that leaves open what was meant.
    """
    best: tuple[tuple[int, int], Found] | None = None
    problem = None
    start = answer.find("{")
    while start >= 0:
        reader = _Reader(answer, start)
        try:
            value = reader.value()
        except _Broken as broken:
            problem = problem or str(broken)
        else:
            if answer[:start].strip() or answer[reader.at :].strip():
                reader.note("there was text around it")
            rank = len(FIELDS.keys() & value.keys()), reader.at - start
            if best is None or rank > best[0]:
                best = rank, Found(value, tuple(reader.notes))
        start = answer.find("{", max(reader.at, start + 1))
    # What is left of a broken object is not what was asked for.
    if best is None or (problem and not best[0][0]):
        problem = problem or "there is no JSON object in it"
        raise AnswerError(f"the model's answer cannot be used, {problem}", answer)
    return best[1]


def check(value: Mapping[str, Any], answer: str = "") -> None:
    """Make sure that the prompt's fields are there and hold what belongs into them.

    Raises:
        AnswerError: no field of a prompt is there, or one holds another kind of value.
    """
    if not FIELDS.keys() & value.keys():
        held = ", ".join(list(value)[:5]) or "nothing"
        raise AnswerError(f"the model's answer is no prompt, it holds {held}", answer)
    wrong = [name for name, kind in FIELDS.items() if name in value and not isinstance(value[name], kind)]
    if wrong:
        said = " and ".join(f"{name} is not {_KINDS[FIELDS[name]]}" for name in wrong)
        raise AnswerError(f"the model's answer is no prompt, {said}", answer)


def to_text(value: Mapping[str, Any]) -> str:
    """As a person reads it: indented, every letter as itself."""
    return json.dumps(value, indent=2, ensure_ascii=False)


class _Broken(Exception):
    pass


class _Reader:
    """Reads one value of JSON from `at` on, leaves `at` behind it, and notes what it had to overlook."""

    def __init__(self, text: str, at: int):
        self.text, self.at = text, at
        self.notes: list[str] = []

    def note(self, what: str) -> None:
        if what not in self.notes:
            self.notes.append(what)

    def value(self, depth: int = 0) -> Any:
        """`_ABSENT` where the text ends before there is anything to keep."""
        following = self._next()
        if depth > _DEEPEST:
            raise self._broken("brackets go deeper than in any prompt")
        if following not in ("{", "["):
            return self._string() if following == '"' else self._word()
        held = self._members(depth) if following == "{" else self._items(depth)
        # Of what had only begun when the answer was cut off, nothing is left to keep.
        is_stub = depth > 0 and not held and self.text[self.at - 1] not in "}]"
        return _ABSENT if is_stub else held

    def _members(self, depth: int) -> dict[str, Any]:
        members: dict[str, Any] = {}
        self.at += 1
        while not self._closes("}"):
            if self._next() != '"':
                raise self._broken("a field's name in quotation marks belongs here")
            name = self._string()
            if self._next() == "":
                self.note(CUT_OFF)
                break
            if self.text[self.at] != ":":
                raise self._broken("a colon belongs here")
            self.at += 1
            value = self.value(depth + 1)
            if value is not _ABSENT:
                members[name] = value
            self._comma("}")
        return members

    def _items(self, depth: int) -> list[Any]:
        items: list[Any] = []
        self.at += 1
        while not self._closes("]"):
            value = self.value(depth + 1)
            if value is not _ABSENT:
                items.append(value)
            self._comma("]")
        return items

    def _next(self) -> str:
        """The next character that is not blank, "" at the end of the text."""
        self.at = self._end_of(_BLANK, self.at)
        return self.text[self.at : self.at + 1]

    def _end_of(self, pattern: re.Pattern[str], start: int) -> int:
        """Where what the pattern takes from there ends; it may be nothing."""
        found = pattern.match(self.text, start)
        return found.end() if found else start

    def _closes(self, bracket: str) -> bool:
        following = self._next()
        if following == "":
            self.note(CUT_OFF)
            return True
        if following == bracket:
            self.at += 1
        return following == bracket

    def _comma(self, bracket: str) -> None:
        following = self._next()
        if following == ",":
            self.at += 1
            if self._next() == bracket:
                self.note("there was a comma too many")
        elif following not in (bracket, ""):
            raise self._broken(f"a comma or {bracket} belongs here")

    def _string(self) -> str:
        start, self.at = self.at + 1, self._end_of(_STRING, self.at + 1)
        content = self.text[start : self.at]
        if self.text[self.at : self.at + 1] == '"':
            self.at += 1
        else:
            self.note(CUT_OFF)
            content, self.at = _CUT_ESCAPE.sub(r"\1", content), len(self.text)
        if _CONTROL.search(content):
            self.note("a text had a raw line break or the like")
        if any(not escape[1] for escape in _ESCAPE.finditer(content)):
            self.note("a text had a wrong escape")
            content = _ESCAPE.sub(lambda escape: escape[0] if escape[1] else "", content)
        text = json.loads(f'"{content}"', strict=False)
        # Half of a surrogate pair cannot be written to a file.
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if whole != text:
            self.note("a text had half a character")
        return whole

    def _word(self) -> Any:
        word = self.text[self.at : self._end_of(_WORD, self.at)]
        if self.at + len(word) == len(self.text):
            # Perhaps there would have been more digits.
            self.note(CUT_OFF)
            self.at = len(self.text)
            return _ABSENT
        if word in _CONSTANTS:
            value = _CONSTANTS[word]
        elif _NUMBER.fullmatch(word) and len(word) < 400 and math.isfinite(float(word)):
            value = json.loads(word)
        else:
            raise self._broken("a value belongs here")
        self.at += len(word)
        return value

    def _broken(self, what: str) -> _Broken:
        found = self.text[self.at : self.at + 20]
        return _Broken(f"at character {self.at + 1} of it {what} and not {found!r}" if found else f"at its end {what}")


def read_structured_prompt(path: str | Path) -> str:
    """The text of a JSON prompt's file.

    Raises:
        PromptFileReadError: it cannot be read, is empty, or is not a JSON object.
    """
    path = user_path(path)
    try:
        content = read_bounded(path, _LARGEST)
        if len(content) > _LARGEST:
            raise PromptFileReadError(f"the prompt file {path} has more than {size(_LARGEST)}: no prompt is as long")
        text = content.decode("utf-8-sig").strip()
    except OSError as error:
        raise PromptFileReadError(f"cannot read the prompt file {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise PromptFileReadError(f"the prompt file {path} is not text in UTF-8") from None
    if not text:
        raise PromptFileReadError(f"the prompt file {path} is empty")
    try:
        value = parse(text)
    except NotJSON as error:
        raise PromptFileReadError(f"the prompt file {path} {error}") from None
    if not isinstance(value, dict):
        raise PromptFileReadError(f"the prompt file {path} is not a prompt: it holds no JSON object")
    return text
