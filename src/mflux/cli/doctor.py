"""`mflux doctor`: what this installation is made of, how fast it computes, and what to do about what is wrong with it.

Every part is asked on its own, and one that is broken is reported like any other. MLX is loaded in a process of its
own, so that a library that crashes or hangs takes only that one with it. Nothing is sent anywhere.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mflux.cli.parser.parsers import MfluxParser
from mflux.cli.terminal import run, say
from mflux.errors import DownloadError, MfluxError
from mflux.text import one_line, size
from mflux.utils.memory import machine_memory

if TYPE_CHECKING:
    from importlib.metadata import Distribution, PackagePath

_PROBE_SECONDS = 120
_SELFTEST_SECONDS = 600
# The side of the matrices whose product is timed.
_SIDE = 1024

Part = dict[str, Any]


def build_parser() -> MfluxParser:
    parser = MfluxParser(
        prog="mflux-doctor",
        description="Show what this installation is made of, how fast it computes, and what to do about what is wrong.",
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.add_argument("--sizes", action="store_true", help="also the size of each installed distribution")
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--plan",
        metavar="MODEL",
        help="instead: what a model takes on disk and in memory, with any number of bits; all: every model",
    )
    either.add_argument(
        "--selftest",
        action="store_true",
        help="instead: generate with the embedded model on the GPU and on the CPU, and compare",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run(report, argv)


def report(argv: Sequence[str] | None) -> int:
    args = build_parser().parse_args(argv)
    if args.plan is not None:
        from mflux.cli import fits

        planned = fits.plans(args.plan)
        say(json.dumps(planned, indent=2) if args.json else "\n".join(fits.describe(planned)))
        return 0
    if args.selftest:
        from mflux.cli import selftest

        try:
            seen = _ask_process("mflux.cli.selftest", "answer", _SELFTEST_SECONDS)
        except RuntimeError as error:
            raise MfluxError(f"the embedded model generates nothing here: {error}") from None
        say(json.dumps(seen, indent=2) if args.json else selftest.describe(seen))
        return 0 if selftest.is_right(seen) else 1
    found = examine(sizes=args.sizes)
    say(json.dumps(found, indent=2) if args.json else "\n".join(describe(found)))
    return 0


def examine(*, sizes: bool = False) -> dict[str, Part]:
    """All parts by name, as JSON can hold them. A part that could not be asked holds only `error`.

    `problems` lists what is wrong, each with the command that mends it.
    """
    found: dict[str, Any] = {
        "mflux": _safely(mflux_part),
        "python": _safely(python_part),
        "platform": _safely(platform_part),
        "memory": _safely(memory_part),
    }
    probe = _safely(probe_mlx)
    found["mlx"] = _safely(lambda: mlx_part(probe))
    found["blas"] = _safely(lambda: blas_part(probe))
    found["extras"] = _safely(extras_part)
    found["caches"] = _safely(caches_part)
    found["hugging_face"] = _safely(hugging_face_part)
    if sizes:
        found["sizes"] = _safely(sizes_part)
    found["problems"] = [problem for part in found.values() for problem in part.pop("problems", ())]
    return found


def _safely(ask: Callable[[], Part]) -> Part:
    try:
        return ask()
    except Exception as error:
        text = one_line(error) or "no reason given"
        return {"error": text if type(error) in (RuntimeError, DownloadError) else f"{type(error).__name__}: {text}"}


# ---- what there is


def mflux_part() -> Part:
    import mflux

    return {"version": mflux.__version__, "folder": str(_package_folder())}


def python_part() -> Part:
    return {"version": platform.python_version(), "executable": sys.executable, "prefix": sys.prefix}


def platform_part() -> Part:
    return {"system": platform.platform(), "machine": platform.machine(), "cores": _cores()}


def _cores() -> int | None:
    # Containers and job schedulers give a process fewer than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def memory_part() -> Part:
    """Bytes in all, bytes that are free to use, and the limit that a container sets; None where that cannot be told."""
    memory = machine_memory()
    return {"total": memory.total, "available": memory.available, "limit": memory.limit}


def extras_part() -> Part:
    from mflux.optional import EXTRAS, is_installed, pip_command

    return {
        name: {
            "installed": is_installed(name),
            "purpose": extra.purpose,
            "command": pip_command(name),
            "versions": {package: _version(package) for package in extra.packages},
        }
        for name, extra in EXTRAS.items()
    }


def _version(distribution: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def caches_part() -> Part:
    """Where models and encoded prompts are kept: folders, their bytes, and the bytes that are free on their disk."""
    from mflux.utils.paths import cache_folder

    return {
        "hugging_face": _safely(lambda: _folder(_hub_constants().HF_HUB_CACHE)),
        "mflux": _folder(cache_folder()),
        "prompts": _folder(cache_folder() / "prompts"),
    }


def _folder(path: str | Path) -> Part:
    import shutil

    path = Path(path)
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    return {"folder": str(path), "bytes": _bytes_under(path), "free": shutil.disk_usage(existing).free}


def _bytes_under(folder: Path) -> int:
    """Of the files themselves: the snapshots of a Hugging Face cache are links to them."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            total += 0 if path.is_symlink() else _file_size(path)
    return total


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        # A download that has just ended renames its file; another distribution may have removed one of its own.
        return 0


