"""Peak resident memory of `mflux-generate`, stage by stage, and how long loading takes.

    python benchmarks/memory.py [--gb 1.0] [--folder FOLDER] [--markdown FILE]

A checkpoint of random weights in FLUX.1's published layout is written to FOLDER (by default a temporary one): its
transformer has the size that is asked for in bfloat16, its T5 half of it. Every run is a process of its own; the peak
is read from the kernel (VmHWM in /proc, reset where a stage begins), above what the process held when mflux was
imported and nothing was loaded. Linux only.
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
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 1024
# Parameters of a double and two single blocks, and of a T5 layer, at this width.
_BLOCKS = 66 * WIDTH**2
_T5_LAYER = 4 * WIDTH**2 + 3 * WIDTH * 2816
PARTS = ("text_encoder_2", "text_encoder", "transformer", "vae")


def write_model(folder: Path, gigabytes: float) -> None:
    """The synthetic checkpoint."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support.tiny import write_checkpoint

    from mflux.backend import mx, tree_flatten
    from mflux.checkpoints.loading import published_turns

    def draw(module, *, seed, dtype):
        key = mx.random.key(seed)
        turns = published_turns(module)
        tensors = {}
        for name, parameter in tree_flatten(module.parameters()):
            key, own = mx.random.split(key)
            # Small enough that nothing overflows, whatever it is.
            value = 0.02 * mx.random.normal(parameter.shape, key=own)
            value = 1 + value if "norm" in name and name.endswith("weight") and parameter.ndim == 1 else value
            tensors[name] = mx.contiguous(turns.get(name, lambda kernel: kernel)(value.astype(dtype)))
            mx.eval(tensors[name])
        return tensors

    blocks = max(round(gigabytes * 1e9 / 2 / _BLOCKS), 1)
    changes = {
        "text_encoder_2": {
            "d_model": WIDTH, "d_ff": 2816, "d_kv": 64, "num_heads": 16,
            "num_layers": max(round(gigabytes * 1e9 / 4 / _T5_LAYER), 1),
        },
        "transformer": {
            "num_attention_heads": WIDTH // 128, "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56],
            "joint_attention_dim": WIDTH, "num_layers": blocks, "num_single_layers": 2 * blocks,
        },
        "vae": {"block_out_channels": [64, 128, 256, 256], "norm_num_groups": 32, "layers_per_block": 2},
    }  # fmt: skip
    options = {"seed": 1, "guidance": False, "dtype": mx.bfloat16, "wide": True}
    write_checkpoint(folder, **options, changes=changes, draw=draw)


# ---- in the measured process


