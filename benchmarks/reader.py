"""Time and peak memory of reading a PyTorch file: mflux's reader against torch.load and conversion.

    python benchmarks/reader.py --size 1.0

For each dtype torch saves a file of about SIZE GB, shaped like a transformer's weights. Each way of reading it runs in
a process of its own, REPEATS times in turn, with the file in the system's cache. Seconds run from before the file is
opened to when every tensor is an evaluated mx.array, on the clock and of the processor (which a busy machine stretches
less); imports come before. Peak memory is the process's largest resident set, mapped pages included, with its imports,
and beside it what the imports alone take. The table goes to standard output.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__)


def save_file(path: Path, dtype: str, gigabytes: float) -> None:
    """Layers of four square matrices and a norm each, and an embedding of a tenth of the file."""
    import torch

    kind = getattr(torch, dtype)
    width, total = 2048, gigabytes * 1e9 / kind.itemsize
    layers = max(1, round(0.9 * total / (4 * width * width + width)))
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(kind)

    tensors = {"embedding.weight": random(max(1, int(0.1 * total / width)), width)}
    for layer in range(layers):
        for name in "qkvo":
            tensors[f"layers.{layer}.{name}.weight"] = random(width, width)
        tensors[f"layers.{layer}.norm.weight"] = random(width)
    torch.save({"state_dict": tensors}, path)


# ---- the ways of reading; each returns {name: array}, all evaluated


def read_mflux(path: Path):
    from mflux.checkpoints import load_checkpoint

    return load_checkpoint(path)


def read_torch(path: Path, mapped: bool = False):
    """torch.load, then each tensor to MLX while torch's dictionary stands, as mflux 0.24 converted."""
    import torch

    from mflux.backend import mx

    state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)["state_dict"]
    arrays = {}
    for name, tensor in state.items():
        if tensor.dtype is torch.bfloat16:
            arrays[name] = mx.array(tensor.view(torch.uint16).numpy()).view(mx.bfloat16)
        else:
            arrays[name] = mx.array(tensor.numpy())
    mx.eval(arrays)
    return arrays


def read_torch_mapped(path: Path):
    return read_torch(path, mapped=True)


WAYS = {
    "torch.load + conversion": read_torch,
    "torch.load(mmap=True) + conversion": read_torch_mapped,
    "mflux": read_mflux,
}


def measure(way: str, path: Path) -> dict[str, float]:
    """In a process of its own: seconds, peak and what the imports alone took, in MB, and a checksum."""
    import time

    import numpy  # noqa: F401

    from mflux.backend import mx

    if way == "mflux":
        import mflux.checkpoints.readers.opening  # noqa: F401
    else:
        import torch  # noqa: F401
    imports = peak_megabytes()
    start, start_cpu = time.perf_counter(), time.process_time()
    arrays = WAYS[way](path)
    seconds, processor = time.perf_counter() - start, time.process_time() - start_cpu
    peak = peak_megabytes()
    total = sum(mx.sum(array.astype(mx.float32)[:1]).item() for array in arrays.values())
    return {
        "seconds": seconds,
        "processor": processor,
        "peak": peak,
        "imports": imports,
        "sum": total,
        "tensors": len(arrays),
    }


def peak_megabytes() -> float:
    """The largest resident set so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would start from what the parent had when it forked.
        return next(int(line.split()[1]) / 1e3 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def middle(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in runs) for name in runs[0]}


def run(*arguments: str) -> str:
    return subprocess.run([sys.executable, str(HERE), *arguments], check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=1.0, help="of the file, in GB (default: 1.0)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each way, in turn (default: 5)")
    parser.add_argument("--folder", type=Path, help="where the file is made and removed (default: the system's)")
    parser.add_argument("--save", nargs=2, metavar=("PATH", "DTYPE"), help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "PATH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.save:
        return save_file(Path(args.save[0]), args.save[1], args.size)
    if args.measure:
        return print(json.dumps(measure(args.measure[0], Path(args.measure[1]))))

    print(
        "| dtype | way | seconds, median (least–most) | of the processor | peak MB | of which imports | time | peak |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "weights.pt"
        for dtype in ("float32", "bfloat16"):
            run("--save", str(path), dtype, "--size", str(args.size))
            runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
            for _ in range(args.repeats):
                for way in WAYS:
                    runs[way].append(json.loads(run("--measure", way, str(path))))
            assert len({(one["sum"], one["tensors"]) for of_way in runs.values() for one in of_way}) == 1
            base = middle(runs["torch.load + conversion"])
            for way, of_way in runs.items():
                times, found = [one["seconds"] for one in of_way], middle(of_way)
                print(
                    f"| {dtype} | {way} | {found['seconds']:.2f} ({min(times):.2f}–{max(times):.2f}) "
                    f"| {found['processor']:.2f} | {found['peak']:,.0f} | {found['imports']:,.0f} "
                    f"| {found['seconds'] / base['seconds']:.0%} | {found['peak'] / base['peak']:.0%} |"
                )
            path.unlink()
    return None


if __name__ == "__main__":
    main()
