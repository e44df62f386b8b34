"""The door to MLX: nothing of it runs or loads what lies in a folder that users share."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest

from mflux import backend
from mflux.backend import mx

pytestmark = pytest.mark.skipif(backend.on_gpu(), reason="a GPU's kernels are not compiled by g++")

ACTIVATE = (
    "import mflux.backend as b; {first}; b.mx.eval(*(f(b.mx.ones((4, 4))) for f in (b.nn.gelu_approx, b.nn.silu)))"
)


@pytest.fixture
def watched(tmp_path) -> dict[str, str]:
    """An environment whose g++ leaves a mark, and an empty temporary folder."""
    programs, temporary = tmp_path / "bin", tmp_path / "temporary"
    programs.mkdir()
    temporary.mkdir()
    compiler = programs / "g++"
    compiler.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\nexit 0\n")
    compiler.chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    # Also where a test runs it in another folder.
    modules = os.pathsep.join(map(os.path.abspath, filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))))
    environment = {name: value for name, value in os.environ.items() if name != "MLX_DISABLE_COMPILE"}
    return environment | {"PATH": path, "TMPDIR": str(temporary), "PYTHONPATH": modules}


def run(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)


def test_the_trap_works(tmp_path, watched):
    done = run(ACTIVATE.format(first="b.mx.enable_compile()"), watched)
    assert done.returncode != 0
    assert (tmp_path / "ran").exists()
    assert list((tmp_path / "temporary").rglob("*.cpp"))


def test_no_compiler_is_started_and_nothing_is_written(tmp_path, watched, cli_process):
    for first in ("pass", "b.mx.random.seed(1)"):
        done = run(ACTIVATE.format(first=first), watched)
        assert (done.returncode, done.stderr) == (0, "")
    drawn = cli_process(
        *("generate", "--model", "demo", "--prompt", "a red circle", "--steps", 1, "--output", tmp_path / "a.png"),
        env=watched,
    )
    assert (drawn.status, drawn.paths) == (0, [tmp_path / "a.png"])
    assert not (tmp_path / "ran").exists()
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize("kind", ["missing", "not a folder", "read-only", "run by a shell", "not text", "empty"])
def test_a_temporary_folder_that_is_of_no_use(tmp_path, watched, cli_process, kind):
    places = {
        "missing": tmp_path / "missing",
        "not a folder": tmp_path / "file",
        "read-only": tmp_path / "read-only",
        "run by a shell": tmp_path / "x$(touch ran)`touch ran`",
        "not text": os.fsencode(tmp_path) + b"/\xff",
        "empty": "",
    }
    (tmp_path / "file").touch()
    places["read-only"].mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    places["run by a shell"].mkdir()
    drawn = cli_process(
        *("generate", "--model", "demo", "--prompt", "a red circle", "--steps", 1, "--output", "a.png"),
        env=watched | {"TMPDIR": os.fsdecode(places[kind])},
        cwd=tmp_path,
    )
    assert (drawn.status, drawn.out, drawn.errors) == (0, "a.png\n", [])
    assert not (tmp_path / "ran").exists()


def test_it_is_turned_off_once(monkeypatch):
    """A program may turn it on for functions of its own, or take the CPU later."""
    calls = []
    monkeypatch.setattr(mx, "disable_compile", lambda: calls.append(1))
    backend.settle_compiling()
    assert calls == []  # done when it was imported
    monkeypatch.setattr(backend, "_is_settled", False)
    monkeypatch.setattr(backend, "on_gpu", lambda: True)
    backend.settle_compiling()
    assert calls == []
    monkeypatch.setattr(backend, "on_gpu", lambda: False)
    backend.settle_compiling()
    backend.settle_compiling()
    assert calls == [1]
