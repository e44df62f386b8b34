"""Time and peak memory of reading what GGUF files pack: mflux's way beside the package gguf.

    python benchmarks/files.py [--numbers 200] [--repeats 3]

For each kind a file of NUMBERS million weights in matrices of 3072 × 12288 is made of random blocks. Each way reads it
in a process of its own, in turn, from the system's cache, until all is an evaluated mx.array: `as it is` is what a
layer of mflux holds, `dense` float32; `gguf, dense` dequantizes with the package and hands MLX the result. Peak memory
is the process's largest resident set less what the imports take. The table goes to standard output.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
KINDS = ("Q8_0", "Q4_0", "Q5_0", "Q4_K", "Q5_K", "Q6_K", "Q3_K", "IQ4_XS", "MXFP4")
WAYS = ("as it is", "dense", "gguf, dense")
SHAPE = (3072, 12288)


def write(path: Path, kind: str, millions: int) -> None:
    from support.gguf_files import random_blocks, write_gguf

    count = max(1, round(millions * 1e6 / (SHAPE[0] * SHAPE[1])))
    content = random_blocks(kind, SHAPE)
    write_gguf(path, {f"layers.{number}.weight": content for number in range(count)})


def peak() -> float:
    """The most that this process had in memory, megabytes; what `getrusage` tells is also of who started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def read(path: Path, way: str) -> dict[str, float]:
    """Seconds, and megabytes above what the imports take."""
    import numpy as np

    from mflux.backend import mx
    from mflux.checkpoints.loading import FolderTensors

    if way == "gguf, dense":
        import gguf
    before = peak()
    start = time.perf_counter()
    if way == "gguf, dense":
        kept = {}
        for tensor in gguf.GGUFReader(path).tensors:
            dense = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            kept[tensor.name] = mx.array(np.ascontiguousarray(dense, np.float32))
    else:
        tensors = FolderTensors(path.parent, [path], packs=way == "as it is")
        kept = {name: tensors[name] for name in tensors}
    mx.eval(kept)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "peak": peak() - before,
        "result": sum(value.nbytes for value in kept.values()) / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", type=int, default=200, help="millions of weights (default: 200)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=KINDS)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
    if args.child:
        print(json.dumps(read(Path(args.child[0]), args.child[1])))
        return
    print("| kind | way | seconds | of gguf's | MB in memory | peak MB |", "|---|---|---:|---:|---:|---:|", sep="\n")
    for kind in args.only:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "x.gguf"
            write(path, kind, args.numbers)
            found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
            for _ in range(args.repeats):
                for way in WAYS:
                    call = [sys.executable, __file__, "--child", str(path), way]
                    done = subprocess.run(call, capture_output=True, text=True, check=True)
                    found[way].append(json.loads(done.stdout))
            for way, runs in found.items():
                ratios = [one["seconds"] / two["seconds"] for one, two in zip(runs, found[WAYS[-1]], strict=True)]
                print(
                    f"| {kind} | {way} | {min(run['seconds'] for run in runs):.2f} | {statistics.median(ratios):.2f} "
                    f"| {runs[0]['result']:,.0f} | {max(run['peak'] for run in runs):,.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
