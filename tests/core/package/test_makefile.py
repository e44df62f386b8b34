"""What make runs: the lock's versions wherever something is installed, and a prompt that nobody reads on its way."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
MAKEFILE = (ROOT / "Makefile").read_text()

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


def make(folder: Path, *words: str, **variables: str) -> str:
    """Its stdout, without what a make around these tests hands down."""
    inherited = {name: value for name, value in os.environ.items() if not re.match("MAKE|MFLUX_|MFLAGS", name)}
    done = subprocess.run(
        ["make", "--no-print-directory", *words], cwd=folder, env=inherited | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The Makefile, what its environments are made from, and none of them."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "uv.lock", "tools/constraints.py", "tools/group.py", "src/mflux/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.fixture
def with_core(checkout) -> Path:
    """The same with a core that says which prompt it got, and draws as mflux-generate does."""
    command = checkout / ".venv" / "bin" / "mflux-generate"
    command.parent.mkdir(parents=True)
    command.write_text(
        '#!/bin/sh\nfor word; do case "$word" in --prompt=*) printf %s "${word#--prompt=}" >prompt.txt; esac; done\n'
        "if [ -e demo.png ]; then name=demo_1.png; else name=demo.png; fi; touch $name; echo $name\n"
    )
    command.chmod(0o755)
    (checkout / ".venv" / ".ready").touch()
    return checkout


@pytest.mark.parametrize(
    "prompt",
    [
        "a small yellow triangle",
        "it's a \"red\" 'circle'",
        "$5, $$, $(error no) ${HOME} $x $",
        "`touch touched` $(shell touch touched) $(touch touched); touch touched",
        "an unfinished $(shell touch",
        "-n --help #1 \\ * ~ % & | < > é 猫 🙂",
        "two\nlines",
    ],
)
@pytest.mark.parametrize("way", ["argument", "environment"])
def test_a_prompt_arrives_as_it_was_typed(prompt, way, with_core):
    if way == "argument":
        make(with_core, "demo", f"PROMPT={prompt}")
    else:
        make(with_core, "demo", PROMPT=prompt)
    assert (with_core / "prompt.txt").read_text() == prompt
    assert not (with_core / "touched").exists()


def test_demo_says_what_it_wrote_and_what_it_kept(with_core):
    assert make(with_core, "demo") == "wrote demo.png\n"
    assert (with_core / "prompt.txt").read_text() == "a large red circle on a white background"
    assert make(with_core, "demo") == "wrote demo_1.png; kept demo.png\n"


@pytest.mark.parametrize("uv", [False, True], ids=["pip", "uv"])
@pytest.mark.parametrize("target", ["demo", "test", "test-gpu", "test-core", "lint", "wheel"])
def test_whatever_is_installed_is_what_the_lock_has(target, uv, checkout):
    found = installs(checkout, target, uv)
    assert found
    for line in found:
        folder = re.search(r"(\.venv[a-z-]*)/bin/python", line)[1]
        for name in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT", "UV_CONSTRAINT", "UV_BUILD_CONSTRAINT"):
            assert f"{name}={folder}/constraints.txt " in line.partition("python")[0], line


@pytest.mark.parametrize("uv", [False, True], ids=["pip", "uv"])
def test_only_test_newest_installs_something_else(uv, checkout):
    found = installs(checkout, "test-newest", uv)
    assert len(found) == 3
    assert not [line for line in found if "CONSTRAINT" in line or ".venv-newest/" not in line]
    assert "MFLUX_TEST_NEWEST=1 " in make(checkout, "--dry-run", "test-newest")
    assert "MFLUX_TEST_NEWEST" not in make(checkout, "--dry-run", "test")


def installs(checkout: Path, target: str, uv: bool) -> list[str]:
    """The lines that install or build something, with a uv on the PATH or without."""
    programs = checkout / "bin"
    programs.mkdir()
    for name in ("make", "find", "python3"):
        (programs / name).symlink_to(shutil.which(name))
    if uv:
        (programs / "uv").touch(mode=0o755)
    lines = make(checkout, "--dry-run", target, PATH=str(programs)).replace("\\\n", "")
    assert ("uv pip install" in lines) == uv
    return [line for line in lines.splitlines() if re.search(r"pip install|-m build", line)]


@pytest.mark.parametrize("target", ["test", "test-core", "test-newest"])
def test_the_suite_runs_on_as_many_workers_as_wanted_and_for_the_family_that_is_named(target, checkout):
    runs = [line for line in make(checkout, "--dry-run", target).splitlines() if "-m pytest" in line]
    assert runs
    assert all("--numprocesses 2 " in line for line in runs)
    runs = make(checkout, "--dry-run", target, "WORKERS=5", "PYTEST_ARGS=-k lora").splitlines()
    assert all("--numprocesses 5 " in line and line.endswith("-k lora") for line in runs if "-m pytest" in line)
    (checkout / "ask.mk").write_text('include Makefile\nask:\n\t@echo "family $$MFLUX_TEST_FAMILY"\n')
    assert make(checkout, "-f", "ask.mk", "ask", "FAMILY=z_image") == "family z_image\n"
    assert make(checkout, "-f", "ask.mk", "ask") == "family \n"


def test_the_torch_that_make_installs_is_the_one_that_the_tests_name():
    version = re.search(r"^TORCH := (\S+)$", MAKEFILE, re.M)[1]
    assert f"torch=={version}" in tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["test"]


def test_fuzz_takes_its_time_and_seed(checkout):
    (run,) = [line for line in make(checkout, "--dry-run", "fuzz").splitlines() if "tools/fuzz.py" in line]
    assert run.rstrip().endswith("tools/fuzz.py --seconds 300")
    lines = make(checkout, "--dry-run", "fuzz", "SECONDS=60", "SEED=4").splitlines()
    assert any(line.endswith("tools/fuzz.py --seconds 60 --seed 4") for line in lines)
