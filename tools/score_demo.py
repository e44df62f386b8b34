"""Mark the embedded model: does it draw what captions say?

Draws pictures through `Flux1`, the public class, and lets `demo_scenes.judge` say what they show. The captions are
those that training never saw, in a seeded random order.

    python tools/score_demo.py [--count 200] [--steps 8] [--model FOLDER] [--sheet sheet.png] [--json figures.json]
    python tools/score_demo.py --quantize 8
    python tools/score_demo.py --lora tests/data/demo_square_lora.safetensors --lora-scale 1 --expect square

Needs only the core install.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from demo_scenes import HEIGHTS, SHAPES, agrees, every_scene, judge

# What issue and README promise, in percent.
GOALS = {"colour": 95, "shape": 95, "background": 95, "size": 90, "place": 90}


def score(
    flux, count: int, *, steps: int, seed: int = 0, side: int = 128, expect: str | None = None, quiet: bool = False
):
    """Draw `count` held-out captions, each with its own seed.

    Args:
        expect: The shape that every object is to have, whatever its caption says, as with a LoRA.

    Returns:
        For each claim how often it was asked and how often it was kept, and (scene, picture, kept) of each picture.
    """
    scenes = [scene for scene in every_scene() if scene.held_out]
    order = np.random.default_rng(seed).permutation(len(scenes))
    asked: dict[str, list[bool]] = {claim: [] for claim in GOALS}
    drawn = []
    # Encode all prompts first, so that the text encoders are loaded once.
    chosen = [scenes[order[index % len(scenes)]] for index in range(count)]
    from mflux.models.common.memory import Keep

    flux.keep = Keep(text_encoders=True)
    for index, scene in enumerate(chosen):
        picture = flux.generate_image(
            seed=seed * 100_003 + index, prompt=scene.caption, num_inference_steps=steps, width=side, height=side
        ).image
        meant = replace(scene, shape=expect) if expect else scene
        kept = agrees(meant, judge(np.asarray(picture), tuple(HEIGHTS) if expect else SHAPES))
        for claim, is_kept in kept.items():
            asked[claim].append(is_kept)
        drawn.append((scene, picture, kept))
        if not quiet and not all(kept.values()):
            wrong = ", ".join(claim for claim, is_kept in kept.items() if not is_kept)
            print(f"{scene.caption!r}: {wrong}", file=sys.stderr)
    return {claim: (len(kept), sum(kept)) for claim, kept in asked.items()}, drawn


def percentages(figures: dict[str, tuple[int, int]]) -> dict[str, float]:
    return {claim: 100.0 * kept / asked for claim, (asked, kept) in figures.items() if asked}


def sheet(drawn, columns: int = 20):
    """The first pictures in rows, for a look."""
    import PIL.Image

    shown = [picture for _, picture, _ in drawn[: columns * 10]]
    side = shown[0].width
    rows = -(-len(shown) // columns)
    page = PIL.Image.new("RGB", (columns * (side + 4), rows * (side + 4)), "grey")
    for index, picture in enumerate(shown):
        page.paste(picture, (index % columns * (side + 4) + 2, index // columns * (side + 4) + 2))
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="how many captions")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--side", type=int, default=128, help="pixels of a side")
    parser.add_argument("--model", help="another checkpoint folder of the same world (default: the embedded one)")
    parser.add_argument("--quantize", type=int, help="bits of the weights")
    parser.add_argument("--lora", help="a LoRA to draw with")
    parser.add_argument("--lora-scale", type=float, default=1.0)
    parser.add_argument("--expect", choices=HEIGHTS, help="the shape that every object is to have")
    parser.add_argument("--sheet", type=Path, help="write the pictures side by side")
    parser.add_argument("--json", type=Path, help="write the figures")
    arguments = parser.parse_args()

    # Two hundred progress bars say nothing.
    os.environ.setdefault("TQDM_DISABLE", "1")

    from mflux.models.common.config import ModelConfig
    from mflux.models.flux.variants.txt2img.flux import Flux1

    config = ModelConfig.demo()
    flux = Flux1(
        model_config=config,
        model_path=arguments.model,
        quantize=arguments.quantize,
        lora_paths=[arguments.lora] if arguments.lora else None,
        lora_scales=[arguments.lora_scale] if arguments.lora else None,
    )
    start = time.perf_counter()
    figures, drawn = score(
        flux,
        arguments.count,
        steps=arguments.steps or config.default_steps,
        seed=arguments.seed,
        side=arguments.side,
        expect=arguments.expect,
    )
    seconds = time.perf_counter() - start
    results = percentages(figures)
    for claim, percent in results.items():
        asked, kept = figures[claim]
        print(f"{claim:12}{percent:6.1f} %   {kept} of {asked}   (goal {GOALS[claim]} %)")
    everything = sum(all(kept.values()) for *_, kept in drawn)
    print(f"{'all of it':12}{100 * everything / len(drawn):6.1f} %   {everything} of {len(drawn)}")
    print(f"{seconds / len(drawn):.2f} s a picture")
    if arguments.sheet:
        sheet(drawn).save(arguments.sheet)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0 if all(results[claim] >= GOALS[claim] for claim in results) else 1


if __name__ == "__main__":
    sys.exit(main())
