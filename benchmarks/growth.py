"""How time and memory grow with pictures, pixels and steps.

    python benchmarks/growth.py [--repeats 3]

The embedded model, drawn larger than it was trained for: what it shows then does not matter here. Each figure is the
median of processes of their own; the exponent is the slope through the logarithms, 1 for what grows linearly.
Everything that a picture needs is counted but the start: text, steps, decoding.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys

DRAW = """
import json, resource, sys, time
pictures, side, steps = map(int, sys.argv[1:])
from mflux.backend import mx
from mflux.models.common.config import ModelConfig
from mflux.models.flux.variants.txt2img.flux import Flux1
flux = Flux1(model_config=ModelConfig.from_name("demo"))
class Loop:
    began = ended = taken = 0
    def call_before_loop(self, **_):
        self.began = time.perf_counter()
    def call_after_loop(self, **_):
        self.taken += time.perf_counter() - self.began
loop = Loop()
flux.callbacks.register(loop)
flux.generate_image(seed=0, prompt="a red circle", num_inference_steps=1, width=64, height=64)
loop.taken, start = 0, time.perf_counter()
mx.reset_peak_memory()
for seed in range(pictures):
    flux.generate_image(seed=seed, prompt="a red circle", num_inference_steps=steps, width=side, height=side)
print(json.dumps({
    "s": time.perf_counter() - start, "steps, s": loop.taken, "MLX's peak, MB": mx.get_peak_memory() / 1e6,
    "process, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
}))
"""
# What changes, and the pictures, side and steps of each case.
AXES = {
    "pictures of 256 px, 8 steps": ((1, 2, 4), lambda value: (value, 256, 8)),
    "side in px, 4 steps": ((256, 512, 768, 1024), lambda value: (1, value, 4)),
    "steps at 256 px": ((4, 8, 16, 32), lambda value: (1, 256, value)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    for what, (values, case) in AXES.items():
        rows = [measured(case(value), args.repeats) for value in values]
        print(f"\n| {what} | {' | '.join(rows[0])} |\n|---:|{'---:|' * len(rows[0])}")
        for value, row in zip(values, rows, strict=True):
            print(f"| {value} | {' | '.join(f'{figure:.3g}' for figure in row.values())} |")
        # Of pixels, and not of a side: twice the side is four times the work that has to be done.
        sizes = [value**2 if "side" in what else value for value in values]
        slopes = [exponent(sizes, [row[name] for row in rows]) for name in rows[0]]
        print(f"| exponent{' of the pixels' if 'side' in what else ''} | {' | '.join(f'{s:.2f}' for s in slopes)} |")


def measured(case: tuple[int, int, int], repeats: int) -> dict[str, float]:
    call = [sys.executable, "-c", DRAW, *map(str, case)]
    runs = [
        json.loads(subprocess.run(call, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        for _ in range(repeats)
    ]
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def exponent(sizes: list[float], figures: list[float]) -> float:
    """The slope of the straight line through the logarithms, by least squares."""
    xs, ys = [math.log(size) for size in sizes], [math.log(figure) for figure in figures]
    x, y = statistics.mean(xs), statistics.mean(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


if __name__ == "__main__":
    main()
