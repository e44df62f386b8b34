"""benchmarks/footprint.py on installations made up for it, and the documents that quote what it found."""

from __future__ import annotations

import re
import sys
import venv
from types import SimpleNamespace

import pytest
from support.environments import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import footprint  # isort: skip

RESULTS = (ROOT / "benchmarks" / "README.md").read_text()
NUMBER = r"(\d[\d,]*(?:\.\d+)?)"


@pytest.fixture
def environment(tmp_path):
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    return tmp_path / "venv"


def write_command(environment, code: str) -> None:
    script = environment / "bin" / "mflux-generate"
    script.write_text(f"#!{environment / 'bin' / 'python'}\n{code}\n")
    script.chmod(0o755)


def test_modules_are_those_that_the_command_imports(environment):
    bench = SimpleNamespace(folder=environment.parent, repeats=1)
    write_command(environment, "import sys\nassert sys.argv[1:] == ['--help']\nsys.exit()")
    few = footprint.measure_help(bench, environment)
    for name in ("one", "two", "three"):
        (environment / "bin" / f"{name}.py").write_text("")
    write_command(
        environment,
        f"import sys\nsys.path.insert(0, {str(environment / 'bin')!r})\nimport one, two, three\nsys.exit(0)",
    )
    more = footprint.measure_help(bench, environment)
    assert more["modules"] == few["modules"] + 3
    assert 0 < few["help_processor"] < 30
    assert 0 < few["help"] < 300


def test_a_command_that_fails_is_no_time(environment):
    bench = SimpleNamespace(folder=environment.parent, repeats=1)
    write_command(environment, f"raise ImportError('{environment}/lib/x.so: cannot be opened')")
    assert footprint.measure_help(bench, environment) == {"help_fails": "ImportError: …/lib/x.so: cannot be opened"}


def test_too_little_disk_is_said_before_anything_is_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(footprint.shutil, "disk_usage", lambda folder: SimpleNamespace(free=12.6e9))
    bench = SimpleNamespace(folder=tmp_path)
    footprint.Bench.check_disk(bench, "core")
    with pytest.raises(SystemExit, match="old: not enough disk"):
        footprint.Bench.check_disk(bench, "old")
    assert "old: needs 13 GB of disk, 13 GB are free" in capsys.readouterr().err


def found(megabytes: float, seconds: float | None = None) -> dict:
    part = {"megabytes": megabytes, "download": megabytes / 2, "install": 3.0, "parts": {"torch": megabytes}}
    return part | (
        {"help_fails": "ImportError: x"}
        if seconds is None
        else {"help": seconds, "help_processor": seconds / 2, "modules": 90}
    )


def test_a_goal_is_reached_or_missed(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    measured = {"old": found(5250.0), "core": found(150.0, 0.1), "old-cpu": found(1200.0, 0.9)}
    lines = footprint.ratios(measured)
    assert lines[0] == "- size on Linux, MB: 5,250 to 150, **35.0 times** less; goal 35: reached"
    # 0.24's help fails without CUDA's driver: its CPU builds are what there is to compare with.
    assert "seconds: 0.900 to 0.100, **9.0 times** less; goal 10: **missed**" in lines[1]
    assert not any("macOS" in line for line in lines)
    measured["macos-old"], measured["macos-core"] = found(900.0, 1.0), found(230.0, 1.0)
    assert "- size on macOS (resolved), MB: 900 to 230, **3.9 times** less; goal 4: **missed**" in footprint.ratios(
        measured
    )


def test_nvidia_s_packages_count_as_one():
    parts = {"nvidia-cublas": 500.0, "nvidia-cudnn-cu13": 700.0, "cuda-toolkit": 1.0, "torch": 1100.0, "tqdm": 0.2}
    assert footprint.largest(parts, 2) == "NVIDIA's 1,201, torch 1,100"


# ---- what the documents quote


def rows(heading: str) -> dict[str, list[str]]:
    """The table of benchmarks/README.md whose first column has this heading; its first cell gives the cells."""
    table = re.search(rf"^\| {heading} \|.*\n\|[-:|]+\n((?:\|.*\n)+)", RESULTS, re.M)
    assert table, heading
    lines = [[cell.strip(" *") for cell in line.strip("|").split(" | ")] for line in table[1].splitlines()]
    return {line[0]: line[1:] for line in lines}


def test_the_headline_is_what_was_measured():
    linux, mac = rows("installed"), rows("resolved for macOS 15, Python 3.12")
    text = " ".join((ROOT / "README.md").read_text().split())
    quoted = re.search(
        rf"Linux it weighs {NUMBER} MB where mflux 0\.24 weighs {NUMBER}, "
        rf"on a Mac {NUMBER} MB where that weighs {NUMBER}, "
        rf"and `mflux-generate --help` answers in {NUMBER} s, not {NUMBER}",
        text,
    )
    assert quoted, "README.md has no headline"
    old_help = next(
        linux[name][4] for name in ("mflux 0.24.0", "mflux 0.24.0, CPU builds") if linux[name][4] != "fails"
    )
    assert quoted.groups() == (
        *(linux["this project"][1], linux["mflux 0.24.0"][1]),
        *(mac["this project"][1], mac["mflux 0.24.0"][1]),
        *(f"{float(linux['this project'][4].split()[0]):.2f}", f"{float(old_help.split()[0]):.1f}"),
    )


def test_the_install_docs_agree_with_what_was_measured():
    text = (ROOT / "docs" / "install.md").read_text()
    for name, label in (("mflux", "this project"), ("mflux[full]", "this project, `mflux[full]`, CPU builds")):
        row = re.search(rf"^\| `{re.escape(name)}` \|.*\| {NUMBER} MB \| (\d+) \|$", text, re.M)
        measured = rows("installed")[label]
        assert float(row[1].replace(",", "")) == pytest.approx(float(measured[1].replace(",", "")), rel=0.03)
        assert int(row[2]) == int(measured[0])
