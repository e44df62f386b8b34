"""What an installation brings, and that it works with that and no more."""

from __future__ import annotations

import platform
import re
import sys
import tomllib
from pathlib import Path

import pytest
from support.environments import ROOT, Done, Environment, cuda_packages

DEMO = ROOT / "src" / "mflux" / "demo" / "checkpoint"
needs_demo = pytest.mark.skipif(not DEMO.is_dir(), reason="the embedded model is not trained yet")
ON_LINUX = sys.platform == "linux"

# What mflux 0.24 brought and this project must not.
FORBIDDEN = {"torch", "torchvision", "transformers", "opencv-python", "opencv-python-headless", "matplotlib", "regex"}
MOST_DISTRIBUTIONS = 23
MOST_MEGABYTES = 160
# The tests that need the extra vlm.
EXTRA = sorted((ROOT / "tests" / "families").glob("*/test_extra*.py"))


@pytest.fixture(scope="module")
def core(make, wheel) -> Environment:
    environment = make("core")
    environment.install(wheel)
    return environment


@pytest.fixture(scope="module")
def torch_lite(make, wheel, torch_index) -> Environment:
    environment = make("torch-lite")
    environment.install(f"{wheel}[torch-lite]", *torch_index.constraints, "--extra-index-url", torch_index.url)
    return environment


@pytest.fixture(scope="module")
def vlm(make, wheel) -> Environment:
    environment = make("vlm")
    environment.install(f"{wheel}[vlm]")
    return environment


@pytest.fixture(scope="module")
def serve(make, wheel) -> Environment:
    environment = make("serve")
    environment.install(f"{wheel}[serve]")
    return environment


@pytest.fixture(scope="module")
def full(make, wheel, torch_index) -> Environment:
    environment = make("full")
    environment.install(f"{wheel}[full]", *torch_index.constraints, "--extra-index-url", torch_index.url)
    return environment


@pytest.fixture(scope="module")
def lowest(make, wheel, tools) -> Environment:
    """The oldest versions that pyproject.toml allows, of what it names."""
    environment = make("lowest")
    project = ("-r", ROOT / "pyproject.toml", "--resolution", "lowest-direct")
    tools.run_uv("pip", "install", "--quiet", "--python", environment.python, *project)
    tools.run_uv("pip", "install", "--quiet", "--python", environment.python, "--no-deps", wheel)
    return environment


@pytest.fixture
def sparse_file(tmp_path) -> Path:
    """A PyTorch file with a plain tensor and a sparse one, [[0, 7], [0, 0]], written without torch."""
    import numpy as np
    from support.torch_archives import Call, Global, archive, save, tensor

    layout = Call(Global("torch.serialization", "_get_layout"), ("torch.sparse_coo",))
    indices = tensor("1", shape=(2, 1), kind="LongStorage")
    parts = (indices, tensor("2", shape=(1,)), Call(Global("torch", "Size"), ((2, 2),)), True)
    root = {
        "plain": tensor("0", shape=(2, 3)),
        "sparse": Call(Global("torch._utils", "_rebuild_sparse_tensor"), (layout, parts)),
    }
    storages = {
        "0": np.arange(6, dtype=np.float32).tobytes(),
        "1": np.array([0, 1], dtype=np.int64).tobytes(),
        "2": np.array([7], dtype=np.float32).tobytes(),
    }
    return save(tmp_path / "sparse.pt", archive(root, storages))


def write_tiny(environment: Environment, folder: Path) -> Path:
    """A tiny FLUX.1 checkpoint of random weights, written by the environment itself."""
    code = (
        "from pathlib import Path; from support.tiny import write_checkpoint; "
        f"write_checkpoint(Path({str(folder)!r}), seed=1, guidance=False)"
    )
    done = environment.run("python", "-c", code, environment={"PYTHONPATH": str(ROOT / "tests")})
    assert done.status == 0, done.err
    return folder


def draw(environment: Environment, folder: Path, *words: object) -> Done:
    return environment.run("mflux-generate", *words, "--steps", 2, "--seed", 1, folder=folder)


# ---- the core


def test_the_core_is_small(core):
    versions = core.versions()
    assert not FORBIDDEN & set(versions)
    assert len(versions) <= MOST_DISTRIBUTIONS, sorted(versions)
    if ON_LINUX:
        assert core.megabytes() <= MOST_MEGABYTES