def hugging_face_part() -> Part:
    constants = _hub_constants()
    # What huggingface_hub looks at, in its order.
    named = next((name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name, "").strip()), None)
    stored = Path(constants.HF_TOKEN_PATH)
    source = named or (str(stored) if stored.is_file() and stored.read_text().strip() else None)
    return {"token": source, "offline": bool(constants.HF_HUB_OFFLINE), "endpoint": one_line(constants.ENDPOINT)}


def _hub_constants() -> Any:
    from mflux.hub.library import check_settings

    check_settings()
    import huggingface_hub.constants

    return huggingface_hub.constants


def sizes_part() -> Part:
    """Bytes of each installed distribution, bytecode left out, the largest first."""
    installed = _distributions()
    sizes = {name: _size(distribution) for name, distribution in installed.items()}
    ordered = sorted(sizes, key=lambda name: (-sizes[name], name.lower()))
    found = {name: {"version": installed[name].version, "bytes": sizes[name]} for name in ordered}
    return {"total": sum(sizes.values()), "distributions": found}


def _size(distribution: Distribution) -> int:
    files = [Path(str(distribution.locate_file(file))) for file in distribution.files or ()]
    if _canonical(distribution.name) == "mflux" and not any(file.name == "doctor.py" for file in files):
        # Installed editable: its record holds only the way to the sources.
        files += [path for path in _package_folder().rglob("*") if path.is_file()]
    return sum(_file_size(path) for path in files if path.suffix != ".pyc")


def _distributions() -> dict[str, Distribution]:
    """What is installed, by the name it has there; of two with one name the one that Python would import."""
    from importlib.metadata import distributions

    found: dict[str, Distribution] = {}
    for distribution in distributions():
        try:
            name, version = distribution.metadata["Name"], distribution.version
        except (KeyError, OSError, ValueError):
            continue
        # The remains of an installation that broke off have neither.
        if name and version:
            found.setdefault(name, distribution)
    return found


def _canonical(name: str) -> str:
    return name.lower().replace("_", "-")


def _package_folder() -> Path:
    return Path(__file__).resolve().parents[1]


# ---- MLX


def probe_mlx() -> Part:
    """What MLX says of itself when it is loaded as mflux loads it, in a process of its own.

    Raises:
        RuntimeError: it cannot be loaded, it crashes, or it does not answer.
    """
    return _ask_process("mflux.cli.doctor", "answer_probe", _PROBE_SECONDS)


