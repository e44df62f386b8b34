"""JSON of a known shape: what a table may say, and that a strict reader names a key that nothing reads."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from mflux.utils.typed_json import Wrong, checked_fields


@dataclass(frozen=True)
class Inner:
    rank: int = 4


@dataclass(frozen=True)
class Outer:
    steps: int = field(default=10, metadata={"least": 1, "most": 64})
    names: tuple[str, ...] = ()
    rate: float | None = None
    inner: Inner = Inner()


def test_only_what_is_said_is_given():
    table = {"steps": 2.0, "names": ["a"], "inner": {"rank": 3}, "other": 1}
    assert checked_fields(Outer, table) == {"steps": 2, "names": ("a",), "inner": {"rank": 3}}


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"steps": 0}, "steps is 0, not a whole number from 1 to 64"),
        ({"names": [1]}, "names is [1], not a list of which each is a text"),
        ({"rate": "x"}, "rate is 'x', not a finite number or null"),
        ({"inner": 3}, "inner is 3, not a table"),
        ({"inner": {"rank": -1}, "step": 1}, "step is not known: did you mean steps?"),
        ({"zzz": 1}, "zzz is not known: there are steps, names, rate, inner"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(table, told):
    with pytest.raises(Wrong) as caught:
        checked_fields(Outer, table, strict=True)
    assert str(caught.value) == told


def test_a_reader_may_know_how_large_a_number_is():
    with pytest.raises(Wrong, match="rank is 9, not a whole number from 0 to 8"):
        checked_fields(Inner, {"rank": 9}, most_of=lambda name: 8)
