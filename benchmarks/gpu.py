"""Seconds and memory of each stage at published width on a GPU: Metal or CUDA, beside torch on the same one.

    python benchmarks/gpu.py [--only flux …] [--pixels 512 1024] [--decode 1024] [--runs 5] [--compiled]
                             [--markdown FILE]

The parts are those of steps.py. Ours in float32, in bfloat16, and bfloat16 with 8 and 4 bits a weight; torch in
bfloat16 on MPS or CUDA, with `--compiled` through `torch.compile` as well. Seconds are the middle one of RUNS, after
one that is not counted; memory is what a run adds to the weights at most, by MLX's counter. Needs the `test` group of
packages. A side that fails says why on stderr. mflux 0.24 is measured on a CPU alone (steps.py), in float32.

Leave the machine alone meanwhile, on mains: a Mac slows down when it is warm. `MFLUX_DEVICE=as-gpu` tries this script
where there is no GPU, and says nothing of speed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import steps

ROOT = steps.ROOT
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
COLUMNS = ("float32", "bfloat16", "8 bits", "4 bits")


def ours(part: steps.Part, column: str) -> Callable[[int], Callable[[], Any]]:
    """Build ours; gives a function from pixels to a run."""
    from cpu import quantized
    from support.cases import every

    from mflux.backend import mx, tree_map

    component = every("COMPONENTS")[part.component]
    config = steps.changed(json.loads((ROOT / "tests/data/surface/configs.json").read_text())[part.entry], part.changes)
    module = component.module(component.module.config_class.from_dict(config))
    dtype = mx.float32 if column == "float32" else mx.bfloat16
    module.update(tree_map(lambda value: (mx.random.normal(value.shape) * 0.02).astype(dtype), module.parameters()))
    mx.eval(module.parameters())
    if column.endswith("bits"):
        module = quantized(module, int(column.split()[0]))

    def at(pixels: int) -> Callable[[], Any]:
        given = {
            # Noise levels and positions are never rounded.
            name: mx.array(value).astype(dtype) if getattr(value, "ndim", 0) > 1 and value.dtype == "float32" else value
            for name, value in part.inputs(module.config, pixels).items()
        }
        if part.sized in ("decode", "encode"):
            run = getattr(module, part.sized)
            return lambda: mx.eval(run(given["whole"]))
        if part.component == "flux2 transformer":
            return lambda: mx.eval(steps.flux2_ours(module, given))
        return lambda: mx.eval(next(iter(component.ours(module, given))))

    return at


def torchs(part: steps.Part, compiled: bool) -> Callable[[int], Callable[[], Any]]:
    """The same of the reference, in bfloat16."""
    import torch
    from support.cases import every

    kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    torch.set_default_device(kind)
    torch.set_grad_enabled(False)
    components = every("COMPONENTS")
    component = components[part.component]
    published = next(case for case in components.values() if part.entry in case.published and case.full_size)
    config = steps.changed(json.loads((ROOT / "tests/data/surface/configs.json").read_text())[part.entry], part.changes)
    model = published.full_size(config).eval()
    for value in model.parameters():
        value.data = value.data.to(torch.bfloat16)
    for layer in model.modules():
        # What a pipeline does at the entrance.
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)):
            layer.register_forward_pre_hook(lambda one, inputs: (inputs[0].to(one.weight.dtype), *inputs[1:]))
    if compiled:
        model.compile()

    def wait() -> None:
        if kind != "cpu":
            getattr(torch, kind).synchronize()

    def at(pixels: int) -> Callable[[], Any]:
        given = part.inputs(model.config, pixels)
        if part.component == "flux2 transformer":
            run = steps.flux2_runs(None, None, model, given)["torch"]
        elif part.sized in ("decode", "encode"):
            inside, function = torch.tensor(given["inside"]), getattr(model, part.sized)
            run = lambda: function(inside)  # noqa: E731
        else:
            run = lambda: next(iter(component.theirs(model, given)))  # noqa: E731
        return lambda: (run(), wait())

    return at


def timed(run: Callable[[], Any], runs: int) -> tuple[float, float]:
    """Seconds of a run, and the megabytes that it adds."""
    from mflux.backend import mx

    run()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken), (mx.get_peak_memory() - before) / 1e6


def row(part: steps.Part, pixels: int, args: argparse.Namespace) -> str:
    from mflux.backend import mx

    cells, added = [], ""
    sides: dict[str, Callable[[], Callable[[int], Callable[[], Any]]]] = {
        name: lambda name=name: ours(part, name) for name in COLUMNS
    }
    if part.sized in ("decode", "encode"):
        # An autoencoder has no quantized layers worth a column.
        sides |= {name: None for name in COLUMNS[2:]}
    sides["torch"] = lambda: torchs(part, False)
    if args.compiled:
        sides["compiled"] = lambda: torchs(part, True)
    for name, build in sides.items():
        if build is None:
            cells.append("–")
            continue
        try:
            seconds, megabytes = timed(build()(pixels), args.runs)
        except Exception as error:
            print(f"{part.name}, {pixels} px, {name}: {type(error).__name__}: {error}", file=sys.stderr)
            cells.append("fails")
            continue
        cells.append(f"{seconds:.3f}")
        added = f"{megabytes:,.0f}" if name == "bfloat16" else added
        mx.clear_cache()
    return f"| {part.name} | {pixels or '–'} | {' | '.join(cells)} | {added} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="families; all of them otherwise")
    parser.add_argument("--pixels", nargs="*", type=int, default=[512, 1024], help="for transformers")
    parser.add_argument("--decode", nargs="*", type=int, default=[1024], help="for autoencoders")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="torch.compile as well")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from mflux.backend import has_gpu, mx

    if not has_gpu():
        raise SystemExit("error: MLX computes on the CPU here: benchmarks/steps.py measures that")
    extra = ["torch, compiled"] if args.compiled else []
    heads = ["part", "px", *COLUMNS, "torch, bfloat16", *extra, "MB added, bfloat16"]
    lines = [
        f"MLX {vars(mx)['__version__']}, {mx.device_info().get('device_name', 'a GPU')}; seconds.",
        "",
        f"| {' | '.join(heads)} |",
        f"|---|{'---:|' * (len(heads) - 1)}",
    ]
    print(*lines, sep="\n", flush=True)
    for part in steps.ALL:
        if args.only and part.component.split()[0] not in args.only:
            continue
        for pixels in {"tokens": args.pixels, "no": [0]}.get(part.sized, args.decode):
            lines.append(row(part, pixels, args))
            print(lines[-1], flush=True)
            if args.markdown:
                args.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
