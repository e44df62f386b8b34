"""FIBO-VLM where transformers is missing: one sentence at once, and nothing is fetched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mflux.errors import MissingExtraError

REFUSAL = Path(__file__).parents[2] / "support" / "refuse_torch"
SENTENCE = (
    "FIBO-VLM needs the package transformers, which is not installed: "
    'pip install "mflux[vlm]" (with uv: uv sync --extra vlm)'
)

# The command's function in a process of its own, which tells what it cost and what it loaded.
RUN = """
import json, resource, sys
before = resource.getrusage(resource.RUSAGE_SELF)
from mflux.models.fibo.cli.{module} import main
status = main(sys.argv[1:])
after = resource.getrusage(resource.RUSAGE_SELF)
seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
print(json.dumps([status, seconds, sorted(sys.modules)]))
"""
COMMANDS = {
    "fibo_inspire": ("--image-path", "none.png"),
    "fibo_refine": ("--prompt-file", "none.json", "--instructions", "make it blue"),
}


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """transformers is refused, and the Hub may be asked: whoever asked it would be told of the address."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REFUSAL), os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "hub"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }


@pytest.mark.parametrize("module", COMMANDS)
def test_commands(module, environment, tmp_path):
    words = COMMANDS[module]
    ended = subprocess.run(
        [sys.executable, "-c", RUN.format(module=module), *words],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    status, seconds, loaded = json.loads(ended.stdout)
    assert ended.stderr == f"error: {SENTENCE}\n"
    assert status == 1
    # Processor time: a busy machine must not fail this, and waiting for a network would show in what was loaded.
    assert seconds < 0.5
    assert not {"huggingface_hub", "mlx.core", "numpy", "PIL", "socket"} & set(loaded)
    assert list(tmp_path.iterdir()) == []


def test_class(environment, tmp_path):
    run = (
        "import sys, time\n"
        "from mflux.errors import MissingExtraError\n"
        "from mflux.models.fibo.vlm.fibo_vlm import FiboVLM\n"
        "start = time.process_time()\n"
        "try:\n"
        "    FiboVLM()\n"
        "except MissingExtraError as error:\n"
        "    print(error)\n"
        "    assert error.exit_code == 1 and isinstance(error, ImportError) and error.name == 'transformers'\n"
        "assert time.process_time() - start < 0.5\n"
        "assert 'huggingface_hub' not in sys.modules\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", run], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (ended.stdout, ended.stderr) == (f"{SENTENCE}\n", "")
    assert list(tmp_path.iterdir()) == []


def test_jinja_alone_may_be_missing(monkeypatch):
    """transformers may be there without its template engine."""
    from mflux.models.fibo.vlm import packages

    monkeypatch.setitem(sys.modules, "transformers", sys)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r'FIBO-VLM needs the package jinja2.*pip install "mflux\[vlm\]"'):
        packages.check_installed()


@pytest.mark.parametrize("module", COMMANDS)
def test_help_and_usage_come_first(module, environment, tmp_path):
    """Without the extra one may still read the help."""
    for words, status in ((("--help",), 0), ((), 2)):
        ended = subprocess.run(
            [sys.executable, "-m", f"mflux.models.fibo.cli.{module}", *words],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert ended.returncode == status
        assert "Traceback" not in ended.stderr
        assert ("vlm" in ended.stdout) == (status == 0)
