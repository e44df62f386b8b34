"""Nothing heavy is imported before it is needed, and torch never."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("mlx", "numpy", "PIL", "huggingface_hub", "tokenizers", "safetensors", "tqdm", "torch", "transformers")
TORCH = ("torch", "transformers", "diffusers", "peft")
SOURCE = Path(__file__).parents[3] / "src" / "mflux"


def python(code: str, *words: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_helping_loads_nothing_heavy():
    code = """
import contextlib, importlib, io, sys

def tell(what):
    print(what, *(name for name in sys.argv[1:] if name in sys.modules))

import mflux
tell("mflux")
mflux.__version__
tell("version")
from mflux.cli.commands import COMMANDS
from mflux.cli.main import main
for name in COMMANDS:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            status = main([name, "--help"])
        except SystemExit as end:
            status = end.code
    assert not status and f"mflux-{name}" in out.getvalue()
    tell(name)
with contextlib.redirect_stdout(io.StringIO()):
    main(["--help"])
tell("help")
"""
    from mflux.cli.commands import COMMANDS

    assert python(code, *HEAVY).splitlines() == ["mflux", "version", *COMMANDS, "help"]


def test_a_usage_error_loads_nothing_heavy_either():
    code = """
import sys
from mflux.cli.main import main
for words in (["--width", "0"], ["--prompt", "x"], ["--model", "seedvr2-3b", "--prompt", "x"]):
    assert main(["generate", *words]) == 2
print(*(name for name in sys.argv[1:] if name in sys.modules))
"""
    assert python(code, *HEAVY).split() == []


def test_helping_takes_no_time():
    """At most 0.2 s where `python -c pass` takes 0.02 s, counted in processor time, so that a busy machine is fair."""

    def seconds(*words: str) -> float:
        used = []
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        return min(used)

    assert seconds("-m", "mflux.models.flux.cli.flux_generate", "--help") < 10 * max(seconds("-c", "pass"), 0.02)


def test_drawing_loads_no_torch(tiny_schnell, tmp_path):
    """Everything that a picture needs, in an interpreter that counts what is asked for."""
    code = """
import sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in refused:
            print("asked for", name)

refused = sys.argv[1].split()
sys.meta_path.insert(0, Watch())
from mflux.cli.main import main
sys.exit(main(sys.argv[2:]))
"""
    words = ["--prompt", "a red circle", "--width", "16", "--height", "16", "--steps", "1", "--seed", "1"]
    output = tmp_path / "image.png"
    # What is refused is asked for no less.
    path = os.pathsep.join(
        part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if not part.endswith("refuse_torch")
    )
    out = python(
        code,
        " ".join(TORCH),
        "generate",
        "--model",
        str(tiny_schnell),
        *words,
        "--output",
        str(output),
        PYTHONPATH=path,
    )
    assert out == f"{output}\n"


def test_one_door_to_torch():
    """What the linter enforces, for whoever runs only the tests."""
    door = SOURCE / "compat" / "torch_minimal.py"
    for path in SOURCE.rglob("*.py"):
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        imports = [line for line in lines if line.startswith(("import torch", "from torch"))]
        assert not imports or path == door, (path, imports)


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_the_refusal_refuses(package):
    """The tests' own hook: without it the suite without torch would prove nothing."""
    folder = Path(__file__).parents[2] / "support" / "refuse_torch"
    code = f"""
import importlib.util
try:
    import {package}
except ModuleNotFoundError as error:
    print(error.name, error)
from mflux.optional import is_installed
print(is_installed("torch-lite"), is_installed("vlm"))
"""
    out = python(code, PYTHONPATH=str(folder))
    assert out.splitlines() == [f"{package} the tests refuse to import {package}", "False False"]


@pytest.mark.skipif(os.environ.get("MFLUX_REFUSE_TORCH") != "1", reason="only with MFLUX_REFUSE_TORCH=1")
def test_the_refusal_is_in_force():
    with pytest.raises(ImportError, match="the tests refuse"):
        import torch  # noqa: F401
    assert "refuse_torch" in os.environ["PYTHONPATH"]
