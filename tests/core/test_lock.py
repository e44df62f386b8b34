"""uv.lock and requirements-core.txt fit pyproject.toml and name no index; tests/environment has pip and uv use them."""

import re
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
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
