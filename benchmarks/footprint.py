"""What an installation weighs and how soon it answers: this project beside mflux 0.24.0.

    python benchmarks/footprint.py [--only NAME …] [--markdown FILE]

Each of these is installed by pip into an empty environment of its own, measured and removed:

    core      this project's wheel, as its README installs it: pip install mflux
    old       mflux 0.24.0, as its README installs it; on Linux that is CUDA's torch and MLX (6 GB)
    old-cpu   mflux 0.24.0 with the CPU builds of torch and of MLX (Linux)
    full-cpu  this project with everything it can use, mflux[full], with the CPU build of torch (Linux)
    macos     both, as uv resolves them for macOS 15 on Apple silicon and Python 3.12: the wheels' contents are
              added up, nothing is installed

The wheels are collected in a folder first, whatever pip's cache holds, and installed from there: seconds to install
have no network in them. pip compiles bytecode, which is in the seconds and not in the size. `--help` and the picture
are the median of --repeats processes, after one whose time is dropped. Beside the seconds on the clock stand those of
the processor, which a busy machine stretches less. Everything happens in a temporary folder; what
each part needs of its disk is checked and said first. --results and --wheels let a run that was broken off go on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from importlib.metadata import distributions
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import cpu_index  # noqa: E402
import lock  # noqa: E402

OLD = "mflux==0.24.0"
PROMPT = "a large red circle on a white background"
# Gigabytes of disk that each part takes at its largest: wheels, what pip caches of them, and the environment.
NEEDS = {"core": 1, "old": 13, "old-cpu": 4, "full-cpu": 4, "macos": 2}
LINUX_ONLY = ("old-cpu", "full-cpu")
LABELS = {
    "old": "mflux 0.24.0",
    "core": "**this project**",
    "old-cpu": "mflux 0.24.0, CPU builds",
    "full-cpu": "this project, `mflux[full]`, CPU builds",
    "macos-old": "mflux 0.24.0",
    "macos-core": "**this project**",
}
# How many times smaller, smaller and faster this project is to be.
GOALS = {"linux": 35, "macos": 4, "help": 10}

# Runs a console script and then tells how many modules that took.
COUNT_MODULES = """
import sys
script, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script
try:
    exec(compile(open(script).read(), script, "exec"), {"__name__": "__main__"})
except SystemExit:
    pass
print(len(sys.modules), file=sys.stderr)
"""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- programs


def variables(**changes: str) -> dict[str, str]:
    """This process's environment without what would change what is measured."""
    dropped = ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if name not in dropped} | changes


Seconds = tuple[float, float]
"""On the clock, of the processor."""


