"""Every command of docs/install.md is run as it stands there, or a line below it says why it is not.

A comment before a block, `<!-- test: KIND NEED… -->`, says where: in a fresh virtual environment with pip (venv), in
an empty folder with uv (uv), or in a copy of this checkout (checkout). mflux itself comes from this checkout's wheel,
which no index has yet; PyTorch's CPU index is replaced where it does not answer.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.environments import ROOT, Done, execute

import cpu_index  # isort: skip

TEXT = (ROOT / "docs" / "install.md").read_text()
# The comment, if there is one; the commands; what follows the block.
_BLOCK = re.compile(
    r"(?:^<!-- test: (?P<kind>\w+)(?P<needs>[\w ]*) -->\n)?^```sh\n(?P<commands>.*?)^```\n\n?(?P<after>.*?)$",
    re.M | re.S,
)


@dataclass(frozen=True)
class Block:
    kind: str | None
    needs: tuple[str, ...]
    commands: str
    after: str

    def __str__(self) -> str:
        return self.commands.partition("\n")[0]


BLOCKS = [
    Block(found["kind"], tuple((found["needs"] or "").split()), found["commands"], found["after"])
    for found in _BLOCK.finditer(TEXT)
]
RUN = [block for block in BLOCKS if block.kind]


def test_every_block_is_found():
    assert len(BLOCKS) == len(re.findall("^```sh$", TEXT, re.M)) > 10


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_is_run_or_says_why_not(block):
    says = block.after.startswith("*Not run by the tests: ")
    assert says != bool(block.kind)
    assert block.kind in (None, "venv", "uv", "checkout")


@pytest.fixture
def place(request, tmp_path, wheel, tools, torch_index):
    """Where a block runs, and with which environment variables."""
    block: Block = request.param
    if "demo" in block.needs and not (ROOT / "src" / "mflux" / "demo" / "checkpoint").is_dir():
        pytest.skip("the embedded model is not trained yet")
    folder = request.getfixturevalue("project") if block.kind == "checkout" else tmp_path / "folder"
    folder.mkdir(exist_ok=True)
    if "weights" in block.needs:
        shutil.copy(request.getfixturevalue("plain_file"), folder / "depth_pro.pt")
    constraints = [f"mflux=={wheel.name.split('-')[1]}", *torch_index.constraints]
    (tmp_path / "constraints.txt").write_text("\n".join(constraints) + "\n")
    paths = [str(Path(tools.uv).parent), *os.environ["PATH"].split(os.pathsep)]
    variables = {
        "UV_PYTHON": sys.executable,
        "UV_PYTHON_DOWNLOADS": "never",
        "UV_TOOL_DIR": str(tmp_path / "tools"),
        "UV_TOOL_BIN_DIR": str(tmp_path / "bin"),
        "PYTHON": sys.executable,
    }
    if block.kind != "checkout":
        # The wheel of this checkout is what an index will have.
        variables |= {"PIP_FIND_LINKS": _find_links(wheel.parent), "PIP_CONSTRAINT": str(tmp_path / "constraints.txt")}
        variables |= {"UV_FIND_LINKS": str(wheel.parent), "UV_CONSTRAINT": str(tmp_path / "constraints.txt")}
    if block.kind == "uv":
        paths.insert(0, str(tmp_path / "bin"))
    else:
        venv.create(tmp_path / "venv", with_pip=True, symlinks=True)
        variables["VIRTUAL_ENV"] = str(tmp_path / "venv")
        paths.insert(0, str(tmp_path / "venv" / "bin"))
        if "weights" in block.needs:
            execute(tmp_path / "venv" / "bin" / "pip", "install", "--quiet", wheel)
    variables["PATH"] = os.pathsep.join(paths)
    yield folder, variables
    for made in ("venv", "folder", "project", "tools"):
        shutil.rmtree(tmp_path / made, ignore_errors=True)


def _find_links(folder: Path) -> str:
    """This folder and those that pip already looks into on this machine."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    known = re.findall(r"^\S*find-links='([^']*)'", listed, re.M)
    return " ".join([str(folder), *dict.fromkeys(known)])


@pytest.fixture
def plain_file(tmp_path) -> Path:
    """A PyTorch file with one tensor."""
    import numpy as np
    from support.torch_archives import archive, save, tensor

    return save(tmp_path / "plain.pt", archive({"w": tensor("0")}, {"0": np.arange(6, dtype=np.float32).tobytes()}))


@pytest.mark.parametrize("block, place", [(block, block) for block in RUN], ids=map(str, RUN), indirect=["place"])
def test_the_commands_work(block, place, torch_index):
    folder, variables = place
    commands = block.commands.replace(cpu_index.URL, torch_index.url)
    if "torch" in block.needs and torch_index.url != cpu_index.URL:
        pytest.skip("uv has the address of PyTorch's index built in, and it does not answer")
    done: Done = execute("bash", "-e", "-u", "-o", "pipefail", "-c", commands, folder=folder, environment=variables)
    assert done.status == 0, f"{done.out}\n{done.err}"
    if "mflux doctor" in commands:
        assert re.search(r"^MLX +\d+\.\d+", done.out, re.M)
    if "torch.__version__" in commands and sys.platform == "linux":
        assert re.search(r"^\d+\.\d+\.\d+\+cpu$", done.out, re.M)
        assert re.search(r"^ +\d+\.\d MB  torch .*\+cpu$", done.out, re.M)
    if block.kind != "uv":
        installed = execute(Path(variables["VIRTUAL_ENV"]) / "bin" / "pip", "list", "--format", "freeze").out
        if "pip install" in commands:
            assert re.search(r"^mflux==1\.|^mflux @ |^-e .*#egg=mflux", installed, re.M)
        assert "torch==" not in installed or "torch-lite" in commands
