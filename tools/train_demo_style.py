"""Teach the embedded model a style that it does not know, with `mflux-train`: every object is pink.

Draws pictures whose captions still say the old colours, has the command learn from them, and generates captions that
nobody learned from, without the LoRA and with it. Pixels say what the pictures show, and both stand side by side in one
file. Needs only the core install; minutes on two CPU cores.

    python tools/train_demo_style.py [--out demo-style] [--epochs 60]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from demo_scenes import COLOURS, HEIGHTS, SHAPES, Scene, every_scene, render, shape_coverage

PINK = (245, 120, 175)
SIDE, PICTURES, BATCH, STEPS, RANK, RATE, SEED = 128, 48, 8, 8, 8, 2e-3, 7
ASKED, GOAL = 16, 14
# From the background, in 0 to 255.
_FAR = 40
# All layers of attention and feed-forward.
LAYERS = (
    *(f"transformer_blocks.{{block}}.attn.{name}" for name in (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"transformer_blocks.{{block}}.{name}" for name in (
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")),
    *(f"single_transformer_blocks.{{block}}.{name}" for name in (
        "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out")),
)  # fmt: skip


def scenes(held_out: bool, count: int) -> list[Scene]:
    """Captions in a seeded order. Small objects are left out: their outlines have few pixels to be judged by."""
    found = [scene for scene in every_scene() if scene.held_out == held_out and scene.size != "small"]
    order = np.random.default_rng(SEED).permutation(len(found))
    return [found[number] for number in order[:count]]


def write_data(folder: Path) -> None:
    """Pictures of the captions' scenes, but for the colour of what they show."""
    import PIL.Image

    folder.mkdir(parents=True)
    rng = np.random.default_rng(SEED)
    for number, scene in enumerate(scenes(held_out=False, count=PICTURES)):
        pixels = render(scene, SIDE, SIDE, rng, colours=COLOURS | {scene.colour: PINK})
        PIL.Image.fromarray(pixels).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(scene.caption + "\n")


def configuration(out: Path, epochs: int) -> dict:
    return {
        "model": "demo",
        "data": "data",
        "seed": SEED,
        "steps": STEPS,
        "training_loop": {"num_epochs": epochs, "batch_size": BATCH},
        "optimizer": {"name": "AdamW", "learning_rate": RATE, "lr_schedule": "cosine", "max_grad_norm": 1.0},
        "checkpoint": {"save_frequency": 120, "output_path": str(out / "run"), "keep": 2},
        "monitoring": {
            "generate_image_frequency": 120, "preview_width": SIDE, "preview_height": SIDE, "plot_frequency": 60,
        },
        "lora_layers": {
            "targets": [
                {"module_path": path, "blocks": "all", "rank": RANK, "alpha": RANK} for path in LAYERS
            ]
        },
    }  # fmt: skip


def generate(asked: list[Scene], adapter: str | None) -> list:
    from mflux.models.common.config import ModelConfig
    from mflux.models.common.memory import Keep
    from mflux.models.flux.variants.txt2img.flux import Flux1

    loras = {"lora_paths": [adapter], "lora_scales": [1.0]} if adapter else {}
    flux = Flux1(model_config=ModelConfig.demo(), **loras)
    flux.keep = Keep(text_encoders=True)
    size = {"num_inference_steps": STEPS, "width": SIDE, "height": SIDE}
    return [
        flux.generate_image(seed=1000 + number, prompt=scene.caption, **size).image
        for number, scene in enumerate(asked)
    ]


