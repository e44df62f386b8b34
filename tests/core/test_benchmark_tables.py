"""What README.md says about speed is what benchmarks/steps.md has, and that has all there is to measure."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import steps  # noqa: E402


def table() -> dict[tuple[str, str], list[str]]:
    """benchmarks/steps.md: what follows a part and its pixels."""
    lines = (ROOT / "benchmarks" / "steps.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {(row[0], row[1]): row[2:] for row in rows if len(row) == 9}


def test_every_part_was_measured():
    rows = table()
    sizes = {"tokens": ("512", "1024"), "no": ("–",), "decode": ("256",), "encode": ("256",)}
    missing = [(part.name, size) for part in steps.PARTS for size in sizes[part.sized] if (part.name, size) not in rows]
    assert not missing


def test_the_headline_of_speed_is_what_was_measured():
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    number = r"(\d+\.\d+)"
    quoted = re.search(
        rf"a double block of FLUX\.1 at 1024 px takes {number} of mflux 0\.24's time on a Linux CPU and {number} of "
        rf"diffusers' on torch; at 4 bits it takes {number} times as long",
        text,
    )
    assert quoted, "README.md has no headline of speed"
    _, _, of_torch, of_024, packed, *_ = table()["flux transformer with guidance: a double block", "1024"]
    assert quoted.groups() == (of_024, of_torch, packed)