def _ask_process(module: str, function: str, seconds: int) -> Part:
    """What a function prints as its last line, in a process of its own.

    Raises:
        RuntimeError: MLX cannot be loaded there, it crashes, or it does not answer.
    """
    import signal
    import subprocess

    # The folder comes last on the path, where it can hide nothing of the standard library.
    code = (
        f"import sys; sys.path.append({str(_package_folder().parent)!r}); from {module} import {function}; {function}()"
    )
    try:
        done = subprocess.run(
            # -P: files that lie in the working directory are not modules.
            [sys.executable, "-P", "-c", code],
            capture_output=True,
            text=True,
            timeout=seconds,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"MLX does not answer within {seconds} s") from None
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise RuntimeError(f"MLX crashes when it is used ({name})")
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(f"MLX cannot be loaded: {said[-1] if said else f'exit status {done.returncode}'}")
    return json.loads(lines[-1])


def answer_probe() -> None:
    """The other end of `probe_mlx`: print one line of JSON."""
    from mflux import chips
    from mflux.backend import mx, on_gpu
    from mflux.cpu import blas

    kinds = {kind for kind in ("metal", "cuda") if hasattr(mx, kind) and getattr(mx, kind).is_available()}
    answer: Part = {
        "version": vars(mx)["__version__"],
        "backend": kinds.pop() if on_gpu() and kinds else "cpu",
        "device": _safely(lambda: dict(mx.device_info())),
        "blas": _safely(lambda: {"name": blas.name(), "multiplies": blas.is_fast()}),
        "chip": chips.told(),
    }
    answer["gflops"] = _safely(lambda: {"value": _gflops(mx)})
    print(json.dumps(answer, default=str))


def _gflops(mx: Any) -> float:
    """Billions of operations a second in a product of two float32 matrices, the best of several."""
    import time

    from mflux.cpu import product

    a, b = (mx.random.normal((_SIDE, _SIDE), key=mx.random.key(seed)) for seed in (0, 1))
    mx.eval(a, b, product(a, b))
    best, began = float("inf"), time.perf_counter()
    for _ in range(20):
        start = time.perf_counter()
        mx.eval(product(a, b))
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() - began > 1:
            break
    return round(2 * _SIDE**3 / best / 1e9, 1)


def mlx_part(probe: Part) -> Part:
    """Version, backend, and who put the library there that all of it rests on."""
    library = library_part()
    problems = library.pop("problems")
    part: Part = {name: probe.get(name) for name in ("version", "backend", "device")}
    part["chip"] = probe.get("chip", [])
    part |= {"error": probe.get("error")} if "error" in probe else {}
    part["library"] = library
    part["nvidia_driver"] = _has_nvidia_driver()
    if "error" in probe and not problems:
        problems = [_problem(probe["error"], _reinstall_mlx(library, part["nvidia_driver"]))]
    if part["nvidia_driver"] and part["backend"] == "cpu" and not problems:
        cuda = f'"mlx[cuda13]=={part["version"]}"'
        remedy = f"{_pip('uninstall -y mlx-cpu')} && {_pip('install ' + cuda)}"
        problems = [_problem("there is an NVIDIA driver, and MLX computes on the CPU", remedy)]
    part["problems"] = problems
    return part


def library_part() -> Part:
    """The wheels that bring MLX's shared library, `libmlx`, and whose copy of it is in place.

    The wheels for the CPU and for CUDA own the same file. pip lets the one that comes last overwrite it, and deletes it
    when either goes.
    """
    installed = {_canonical(name): distribution for name, distribution in _distributions().items()}
    owners: dict[str, tuple[str, PackagePath, Path]] = {}
    for name, distribution in installed.items():
        if name != "mlx" and not name.startswith("mlx-"):
            continue
        for file in distribution.files or ():
            if file.as_posix() in ("mlx/lib/libmlx.so", "mlx/lib/libmlx.dylib"):
                owners[name] = (distribution.version, file, Path(str(distribution.locate_file(file))))
    in_place = sorted(name for name, (_, file, path) in owners.items() if _is_recorded(path, file))
    part: Part = {
        "mlx": installed["mlx"].version if "mlx" in installed else None,
        "wheels": {name: version for name, (version, _, _) in sorted(owners.items())},
        "in_place": in_place[0] if in_place else None,
    }
    part["problems"] = _library_problems(part, next((path for _, _, path in owners.values()), None))
    return part