def test_doctor_finds_the_core_sound_and_no_extra(core):
    found = core.doctor()
    assert [name for name, part in found.items() if "error" in part] == []
    assert {name: extra["installed"] for name, extra in found["extras"].items()} == {
        "torch-lite": False,
        "vlm": False,
        "serve": False,
        "full": False,
    }
    sizes = found["sizes"]
    assert set(name.lower().replace("_", "-") for name in sizes["distributions"]) == set(core.versions())
    assert sizes["total"] / 1e6 == pytest.approx(core.megabytes(), rel=0.02)


def test_the_core_draws_with_a_checkpoint(core, tmp_path):
    model = write_tiny(core, tmp_path / "tiny-schnell")
    words = ("--model", model, "--base-model", "schnell", "--prompt", "a red circle", "--width", 64, "--height", 32)
    done = draw(core, tmp_path, *words)
    assert done.status == 0, done.err
    assert Path(tmp_path, done.out.strip()).stat().st_size > 100


@needs_demo
def test_the_core_draws_with_the_embedded_model(core, tmp_path):
    done = core.run(
        *("mflux-generate", "--model", "demo", "--prompt", "a large red circle on a white background", "--seed", 2),
        folder=tmp_path,
    )
    assert done.status == 0, done.err
    code = "from PIL import Image; p = Image.open('image.png').convert('RGB'); print(p.getpixel((64, 64)))"
    red, green, blue = eval(core.run("python", "-c", code, folder=tmp_path).out)
    assert red > 150 > max(green, blue)


def test_what_needs_torch_says_so_in_one_sentence(core, sparse_file):
    done = core.run("mflux-convert", sparse_file, "out.safetensors", folder=sparse_file.parent)
    assert done.status == 1
    (line,) = done.errors
    assert "the sparse tensor sparse needs the package torch, which is not installed" in line
    index = " --extra-index-url https://download.pytorch.org/whl/cpu" if ON_LINUX else ""
    assert f'pip install "mflux[torch-lite]"{index} (with uv: uv sync --extra torch-lite)' in line
    assert "Traceback" not in done.err
    assert not (sparse_file.parent / "out.safetensors").exists()


def test_what_needs_transformers_says_so_in_one_sentence(core, tmp_path):
    for command in ("mflux-inspire-fibo", "mflux-refine-fibo"):
        (tmp_path / "prompt.json").write_text("{}")
        words = {
            "mflux-inspire-fibo": ("--image-path", ROOT / "docs" / "demo.png"),
            "mflux-refine-fibo": ("--prompt-file", "prompt.json", "--instructions", "make it red"),
        }[command]
        done = core.run(command, *words, folder=tmp_path)
        assert done.status == 1, done.err
        (line,) = done.errors
        assert "transformers" in line
        assert 'pip install "mflux[vlm]" (with uv: uv sync --extra vlm)' in line
        assert "Traceback" not in done.err


def test_every_command_has_a_help_that_needs_nothing_more(core):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for command in scripts:
        done = core.run(command, "--help")
        assert done.status == 0, (command, done.err)
        assert done.out.startswith("usage: "), command
        assert done.err == "", command


# ---- extras


def test_torch_lite_brings_a_cpu_build_and_nothing_of_cuda(torch_lite, core):
    versions = torch_lite.versions()
    assert cuda_packages(versions) == []
    if ON_LINUX:
        assert versions["torch"].endswith("+cpu")
    assert "transformers" not in versions
    assert set(core.versions()) < set(versions)


def test_torch_lite_reads_a_sparse_tensor(torch_lite, sparse_file):
    done = torch_lite.run("mflux-convert", sparse_file, "out.safetensors", folder=sparse_file.parent)
    assert done.status == 0, done.err
    code = "from safetensors.numpy import load_file; d = load_file('out.safetensors'); print(d['sparse'].tolist())"
    assert torch_lite.run("python", "-c", code, folder=sparse_file.parent).out == "[[0.0, 7.0], [0.0, 0.0]]\n"


def test_vlm_brings_transformers_and_no_torch(vlm):
    versions = vlm.versions()
    assert {"transformers", "jinja2"} <= set(versions)
    assert not {"torch", "torchvision"} & set(versions)
    assert cuda_packages(versions) == []
    found = vlm.doctor()["extras"]
    assert (found["vlm"]["installed"], found["torch-lite"]["installed"], found["full"]["installed"]) == (
        True,
        False,
        False,
    )


def test_fibo_vlm_runs_without_torch(vlm, tmp_path):
    """Commands, class and processor on a small checkpoint; pytest lies beside the environment, not in it."""
    vlm.pip("install", "--quiet", "--no-compile", "--target", tmp_path / "beside", "pytest")
    words = ("-m", "pytest", "-rs", "-p", "no:cacheprovider", *EXTRA)
    done = vlm.run("python", *words, folder=ROOT, environment={"PYTHONPATH": str(tmp_path / "beside")})
    assert done.status == 0, f"{done.out[-4000:]}\n{done.err}"
    assert re.search(r"^\d\d+ passed", done.out, re.M), done.out
    assert "skipped" not in done.out
    assert "torch" not in vlm.versions()


