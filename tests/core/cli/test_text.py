"""What a person is shown."""

from __future__ import annotations

import pytest

from mflux.text import count, lines_shown, one_line, shown, size, some, without_password


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("plain", "plain"), ("Zürich 東京\u3000x", "Zürich 東京\u3000x"), ("👩\u200d🚀", "👩\u200d🚀"),
        ("\x1b[2J", r"\x1b[2J"), ("a\r\nb\tc\0", r"a\r\nb\tc\x00"), ("\ud800", r"\ud800"), ("\u202eabc", r"\u202eabc"),
        ("\u2066a\u2069", r"\u2066a\u2069"), ("\x9b1m", r"\x9b1m"), (5, "5"), ("\u2028", r"\u2028"),
    ],
)  # fmt: skip
def test_shown(text, told):
    assert shown(text) == told
    assert one_line(shown(text)) == told.replace("\u3000", " ")


def test_nothing_endless():
    assert shown("x" * 10**6) == "x" * 119 + "…"
    assert shown("x" * 10**6, 5) == "xxxx…"
    assert len(one_line("word " * 10**6)) == 2000
    assert some(range(9), 3) == "0, 1, 2, …"
    assert some(["a\nb", "y" * 500], each=10) == r"a\nb, " + "y" * 9 + "…"


def test_one_line():
    assert one_line(" two\nlines\r\n and\ta tab\x07 ") == r"two lines and a tab\x07"


@pytest.mark.parametrize(
    ("number", "told"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1_234_567, "1.2 MB"), (33e9, "33 GB"), (1.5e12, "1500 GB")],
)
def test_sizes(number, told):
    assert size(number) == told


def test_counts():
    assert count(["a"], "tensor") == "1 tensor"
    assert count([], "tensor") == "0 tensors"
    assert count(12_345, "tensor") == "12,345 tensors"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("no connection to https://me:geheim@hub:80/x (gone)", "no connection to https://…@hub:80/x (gone)"),
        ("http://hf_token@host", "http://…@host"), ("http://a:p@ss@host/x@y", "http://…@host/x@y"),
        ("org/name@main and me@example.org", "org/name@main and me@example.org"), ("https://host/a@b", "https://host/a@b"),
        ("socks5://a:b@c, http://d:e@f", "socks5://…@c, http://…@f"),
    ],
)  # fmt: skip
def test_addresses_are_told_without_passwords(text, told):
    assert without_password(text) == one_line(text) == told


def test_several_lines():
    assert lines_shown("a\tb\n\x1b[2Jc\r\n") == "a\tb\n\\x1b[2Jc\\r\n"
    assert lines_shown("x" * 9 + "\n" + "y" * 9, 5) == "xxxx…\nyyyy…"
