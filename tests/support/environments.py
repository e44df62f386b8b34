"""An empty virtual environment, what fills it, and what can be asked of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))


@dataclass(frozen=True)
class Done:
    """How a process ended."""

    status: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


def execute(*words: object, folder: Path | None = None, environment: dict[str, str] | None = None) -> Done:
    """Run a program without what this process's own environment would change about it."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("VIRTUAL_ENV", "PYTHONPATH", "MFLUX_REFUSE_TORCH")
    }
    done = subprocess.run(
        [str(word) for word in words],
        cwd=folder,
        env=inherited | {"HF_HUB_OFFLINE": "1"} | (environment or {}),
        capture_output=True,
        text=True,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


class Environment:
    """A virtual environment that holds only what is installed into it, not even pip."""

    def __init__(self, folder: Path, tools: Tools):
        self.folder = folder
        self.tools = tools
        venv.create(folder, with_pip=False, symlinks=True)

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def pip(self, *words: object) -> Done:
        done = execute(self.tools.python, "-m", "pip", "--python", self.python, *words)
        assert done.status == 0, done.err
        return done

    def install(self, *words: object) -> None:
        self.pip("install", "--quiet", "--no-compile", "--disable-pip-version-check", *words)

    def run(self, command: str, *words: object, **options) -> Done:
        return execute(self.folder / "bin" / command, *words, **options)

    def versions(self) -> dict[str, str]:
        listed = json.loads(self.pip("list", "--format", "json", "--disable-pip-version-check").out)
        return {entry["name"].lower().replace("_", "-"): entry["version"] for entry in listed}

    def megabytes(self) -> float:
        """Of everything installed, bytecode left out."""
        (packages,) = self.folder.glob("lib/python*/site-packages")
        files = (path for path in packages.rglob("*") if path.is_file() and path.suffix != ".pyc")
        return sum(path.stat().st_size for path in files) / 1e6

    def doctor(self) -> dict:
        done = self.run("mflux", "doctor", "--json", "--sizes")
        assert done.status == 0, done.err
        return json.loads(done.out)


class Tools:
    """pip and uv, neither of them in the environments that they fill."""

    def __init__(self, folder: Path):
        venv.create(folder, with_pip=True, symlinks=True)
        self.python = folder / "bin" / "python"
        self.uv = shutil.which("uv")
        upgrade = ["pip"] if self.uv else ["pip", "uv"]
        done = execute(self.python, "-m", "pip", "install", "--quiet", "--upgrade", *upgrade)
        assert done.status == 0, done.err
        self.uv = self.uv or str(folder / "bin" / "uv")

    def run_uv(self, *words: object, **options) -> Done:
        options["environment"] = {"UV_PYTHON": sys.executable, "UV_PYTHON_DOWNLOADS": "never"} | options.get(
            "environment", {}
        )
        done = execute(self.uv, *words, **options)
        assert done.status == 0, done.err
        return done


def cuda_packages(names) -> list[str]:
    """Those of CUDA, of which there must be none beside a CPU build of torch."""
    return sorted(name for name in names if name.startswith(("nvidia", "cuda", "triton", "pytorch-triton", "mlx-cuda")))