def test_serve_brings_a_server_and_little_else(serve, core):
    more = set(serve.versions()) - set(core.versions())
    assert {"starlette", "uvicorn", "python-multipart", "prometheus-client"} <= more
    assert len(more) <= 6, sorted(more)
    if ON_LINUX:
        assert serve.megabytes() - core.megabytes() < 3
    done = serve.run("mflux-serve", "--host", "0.0.0.0")
    assert (done.status, len(done.errors)) == (2, 1)


def test_full_is_all_of_it(full, vlm, torch_lite, sparse_file):
    versions = full.versions()
    of_serve = {"starlette", "uvicorn", "python-multipart", "prometheus-client"}
    assert set(versions) == set(vlm.versions()) | set(torch_lite.versions()) | of_serve
    assert cuda_packages(versions) == []
    full.pip("check")
    found = full.doctor()
    assert [name for name, part in found.items() if "error" in part] == []
    assert {name: extra["installed"] for name, extra in found["extras"].items()} == {
        "torch-lite": True,
        "vlm": True,
        "serve": True,
        "full": True,
    }
    assert full.run("mflux-convert", sparse_file, "out.safetensors", folder=sparse_file.parent).status == 0
    done = full.run("mflux-inspire-fibo", "--image-path", ROOT / "docs" / "demo.png", folder=sparse_file.parent)
    # Past what the core says: the extra is there, the model's weights are not.
    assert done.status == 1
    (line,) = done.errors
    assert "mflux[vlm]" not in line


def test_an_extra_weighs_what_the_docs_say(core, torch_lite, vlm, serve, full):
    """Within a tenth of the table in docs/install.md, on the machine that it is for."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("the table is for Linux x86-64")
    text = (ROOT / "docs" / "install.md").read_text()
    environments = {
        "mflux": core,
        "mflux[torch-lite]": torch_lite,
        "mflux[vlm]": vlm,
        "mflux[serve]": serve,
        "mflux[full]": full,
    }
    for name, environment in environments.items():
        row = re.search(rf"^\| `{re.escape(name)}` \|.*\| ([\d,]+) MB \| (\d+) \|$", text, re.M)
        assert row, name
        assert environment.megabytes() == pytest.approx(float(row[1].replace(",", "")), rel=0.1)
        assert len(environment.versions()) == pytest.approx(int(row[2]), abs=3)


# ---- the oldest versions


def test_the_oldest_allowed_versions_are_really_those(lowest):
    versions = lowest.versions()
    for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        name, bound = re.match(r"([a-z-]+)(?:\[cpu\])?>=([\d.]+)", text).groups()
        assert (versions[name] + ".").startswith(f"{bound}."), text


def test_the_oldest_allowed_versions_run(lowest, tmp_path):
    assert [name for name, part in lowest.doctor().items() if "error" in part] == []
    model = write_tiny(lowest, tmp_path / "tiny-schnell")
    words = ("--model", model, "--base-model", "schnell", "--prompt", "a red circle", "--width", 64, "--height", 32)
    done = draw(lowest, tmp_path, *words)
    assert done.status == 0, done.err
    assert lowest.run("mflux-info", Path(tmp_path, done.out.strip())).out.startswith("Prompt: a red circle\n")


def test_the_oldest_allowed_versions_pass_the_core_s_tests(lowest, tools):
    tools.run_uv("pip", "install", "--quiet", "--python", lowest.python, "pytest", "hypothesis")
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/core", "tests/families")
    done = lowest.run("python", *words, folder=ROOT, environment={"MFLUX_REFUSE_TORCH": "1"})
    assert done.status == 0, done.out[-4000:]


@needs_demo
def test_the_oldest_allowed_versions_draw_with_the_embedded_model(lowest, tmp_path):
    done = draw(lowest, tmp_path, "--model", "demo", "--prompt", "a large red circle on a white background")
    assert done.status == 0, done.err


# ---- speed on a Linux CPU


@pytest.mark.skipif(not ON_LINUX, reason="a Mac has its own BLAS")
def test_a_plain_install_multiplies_with_numpy_s_blas(core):
    found = core.doctor()
    assert found["blas"]["library"].startswith("numpy's OpenBLAS")
    assert found["problems"] == []
    # MLX's own BLAS reaches five.
    assert found["blas"]["gflops"] > 20
