"""What README.md says about speed is what benchmarks/steps.md has; programs that no test runs name what exists."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]
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


# ---- programs beside the package

# Those named after 0.24 run with mflux 0.24.
PROGRAMS = [
    path for folder in ("benchmarks", "tools") for path in (ROOT / folder).glob("*.py") if "024" not in path.name
]


@pytest.mark.parametrize("path", sorted(PROGRAMS), ids=lambda path: path.name)
def test_what_a_program_takes_from_mflux_is_there(path):
    """Also where it is imported within a function, and as an attribute of a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules: dict[str, ModuleType] = {}
    missing = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "mflux":
            continue
        module = importlib.import_module(node.module)
        for alias in node.names:
            if not hasattr(module, alias.name):
                try:
                    importlib.import_module(f"{node.module}.{alias.name}")
                except ModuleNotFoundError:
                    missing.append(f"{node.module}.{alias.name}")
                    continue
            found = getattr(module, alias.name)
            if isinstance(found, ModuleType):
                modules[alias.asname or alias.name] = found
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            module = modules[node.value.id]
            if not hasattr(module, node.attr):
                missing.append(f"{module.__name__}.{node.attr}")
    assert not missing
