"""What a step cache costs in the image, with the embedded model, which draws shapes that can be told.

    python benchmarks/fewer_passes.py [--steps 20] [--images 8]

For each part of the steps that use the prediction before again: how many passes are left, how far the images are from
those of all steps (PSNR of 8-bit values in dB, its mean and its least), and seconds an image.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

PARTS = (None, 0.1, 0.25, 0.4, 0.5)
COLOURS = ("red", "blue", "green", "yellow")
SHAPES = ("circle", "square", "triangle")


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = np.mean((one.astype(float) - other.astype(float)) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default: 20)")
    parser.add_argument("--images", type=int, default=8, help="how many, each of another prompt (default: 8)")
    args = parser.parse_args()
    from mflux.models.common.config import ModelConfig
    from mflux.models.flux.variants.txt2img.flux import Flux1

    model = Flux1(model_config=ModelConfig.from_name("demo"))
    whole: list[np.ndarray] = []
    print("| part | passes | PSNR, dB | least | s |\n|---:|---:|---:|---:|---:|")
    for part in PARTS:
        found, start = [], time.perf_counter()
        for number in range(args.images):
            colour, shape = COLOURS[number % len(COLOURS)], SHAPES[number % len(SHAPES)]
            prompt = f"a large {colour} {shape} on a white background"
            image = model.generate_image(
                number, prompt, num_inference_steps=args.steps, width=256, height=256, step_cache_ratio=part
            )
            found.append(np.asarray(image.image))
        seconds = (time.perf_counter() - start) / args.images
        whole = whole or found
        values = [psnr(one, other) for one, other in zip(whole, found, strict=True)]
        passes = args.steps - round((part or 0) * args.steps)
        print(f"| {part or 0:g} | {passes} | {np.mean(values):.1f} | {min(values):.1f} | {seconds:.2f} |")


if __name__ == "__main__":
    main()
