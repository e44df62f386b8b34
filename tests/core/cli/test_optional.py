"""The sentence for a package that is not there, and the overview of what is."""

from __future__ import annotations

import importlib
import sys
import tomllib
from pathlib import Path

import pytest

from mflux import optional
from mflux.errors import MfluxError, MissingExtraError
from mflux.optional import EXTRAS, Extra, is_installed, missing_message, pip_command, require

PROJECT = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Path:
    """A folder to put packages into, and no others' leftovers."""
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("fake_")]:
        del sys.modules[name]


def test_a_package_that_is_there(packages):
    (packages / "fake_there.py").write_text("value = 7")
    importlib.invalidate_caches()
    assert require("fake_there", extra="vlm", feature="FIBO-VLM").value == 7


def test_a_package_that_is_missing():
    with pytest.raises(MissingExtraError) as caught:
        require("fake_missing.part", extra="vlm", feature="FIBO-VLM")
    error = caught.value
    assert str(error) == (
        "FIBO-VLM needs the package fake_missing, which is not installed: "
        'pip install "mflux[vlm]" (with uv: uv sync --extra vlm)'
    )
    assert isinstance(error, MfluxError)
    assert isinstance(error, ImportError)
    assert error.name == "fake_missing.part"
    assert error.exit_code == 1
    assert error.__suppress_context__


def test_a_package_that_is_broken_says_so_itself(packages):
    (packages / "fake_broken.py").write_text("import fake_dependency")
    (packages / "fake_wrong.py").write_text("raise ImportError('libfake.so is missing')")
    importlib.invalidate_caches()
    with pytest.raises(ModuleNotFoundError, match="fake_dependency") as caught:
        require("fake_broken", extra="vlm", feature="FIBO-VLM")
    assert not isinstance(caught.value, MissingExtraError)
    with pytest.raises(ImportError, match=r"libfake\.so is missing") as caught:
        require("fake_wrong", extra="vlm", feature="FIBO-VLM")
    assert not isinstance(caught.value, MissingExtraError)


@pytest.mark.parametrize("extra", ["torch-lite", "full"])
def test_torch_comes_from_the_cpu_index_on_linux(monkeypatch, extra):
    monkeypatch.setattr(sys, "platform", "linux")
    index = "--extra-index-url https://download.pytorch.org/whl/cpu"
    assert pip_command(extra) == f'pip install "mflux[{extra}]" {index}'
    assert missing_message("torch", extra=extra, feature="A sparse tensor") == (
        "A sparse tensor needs the package torch, which is not installed: "
        f'pip install "mflux[{extra}]" {index} (with uv: uv sync --extra {extra})'
    )
    monkeypatch.setattr(sys, "platform", "darwin")
    assert pip_command(extra) == f'pip install "mflux[{extra}]"'


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_without_torch_no_index_is_named(monkeypatch, platform):
    monkeypatch.setattr(sys, "platform", platform)
    assert pip_command("vlm") == 'pip install "mflux[vlm]"'


def test_the_extras_are_those_that_can_be_installed():
    declared = PROJECT["optional-dependencies"]
    assert EXTRAS.keys() == declared.keys()
    for name, extra in EXTRAS.items():
        if name != "full":
            names = [requirement.partition(">")[0].replace("-", "_") for requirement in declared[name]]
            assert [package.replace("-", "_") for package in extra.packages] == names
    # "full" is every other one, those that are added later too.
    others = ",".join(name for name in EXTRAS if name != "full")
    assert declared["full"] == [f"mflux[{others}]"]
    assert set(EXTRAS["full"].packages) == {package for extra in EXTRAS.values() for package in extra.packages}
    assert [name for name, extra in EXTRAS.items() if extra.brings_torch] == ["torch-lite", "full"]


def test_an_extra_is_installed_if_all_of_it_is(packages, monkeypatch):
    monkeypatch.setitem(optional.EXTRAS, "fake", Extra(("fake_one", "fake_two"), "a test"))
    (packages / "fake_one.py").write_text("raise SystemError('looking does not import')")
    importlib.invalidate_caches()
    assert not is_installed("fake")
    (packages / "fake_two.py").write_text("")
    importlib.invalidate_caches()
    assert is_installed("fake")
    monkeypatch.setitem(sys.modules, "fake_two", None)
    assert not is_installed("fake")


def test_a_missing_package_ends_a_command_in_one_line(cli, monkeypatch):
    import mflux.cli.info

    def show(argv):
        require("fake_missing", extra="vlm", feature="FIBO-VLM")

    monkeypatch.setattr(mflux.cli.info, "show", show)
    result = cli("info", "x.png")
    assert result.status == 1
    assert result.err == f"error: {missing_message('fake_missing', extra='vlm', feature='FIBO-VLM')}\n"


# ---- the overview


def test_help_lists_commands_models_and_extras(cli, monkeypatch):
    from mflux.cli.commands import COMMANDS
    from mflux.models.common.family import built

    monkeypatch.setattr(optional, "is_installed", lambda name: name == "vlm")
    result = cli("--help")
    assert (result.status, result.err) == (0, "")
    assert cli().out == cli("-h").out == result.out
    sections = {part.partition("\n")[0]: part.splitlines()[1:] for part in result.out.split("\n\n")}
    words = {heading: [line.split()[0] for line in lines] for heading, lines in sections.items()}
    assert words["commands:"] == list(COMMANDS)
    assert words["models:"] == list(built())
    assert words["extras:"] == list(EXTRAS)
    assert "comes with mflux" in sections["models:"][0]
    assert sections["extras:"][0].endswith(f"(not installed: {pip_command('torch-lite')})")
    assert sections["extras:"][1].endswith("(installed)")


def test_the_version(cli):
    import mflux

    assert cli("--version").out == f"mflux {mflux.__version__}\n"
    assert mflux.__version__ == PROJECT["version"]
    with pytest.raises(AttributeError, match="module 'mflux' has no attribute 'nonsense'"):
        mflux.nonsense  # noqa: B018


def test_every_command_has_one_line_of_help(cli):
    from mflux.cli.commands import COMMANDS

    for command in COMMANDS.values():
        assert len(command.summary) < 70
        assert not command.summary.endswith(".")
