"""The JSON in a model's answer: what is mended, and what is refused."""

from __future__ import annotations

import json
import string

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mflux.models.fibo.vlm.json_text import CUT_OFF, AnswerError, check, read_object, to_text

FULL = {
    "short_description": 'A "small" dog,\nasleep: {x} [y] \\ é 🙂',
    "objects": [{"description": "dog", "number_of_objects": 3}, {"description": "mat", "pose": None}],
    "lighting": {"conditions": "dim", "is_soft": True},
    "text_render": [],
    "context": "",
}
# A busy machine is slow, and that is no failure.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
LEAF = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(LEAF, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4))
OBJECTS = st.dictionaries(st.text(max_size=8), VALUES, max_size=5)


@patient
@given(OBJECTS, st.sampled_from([None, 2, "\t"]), st.booleans())
def test_sound_json_is_as_it_was(value, indent, ensure_ascii):
    found = read_object(json.dumps(value, indent=indent, ensure_ascii=ensure_ascii))
    whole = json.loads(json.dumps(value).encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    assert json.dumps(found.value) == json.dumps(whole)
    assert found.mended == ()


@patient
@given(st.data())
def test_every_beginning_of_sound_json_is_kept_as_far_as_it_goes(data):
    text = json.dumps(FULL, ensure_ascii=data.draw(st.booleans()))
    length = data.draw(st.integers(1, len(text) - 1))
    found = read_object(text[:length])
    assert found.mended in ((CUT_OFF,), (CUT_OFF, "a text had half a character"))
    assert is_beginning(found.value, FULL)
    # Nothing but the value that was being written, or its name, is lost.
    if length > text.index('"lighting"'):
        assert found.value["objects"] == FULL["objects"]


def is_beginning(part, whole) -> bool:
    if isinstance(whole, dict) and isinstance(part, dict):
        return list(part) == list(whole)[: len(part)] and all(is_beginning(part[name], whole[name]) for name in part)
    if isinstance(whole, list) and isinstance(part, list):
        return len(part) <= len(whole) and all(map(is_beginning, part, whole))
    if isinstance(whole, str) and isinstance(part, str):
        # An emoji may be cut in half.
        return whole.startswith(part.rstrip("\ufffd"))
    return part is whole or part == whole


@patient
@given(st.text(alphabet=string.printable + "é\u2028\ud800", max_size=60))
def test_anything_is_either_json_or_refused(text):
    for answer in (text, "{" + text, '{"context": ' + text, '{"context": "' + text):
        try:
            value = read_object(answer).value
        except AnswerError as error:
            assert error.answer == answer
            assert "\n" not in str(error)
        else:
            assert json.loads(to_text(value).encode()) == value


@pytest.mark.parametrize(
    ("answer", "value", "mended"),
    [
        ('{"context": "x",}', {"context": "x"}, "a comma too many"),
        ('{"objects": [1, 2, ], }', {"objects": [1, 2]}, "a comma too many"),
        ('```json\n{"context": "x"}\n```', {"context": "x"}, "text around it"),
        ('Here you are: {"context": "x"} Anything else?', {"context": "x"}, "text around it"),
        ('{"context": "x"}}', {"context": "x"}, "text around it"),
        ('{"context": "a\nb\tc"}', {"context": "a\nb\tc"}, "raw line break"),
        (r'{"context": "it\'s 5\% \u12 \x"}', {"context": "it's 5% u12 x"}, "wrong escape"),
        (r'{"context": "\ud83d!"}', {"context": "\ufffd!"}, "half a character"),
        ('{"context": "x", "objects": [{"a": 1}, {"b"', {"context": "x", "objects": [{"a": 1}]}, "end was missing"),
        ('{"context": "x", "count": 12', {"context": "x"}, "end was missing"),
        ('{"context": "x", "count": tr', {"context": "x"}, "end was missing"),
        ('{"context": "x\\', {"context": "x"}, "end was missing"),
        ('{"context": "x\\u00', {"context": "x"}, "end was missing"),
        ('{"context": "x\\\\u00', {"context": "x\\u00"}, "end was missing"),
        ('{note} {"context": "x"}', {"context": "x"}, "text around it"),
        # Of several, the one that is a prompt; else the longest.
        ('{"a": 1, "b": "something long"} {"context": "x"}', {"context": "x"}, "text around it"),
        ('{"a": 1} {"a": 1, "b": 2}', {"a": 1, "b": 2}, "text around it"),
    ],
)
def test_mended(answer, value, mended):
    found = read_object(answer)
    assert found.value == value
    assert any(mended in what for what in found.mended)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("", "there is no JSON object in it"),
        ("[1, 2]", "there is no JSON object in it"),
        ('"context"', "there is no JSON object in it"),
        ('{"context" "x"}', "at character 12 of it a colon belongs here and not '\"x\"}'"),
        ('{"context": "x" "objects": []}', "at character 17 of it a comma or } belongs here"),
        ('{"context": "x]', None),
        ('{"context": "x"]', "at character 16 of it a comma or } belongs here and not ']'"),
        ("{context: 1}", "a field's name in quotation marks belongs here and not 'context: 1}'"),
        ("{'context': 1}", "a field's name in quotation marks"),
        ('{"context": x}', "a value belongs here and not 'x}'"),
        ('{"context": True}', "a value belongs here"),
        ('{"context": NaN}', "a value belongs here"),
        ('{"context": 1e999}', "a value belongs here"),
        ('{"context": 01}', "a value belongs here"),
        ('{"context": ' + "9" * 5000 + "}", "a value belongs here"),
        ('{"context": ,}', "a value belongs here"),
        ('{"a":' * 5000, "brackets go deeper"),
        ('{"objects":' + "[" * 5000, "brackets go deeper"),
        # The inner object of a broken one is not what was asked for.
        ('{"context": x, "lighting": {"shadows": "long"}}', "a value belongs here"),
    ],
)
def test_refused(answer, says):
    if says is None:
        assert read_object(answer).mended == (CUT_OFF,)
        return
    with pytest.raises(AnswerError) as raised:
        read_object(answer)
    assert says in str(raised.value)
    assert isinstance(raised.value, ValueError)
    assert raised.value.exit_code == 1


def test_fields():
    check(FULL)
    check({"context": "x", "something": "else"})
    for value, says in (
        ({}, "it holds nothing"),
        ({"a": 1, "b": 2}, "it holds a, b"),
        ({"context": ["x"]}, "context is not text"),
        ({"objects": {}, "lighting": "dim"}, "objects is not a list and lighting is not an object"),
    ):
        with pytest.raises(AnswerError, match=says):
            check(value, "answer")


def test_text_is_for_reading():
    assert to_text({"context": "é"}) == '{\n  "context": "é"\n}'