def processor_seconds() -> float:
    """Of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed(*words: object, folder: Path, **changes: str) -> tuple[Seconds, subprocess.CompletedProcess]:
    call = [str(word) for word in words]
    start, used = time.perf_counter(), processor_seconds()
    done = subprocess.run(call, cwd=folder, env=variables(**changes), capture_output=True, text=True, check=False)
    return (time.perf_counter() - start, processor_seconds() - used), done


def checked(*words: object, folder: Path, **changes: str) -> tuple[Seconds, str]:
    """Seconds and standard output of a program that has to succeed."""
    seconds, done = timed(*words, folder=folder, **changes)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))} failed:\n{done.stdout}{done.stderr}")
    return seconds, done.stdout


def summed(name: str, runs: list[Seconds], add: Callable[[Iterable[float]], float]) -> dict[str, float]:
    """Both kinds of seconds by name, added up or averaged."""
    clock, processor = zip(*runs, strict=True)
    return {name: add(clock), f"{name}_processor": add(processor)}


class Bench:
    """The folder in which everything happens, and the programs that install."""

    def __init__(self, folder: Path, wheels: Path | None, repeats: int):
        self.folder = folder
        self.kept = wheels
        self.repeats = repeats
        self.tools = lock.Tools(folder / "tools")
        self.pip("install", "--quiet", "--upgrade", "pip")
        self.wheel = self._build()

    def pip(self, *words: object, **changes: str) -> Seconds:
        # Temporary files belong where the free space has been looked at.
        pip = (self.tools.python, "-m", "pip", "--disable-pip-version-check", *words)
        return checked(*pip, folder=self.folder, TMPDIR=str(self.folder), **changes)[0]

    def _build(self) -> Path:
        self.pip("wheel", "--quiet", "--no-deps", "--wheel-dir", self.folder / "dist", ROOT)
        (path,) = (self.folder / "dist").glob("mflux-*.whl")
        return path

    def check_disk(self, name: str) -> None:
        free = shutil.disk_usage(self.folder).free / 1e9
        say(f"{name}: needs {NEEDS[name]} GB of disk, {free:.0f} GB are free")
        if free < NEEDS[name]:
            raise SystemExit(f"{name}: not enough disk; name a folder with more (--folder) or leave it out (--only)")


# ---- what is installed


@contextlib.contextmanager
def torch_index(bench: Bench) -> Iterator[list[str]]:
    """What pip has to be told to take a CPU build of torch."""
    version = lock.torch_pin((ROOT / "pyproject.toml").read_text())
    if cpu_index.answers():
        yield [f"torch=={version}", "--extra-index-url", cpu_index.URL]
        return
    with cpu_index.StandIn(cpu_index.find_wheel(bench.tools.python, version)) as stand_in:
        yield [f"torch=={version}", "--extra-index-url", stand_in.url]


def requirements_of_old(bench: Bench) -> list[str]:
    """What mflux 0.24.0 asks for, with MLX's CPU build in place of CUDA's."""
    ask = ("install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed", "--report", "-", OLD)
    _, report = checked(bench.tools.python, "-m", "pip", *ask, folder=bench.folder)
    listed = json.loads(report)["install"][0]["metadata"]["requires_dist"]
    return [re.sub(r"\[cuda\d+\]", "[cpu]", text) for text in listed if "extra ==" not in text]


def install(bench: Bench, name: str, environment: Path) -> dict[str, float]:
    """Collect the wheels, then install them; seconds that the second takes, and megabytes of the wheels."""
    wheels = (bench.kept or bench.folder) / f"{name}-wheels"
    wheels.mkdir(exist_ok=True)
    # A folder of wheels that pip has been configured to look into may hold other builds than the index has.
    only_these = {"PIP_FIND_LINKS": str(wheels)}
    with contextlib.ExitStack() as stack:
        if name == "old":
            steps = [[OLD]]
        elif name == "core":
            steps = [[bench.wheel]]
        elif name == "full-cpu":
            steps = [[f"{bench.wheel}[full]", *stack.enter_context(torch_index(bench))]]
        else:
            steps = [[*requirements_of_old(bench), *stack.enter_context(torch_index(bench))], ["--no-deps", OLD]]
        collect = ("wheel", "--quiet", "--wheel-dir", wheels, "--find-links", wheels)
        for step in steps:
            bench.pip(*collect, *step, **(only_these if name == "old" else {}))
    seconds, downloaded = [], 0
    report = bench.folder / "installed.json"
    into = ("--python", environment / "bin" / "python", "install", "--quiet", "--no-index", "--report", report)
    for step in steps:
        seconds.append(bench.pip(*into, *step, **only_these))
        urls = [part["download_info"]["url"] for part in json.loads(report.read_text())["install"]]
        downloaded += sum(Path(url2pathname(urlsplit(url).path)).stat().st_size for url in urls)
    if bench.kept is None:
        shutil.rmtree(wheels)
    return summed("install", seconds, sum) | {"download": downloaded / 1e6}


# ---- measuring


def measure(bench: Bench, name: str) -> dict:
    environment = bench.folder / name
    venv.create(environment, with_pip=False, symlinks=True)
    try:
        found: dict = install(bench, name, environment)
        (packages,) = environment.glob("lib/python*/site-packages")
        files = (path for path in packages.rglob("*") if path.is_file() and path.suffix != ".pyc")
        found["megabytes"] = sum(path.stat().st_size for path in files) / 1e6
        found["parts"] = {part.name: size_of(part) / 1e6 for part in distributions(path=[str(packages)])}
        found |= measure_help(bench, environment)
        if name in ("core", "full-cpu"):
            found |= measure_picture(bench, environment)
    finally:
        shutil.rmtree(environment)
    return found


def size_of(distribution) -> int:
    paths = (Path(str(distribution.locate_file(file))) for file in distribution.files or ())
    return sum(path.stat().st_size for path in paths if path.suffix != ".pyc" and path.is_file())


def measure_help(bench: Bench, environment: Path) -> dict:
    """Seconds and modules of `mflux-generate --help`, or how it fails."""
    script, python = environment / "bin" / "mflux-generate", environment / "bin" / "python"
    _, done = timed(script, "--help", folder=bench.folder)
    if done.returncode:
        return {"help_fails": done.stderr.strip().splitlines()[-1].replace(str(environment), "…")}
    seconds = [checked(script, "--help", folder=bench.folder)[0] for _ in range(bench.repeats)]
    _, counted = timed(python, "-c", COUNT_MODULES, script, "--help", folder=bench.folder)
    modules = int(counted.stderr.strip().splitlines()[-1])
    return summed("help", seconds, statistics.median) | {"modules": modules}


def measure_picture(bench: Bench, environment: Path) -> dict[str, float]:
    """From the start of the command to its end with a picture, offline."""
    seconds = []
    for number in range(bench.repeats + 1):
        path = bench.folder / f"{number}.png"
        call = (
            environment / "bin" / "mflux-generate",
            "--model",
            "demo",
            "--prompt",
            PROMPT,
            "--seed",
            2,
            "--output",
            path,
        )
        seconds.append(checked(*call, folder=bench.folder, HF_HUB_OFFLINE="1")[0])
        path.unlink()
    return summed("picture", seconds[1:], statistics.median)


def resolve_macos(bench: Bench) -> dict[str, dict]:
    """What both weigh on a Mac, from the wheels that a Mac would get."""
    found = {}
    for name, requirement in (("macos-old", OLD), ("macos-core", f"mflux @ {bench.wheel.as_uri()}")):
        wanted = bench.folder / "wanted.in"
        wanted.write_text(requirement + "\n")
        resolved = bench.tools.uv(
            *("pip", "compile", "--quiet", "--no-header", "--no-annotate", str(wanted)),
            *("--python-platform", "aarch64-apple-darwin", "--python-version", "3.12"),
            cwd=bench.folder,
        )
        pins = [line for line in resolved.splitlines() if "==" in line]
        wheels = bench.folder / "macos-wheels"
        bench.pip(
            *("download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", wheels),
            *("--platform", "macosx_15_0_arm64", "--python-version", "3.12", "--implementation", "cp", *pins),
        )
        if name == "macos-core":
            shutil.copy(bench.wheel, wheels)
        parts, downloaded = {}, 0
        for path in sorted(wheels.iterdir()):
            downloaded += path.stat().st_size
            with zipfile.ZipFile(path) as archive:
                size = sum(entry.file_size for entry in archive.infolist() if not entry.filename.endswith(".pyc"))
            parts[path.name.partition("-")[0].lower().replace("_", "-")] = size / 1e6
        shutil.rmtree(wheels)
        found[name] = {"parts": parts, "megabytes": sum(parts.values()), "download": downloaded / 1e6}
    return found


# ---- the report


def machine(load: float) -> str:
    system = platform.platform()
    with contextlib.suppress(OSError):
        system = platform.freedesktop_os_release()["PRETTY_NAME"]
    if sys.platform == "darwin":
        system = f"macOS {platform.mac_ver()[0]}"
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
        cpu = names[0] if names else cpu
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    return (
        f"{cpu} ({platform.machine()}), {os.cpu_count()} cores, {memory:.0f} GB of memory, {system}, "
        f"Python {platform.python_version()}, load before the start {load:.1f}"
    )


def cell(found: dict, name: str, form: str) -> str:
    """A measurement, with the processor's seconds if it has any."""
    if name not in found:
        return "–"
    processor = f" ({found[f'{name}_processor']:{form}})" if f"{name}_processor" in found else ""
    return f"{found[name]:{form}}{processor}"


