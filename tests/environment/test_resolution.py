"""uv, the lock and the hash-pinned requirements, with whatever index this machine has."""

from __future__ import annotations

import json
import sys
import tomllib

import lock
import pytest
from packaging.markers import Marker
from support.environments import ROOT, Environment, cuda_packages, execute

EXTRAS = ("", "torch-lite", "vlm", "serve", "full")


def locked() -> dict[str, str]:
    """The versions of uv.lock for this machine."""
    versions = {}
    for package in tomllib.loads((ROOT / "uv.lock").read_text())["package"]:
        markers = package.get("resolution-markers")
        if markers is None or any(Marker(marker).evaluate() for marker in markers):
            versions[package["name"]] = package["version"]
    return versions


def synced(tools, project) -> dict[str, str]:
    done = execute(tools.uv, "pip", "list", "--format", "json", "--python", project / ".venv", folder=project)
    return {entry["name"]: entry["version"] for entry in json.loads(done.out)}


@pytest.mark.usefixtures("tools")
def test_the_lock_is_what_uv_makes_of_it_and_of_pyproject_toml():
    assert (lock.LOCK.read_text(), lock.REQUIREMENTS.read_text()) == lock.make_files()


def test_uv_sync_brings_the_core_and_then_the_extras_at_the_locked_versions(tools, project, torch_index):
    tools.run_uv("sync", "--quiet", folder=project)
    versions = synced(tools, project)
    assert versions.pop("mflux")
    assert not {"torch", "transformers"} & set(versions)
    assert versions == {name: version for name, version in locked().items() if name in versions}

    tools.run_uv("sync", "--quiet", "--extra", "full", folder=project)
    versions = synced(tools, project)
    assert versions.pop("mflux")
    assert {"torch", "transformers", "jinja2"} <= set(versions)
    assert cuda_packages(versions) == []
    assert versions == {name: version for name, version in locked().items() if name in versions}
    # The lock has been completed with addresses, torch's with that of the CPU index.
    completed = tomllib.loads((project / "uv.lock").read_text())
    sources = {package["version"]: package["source"] for package in completed["package"] if package["name"] == "torch"}
    if sys.platform == "linux":
        assert versions["torch"].endswith("+cpu")
    assert [source["registry"].rstrip("/") for version, source in sources.items() if version.endswith("+cpu")] == [
        torch_index.url
    ]
    found = execute(project / ".venv" / "bin" / "mflux", "doctor", "--json")
    assert json.loads(found.out)["extras"]["full"]["installed"] is True


def test_pip_takes_the_hash_pinned_core(make, wheel):
    environment: Environment = make("hashes")
    environment.install("--require-hashes", "-r", lock.REQUIREMENTS)
    environment.install("--no-deps", wheel)
    versions = environment.versions()
    assert versions.pop("mflux")
    assert versions == {name: version for name, version in locked().items() if name in versions}
    assert environment.run("mflux", "--version").out.startswith("mflux ")
    environment.pip("check")


def test_pip_refuses_a_core_with_another_hash(make, tmp_path):
    altered = lock.REQUIREMENTS.read_text().replace("sha256:", "sha256:0000")
    altered = "\n".join(line[: line.index("0000") + 64] + line[line.index("0000") + 68 :] if "0000" in line else line
                        for line in altered.splitlines())  # fmt: skip
    (tmp_path / "altered.txt").write_text(altered)
    environment = make("altered")
    done = execute(
        *(environment.tools.python, "-m", "pip", "--python", environment.python, "install", "--require-hashes"),
        *("--no-deps", "-r", tmp_path / "altered.txt"),
    )
    assert done.status != 0
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in done.err


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("python", ["3.11", "3.13"])
@pytest.mark.parametrize("platform", ["aarch64-apple-darwin", "x86_64-manylinux_2_35", "aarch64-manylinux_2_35"])
def test_no_platform_gets_anything_of_cuda(tools, project, torch_index, platform, python, extra):
    words = ["pip", "compile", "--quiet", "--no-header", "--no-annotate", "pyproject.toml"]
    words += ["--python-platform", platform, "--python-version", python]
    words += ["--extra", extra] if extra else []
    # The source in pyproject.toml is for the lock; here one names the index, as docs/install.md says.
    words += ["--index", torch_index.url] if extra in ("torch-lite", "full") and "linux" in platform else []
    done = tools.run_uv(*words, folder=project, environment={"MACOSX_DEPLOYMENT_TARGET": "15.0"})
    versions = dict(line.split("==") for line in done.out.splitlines() if "==" in line)
    assert cuda_packages(versions) == []
    assert {"mlx", "mlx-metal" if "darwin" in platform else "mlx-cpu"} <= set(versions)
    assert ("torch" in versions) == (extra in ("torch-lite", "full"))
    assert ("transformers" in versions) == (extra in ("vlm", "full"))
    if extra == "":
        assert len(versions) <= 22
    if "torch" in versions and "linux" in platform:
        assert versions["torch"].endswith("+cpu")


NOWHERE = "http://127.0.0.1:9/cpu"
USER = """
[project]
name = "user"
version = "0"
requires-python = ">=3.11"
dependencies = ["mflux[torch-lite]", "torch"]

[tool.uv]
environments = ["sys_platform == 'linux'"]

[tool.uv.sources]
mflux = {{ path = "{path}" }}
torch = {{ index = "mine" }}

[[tool.uv.index]]
name = "mine"
url = "{url}"
explicit = true
"""


def test_a_project_with_a_torch_index_of_its_own(tools, project, torch_index, tmp_path):
    """It takes mflux from a path (or git): uv reads this project's sources too; these must not stand beside its own."""
    pyproject = project / "pyproject.toml"
    # Where nothing answers: nobody else is to ask there.
    pyproject.write_text(pyproject.read_text().replace(torch_index.url, NOWHERE))
    user = tmp_path / "user"
    user.mkdir()
    (user / "pyproject.toml").write_text(USER.format(path=project, url=torch_index.url))
    tools.run_uv("lock", "--quiet", folder=user)
    packages = tomllib.loads((user / "uv.lock").read_text())["package"]
    (torch,) = (package for package in packages if package["name"] == "torch")
    assert torch["source"]["registry"].rstrip("/") == torch_index.url
