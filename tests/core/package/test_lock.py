"""uv.lock and requirements-core.txt fit pyproject.toml and name no index, and this environment has what the lock has.

tests/environment has pip and uv use them.
"""

import os
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from importlib.metadata import distributions
from itertools import product
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "tools"))
import constraints  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK_TEXT = (ROOT / "uv.lock").read_text()
LOCK = tomllib.loads(LOCK_TEXT)
CORE_TEXT = (ROOT / "requirements-core.txt").read_text()


def locked_versions() -> dict[str, list[Version]]:
    found = defaultdict(list)
    for package in LOCK["package"]:
        found[package["name"]].append(Version(package["version"]))
    return found


def core_pins() -> dict[str, list[tuple[Version, Marker, str]]]:
    """Version, marker and hashes of each pin in requirements-core.txt."""
    found = defaultdict(list)
    for entry in CORE_TEXT.replace("\\\n", " ").splitlines():
        if entry.startswith("#"):
            continue
        pin = Requirement(entry.partition("--hash")[0].strip())
        (specifier,) = pin.specifier
        assert specifier.operator == "==", entry
        found[pin.name].append((Version(specifier.version), pin.marker, entry))
    return found


def direct_requirements() -> list[Requirement]:
    project = PROJECT["project"]
    texts = list(project["dependencies"])
    for group in [*project["optional-dependencies"].values(), *PROJECT["dependency-groups"].values()]:
        texts += [entry for entry in group if isinstance(entry, str)]
    requirements = [Requirement(text) for text in texts]
    return [requirement for requirement in requirements if requirement.name != "mflux"]


@pytest.mark.parametrize("requirement", direct_requirements(), ids=str)
def test_every_direct_dependency_is_locked_at_a_version_that_it_allows(requirement):
    versions = locked_versions()[canonicalize_name(requirement.name)]
    assert versions, f"{requirement.name} is not in uv.lock: make lock"
    for version in versions:
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} is locked at {version}"


def test_the_lock_holds_names_versions_and_markers_and_nothing_else():
    assert LOCK["requires-python"] == PROJECT["project"]["requires-python"]
    assert set(LOCK["supported-markers"]) == set(PROJECT["tool"]["uv"]["environments"])
    for package in LOCK["package"]:
        assert set(package) <= {"name", "version", "source", "resolution-markers"}, package["name"]
        assert package["source"] == {"registry": "."}, package["name"]
    assert "mflux" not in locked_versions()


@pytest.mark.parametrize("text", [LOCK_TEXT, CORE_TEXT], ids=["uv.lock", "requirements-core.txt"])
def test_no_address_stands_in_it(text):
    assert "//" not in text
    assert not re.search(r"[a-z][a-z0-9-]*\.(org|com|net|io|dev|internal|local|invalid)\b", text)
    assert not re.search(r"\b\d+\.\d+\.\d+\.\d+:\d+|localhost|@ ?file", text)


def test_torch_on_linux_is_the_cpu_build_and_nothing_of_cuda_is_locked():
    builds = {
        package["version"]: [Marker(marker) for marker in package["resolution-markers"]]
        for package in LOCK["package"]
        if package["name"] == "torch"
    }
    pin = next(requirement for requirement in direct_requirements() if str(requirement).startswith("torch=="))
    version = str(pin.specifier).removeprefix("==")
    assert set(builds) == {version, f"{version}+cpu"}
    for build, markers in builds.items():
        for system in ("linux", "darwin"):
            environment = {"sys_platform": system, "python_full_version": "3.12.0"}
            assert any(marker.evaluate(environment) for marker in markers) == (
                (system == "linux") == build.endswith("+cpu")
            )
    assert not [name for name in locked_versions() if re.search(r"nvidia|cuda|triton|cu1\d", name)]


def test_the_core_is_pinned_to_the_versions_of_the_lock_with_a_hash_for_every_file():
    locked = locked_versions()
    pins = core_pins()
    for name, entries in pins.items():
        assert sorted(version for version, _, _ in entries) == sorted(locked[name])
        for _, _, entry in entries:
            assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry), name
    core = {canonicalize_name(Requirement(text).name) for text in PROJECT["project"]["dependencies"]}
    assert core <= set(pins)
    assert not {"torch", "transformers", "jinja2", "pytest"} & set(pins)


@pytest.mark.parametrize("system, wheel", [("linux", "mlx-cpu"), ("darwin", "mlx-metal")])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64", "arm64"])
@pytest.mark.parametrize("python", ["3.11.9", "3.12.4", "3.13.1"])
def test_each_environment_gets_one_version_of_each_package(system, wheel, machine, python):
    environment = {"sys_platform": system, "platform_machine": machine, "python_full_version": python}
    chosen = defaultdict(list)
    for name, entries in core_pins().items():
        for version, marker, _ in entries:
            if marker is None or marker.evaluate(environment):
                chosen[name].append(version)
    assert all(len(versions) == 1 for versions in chosen.values())
    assert {name for name in chosen if name.startswith("mlx")} == {"mlx", wheel}
    # With mflux itself, at most the 23 that the README promises.
    assert len(chosen) <= 22


