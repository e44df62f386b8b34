"""`mflux-completions`: what the shell offers comes from the parsers themselves."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from mflux.cli.commands import COMMANDS

# Asks bash what it would offer at the end of a line, as the Tab key does.
ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}; COMPREPLY=()
[[ $(complete -p "$1") =~ -F\\ ([^ ]*) ]]
"${BASH_REMATCH[1]}" "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="session")
def bash_script(tmp_path_factory) -> Path:
    from mflux.cli.completions import completion_script

    path = tmp_path_factory.mktemp("completions") / "mflux"
    path.write_text(completion_script("bash"))
    return path


@pytest.fixture
def offered(bash_script, in_folder):
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    (in_folder / "photo.png").write_text("")
    (in_folder / "photos").mkdir()

    def ask(*words: str) -> set[str]:
        call = ["bash", "-c", ASK, "bash", str(bash_script), *words]
        done = subprocess.run(call, capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    return ask


@pytest.mark.parametrize("start", [["mflux-generate"], ["mflux", "generate"]])
def test_options_and_their_values(offered, start):
    assert offered(*start, "--lor") == {"--lora", "--lora-style", "--lora-paths", "--lora-scales"}
    assert offered(*start, "--quantize", "") == {"3", "4", "5", "6", "8"}
    assert offered(*start, "--image", "ph") == {"photo.png", "photos"}
    assert offered(*start, "--stepwise-image-output-dir", "ph") == {"photos"}
    assert offered(*start, "--output", "photo.") == {"photo.png"}


def test_commands(offered):
    assert offered("mflux", "") == set(COMMANDS)
    assert offered("mflux", "gen") == {name for name in COMMANDS if name.startswith("gen")}
    assert offered("mflux-info", "photo.") == {"photo.png"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_a_script_for_each_shell(cli, shell, tmp_path):
    result = cli("completions", "--print", "--shell", shell)
    assert (result.status, result.err) == (0, "")
    path = tmp_path / "script"
    path.write_text(result.out)
    for program in ("mflux", *(f"mflux-{name}" for name in COMMANDS)):
        line = {"bash": f" {program}\n", "zsh": f"  {program}) _shtab_", "tcsh": f"complete {program} "}[shell]
        assert line in result.out
    assert "vae-tile-size" in result.out
    if shutil.which(shell):
        subprocess.run([shell, "-n", str(path)], check=True)


def test_a_zsh_script_is_one_script(cli):
    out = cli("completions", "--print", "--shell", "zsh").out
    lines = out.splitlines()
    assert [line for line in lines if line.startswith("#compdef")] == [lines[0]]
    assert lines[0].split()[1:] == ["mflux", *(f"mflux-{name}" for name in COMMANDS)]
    called = {line.split()[1] for line in lines if line.startswith("  mflux")}
    defined = {line.removesuffix("() {") for line in lines if line.endswith("() {")}
    assert len(called) == len(COMMANDS) + 1
    assert called <= defined


def test_installing(cli, tmp_path):
    folder = tmp_path / "new" / "folder"
    words = ["completions", "--shell", "bash", "--dir", folder]
    result = cli(*words, "--check")
    assert result.status == 1
    assert result.err == f"error: completions for bash are not installed in {folder}: mflux-completions\n"

    result = cli(*words)
    assert (result.status, result.out) == (0, f"{folder / 'mflux'}\n")
    assert result.err == f"put 'source {folder / 'mflux'}' into your shell's start-up file and open a new shell\n"
    result = cli(*words, "--check")
    assert (result.status, result.out) == (0, f"{folder / 'mflux'} is current\n")

    (folder / "mflux").write_text("# of an older version\n")
    result = cli(*words, "--check")
    assert (result.status, result.err) == (
        1,
        f"error: {folder / 'mflux'} is from another version: mflux-completions --update\n",
    )
    assert cli(*words, "--update").status == 0
    assert cli(*words, "--check").status == 0


def test_a_folder_that_cannot_be_written_to(cli, tmp_path):
    (tmp_path / "file").write_text("")
    result = cli("completions", "--shell", "zsh", "--dir", tmp_path / "file" / "inside")
    path = tmp_path / "file" / "inside" / "_mflux"
    assert result.status == 1
    assert result.err == f"error: cannot write {path}: Not a directory (--dir chooses another folder)\n"


@pytest.mark.parametrize(
    ("shell", "place"),
    [
        ("/usr/bin/zsh", ".zsh/completions/_mflux"),
        ("/bin/bash", ".local/share/bash-completion/completions/mflux"),
        ("/bin/tcsh", ".config/tcsh/mflux.csh"),
        ("/usr/bin/fish", ".local/share/bash-completion/completions/mflux"),
    ],
)
def test_the_usual_place(cli, tmp_path, monkeypatch, shell, place):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", shell)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    result = cli("completions")
    assert result.out == f"{tmp_path / place}\n"
    assert (tmp_path / place).is_file()
    assert str((tmp_path / place).parent if shell.endswith("zsh") else tmp_path / place) in result.err
