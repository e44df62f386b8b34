"""Captions as Ideogram 4 was taught with: JSON of a fixed form.

Source: the authors' guide to prompts, as mflux 0.24 checks it. Plain text is generated from as well, worse.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mflux.errors import UsageError
from mflux.text import shown, some, written
from mflux.utils.strict_json import NotJSON, parse

_PLAIN = "it is plain text, and the model was taught with captions in JSON (see the family's README)"
_COLOUR = re.compile(r"#[0-9A-F]{6}")
# A letter beyond ASCII that is written as an escape.
_ESCAPED = re.compile(r"\\u(?!00[0-7])[0-9a-fA-F]{4}")
_ON_THE_WHOLE, _IN_AN_ELEMENT = 16, 5


def caption(prompt: str | Mapping[str, Any]) -> tuple[str, list[str]]:
    """A prompt as the model reads it, and what is wrong with it, each as the rest of a sentence.

    A caption in JSON, as text or as a table, is written anew without spaces, its keys in their order: as the captions
    were that the model was taught with.

    Raises:
        UsageError: it is neither text nor a table that can be written as JSON.
    """
    if isinstance(prompt, Mapping):
        return _compact(prompt), list(_problems(prompt))
    if not isinstance(prompt, str):
        raise UsageError(f"a prompt is a text or a caption (a dict), not {shown(written(prompt), 60)}")
    text = prompt.strip()
    if not text.startswith("{"):
        return prompt, [_PLAIN]
    try:
        found = parse(text)
    except NotJSON as error:
        return prompt, [f"it begins as JSON and is none ({error}): it is read as plain text"]
    if not isinstance(found, dict):
        return prompt, [_PLAIN]
    escaped = _ESCAPED.search(text) if text.isascii() else None
    also = [f"{escaped[0]} stands in it: write the letter itself"] if escaped else []
    return _compact(found), also + list(_problems(found))


def _compact(table: Mapping[str, Any]) -> str:
    try:
        return json.dumps(table, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"the prompt cannot be written as JSON: {shown(error, 200)}") from None


def _problems(table: Mapping[str, Any]) -> Iterator[str]:
    known = ("high_level_description", "style_description", "compositional_deconstruction")
    yield from _unknown(table, known, "the caption")
    if "high_level_description" in table:
        yield from _texts(table, ("high_level_description",), "the caption")
    if "style_description" in table:
        yield from _style(table["style_description"])
    if "compositional_deconstruction" in table:
        yield from _composition(table["compositional_deconstruction"])
    else:
        yield "the caption has no compositional_deconstruction"


def _style(style: Any) -> Iterator[str]:
    where = "style_description"
    if not isinstance(style, Mapping):
        yield f"{where} is no table"
        return
    if ("photo" in style) == ("art_style" in style):
        yield f"{where} has to have one of photo and art_style"
        return
    kind = ("photo", "medium") if "photo" in style else ("medium", "art_style")
    needed = ("aesthetics", "lighting", *kind)
    yield from _form(style, needed, needed, ("color_palette",), where)
    yield from _colours(style, where, _ON_THE_WHOLE)


def _composition(composition: Any) -> Iterator[str]:
    where = "compositional_deconstruction"
    if not isinstance(composition, Mapping):
        yield f"{where} is no table"
        return
    yield from _form(composition, ("background",), ("background", "elements"), (), where)
    elements = composition.get("elements")
    if not isinstance(elements, list):
        yield f"{where} has to have elements, a list"
        return
    for number, element in enumerate(elements):
        yield from _element(element, f"elements[{number}]")


def _element(element: Any, where: str) -> Iterator[str]:
    if not isinstance(element, Mapping):
        yield f"{where} is no table"
        return
    kind = element.get("type")
    if kind not in ("obj", "text"):
        yield f"the type of {where} is neither obj nor text"
        return
    texts = ("text", "desc") if kind == "text" else ("desc",)
    yield from _form(element, texts, ("type", "bbox", *texts), ("color_palette",), where, optional=("bbox",))
    if "bbox" in element:
        yield from _box(element["bbox"], f"{where}.bbox")
    yield from _colours(element, where, _IN_AN_ELEMENT)


def _form(
    table: Mapping[str, Any],
    texts: Sequence[str],
    order: Sequence[str],
    last: Sequence[str],
    where: str,
    *,
    optional: Sequence[str] = (),
) -> Iterator[str]:
    """What is wrong with a table's keys.

    Args:
        texts: those whose value is text.
        order: all, in the order in which they stand.
        last: what may follow.
        optional: those of `order` that may be left out.
    """
    order = (*order, *last)
    yield from _unknown(table, order, where)
    if missing := [key for key in order if key not in table and key not in (*last, *optional)]:
        yield f"{where} lacks {some(missing)}"
    here = [key for key in table if key in order]
    if here != [key for key in order if key in table]:
        yield f"the keys of {where} stand in the order {some(here)}, not {some([key for key in order if key in table])}"
    yield from _texts(table, [key for key in texts if key in table], where)


def _unknown(table: Mapping[str, Any], known: Sequence[str], where: str) -> Iterator[str]:
    if unknown := [key for key in table if key not in known]:
        yield f"{where} has keys that belong elsewhere or nowhere: {some(unknown)}"


def _texts(table: Mapping[str, Any], keys: Sequence[str], where: str) -> Iterator[str]:
    for key in keys:
        if not isinstance(table[key], str):
            yield f"{key} of {where} is no text"


def _box(box: Any, where: str) -> Iterator[str]:
    if not (isinstance(box, list) and len(box) == 4 and all(type(side) is int for side in box)):
        yield f"{where} is not four whole numbers: top, left, bottom, right"
    elif not all(0 <= side <= 1000 for side in box):
        yield f"{where} {box} is not within 0 to 1000"
    elif box[0] > box[2] or box[1] > box[3]:
        yield f"{where} {box} ends before it begins: top, left, bottom, right"


def _colours(table: Mapping[str, Any], where: str, most: int) -> Iterator[str]:
    if "color_palette" not in table:
        return
    colours = table["color_palette"]
    if not isinstance(colours, list):
        yield f"color_palette of {where} is no list"
        return
    if len(colours) > most:
        yield f"color_palette of {where} has {len(colours)} colours, and {most} is the most"
    if wrong := [colour for colour in colours if not (isinstance(colour, str) and _COLOUR.fullmatch(colour))]:
        yield f"color_palette of {where} has {some(map(written, wrong))}: a colour is #RRGGBB, in capitals"
