"""How soon a command answers, and where the time of the first picture goes.

    python benchmarks/start.py [--repeats 9]

Run it in an environment with mflux installed. Every figure is the median of processes that begin from nothing, after
one whose time is dropped; the first picture is the embedded model's, drawn as `mflux-generate --model demo` draws it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Tells when it got where; the clock is the system's, so that the start of the process counts too.
PICTURE = """
import json, sys, time
started, seen = float(sys.argv[1]), {}
def reached(what):
    seen[what] = time.time() - started
reached("Python")
from mflux.models.common.config import ModelConfig
from mflux.models.flux.variants.txt2img.flux import Flux1
reached("imports")
flux = Flux1(model_config=ModelConfig.from_name("demo"))
class Loop:
    def call_before_loop(self, **_):
        reached("reading the folder, encoding the prompt")
    def call_after_loop(self, **_):
        reached("loading the transformer, eight steps")
flux.callbacks.register(Loop())
image = flux.generate_image(seed=1, prompt="a large red circle", num_inference_steps=8)
reached("loading the autoencoder, decoding")
image.save(sys.argv[2])
reached("writing the file")
print(json.dumps(seen))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    print("| command | s |\n|---|---:|")
    for name, module in commands().items():
        call = [sys.executable, "-m", module, "--help"]
        print(f"| `{name} --help` | {median(lambda call=call: seconds(call), args.repeats):.3f} |")
    with tempfile.TemporaryDirectory() as folder:
        call = [sys.executable, "-m", commands()["mflux-generate"], "--model", "demo"]
        call += ["--prompt", "a large red circle", "--output", str(Path(folder) / "a.png")]
        print(f"| `mflux-generate --model demo` | {median(lambda: seconds(call), args.repeats):.2f} |")
        print("\n| the first picture | s |\n|---|---:|")
        runs = [phases(Path(folder)) for _ in range(args.repeats + 1)][1:]
    for what in runs[0]:
        print(f"| {what} | {statistics.median(run[what] for run in runs):.3f} |")
    print(f"| together | {statistics.median(sum(run.values()) for run in runs):.3f} |")


def commands() -> dict[str, str]:
    """The commands to time, and the modules that they are."""
    from mflux.models.common.family import families

    found = {"mflux": "mflux.cli.main"}
    for family in families().values():
        for command in family.commands[:1]:
            found[f"mflux-{command.name}"] = command.module
    return found


def median(measure, repeats: int) -> float:
    return statistics.median([measure() for _ in range(repeats + 1)][1:])


def seconds(call: list[str]) -> float:
    start = time.perf_counter()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "MFLUX_PROMPT_CACHE": "0"}
    subprocess.run(call, check=True, capture_output=True, env=environment)
    return time.perf_counter() - start


def phases(folder: Path) -> dict[str, float]:
    """Seconds that each part of the first picture took."""
    call = [sys.executable, "-c", PICTURE, repr(time.time()), str(folder / f"{time.time()}.png")]
    done = subprocess.run(call, check=True, capture_output=True, text=True)
    reached = json.loads(done.stdout.splitlines()[-1])
    ends = list(reached.values())
    return {what: end - before for (what, end), before in zip(reached.items(), [0.0, *ends], strict=False)}


if __name__ == "__main__":
    main()
