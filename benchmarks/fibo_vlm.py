"""FIBO-VLM on random weights: seconds to see a picture, tokens per second to read and to write, peak memory.

    python benchmarks/fibo_vlm.py --layers 4 --blocks 4

The network has the published widths, vocabulary included, and as many layers as asked for: the published model's 36
and the vision tower's 24 take 18 GB in float32, in which MLX's CPU backend computes. The picture has about the most
pixels that FIBO-VLM is shown. With --quantize all linear layers and embeddings are, as with `mflux-inspire-fibo -q`.

Each measurement runs in a process of its own; the least of the repetitions counts, on the clock and of the processor
(which a busy machine stretches less). Memory is what MLX held at most, without the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__)
DATA = HERE.parents[1] / "tests" / "data" / "fibo_vlm_config.json"
# 992 x 800 pixels, of at most 802,816.
GRID = (62, 50)
TEXT = 60


def build(layers: int, blocks: int, quantize: int | None):
    from mflux.backend import compute_dtype, mx, nn, tree_flatten
    from mflux.models.common.networks.qwen3_vl import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    config = Qwen3VLConfig.from_dict(json.loads(DATA.read_text()))
    indexes = tuple(range(min(3, blocks, layers)))
    config = replace(
        config,
        text_config=replace(config.text_config, num_hidden_layers=layers),
        vision_config=replace(config.vision_config, depth=blocks, deepstack_visual_indexes=indexes),
    )
    network = Qwen3VLForConditionalGeneration(config)
    dtype = compute_dtype(mx.bfloat16)
    mx.random.seed(0)
    network.apply(lambda value: value.astype(dtype))
    if quantize:
        nn.quantize(network, bits=quantize)
    for _, value in tree_flatten(network.parameters()):
        mx.eval(value)
    network.eval()
    return network


def measure(what: str, layers: int, blocks: int, quantize: int | None, tokens: int) -> dict[str, float]:
    """One measurement, in this process."""
    from mflux.backend import mx
    from mflux.models.common.memory import weight_bytes
    from mflux.models.fibo.vlm.generation import PREFILL, Sampling, generate_tokens

    network = build(layers, blocks, quantize)
    vision = network.config.vision_config
    size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    patches = mx.random.normal((GRID[0] * GRID[1], size))
    count = GRID[0] * GRID[1] // vision.spatial_merge_size**2
    ids = [1] * TEXT + [network.config.image_token_id] * count + [2] * TEXT
    mx.eval(patches)
    base = weight_bytes(network)

    def timed(step) -> dict[str, float]:
        mx.clear_cache()
        mx.reset_peak_memory()
        start, used = time.perf_counter(), time.process_time()
        step()
        return {
            "seconds": time.perf_counter() - start,
            "processor": time.process_time() - used,
            "peak": (mx.get_peak_memory() - base) / 1e9,
            "weights": base / 1e9,
        }

    prompt = None

    def see() -> None:
        nonlocal prompt
        prompt = network.prompt(ids, patches, [GRID])
        mx.eval(prompt.embeddings, prompt.deepstack)

    seen = timed(see)
    if what == "see":
        return seen
    prefill = len(ids) if what == "read at once" else PREFILL
    said = generate_tokens(network, prompt, Sampling(0.2, 0.9, 0), prefill=prefill)
    read = timed(lambda: next(said))
    if what != "write":
        return read | {"tokens": len(ids)}
    return timed(lambda: [next(said) for _ in range(tokens)]) | {"tokens": tokens}


def in_process(what: str, args: argparse.Namespace) -> dict[str, float]:
    words = ["--layers", str(args.layers), "--blocks", str(args.blocks), "--tokens", str(args.tokens), "--only", what]
    if args.quantize:
        words += ["--quantize", str(args.quantize)]
    done = subprocess.run([sys.executable, str(HERE), *words], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="layers of the language model (published: 36)")
    parser.add_argument("--blocks", type=int, default=4, help="layers of the vision tower (published: 24)")
    parser.add_argument("--quantize", type=int, choices=(3, 4, 5, 6, 8))
    parser.add_argument("--tokens", type=int, default=32, help="tokens to write")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args.layers, args.blocks, args.quantize, args.tokens)))
        return

    from mflux.backend import has_gpu
    from mflux.cpu import blas

    device = "GPU" if has_gpu() else f"CPU, {os.cpu_count()} cores, {blas.name()}"
    kind = f"{args.quantize} bits" if args.quantize else "not quantized"
    print(f"{device}; {args.layers} layers, {args.blocks} vision blocks, {kind}; best of {args.repeats}\n")
    print("| what | seconds | of the processor | tokens per second | memory beside the weights, GB |")
    print("|---|---:|---:|---:|---:|")
    for what in ("see", "read", "read at once", "write"):
        runs = [in_process(what, args) for _ in range(args.repeats)]
        best = min(runs, key=lambda run: run["seconds"])
        rate = f"{best['tokens'] / best['seconds']:.1f}" if "tokens" in best else "–"
        processor = min(run["processor"] for run in runs)
        peak = statistics.median(run["peak"] for run in runs)
        print(f"| {what} | {best['seconds']:.2f} | {processor:.2f} | {rate} | {peak:.2f} |", flush=True)
    print(f"\nWeights: {best['weights']:.2f} GB.")


if __name__ == "__main__":
    main()
