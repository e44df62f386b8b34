"""What MLX's compiler does for mflux on a Linux CPU: the same work with activations compiled by g++ and without.

    python benchmarks/compiling.py [--repeats 3]

The widths are the published ones of FLUX.1, the weights random. Each side runs in processes of its own, in turn; with
the compiler in a temporary folder of their own, which is empty for the first of them. The shortest of all repetitions
counts, because other programs can only lengthen one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

ROUNDS = 2
BLOCK = "double block of FLUX.1's transformer, 3072 wide, 1,024 picture and 512 text tokens"
DECODE = "FLUX.1's autoencoder, decoding 256 × 256 pixels"


def measure(repeats: int, *, compiled: bool) -> dict:
    """In this process: for each piece of work the seconds of the first time, the least of the others, and the peak."""
    from mflux.backend import mx, nn
    from mflux.models.common.networks.autoencoders.kl import AutoencoderKL, AutoencoderKLConfig
    from mflux.models.common.networks.layers import rotary_embedding
    from mflux.models.common.networks.mmdit import TransformerBlock, latent_image_ids

    # mflux has turned it off by now.
    mx.enable_compile() if compiled else mx.disable_compile()

    def draw(*shape: int) -> mx.array:
        return mx.random.normal(shape, key=mx.random.key(len(shape) + shape[-1])) * 0.02

    block = TransformerBlock(24, 128)
    image, text, condition = draw(1, 1024, 3072), draw(1, 512, 3072), draw(1, 3072)
    ids = mx.concatenate([mx.zeros((512, 3), dtype=mx.uint32), latent_image_ids(32, 32).astype(mx.uint32)])
    rotary = rotary_embedding(ids, (16, 56, 56))
    autoencoder = AutoencoderKL(AutoencoderKLConfig())
    latents = draw(1, 16, 32, 32)
    mx.eval(block.parameters(), image, text, condition, rotary, latents)
    work = {
        "SiLU of 256 × 256 pixels in 128 channels, float32": (lambda x: nn.silu(x), draw(1, 256, 256, 128)),
        "GELU of 1,024 tokens, 12288 wide, float32": (lambda x: nn.gelu_approx(x), draw(1, 1024, 12288)),
        BLOCK: (lambda x: block(x, text, condition, rotary), image),
        DECODE: (autoencoder.decode, latents),
    }
    found = {}
    for name, (step, start) in work.items():
        mx.eval(start)
        mx.reset_peak_memory()
        before, seconds = mx.get_active_memory(), []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            mx.eval(step(start))
            seconds.append(time.perf_counter() - began)
        peak = mx.get_peak_memory() - before
        found[name] = {"first": seconds[0], "seconds": min(seconds[1:]), "peak": peak}
    return found


def in_process(repeats: int, compiled: bool, folder: str) -> dict:
    call = [sys.executable, __file__, "--child", "on" if compiled else "off", "--repeats", str(repeats)]
    done = subprocess.run(call, env=os.environ | {"TMPDIR": folder}, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="of each piece of work in a process (default: 3)")
    parser.add_argument("--child", choices=["on", "off"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.repeats, compiled=args.child == "on")))
        return

    with tempfile.TemporaryDirectory() as folder:
        runs = [{on: in_process(args.repeats, on, folder) for on in (True, False)} for _ in range(ROUNDS)]
    print("| what | compiled, s | not, s | times longer | the first time, compiled, s | MB compiled | MB not |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in runs[0][True]:
        on, off = (min(run[side][name]["seconds"] for run in runs) for side in (True, False))
        first = runs[0][True][name]["first"]
        peaks = " | ".join(f"{min(run[side][name]['peak'] for run in runs) / 1e6:,.0f}" for side in (True, False))
        print(f"| {name} | {on:.3f} | {off:.3f} | {off / on:.2f} | {first:.3f} | {peaks} |")


if __name__ == "__main__":
    main()
