"""`mflux doctor` tells every part, and what is broken is told like the rest."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mflux
from mflux import backend
from mflux.cli import doctor

LABELS = ("mflux", "Python", "platform", "memory", "MLX", "BLAS", "extras", "caches", "Hugging Face")


@pytest.fixture
def quick(monkeypatch) -> dict:
    """A sound answer of MLX's process, so that not every test starts and times one."""
    answer = {
        "version": "0.32.4",
        "backend": "cpu",
        "device": {"device_name": "a processor"},
        "blas": {"name": "numpy's OpenBLAS 0.3.31 (Haswell)", "multiplies": True},
        "gflops": {"value": 123.4},
    }
    monkeypatch.setattr(doctor, "probe_mlx", lambda: answer)
    monkeypatch.setattr(doctor, "_has_nvidia_driver", lambda: False)
    return answer


@pytest.fixture
def plain_pip(monkeypatch):
    monkeypatch.setattr(doctor, "_pip", lambda words: f"pip {words}")


# ---- this installation


def test_it_tells_every_part_of_this_installation(cli):
    result = cli("doctor", "--json")
    assert result.status == 0
    assert result.err == ""
    found = json.loads(result.out)
    assert found["mflux"]["version"] == mflux.__version__
    assert found["python"]["version"] == ".".join(map(str, sys.version_info[:3]))
    assert found["memory"]["total"] > 1e8
    assert found["mlx"]["version"] == importlib.metadata.version("mlx")
    assert found["mlx"]["backend"] == ("cpu" if not backend.on_gpu() else found["mlx"]["backend"])
    assert found["mlx"]["library"]["in_place"] in found["mlx"]["library"]["wheels"]
    assert found["blas"]["gflops"] > 0
    assert found["caches"]["hugging_face"]["free"] > 0
    assert found["hugging_face"]["offline"] is True
    assert set(found["extras"]) == {"torch-lite", "vlm", "gguf", "serve", "full"}
    assert "sizes" not in found
    for part in found.values():
        assert "error" not in part


def test_the_text_has_a_line_for_every_part(cli, quick):
    result = cli("doctor")
    assert result.status == 0
    lines = result.out.splitlines()
    for label in LABELS:
        assert sum(line.startswith(f"{label:14}") for line in lines) == 1, label
    assert "cannot be told" not in result.out
    assert "0.32.4 on CPU (a processor)" in result.out
    assert "numpy's OpenBLAS 0.3.31 (Haswell), 123 GFLOP/s on the CPU" in result.out


def test_numpy_without_a_blas_is_told(cli, quick, plain_pip):
    assert doctor.blas_part(quick)["problems"] == []
    quick["blas"] = {"name": "no BLAS", "multiplies": False}
    result = cli("doctor")
    assert (
        "problem: this numpy multiplies matrices with no BLAS, many times slower than the one of PyPI\n"
        "   mend: pip install --force-reinstall --no-deps --only-binary :all: numpy"
    ) in result.out
    # A GPU does not care.
    quick["backend"] = "metal"
    assert doctor.blas_part(quick)["problems"] == []


def test_neither_doctor_nor_its_help_loads_anything_heavy(cli_process):
    code = (
        "import sys; from mflux.cli.main import main; status = main(['doctor', *sys.argv[1:]]); "
        "print({'mlx', 'mlx.core', 'numpy', 'PIL', 'torch', 'transformers', 'tokenizers'} & set(sys.modules)); "
        "print('huggingface_hub' in sys.modules)"
    )
    for word, hub in (("--json", "True"), ("--help", None)):
        done = subprocess.run([sys.executable, "-c", code, word], capture_output=True, text=True, check=False)
        if hub is None:
            assert "usage: mflux-doctor" in done.stdout
        else:
            # The whole of it, and MLX not even then: it is loaded in a process of its own.
            assert done.stdout.splitlines()[-2:] == ["set()", hub]
    light = "import sys; import mflux.cli.doctor; print({'mlx', 'numpy', 'PIL', 'huggingface_hub'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", light], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# ---- MLX is broken

