"""What OpenBLAS does for MLX on a Linux CPU: the same work with and without it.

    python benchmarks/blas.py [--repeats 10]

Each side runs in processes of its own, in turn, with MFLUX_BLAS=off and without; the shortest of all repetitions
counts, because other programs can only lengthen one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 2
GOAL = 20
PRODUCT = "product of two 1024 × 1024 matrices, float32"


def measure(repeats: int) -> dict:
    """In this process: the library that mflux put before MLX's, and the least seconds of each piece of work."""
    from mflux.backend import BLAS, mx

    def draw(*shape: int, dtype=mx.float32):
        return mx.random.normal(shape, key=mx.random.key(len(shape) + shape[0])).astype(dtype)

    square, half = draw(1024, 1024), draw(1024, 1024, dtype=mx.bfloat16)
    picture, kernel = draw(1, 64, 64, 128), draw(128, 3, 3, 128)
    work = {
        PRODUCT: (lambda: square @ square, 2 * 1024**3),
        "convolution 3 × 3 of 64 × 64 pixels, 128 to 128 channels, float32": (
            lambda: mx.conv2d(picture, kernel, padding=1),
            2 * 64 * 64 * 128 * 128 * 9,
        ),
        "product of two 1024 × 1024 matrices, bfloat16": (lambda: half @ half, 2 * 1024**3),
    }
    mx.eval(square, half, picture, kernel)
    found = {}
    for name, (step, operations) in work.items():
        seconds = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            mx.eval(step())
            seconds.append(time.perf_counter() - start)
        found[name] = {"seconds": min(seconds[1:]), "operations": operations}
    return {"blas": BLAS, "work": found}


def in_process(repeats: int, **changes: str) -> dict:
    inherited = {name: value for name, value in os.environ.items() if name != "MFLUX_BLAS"}
    call = [sys.executable, __file__, "--child", "--repeats", str(repeats)]
    done = subprocess.run(call, env=inherited | changes, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10, help="of each piece of work in a process (default: 10)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.repeats)))
        return

    without, with_it = [], []
    for _ in range(ROUNDS):
        without.append(in_process(args.repeats, MFLUX_BLAS="off"))
        with_it.append(in_process(args.repeats))
    library = with_it[0]["blas"] and Path(with_it[0]["blas"]).name
    if library is None:
        raise SystemExit("there is no OpenBLAS here to compare with: mflux doctor says how to get it")
    assert without[0]["blas"] is None
    print(f"| what | MLX's own, s | with {library}, s | GFLOP/s | times faster |\n|---|---:|---:|---:|---:|")
    for name, part in without[0]["work"].items():
        slow = min(run["work"][name]["seconds"] for run in without)
        fast = min(run["work"][name]["seconds"] for run in with_it)
        rates = " to ".join(f"{part['operations'] / seconds / 1e9:,.1f}" for seconds in (slow, fast))
        goal = f" (goal {GOAL})" if name == PRODUCT else ""
        print(f"| {name} | {slow:.4f} | {fast:.4f} | {rates} | {slow / fast:.1f}{goal} |")


if __name__ == "__main__":
    main()