def largest(parts: dict[str, float], count: int = 7) -> str:
    """The largest distributions; NVIDIA's many count as one."""
    summed: dict[str, float] = {}
    for name, size in parts.items():
        group = "NVIDIA's" if name.lower().startswith(("nvidia", "cuda")) else name
        summed[group] = summed.get(group, 0) + size
    ordered = sorted(summed.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {size:,.0f}" for name, size in ordered[:count])


def ratios(measured: dict[str, dict]) -> list[str]:
    """One line for each pair that was measured, with the goal where there is one."""
    lines = []

    def compare(what: str, old: str, new: str, field: str, form: str, goal: int | None = None) -> None:
        if field not in measured.get(old, {}) or field not in measured.get(new, {}):
            return
        before, after = measured[old][field], measured[new][field]
        ratio = before / after
        verdict = "" if goal is None else f"; goal {goal}: {'reached' if ratio >= goal else '**missed**'}"
        lines.append(f"- {what}: {before:{form}} to {after:{form}}, **{ratio:.1f} times** less{verdict}")

    here = "Linux" if sys.platform == "linux" else "macOS"
    compare(f"size on {here}, MB", "old", "core", "megabytes", ",.0f", GOALS["linux"] if here == "Linux" else None)
    compare("size on macOS (resolved), MB", "macos-old", "macos-core", "megabytes", ",.0f", GOALS["macos"])
    working = "old" if "help" in measured.get("old", {}) else "old-cpu"
    compare("`mflux-generate --help`, seconds", working, "core", "help", ".3f", GOALS["help"])
    compare("the processor's seconds of it", working, "core", "help_processor", ".3f", GOALS["help"])
    compare("modules that it imports", working, "core", "modules", ",d")
    compare("download, MB", "old", "core", "download", ",.0f")
    compare("seconds to install", "old", "core", "install", ".1f")
    compare("the processor's seconds of it", "old", "core", "install_processor", ".1f")
    compare("size against 0.24.0's with CPU builds, MB", "old-cpu", "core", "megabytes", ",.0f")
    compare("size of everything against it, MB", "old-cpu", "full-cpu", "megabytes", ",.0f")
    return lines


def report(results: dict) -> str:
    measured = results["measured"]
    lines = [f"{results['date']}; {results['machine']}. Seconds are the clock's, in brackets the processor's.", ""]
    installed = [name for name in ("old", "core", "old-cpu", "full-cpu") if name in measured]
    if installed:
        lines.append(
            "| installed | distributions | MB | MB to download | install, s | `--help`, s | modules | picture, s |"
        )
        lines.append("|---|" + "---:|" * 7)
    for name in installed:
        found = measured[name]
        cells = [LABELS[name], str(len(found["parts"])), f"{found['megabytes']:,.0f}", f"{found['download']:,.0f}"]
        cells += [cell(found, "install", ".1f"), "fails" if "help_fails" in found else cell(found, "help", ".3f")]
        cells += [cell(found, "modules", ",d"), cell(found, "picture", ".1f")]
        lines.append(f"| {' | '.join(cells)} |")
    failures = [(LABELS[name], found["help_fails"]) for name, found in measured.items() if "help_fails" in found]
    lines += [""] + [f"`--help` of {label} fails here: `{text}`.\n" for label, text in failures]
    if "macos-old" in measured:
        lines += [
            "| resolved for macOS 15, Python 3.12 | distributions | MB | MB to download |",
            "|---|---:|---:|---:|",
        ]
        for name in ("macos-old", "macos-core"):
            found = measured[name]
            size, download = f"{found['megabytes']:,.0f}", f"{found['download']:,.0f}"
            lines.append(f"| {LABELS[name]} | {len(found['parts'])} | {size} | {download} |")
        lines.append("")
    lines += [*ratios(measured), "", "| installed | the largest parts, MB |", "|---|---|"]
    for name, found in measured.items():
        label = LABELS[name] + (" on macOS" if name.startswith("macos") else "")
        lines.append(f"| {label} | {largest(found['parts'])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NEEDS, default=list(NEEDS), metavar="NAME", help="of those above")
    parser.add_argument("--repeats", type=int, default=5, help="processes of which the median counts (default: 5)")
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's for temporary files)")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="collect the wheels here and leave them")
    parser.add_argument("--results", type=Path, metavar="FILE", help="JSON: kept here, and not measured again")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the report here (default: stdout)")
    args = parser.parse_args()

    results = {"machine": machine(os.getloadavg()[0]), "date": date.today().isoformat(), "measured": {}}
    if args.results and args.results.is_file():
        results = json.loads(args.results.read_text())
    wanted = [
        name
        for name in args.only
        if ("macos-old" if name == "macos" else name) not in results["measured"]
        and (sys.platform == "linux" or name not in LINUX_ONLY)
    ]
    if wanted:
        with tempfile.TemporaryDirectory(prefix="mflux-footprint-", dir=args.folder) as folder:
            os.environ["MACOSX_DEPLOYMENT_TARGET"] = "15.0"  # what uv resolves a Mac for
            bench = Bench(Path(folder), args.wheels and args.wheels.resolve(), args.repeats)
            for name in wanted:
                bench.check_disk(name)
                results["measured"] |= resolve_macos(bench) if name == "macos" else {name: measure(bench, name)}
                if args.results:
                    args.results.write_text(json.dumps(results, indent=2) + "\n")
                say(f"{name}: measured")
    text = report(results)
    if args.markdown:
        args.markdown.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
