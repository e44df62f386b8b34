"""What all tests share: no network, fixtures for models and commands, and torch refused where that is asked for.

With MFLUX_REFUSE_TORCH=1 importing torch or transformers fails, here and in every process that a test starts, and the
tests that need more than the wheel are left out, which their names tell. Without it they are never left out: where a
package is missing that they need, they fail.
"""

from __future__ import annotations

import gc
import importlib.util
import io
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pytest

REFUSAL = Path(__file__).parent / "support" / "refuse_torch"

if os.environ.get("MFLUX_REFUSE_TORCH") == "1":
    early = {"torch", "transformers"} & sys.modules.keys()
    assert not early, f"{early} came in before the tests could refuse it"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REFUSAL), os.environ.get("PYTHONPATH")]))
    spec = importlib.util.spec_from_file_location("refuse_torch", REFUSAL / "sitecustomize.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    # What needs the reference implementations, or an extra.
    collect_ignore_glob = [
        "parity/*",
        "families/*/test_parity*.py",
        "families/*/test_extra*.py",
        "serve/test_extra*.py",
    ]

# Nothing here may reach for the network; what a test wants of the Hub, it asks of a server of its own.
os.environ["HF_HUB_OFFLINE"] = "1"
# One test's prompts are to be encoded in another as well, and none belongs into this user's cache.
os.environ["MFLUX_PROMPT_CACHE"] = "0"


_modules = 0


def pytest_runtest_setup() -> None:
    """What has been imported and collected stays for good, so the garbage collector need not look at it again: models
    collect whenever they let a part go, and over torch, transformers and ten thousand tests that took half of the time
    that all of this takes."""
    global _modules
    if len(sys.modules) > _modules + 20:
        gc.collect()
        gc.freeze()
        _modules = len(sys.modules)


@pytest.fixture(autouse=True)
def way(request) -> Iterator[str]:
    """How this test's models compute: as this machine does, or as a GPU, see `support.gpu.both_ways`."""
    name = getattr(request, "param", "plain")
    if name == "plain":
        yield name
        return
    from support.gpu import computing

    with computing(name):
        yield name


@pytest.fixture(scope="session")
def tiny_schnell(tmp_path_factory) -> Path:
    """A folder with a tiny FLUX.1 model of random weights that takes no guidance; not to be written to."""
    from support.tiny import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny-schnell", seed=1, guidance=False)


@pytest.fixture(scope="session")
def tiny_dev(tmp_path_factory) -> Path:
    """The same with guidance and resolution-dependent shift, and of other widths."""
    from support.tiny import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny-dev", seed=2, guidance=True)


@pytest.fixture(scope="session")
def written_models(tmp_path_factory) -> Callable[..., Path]:
    """Families' tiny models by name and width, each written when it is first asked for; stored in float32, or as
    published ones are in bfloat16."""
    from support.tiny_models import TINY, in_sixteen_bits

    @cache
    def write(name: str, wide: bool, sixteen: bool = False) -> Path:
        folder = tmp_path_factory.mktemp("tiny") / ("wide" if wide else "narrow")
        return in_sixteen_bits(write(name, wide), folder) if sixteen else TINY[name].write(folder, wide=wide)

    return write


@pytest.fixture
def tiny(request, written_models, in_folder, monkeypatch, cli, way):
    """One family's `TinyModel`, for tests marked with `EVERY_TINY`; with `both_ways`, a GPU's is stored in bfloat16.

    The working directory holds what it generates from, and what the family replaces to be fast is replaced.
    """
    from support.tiny_models import TINY, TinyModel

    case = TINY[request.param]
    for path, value in case.patches.items():
        monkeypatch.setattr(path, value)
    if case.pictures is not None:
        case.pictures(in_folder)
    return TinyModel(case, cli, partial(written_models, request.param, sixteen=way == "as-gpu"))


@pytest.fixture
def in_folder(tmp_path, monkeypatch) -> Path:
    """An empty folder, which is also the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def no_lasting_settings() -> Iterator[None]:
    """Commands set these for their process; the tests share one."""
    if "mflux.backend" in sys.modules:
        from support.gpu import device_restored

        with device_restored():
            yield
    else:
        yield
    logger = logging.getLogger("mflux")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


@dataclass(frozen=True)
class Result:
    """How a command ended, and what it said."""

    status: int
    out: str
    err: str

    @property
    def paths(self) -> list[Path]:
        return [Path(line) for line in self.out.splitlines()]

    @property
    def warnings(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("warning: ")]

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


@pytest.fixture
def cli(capsys, monkeypatch) -> Callable[..., Result]:
    """Run a command in this process: `cli("generate", "--seed", 1)` is `mflux generate --seed 1`."""

    def run(*words: object, stdin: str | None = None) -> Result:
        from mflux.cli.main import main

        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        status = main([str(word) for word in words])
        return Result(status, *capsys.readouterr())

    return run


@pytest.fixture
def cli_process() -> Callable[..., Result]:
    """The same in a process of its own."""

    def run(*words: object, **options) -> Result:
        call = [sys.executable, "-m", "mflux.cli.main", *map(str, words)]
        done = subprocess.run(call, capture_output=True, text=True, timeout=60, **options)
        return Result(done.returncode, done.stdout, done.stderr)

    return run
