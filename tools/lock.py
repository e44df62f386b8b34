"""Write uv.lock and requirements-core.txt, both free of any index's address (`make lock`).

uv.lock holds names, exact versions, `source = { registry = "." }` and resolution markers, nothing else. uv takes such a
file for a set of preferences: `uv sync` resolves to these versions from whatever index is configured, and completes the
file in that checkout with that index's addresses and hashes. requirements-core.txt pins what a plain `pip install
mflux` brings, with the hash of every file, for `pip install --require-hashes -r`; it comes from the same resolution.

The resolution happens in a copy of pyproject.toml in a temporary folder. Versions that uv.lock already has stay as long
as they fit; `--upgrade` takes the newest. `--check` writes nothing and fails where something would change. uv is taken
from the PATH, or else installed into a temporary environment. Where PyTorch's CPU index does not answer, a stand-in
serves the CPU build that pip finds.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

import cpu_index

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "uv.lock"
REQUIREMENTS = ROOT / "requirements-core.txt"

LOCK_HEAD = """\
# Written by `make lock`: versions only, so that it fits every index. `uv sync` completes it with your index's addresses
# and hashes; `--locked` and `--frozen` need them and so refuse this file until a `uv sync` has run.
"""
REQUIREMENTS_HEAD = """\
# Written by `make lock` from uv.lock: what a plain `pip install mflux` brings, on Linux and macOS.
# pip install --require-hashes -r requirements-core.txt
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/lock.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions instead of those in uv.lock")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file would change")
    args = parser.parse_args(argv)
    lock, requirements = make_files(upgrade=args.upgrade)
    stale = False
    for path, text in ((LOCK, lock), (REQUIREMENTS, requirements)):
        if path.is_file() and path.read_text() == text:
            print(f"{path.name}: up to date")
        elif args.check:
            print(f"{path.name}: not up to date (make lock)", file=sys.stderr)
            stale = True
        else:
            path.write_text(text)
            print(f"{path.name}: written")
    return int(stale)


def make_files(*, upgrade: bool = False) -> tuple[str, str]:
    """The contents of uv.lock and of requirements-core.txt."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mflux-lock-")))
        tools = Tools(folder / "tools")
        project = (ROOT / "pyproject.toml").read_text()
        if not cpu_index.answers():
            wheel = cpu_index.find_wheel(tools.python, torch_pin(project))
            stand_in = stack.enter_context(cpu_index.StandIn(wheel))
            print(f"{cpu_index.URL} does not answer: torch {wheel.version} stands in", file=sys.stderr)
            project = replace_index(project, stand_in.url)
        (folder / "pyproject.toml").write_text(project)
        if LOCK.is_file() and not upgrade:
            shutil.copy(LOCK, folder / "uv.lock")
        tools.uv("lock", "--quiet", cwd=folder)
        lock = neutral(tomllib.loads((folder / "uv.lock").read_text()))
        exported = tools.uv(
            *("export", "--quiet", "--frozen", "--no-emit-project", "--no-default-groups"),
            *("--no-annotate", "--no-header", "--format", "requirements.txt"),
            cwd=folder,
        )
    return lock, REQUIREMENTS_HEAD + exported


def replace_index(project: str, url: str) -> str:
    """The text of a pyproject.toml that takes torch from another address."""
    if project.count(f'"{cpu_index.URL}"') != 1:
        raise SystemExit(f"pyproject.toml does not name {cpu_index.URL} exactly once")
    return project.replace(f'"{cpu_index.URL}"', f'"{url}"')


def neutral(lock: dict) -> str:
    """A lock without addresses, hashes and the project's own entry, in one order whatever order uv gave."""
    parts = [LOCK_HEAD + f'version = {lock["version"]}\nrequires-python = "{lock["requires-python"]}"\n']
    for field in ("resolution-markers", "supported-markers"):
        parts[0] += _markers(field, lock.get(field, []))
    for package in sorted(lock["package"], key=lambda package: (package["name"], package["version"])):
        if "registry" not in package["source"]:
            continue
        parts.append(
            f'[[package]]\nname = "{package["name"]}"\nversion = "{package["version"]}"\n'
            f'source = {{ registry = "." }}\n{_markers("resolution-markers", package.get("resolution-markers", []))}'
        )
    return "\n".join(parts)


def _markers(field: str, markers: list[str]) -> str:
    return f"{field} = [\n" + "".join(f'    "{marker}",\n' for marker in sorted(markers)) + "]\n" if markers else ""


def torch_pin(project: str) -> str:
    """The version that the tests pin torch to, which is the one that a stand-in has to have."""
    for requirement in tomllib.loads(project)["dependency-groups"]["test"]:
        if isinstance(requirement, str) and requirement.startswith("torch=="):
            return requirement.removeprefix("torch==")
    raise SystemExit("pyproject.toml: the dependency group test does not pin torch")


class Tools:
    """uv, and a Python with pip, in a temporary environment as far as they are not there."""

    def __init__(self, folder: Path):
        venv.create(folder, with_pip=True, symlinks=True)
        self.python = folder / "bin" / "python"
        self.program = shutil.which("uv")
        if self.program is None:
            pip = [self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv"]
            subprocess.run(pip, check=True, stderr=subprocess.DEVNULL)
            self.program = str(folder / "bin" / "uv")

    def uv(self, *arguments: str, cwd: Path) -> str:
        """Run uv with this interpreter and return what it prints."""
        # A virtual environment that happens to be active is not to be looked at.
        environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
        environment |= {"UV_PYTHON": sys.executable, "UV_PYTHON_DOWNLOADS": "never"}
        done = subprocess.run([self.program, *arguments], cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(done.returncode)
        return done.stdout


if __name__ == "__main__":
    sys.exit(main())