def _library_problems(part: Part, path: Path | None) -> list[Part]:
    wheels: dict[str, str] = part["wheels"]
    if part["mlx"] is None:
        return [_problem("mlx is not installed", _reinstall_mlx(part, _has_nvidia_driver()))]
    if not wheels or path is None:
        return [_problem("no wheel with MLX's library is installed", _reinstall_mlx(part, _has_nvidia_driver()))]
    names = list(wheels)
    if len(names) > 1:
        state = f"that of {part['in_place']} is in place" if part["in_place"] else "that of none is in place"
        what = f"{' and '.join(names)} are installed and both own {path.name}; {state}"
        return [_problem(what, _reinstall_mlx(part, _has_nvidia_driver()))]
    (name,) = names
    remedy = _pip(f"install --force-reinstall --no-deps {name}=={part['mlx']}")
    if not path.is_file():
        return [_problem(f"{name} is installed and its {path.name} is missing", remedy)]
    if part["in_place"] is None:
        return [_problem(f"{path.name} is not the one that {name} {wheels[name]} brought", remedy)]
    if wheels[name] != part["mlx"]:
        return [_problem(f"mlx is {part['mlx']} and {name} is {wheels[name]}; they belong together", remedy)]
    return []


def _reinstall_mlx(part: Part, has_driver: bool) -> str:
    """The command that leaves one library in place: CUDA's where it was chosen and can run, else the CPU's."""
    version = f"=={part['mlx']}" if part["mlx"] else ""
    if sys.platform == "darwin":
        return _pip(f"install --force-reinstall mlx{version}")
    cuda = next((name for name in part["wheels"] if "cuda" in name), None)
    keep = cuda if cuda and has_driver else "mlx-cpu"
    others = [name for name in part["wheels"] if name != keep]
    # Removing one wheel takes the file away from the other, so that one is installed anew in any case.
    install = _pip(f"install --force-reinstall --no-deps mlx{version} {keep}{version}")
    return f"{_pip('uninstall -y ' + ' '.join(others))} && {install}" if others else install


def _is_recorded(path: Path, file: PackagePath) -> bool:
    """Whether a file's content is what the wheel's record says."""
    import base64
    import hashlib

    try:
        if file.hash is None or path.stat().st_size != file.size:
            return False
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, file.hash.mode).digest()
    except OSError:
        return False
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == file.hash.value


def _has_nvidia_driver() -> bool:
    if sys.platform != "linux":
        return False
    import ctypes

    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def blas_part(probe: Part) -> Part:
    """What multiplies matrices on the CPU, and how fast those of MLX's default device are: GFLOP/s in float32."""
    if "error" in probe:
        raise RuntimeError("MLX could not be asked")
    measured, blas = probe["gflops"], probe["blas"]
    if "error" in blas:
        raise RuntimeError(blas["error"])
    part: Part = {"library": blas["name"], "gflops": measured.get("value"), "problems": []}
    if "error" in measured:
        what = f"MLX cannot multiply matrices: {measured['error']}"
        part["problems"].append(_problem(what, "free memory, or install MLX anew as docs/install.md says"))
    if not blas["multiplies"] and probe["backend"] == "cpu":
        what = f"this numpy multiplies matrices with {blas['name']}, many times slower than the one of PyPI"
        part["problems"].append(_problem(what, _pip("install --force-reinstall --no-deps --only-binary :all: numpy")))
    return part


def _problem(what: str, remedy: str) -> Part:
    return {"problem": what, "remedy": remedy}