# ---- the versions that make installs

newest = pytest.mark.skipif(os.environ.get("MFLUX_TEST_NEWEST") == "1", reason="make test-newest has other versions")
SYSTEMS = [
    {
        "python_full_version": python,
        "python_version": python.rpartition(".")[0],
        "implementation_name": "cpython",
        "os_name": "posix",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "platform_system": {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}[system],
        "sys_platform": system,
    }
    for python, system, machine in product(
        ["3.11.0", "3.12.0", "3.13.10"], ["linux", "darwin", "win32"], ["arm64", "x"]
    )
]
LOCKED_MARKERS = sorted({m for package in LOCK["package"] for m in package.get("resolution-markers", [])})


def installed() -> dict[str, str]:
    """Version by name; of two that go by one name, the one that is imported."""
    found = {}
    for distribution in distributions():
        found.setdefault(canonicalize_name(distribution.name), distribution.version)
    return found


def brought(requirements: list[str]) -> set[str]:
    """The names of what these requirements install here, as far as it is installed."""
    metadata = {canonicalize_name(distribution.name): distribution.requires or [] for distribution in distributions()}
    seen, waiting = set(), [(Requirement(text), "") for text in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                waiting += [(Requirement(text), wanted) for text in metadata.get(name, [])]
    return {name for name, _ in seen} & metadata.keys()


@newest
def test_this_environment_has_the_versions_of_the_lock():
    locked, here = constraints.locked(), installed()
    other = {name: here[name] for name in locked.keys() & here.keys() if here[name] != locked[name]}
    assert not other, f"not what uv.lock has (`make test` and `make test-core` install that): {other}"


@newest
def test_everything_that_this_environment_was_asked_for_is_in_the_lock():
    here = installed()
    texts = [str(requirement) for requirement in direct_requirements() if canonicalize_name(requirement.name) in here]
    names = brought(texts)
    assert {"mlx", "numpy", "pytest", "pytest-xdist", "execnet"} <= names
    assert not names - constraints.locked().keys(), "make lock"


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: "-".join(list(system.values())[::7]))
@pytest.mark.parametrize(
    "marker",
    [
        *LOCKED_MARKERS,
        "python_version >= '3.12'",
        "python_full_version < '3.12.0' or sys_platform == 'darwin' and platform_machine != 'arm64'",
        "(python_full_version < '3.13' or sys_platform == 'darwin') and platform_machine == 'arm64'",
        "python_full_version > '3.9' and python_full_version <= '3.13.9'",
    ],
)
def test_a_marker_means_what_it_means_to_pip(marker, system):
    assert constraints.holds(marker, system) == Marker(marker).evaluate(system)


@pytest.mark.parametrize(
    "marker",
    ["extra == 'x'", "sys_platform in 'linux'", "sys_platform < 'm'", "not sys_platform", "'linux'", "print()"],
)
def test_a_marker_that_is_not_understood_is_not_guessed_at(marker):
    with pytest.raises(ValueError, match="cannot read the marker"):
        constraints.holds(marker, SYSTEMS[0])


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: "-".join(list(system.values())[::7]))
def test_each_system_gets_one_version_of_everything_or_a_refusal(system):
    if system["sys_platform"] == "win32":
        with pytest.raises(ValueError, match=r"uv\.lock is not for win32"):
            constraints.locked(system)
        return
    chosen = constraints.locked(system)
    assert set(chosen) == set(locked_versions())
    assert chosen["torch"].endswith("+cpu") == (system["sys_platform"] == "linux")


def test_two_versions_for_one_system_are_an_error(tmp_path):
    package = '[[package]]\nname = "a"\nversion = "{}"\nsource = {{ registry = "." }}\n'
    (tmp_path / "uv.lock").write_text(package.format(1) + package.format(2))
    with pytest.raises(ValueError, match="two versions of a"):
        constraints.locked(lock=tmp_path / "uv.lock")


def test_a_lock_that_uv_has_completed_says_the_same(tmp_path):
    itself = '\n[[package]]\nname = "mflux"\nversion = "0"\nsource = { editable = "." }\n'
    (tmp_path / "uv.lock").write_text(LOCK_TEXT.replace('registry = "."', 'registry = "https://example"') + itself)
    assert constraints.locked(lock=tmp_path / "uv.lock") == constraints.locked()


def test_the_constraints_are_what_pip_reads():
    tool = ROOT / "tools" / "constraints.py"
    # Alone, as under a python3 that has nothing installed.
    done = subprocess.run([sys.executable, "-I", "-S", tool], capture_output=True, text=True, check=True)
    pins = {name: version for name, version in constraints.locked().items() if name != "torch"}
    assert dict(line.split("==") for line in done.stdout.splitlines()) == pins


def test_the_lock_has_what_building_needs():
    assert PROJECT["dependency-groups"]["build"] == PROJECT["build-system"]["requires"]