BROKEN = {
    "raises": (
        "raise ImportError('libcuda.so.1: cannot open shared object file')",
        "MLX cannot be loaded: ImportError: libcuda.so.1: cannot open shared object file",
    ),
    "crashes": ("import os; os.abort()", "MLX crashes when it is used (SIGABRT)"),
    "hangs": ("import time; time.sleep(60)", "MLX does not answer within 1 s"),
    "leaves": ("raise SystemExit(3)", "MLX cannot be loaded: exit status 3"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_mlx_that_does_not_load_is_reported(cli, monkeypatch, tmp_path, kind):
    code, told = BROKEN[kind]
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").touch()
    (tmp_path / "mlx" / "core.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "_has_nvidia_driver", lambda: False)
    if kind == "hangs":
        monkeypatch.setattr(doctor, "_PROBE_SECONDS", 1)
    result = cli("doctor")
    assert result.status == 0
    assert f"cannot be told ({told})" in result.out
    assert f"\nproblem: {told}\n   mend: " in result.out
    assert "cannot be told (MLX could not be asked)" in result.out
    assert f"{'extras':14}torch-lite" in result.out


def test_files_in_the_working_directory_are_not_taken_for_modules(in_folder):
    (in_folder / "mlx.py").write_text("raise SystemExit('the wrong mlx')")
    (in_folder / "json.py").write_text("raise SystemExit('the wrong json')")
    assert doctor.probe_mlx()["version"] == importlib.metadata.version("mlx")


# ---- two wheels, one library


class Site:
    """A folder of installed distributions, as far as importlib.metadata looks at it."""

    def __init__(self, folder: Path, monkeypatch):
        self.folder = folder
        folder.mkdir()
        search = importlib.metadata.distributions
        monkeypatch.setattr(importlib.metadata, "distributions", lambda: search(path=[str(folder)]))

    def install(self, name: str, version: str, files: dict[str, bytes], *, missing: bytes | None = None) -> None:
        """Write files and record them, as pip does: what was there before is overwritten."""
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        rows = []
        for path, content in files.items():
            target = self.folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            rows.append(f"{path},sha256={digest},{len(content)}\n")
        (info / "RECORD").write_text("".join(rows))


@pytest.fixture
def site(tmp_path, monkeypatch) -> Site:
    return Site(tmp_path / "site", monkeypatch)


LIBRARY = "mlx/lib/libmlx.so"
CPU, CUDA = b"for the processor", b"for the graphics card"


def told(part: dict) -> list[tuple[str, str]]:
    return [(problem["problem"], problem["remedy"]) for problem in part["problems"]]


@pytest.fixture
def linux(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(doctor, "_has_nvidia_driver", lambda: False)


def test_one_sound_wheel_is_no_problem(site, linux):
    site.install("mlx", "0.32.4", {"mlx/core.so": b""})
    site.install("mlx-cpu", "0.32.4", {LIBRARY: CPU})
    site.install("mlx-lm", "0.30.0", {"mlx_lm/__init__.py": b""})
    part = doctor.library_part()
    assert part == {"mlx": "0.32.4", "wheels": {"mlx-cpu": "0.32.4"}, "in_place": "mlx-cpu", "problems": []}


@pytest.mark.parametrize("order", [("mlx-cpu", "mlx-cuda-13"), ("mlx-cuda-13", "mlx-cpu")])
@pytest.mark.parametrize("driver", [False, True])
def test_two_wheels_and_whose_library_is_in_place(site, linux, plain_pip, monkeypatch, order, driver):
    monkeypatch.setattr(doctor, "_has_nvidia_driver", lambda: driver)
    site.install("mlx", "0.32.4", {})
    for name in order:
        site.install(name, "0.32.4", {LIBRARY: CPU if name == "mlx-cpu" else CUDA})
    part = doctor.library_part()
    assert part["in_place"] == order[-1]
    keep, drop = ("mlx-cuda-13", "mlx-cpu") if driver else ("mlx-cpu", "mlx-cuda-13")
    assert told(part) == [
        (
            f"mlx-cpu and mlx-cuda-13 are installed and both own libmlx.so; that of {order[-1]} is in place",
            f"pip uninstall -y {drop} && pip install --force-reinstall --no-deps mlx==0.32.4 {keep}==0.32.4",
        )
    ]


def test_two_wheels_and_a_library_of_neither(site, linux, plain_pip):
    site.install("mlx", "0.32.4", {})
    site.install("mlx-cpu", "0.32.4", {LIBRARY: CPU})
    site.install("mlx-cuda-12", "0.32.4", {LIBRARY: CUDA})
    (site.folder / LIBRARY).write_bytes(b"another")
    part = doctor.library_part()
    assert part["in_place"] is None
    assert "that of none is in place" in told(part)[0][0]


def test_a_library_that_went_with_the_other_wheel(site, linux, plain_pip):
    site.install("mlx", "0.32.4", {})
    site.install("mlx-cpu", "0.32.4", {LIBRARY: CPU})
    (site.folder / LIBRARY).unlink()
    assert told(doctor.library_part()) == [
        (
            "mlx-cpu is installed and its libmlx.so is missing",
            "pip install --force-reinstall --no-deps mlx-cpu==0.32.4",
        )
    ]


def test_a_library_that_another_wheel_left_behind(site, linux, plain_pip):
    site.install("mlx", "0.32.4", {})
    site.install("mlx-cpu", "0.32.4", {LIBRARY: CPU})
    # As long as the recorded one, so that only its content tells.
    (site.folder / LIBRARY).write_bytes(CPU[::-1])
    assert told(doctor.library_part()) == [
        (
            "libmlx.so is not the one that mlx-cpu 0.32.4 brought",
            "pip install --force-reinstall --no-deps mlx-cpu==0.32.4",
        )
    ]


def test_wheels_of_different_versions(site, linux, plain_pip):
    site.install("mlx", "0.32.4", {})
    site.install("mlx-cpu", "0.31.0", {LIBRARY: CPU})
    assert told(doctor.library_part()) == [
        (
            "mlx is 0.32.4 and mlx-cpu is 0.31.0; they belong together",
            "pip install --force-reinstall --no-deps mlx-cpu==0.32.4",
        )
    ]


def test_no_library_and_no_mlx(site, linux, plain_pip):
    assert told(doctor.library_part()) == [
        ("mlx is not installed", "pip install --force-reinstall --no-deps mlx mlx-cpu")
    ]
    site.install("mlx", "0.32.4", {})
    assert told(doctor.library_part()) == [
        (
            "no wheel with MLX's library is installed",
            "pip install --force-reinstall --no-deps mlx==0.32.4 mlx-cpu==0.32.4",
        )
    ]


def test_cuda_without_a_driver_leads_back_to_the_cpu(site, linux, plain_pip):
    site.install("mlx", "0.32.4", {})
    site.install("mlx-cuda-13", "0.32.4", {LIBRARY: CUDA})
    assert told(doctor.mlx_part({"error": "MLX cannot be loaded: libcuda.so.1"})) == [
        (
            "MLX cannot be loaded: libcuda.so.1",
            "pip uninstall -y mlx-cuda-13 && pip install --force-reinstall --no-deps mlx==0.32.4 mlx-cpu==0.32.4",
        )
    ]


def test_what_is_done_on_a_chip_is_told(site, linux, quick):
    site.install("mlx", "0.32.4", {})
    site.install("mlx-cpu", "0.32.4", {LIBRARY: CPU})
    quick |= {"backend": "metal", "device": {"device_name": "Apple M1"}, "chip": ["layers are unpacked"]}
    lines = doctor.describe({"mlx": doctor.mlx_part(quick), "problems": []})
    assert lines[0].startswith("MLX           0.32.4 on Metal (Apple M1)")
    assert lines[1] == f"{'':14}on this chip layers are unpacked"


def test_a_driver_and_the_cpu_wheel(site, linux, plain_pip, quick, monkeypatch):
    site.install("mlx", "0.32.4", {})
    site.install("mlx-cpu", "0.32.4", {LIBRARY: CPU})
    assert told(doctor.mlx_part(quick)) == []
    monkeypatch.setattr(doctor, "_has_nvidia_driver", lambda: True)
    assert told(doctor.mlx_part(quick)) == [
        (
            "there is an NVIDIA driver, and MLX computes on the CPU",
            'pip uninstall -y mlx-cpu && pip install "mlx[cuda13]==0.32.4"',
        )
    ]
    quick["backend"] = "cuda"
    assert told(doctor.mlx_part(quick)) == []


def test_on_macos_the_library_is_that_of_mlx_metal(site, plain_pip, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    site.install("mlx", "0.32.4", {})
    site.install("mlx-metal", "0.32.4", {"mlx/lib/libmlx.dylib": b"for Metal"})
    assert doctor.library_part()["in_place"] == "mlx-metal"
    part = doctor.mlx_part({"error": "MLX cannot be loaded: no reason"})
    assert told(part) == [("MLX cannot be loaded: no reason", "pip install --force-reinstall mlx==0.32.4")]


def test_commands_fit_environments_without_pip(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert doctor._pip("uninstall -y mlx-cpu") == "uv pip uninstall mlx-cpu"
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    assert doctor._pip("uninstall -y mlx-cpu") == "pip uninstall -y mlx-cpu"


# ---- other parts are broken

PARTS = ("mflux", "python", "platform", "memory", "mlx", "blas", "extras", "caches", "hugging_face", "sizes")


@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_cannot_be_asked_is_told_and_hides_no_other(cli, quick, site, monkeypatch, name):
    def broken(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(doctor, f"{name}_part", broken)
    result = cli("doctor", "--json", "--sizes")
    assert result.status == 0
    found = json.loads(result.out)
    assert found[name] == {"error": "OSError: [Errno 5] Input/output error"}
    assert [other for other in PARTS if "error" in found[other]] == [name]
    result = cli("doctor", "--sizes")
    assert result.status == 0
    assert result.out.count("cannot be told (OSError: [Errno 5] Input/output error)") == 1


def test_an_environment_that_huggingface_hub_cannot_read_is_told(cli_process):
    import os

    environment = os.environ | {"HF_HOME": "~nobody9/x"}
    result = cli_process("doctor", "--json", env=environment)
    assert result.status == 0, result.err
    found = json.loads(result.out)
    assert "HF_HOME is ~nobody9/x" in found["hugging_face"]["error"]
    assert "HF_HOME is ~nobody9/x" in found["caches"]["hugging_face"]["error"]
    assert found["caches"]["mflux"]["free"] > 0
    result = cli_process("doctor", env=environment)
    assert result.status == 0
    assert result.out.count("HF_HOME is ~nobody9/x") == 2


def test_a_matrix_product_that_fails_is_a_problem(cli, quick):
    quick["gflops"] = {"error": "MemoryError: no room"}
    result = cli("doctor")
    assert result.status == 0
    assert "problem: MLX cannot multiply matrices: MemoryError: no room" in result.out
    assert "GFLOP/s" not in result.out


# ---- what is told


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_an_extra_that_is_not_there_comes_with_its_command(cli, quick, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    extra = {"torch": "torch-lite", "transformers": "vlm"}[name]
    result = cli("doctor")
    for missing in (extra, "full"):
        assert f'{missing}: not installed; pip install "mflux[{missing}]"' in result.out


def test_an_extra_that_is_there_comes_with_its_versions(cli, quick, monkeypatch):
    import mflux.optional

    monkeypatch.setattr(mflux.optional, "is_installed", lambda name: True)
    monkeypatch.setattr(doctor, "_version", lambda name: {"torch": "2.13.0+cpu"}.get(name))
    assert "torch-lite: installed (torch 2.13.0+cpu)" in cli("doctor").out
    assert "vlm: installed (transformers ?, jinja2 ?)" in cli("doctor").out


@pytest.mark.parametrize("user", ["me:geheim", "hf_geheim"])
def test_a_password_in_the_endpoint_is_not_told(cli_process, user):
    for address in (f"https://{user}@hub.example", f"https://{user}@hub.example:[/"):
        for words in ([], ["--json"]):
            result = cli_process("doctor", *words, env=os.environ | {"HF_ENDPOINT": address})
            assert result.status == 0
            assert "geheim" not in result.out + result.err
            told = result.out.replace(r"\u2026", "…")
            assert "https://…@hub.example" in told or "Invalid IPv6 URL" in told


@pytest.mark.parametrize("kind", ["variable", "file", "none", "empty"])
def test_where_the_token_comes_from_is_told_and_the_token_is_not(cli, quick, monkeypatch, tmp_path, kind):
    import huggingface_hub.constants as constants

    secret = "hf_thisIsASecret"
    stored = tmp_path / "token"
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(stored))
    if kind == "variable":
        monkeypatch.setenv("HF_TOKEN", secret)
    if kind in ("file", "empty"):
        stored.write_text(secret if kind == "file" else "\n")
    expected = {"variable": "token from HF_TOKEN;", "file": f"token from {stored};"}.get(kind, "no token;")
    for words in ([], ["--json"]):
        result = cli("doctor", *words)
        assert secret not in result.out + result.err
    assert expected in cli("doctor").out


@pytest.mark.parametrize("offline", [True, False])
def test_the_offline_state_is_told(cli, quick, monkeypatch, offline):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    assert ("; offline (HF_HUB_OFFLINE);" if offline else "; online;") in cli("doctor").out


def test_caches_are_measured_without_counting_links_twice(cli, quick, monkeypatch, tmp_path):
    import huggingface_hub.constants as constants

    blobs, snapshot = tmp_path / "hub" / "models--a--b" / "blobs", tmp_path / "hub" / "models--a--b" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "x").write_bytes(bytes(3_000_000))
    (snapshot / "weights.safetensors").symlink_to(blobs / "x")
    (snapshot / "gone").symlink_to(blobs / "nothing")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("MFLUX_CACHE_DIR", str(tmp_path / "not" / "there"))
    found = json.loads(cli("doctor", "--json").out)["caches"]
    assert found["hugging_face"]["bytes"] == 3_000_000
    assert found["mflux"]["bytes"] == 0
    assert found["mflux"]["free"] > 0
    assert f"{tmp_path / 'hub'}: 3 MB, " in cli("doctor").out


def test_sizes_are_those_of_the_files_that_a_distribution_brought(site, cli, quick):
    site.install("big", "2.0", {"big/weights": bytes(2_500_000), "big/__pycache__/a.pyc": bytes(9_000_000)})
    site.install("small", "1.0", {"small.py": bytes(1000), "small_gone.py": bytes(5000)})
    (site.folder / "small_gone.py").unlink()
    broken = site.folder / "broken-1.0.dist-info"
    broken.mkdir()
    found = json.loads(cli("doctor", "--json", "--sizes").out)["sizes"]
    assert list(found["distributions"]) == ["big", "small"]
    small = found["distributions"]["small"]
    assert found["distributions"]["big"] == {"version": "2.0", "bytes": 2_500_000}
    assert small == {"version": "1.0", "bytes": 1000}
    assert found["total"] == 2_501_000
    text = cli("doctor", "--sizes").out
    assert "   2.5 MB  big 2.0\n" in text
    assert "   2.5 MB  2 distributions" in text


def test_this_package_is_measured_wherever_it_lies():
    ours = doctor.sizes_part()["distributions"]["mflux"]
    sources = sum(path.stat().st_size for path in Path(mflux.__file__).parent.rglob("*.py"))
    assert ours["bytes"] >= sources


def test_a_container_s_limit_is_told(monkeypatch):
    files = {
        "/proc/meminfo": ["MemTotal: 1 kB", "MemAvailable:    2048 kB", "HugePages_Total:   0", "odd"],
        "/sys/fs/cgroup/memory.max": ["1048576"],
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": [],
    }
    monkeypatch.setattr("mflux.utils.memory.lines_of", files.get)
    part = doctor.memory_part()
    assert (part["available"], part["limit"]) == (2048 * 1024, 1048576)
    assert "2.1 MB available, limited to 1 MB for this container" in doctor._memory_text(part)
    files["/sys/fs/cgroup/memory.max"] = ["max"]
    assert doctor.memory_part()["limit"] is None


# ---- the selftest


def test_the_embedded_model_is_generated_in_two_ways(cli):
    """Once for good, in a process of its own: without a GPU, the CPU in its way."""
    result = cli("doctor", "--selftest")
    (line,) = result.out.splitlines()
    assert (result.status, result.err) == (0, "")
    assert " computes right: " in line and " of 255 from the CPU's image; " in line
    if not backend.mx.is_available(backend.mx.gpu):
        assert line.startswith("MLX finds no GPU; in its way this CPU computes right: ")


def test_a_gpu_that_computes_wrong_is_told(cli, monkeypatch):
    found = {"device": "metal", "name": "Apple M9", "difference": 40.0, "seconds": 0.1, "cpu_seconds": 1.0}
    monkeypatch.setattr(doctor, "_ask_process", lambda *_: found)
    result = cli("doctor", "--selftest")
    assert result.status == 1
    assert result.out.startswith("this GPU (Metal, Apple M9) computes wrong: 40.00 of 255 from the CPU's image, where ")
    assert "--device cpu" in result.out and "report" in result.out
    assert json.loads(cli("doctor", "--selftest", "--json").out) == found
    found |= {"difference": 0.3}
    assert cli("doctor", "--selftest").status == 0


def test_a_process_that_ends_is_one_sentence(cli, monkeypatch):
    def ended(*_):
        raise RuntimeError("MLX crashes when it is used (SIGSEGV)")

    monkeypatch.setattr(doctor, "_ask_process", ended)
    result = cli("doctor", "--selftest")
    assert result.status == 1
    assert result.errors == ["error: the embedded model generates nothing here: MLX crashes when it is used (SIGSEGV)"]
