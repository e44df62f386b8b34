"""Throw-away environments made from the built wheel.

They take minutes, gigabytes of disk for a while, and a package index, so they run only when asked for:
`make test-environments`. Where PyTorch's CPU index does not answer, `tools/cpu_index.py` stands in for it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.environments import ROOT, Environment, Tools, execute

import cpu_index  # isort: skip (environments.py puts tools/ on the path)
import lock  # isort: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    wanted = os.environ.get("MFLUX_TEST_ENVIRONMENTS") == "1"
    for item in items:
        # Whatever installs something asks for the tools to do it with.
        installs = Path(__file__).parent in item.path.parents and "tools" in getattr(item, "fixturenames", ())
        if installs and not wanted:
            item.add_marker(pytest.mark.skip(reason="takes minutes and an index: make test-environments"))


@pytest.fixture(scope="session")
def tools(tmp_path_factory) -> Tools:
    return Tools(tmp_path_factory.mktemp("tools") / "venv")


@pytest.fixture(scope="session")
def wheel(tools, tmp_path_factory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    done = execute(tools.python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT)
    assert done.status == 0, done.err
    (path,) = folder.glob("mflux-*.whl")
    return path


@dataclass(frozen=True)
class TorchIndex:
    """Where torch's CPU builds come from, and the one version that is there if it is a stand-in."""

    url: str
    version: str | None

    @property
    def constraints(self) -> list[str]:
        # A stand-in has one version. The default index has newer ones, with CUDA, and pip takes the newest of all.
        return [f"torch=={self.version}"] if self.version else []


@pytest.fixture(scope="session")
def torch_index(tools) -> Iterator[TorchIndex]:
    """The real index, or a stand-in on the loopback address."""
    if cpu_index.answers():
        yield TorchIndex(cpu_index.URL, None)
        return
    version = lock.torch_pin((ROOT / "pyproject.toml").read_text())
    with cpu_index.StandIn(cpu_index.find_wheel(tools.python, version)) as stand_in:
        yield TorchIndex(stand_in.url, version)


@pytest.fixture(scope="module")
def make(tools, tmp_path_factory) -> Iterator[Callable[[str], Environment]]:
    """Make empty environments, which go when the module's tests are over."""
    made: list[Environment] = []

    def new(name: str) -> Environment:
        made.append(Environment(tmp_path_factory.mktemp(name) / "venv", tools))
        return made[-1]

    yield new
    for environment in made:
        shutil.rmtree(environment.folder)


@pytest.fixture
def project(tmp_path, torch_index) -> Path:
    """A copy of what git knows of this checkout, with the index's address replaced by one that answers."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    folder = tmp_path / "project"
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    pyproject = folder / "pyproject.toml"
    pyproject.write_text(lock.replace_index(pyproject.read_text(), torch_index.url))
    return folder
