"""`make fuzz`: it sees what it is there to see, and each of its readers reads its own sound files."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from support import mutations

from mflux.errors import MfluxError

ROOT = Path(__file__).parents[3]
_spec = importlib.util.spec_from_file_location("fuzz", ROOT / "tools" / "fuzz.py")
fuzz = importlib.util.module_from_spec(_spec)
sys.modules["fuzz"] = fuzz
_path = list(sys.path)
_spec.loader.exec_module(fuzz)
sys.path[:] = _path


def reader(read) -> fuzz.Reader:
    return fuzz.Reader(lambda folder: None, read, ("*",))


def test_what_counts_as_a_find(tmp_path):
    def refuse(text):
        def read(_):
            error = MfluxError()
            # As a class could that cuts nothing.
            error.args = (text,)
            raise error

        return reader(read)

    def fail(_):
        raise KeyError("x")

    def panic(_):
        raise BaseException("panicked")

    assert fuzz.attempt(reader(lambda _: None), tmp_path) == (fuzz.ACCEPTED, "")
    assert fuzz.attempt(refuse("x is damaged: fetch it again"), tmp_path) == (fuzz.REFUSED, "")
    for text in ("", "two\nlines", "\x1b[2J", "x" * (fuzz.LONGEST_MESSAGE + 1)):
        assert fuzz.attempt(refuse(text), tmp_path)[0] == fuzz.FIND
    for read in (fail, panic):
        outcome, what = fuzz.attempt(reader(read), tmp_path)
        assert outcome == fuzz.FIND and "Traceback" in what


@pytest.mark.parametrize("name", fuzz.READERS)
def test_every_reader_reads_its_sound_files_and_changed_ones(tmp_path, name):
    """A seed's cases are the same each time."""
    call = [sys.executable, ROOT / "tools" / "fuzz.py", "--reader", name, "--seed", "7", "--finds", tmp_path / "finds"]
    done = subprocess.run([*call, "--seconds", "0.5"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("seed 7, ")
    row = re.search(rf"^{name} +([\d,]+) +([\d,]+) +([\d,]+) +0$", done.stdout, re.M)
    assert row and int(row[1].replace(",", "")) > 0
    assert not (tmp_path / "finds").exists()


def test_a_process_that_ends_is_a_find_and_its_files_are_kept(tmp_path, monkeypatch):
    """The reader of a child of this process, which ends itself at its third case."""
    patch = tmp_path / "sitecustomize.py"
    patch.write_text(
        "import os, random, signal\n"
        "class Ends(random.Random):\n"
        "    def __init__(self, seed=None):\n"
        "        super().__init__(seed)\n"
        "        if str(seed).endswith(' texts 2'): os.kill(os.getpid(), signal.SIGSEGV)\n"
        "random.Random = Ends\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    counts = fuzz.fuzz("texts", 1, 3.0, tmp_path / "finds")
    assert counts[fuzz.FIND] == 1 and counts.total() > 3
    (find,) = (tmp_path / "finds").iterdir()
    about = json.loads((find / "find.json").read_text())
    assert (about["reader"], about["seed"], about["case"]) == ("texts", 1, 2)
    assert f"ended with {-signal.SIGSEGV}" in about["what"]
    assert (find / "files" / "prompt.json").is_file()
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "fuzz.py", "--replay", find], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.split()[0] in ("read", "refused")


def test_changes_come_from_the_seed_and_reach_everything():
    sound = json.dumps({"a": [1, {"b": "x"}], "c": None}).encode()
    for change in (mutations.mutated, mutations.mutated_json, mutations.cut):
        once = [change(sound, random.Random(number)) for number in range(300)]
        assert once == [change(sound, random.Random(number)) for number in range(300)]
        assert len(set(once)) > 30
    hostile = json.dumps(mutations.HOSTILE)
    for number in range(300):
        mutations.mutated_value(json.loads(sound), random.Random(number))
    assert json.dumps(mutations.HOSTILE) == hostile, "what is put into one file must not change the next"
    kinds = Counter(type(mutations.mutated_value(json.loads(sound), random.Random(number))) for number in range(500))
    assert len(kinds) > 3