def right(scene: Scene, picture) -> dict[str, bool]:
    """What a picture keeps of the caption, and whether its object is pink: the border's median is the background, and
    what is far from that is the object, whose median is its colour and whose outline is compared with each shape's."""
    pixels = np.asarray(picture)[..., :3].astype(np.float32)
    colours = COLOURS | {"pink": PINK}

    def nearest(colour: np.ndarray) -> str:
        return min(colours, key=lambda name: float(np.linalg.norm(colour - np.array(colours[name]))))

    border = np.concatenate([pixels[:3].reshape(-1, 3), pixels[-3:].reshape(-1, 3), pixels[:, :3].reshape(-1, 3)])
    paper = np.median(border, axis=0)
    inside = np.linalg.norm(pixels - paper, axis=-1) > _FAR
    if inside.sum() < 50:
        return {"pink": False, "background": nearest(paper) == scene.background, "shape": False}
    return {
        "pink": nearest(np.median(pixels[inside], axis=0)) == "pink",
        "background": nearest(paper) == scene.background,
        "shape": outline(inside) == scene.shape,
    }


def outline(inside: np.ndarray) -> str | None:
    """The shape that overlaps a mask best, drawn into its bounding box, at 0.8 or more."""
    rows, columns = np.nonzero(inside)
    # A stray pixel must not stretch the box.
    top, bottom = np.quantile(rows, [0.002, 0.998])
    left, right_end = np.quantile(columns, [0.002, 0.998])
    tall, middle = bottom - top + 1, ((left + right_end + 1) / 2, (top + bottom + 1) / 2)
    scores = {}
    for shape in SHAPES:
        drawn = shape_coverage(shape, *inside.shape, *middle, tall / HEIGHTS[shape]) > 0.5
        scores[shape] = (inside & drawn).sum() / (inside | drawn).sum()
    best = max(scores, key=lambda shape: scores[shape])
    return best if scores[best] >= 0.8 else None


def side_by_side(before: list, after: list, columns: int = 8):
    """Each picture without the LoRA over the same one with it."""
    import PIL.Image

    rows, gap = -(-len(before) // columns), 4
    page = PIL.Image.new("RGB", (columns * (SIDE + gap), rows * (2 * SIDE + 3 * gap)), "white")
    for number, pair in enumerate(zip(before, after, strict=True)):
        x, y = number % columns * (SIDE + gap) + gap // 2, number // columns * (2 * SIDE + 3 * gap)
        for row, picture in enumerate(pair):
            page.paste(picture, (x, y + row * (SIDE + gap)))
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-style"), help="a new folder (default: demo-style)")
    parser.add_argument("--epochs", type=int, default=60)
    arguments = parser.parse_args()
    os.environ.setdefault("TQDM_MININTERVAL", "5")
    out = arguments.out.absolute()
    if out.exists():
        parser.error(f"{out} exists already: give --out a new folder")
    write_data(out / "data")
    (out / "config.json").write_text(json.dumps(configuration(out, arguments.epochs), indent=2))
    words = [sys.executable, "-m", "mflux.models.common.cli.train", "--config", str(out / "config.json")]
    start = time.perf_counter()
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return done.returncode
    seconds = time.perf_counter() - start
    adapter = done.stdout.splitlines()[-1]
    asked = scenes(held_out=True, count=ASKED)
    before, after = generate(asked, None), generate(asked, adapter)
    pinks = sum(right(scene, picture)["pink"] for scene, picture in zip(asked, before, strict=True))
    kept = [right(scene, picture) for scene, picture in zip(asked, after, strict=True)]
    side_by_side(before, after).save(out / "style.png")
    print(f"learned in {seconds:.0f} s; without the LoRA {pinks} of {ASKED} objects are pink, with it:")
    for claim in kept[0]:
        print(f"  {claim:12}{sum(one[claim] for one in kept)} of {ASKED}")
    for scene, one in zip(asked, kept, strict=True):
        if not all(one.values()):
            print(f"  {scene.caption!r}: {', '.join(claim for claim, is_kept in one.items() if not is_kept)}")
    whole = sum(all(one.values()) for one in kept)
    print(f"all of it: {whole} of {ASKED} (goal {GOAL}); {out / 'style.png'}, {adapter}")
    return 0 if whole >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