def status(field: str) -> int:
    """Bytes, from the kernel's account of this process: "VmRSS" now, "VmHWM" at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def generate(words: list[str]) -> dict:
    """`mflux-generate` with these words; the peak while each component loads, and from then to the next stage."""
    from mflux.backend import tree_flatten
    from mflux.models.common import memory, pipeline
    from mflux.models.flux.cli import flux_generate

    idle = status("VmRSS")
    found: list[dict] = []
    real, sizes = memory.timed, {}
    measure_bytes = memory.weight_bytes

    def weighing(module):
        sizes["last"] = measure_bytes(module)
        sizes["largest"] = max(value.nbytes for _, value in tree_flatten(module.parameters()))
        return sizes["last"]

    @contextmanager
    def watched(what: str):
        if found:
            found[-1]["then"] = status("VmHWM") - idle
        forget_peak()
        before = status("VmRSS") - idle
        with real(what) as note:
            yield note
        if found:
            # A stage within this one, such as the loading of the autoencoder within decoding.
            found[-1].setdefault("then", status("VmHWM") - idle)
        stage = {"stage": what, "before": before, "peak": status("VmHWM") - idle, "held": status("VmRSS") - idle}
        if what.startswith("load "):
            stage |= {"weights": sizes["last"], "largest": sizes["largest"]}
        found.append(stage)
        forget_peak()

    memory.timed = pipeline.timed = watched
    memory.weight_bytes = weighing
    code = flux_generate.main(words)
    if found:
        found[-1]["then"] = status("VmHWM") - idle
    return {"idle": idle, "code": code, "stages": found}


def everything(folder: Path, bits: int | None) -> dict:
    """What a program needs that loads all components and then quantizes them."""
    from mflux.backend import mx, nn
    from mflux.checkpoints.loading import load_component
    from mflux.models.common.networks.autoencoders.kl import AutoencoderKL
    from mflux.models.common.networks.text_encoders.clip import CLIPTextEncoder
    from mflux.models.common.networks.text_encoders.t5 import T5Encoder
    from mflux.models.flux.model.transformer import FluxTransformer

    classes = (T5Encoder, CLIPTextEncoder, FluxTransformer, AutoencoderKL)
    idle = status("VmRSS")
    forget_peak()
    modules = [load_component(kind, folder / part) for kind, part in zip(classes, PARTS, strict=True)]
    if bits is not None:
        for module in modules:
            nn.quantize(
                module,
                bits=bits,
                class_predicate=lambda _, layer: hasattr(layer, "to_quantized") and layer.weight.shape[-1] % 64 == 0,
            )
            mx.eval(module.parameters())
    return {"idle": idle, "peak": status("VmHWM") - idle}


def times(folder: Path) -> dict:
    """Seconds to read the transformer, with the file in the system's cache: medians of five turns.

    In each turn one way follows the other, and each begins without memory: where fresh pages have to come from costs
    as much as reading, and whoever finds them in place would look faster.
    """
    from mflux.backend import mx
    from mflux.checkpoints.loading import load_component
    from mflux.models.common.memory import give_back_memory
    from mflux.models.flux.model.transformer import FluxTransformer

    part = folder / "transformer"
    path = part / "diffusion_pytorch_model.safetensors"

    def plain():
        mx.eval(mx.load(str(path)))

    def stored():
        load_component(FluxTransformer, part, keep_dtypes=True)

    def cast():
        load_component(FluxTransformer, part)

    def quantized():
        load_component(FluxTransformer, part, quantize=8)

    taken: dict[str, list[float]] = {}
    plain()
    for _ in range(5):
        for read in (plain, stored, cast, quantized):
            give_back_memory()
            start = time.perf_counter()
            read()
            taken.setdefault(read.__name__, []).append(time.perf_counter() - start)
    return {
        "bytes": path.stat().st_size,
        "seconds": {name: statistics.median(values) for name, values in taken.items()},
        "ratios": {
            name: statistics.median(value / other for value, other in zip(values, taken["plain"], strict=True))
            for name, values in taken.items()
        },
    }


# ---- the table


def child(*words: object) -> dict:
    call = [sys.executable, __file__, "--child", *map(str, words)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "MFLUX_PROMPT_CACHE": "0"}
    done = subprocess.run(call, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(call)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def mb(count: float) -> str:
    return f"{count / 1e6:,.0f}"


def report(folder: Path, gigabytes: float) -> str:
    lines = [
        f"A transformer of {gigabytes:g} GB in bfloat16. MB above an idle process with mflux imported.",
        "",
        "| run | stage | held before | peak while loading | weights | promised at most | peak of the stage's work |",
        "|---|---|---|---|---|---|---|",
    ]
    small = ["--width", 128, "--height", 128]
    large = ["--width", 640, "--height", 640]
    highest = {}
    with tempfile.TemporaryDirectory() as pictures:
        for number, (label, words) in enumerate(
            {
                "plain": small,
                "-q 8": [*small, "-q", 8],
                "640 px": large,
                "640 px, --vae-tile-size 256": [*large, "--vae-tile-size", 256],
                "640 px, --low-ram": [*large, "--low-ram"],
            }.items()
        ):
            call = ["--model", folder, "--base-model", "demo", "--prompt", "a red circle", "--seed", 1, "--steps", 1]
            found = child("generate", *call, "--output", f"{pictures}/{number}.png", *words)
            if found["code"]:
                raise SystemExit(f"{label}: mflux-generate failed")
            weights = max(stage.get("weights", 0) for stage in found["stages"])
            highest[label] = max(max(stage["peak"], stage["then"]) for stage in found["stages"])
            for stage in found["stages"]:
                limit = stage["before"] + 1.15 * weights + (stage.get("largest", 0) if "-q" in words else 0)
                own = [mb(stage["weights"]), mb(limit)] if "weights" in stage else ["", ""]
                cells = [label, stage["stage"], mb(stage["before"]), mb(stage["peak"]), *own, mb(stage["then"])]
                lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| run | highest peak of all |", "|---|---|"]
    lines += [f"| {label} | {mb(peak)} |" for label, peak in highest.items()]
    for bits in (None, 8):
        peak = child("everything", folder, bits or 0)["peak"]
        lines.append(f"| all components loaded{', then quantized to 8 bits' if bits else ''} | {mb(peak)} |")
    took = child("times", folder)
    lines += ["", f"| reading {took['bytes'] / 1e9:.2f} GB, warm | seconds | of mx.load + mx.eval |", "|---|---|---|"]
    for name, label in {
        "plain": "mx.load + mx.eval",
        "stored": "load_component, dtype as stored",
        "cast": "load_component, to the compute dtype",
        "quantized": "load_component, quantized to 8 bits",
    }.items():
        lines.append(f"| {label} | {took['seconds'][name]:.2f} | {took['ratios'][name]:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        kind, *words = sys.argv[2:]
        if kind == "generate":
            result = generate(words)
        elif kind == "everything":
            result = everything(Path(words[0]), int(words[1]) or None)
        else:
            result = times(Path(words[0]))
        print(json.dumps(result))
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gb", type=float, default=1.0, help="size of the transformer in bfloat16 (default: 1)")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is, or is to be written")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "model"
        if not (folder / "model_index.json").is_file():
            write_model(folder, args.gb)
        text = report(folder, args.gb)
    print(text)
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