def _pip(words: str) -> str:
    """A pip command as it works here: environments that uv made hold no pip."""
    if importlib.util.find_spec("pip") is not None:
        return f"pip {words}"
    return f"uv pip {words.replace('uninstall -y', 'uninstall')}"


# ---- as text


def describe(found: dict[str, Any]) -> list[str]:
    """The lines that a person reads."""
    texts = {
        "mflux": ("mflux", lambda part: [f"{part['version']} in {part['folder']}"]),
        "python": ("Python", lambda part: [f"{part['version']}, {part['executable']}"]),
        "platform": ("platform", lambda part: [f"{part['system']}, {part['machine']}, {part['cores']} cores"]),
        "memory": ("memory", lambda part: [_memory_text(part)]),
        "mlx": ("MLX", lambda part: [_mlx_text(part), *(f"on this chip {rule}" for rule in part["chip"])]),
        "blas": ("BLAS", lambda part: [_blas_text(part, found["mlx"].get("backend"))]),
        "extras": ("extras", _extras_lines),
        "caches": ("caches", _cache_lines),
        "hugging_face": ("Hugging Face", lambda part: [_hugging_face_text(part)]),
        "sizes": ("sizes", _size_lines),
    }
    lines = []
    for name, (label, text) in texts.items():
        if name not in found:
            continue
        part = found[name]
        told = [f"cannot be told ({part['error']})"] if "error" in part else text(part)
        lines += [f"{'' if index else label:14}{line}" for index, line in enumerate(told)]
    for problem in found["problems"]:
        lines += ["", f"problem: {problem['problem']}", f"   mend: {problem['remedy']}"]
    return lines


def _memory_text(part: Part) -> str:
    text = f"{size(part['total'])}"
    if part["available"] is not None:
        text += f", {size(part['available'])} available"
    if part["limit"] is not None:
        text += f", limited to {size(part['limit'])} for this container"
    return text


def _mlx_text(part: Part) -> str:
    names = {"cpu": "CPU", "metal": "Metal", "cuda": "CUDA"}
    text = f"{part['version']} on {names.get(part['backend'], part['backend'])}"
    if device := part["device"].get("device_name"):
        text += f" ({device})"
    library = part["library"]
    if library["in_place"]:
        text += f", library of {library['in_place']} {library['wheels'][library['in_place']]}"
    return text


def _blas_text(part: Part, backend: str | None) -> str:
    text = part["library"]
    if part["gflops"] is not None:
        where = "GPU" if backend in ("metal", "cuda") else "CPU"
        text += f", {part['gflops']:.0f} GFLOP/s on the {where} ({_SIDE}³ product, float32)"
    return text


def _extras_lines(part: Part) -> list[str]:
    lines = []
    for name, extra in part.items():
        if extra["installed"]:
            versions = ", ".join(f"{package} {version or '?'}" for package, version in extra["versions"].items())
            lines.append(f"{name}: installed ({versions})")
        else:
            lines.append(f"{name}: not installed; {extra['command']}")
    return lines


def _cache_lines(part: Part) -> list[str]:
    return [
        f"cannot be told ({cache['error']})"
        if "error" in cache
        else f"{cache['folder']}: {size(cache['bytes'])}, "
        + ("encoded prompts (remove it to empty it)" if name == "prompts" else f"{size(cache['free'])} free")
        for name, cache in part.items()
    ]


def _hugging_face_text(part: Part) -> str:
    token = f"token from {part['token']}" if part["token"] else "no token"
    return f"{token}; {'offline (HF_HUB_OFFLINE)' if part['offline'] else 'online'}; {part['endpoint']}"


def _size_lines(part: Part) -> list[str]:
    lines = [f"{size(part['total']):>9}  {len(part['distributions'])} distributions, bytecode left out"]
    for name, distribution in part["distributions"].items():
        lines.append(f"{size(distribution['bytes']):>9}  {name} {distribution['version']}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
