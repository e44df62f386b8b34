"""What four bits cost Qwen-Image's transformer, with and without eight for its `img_mod` layers.

    python benchmarks/qwen_bits.py [--blocks 12] [--steps 4 20]

A transformer of the published architecture, 1024 channels wide, with random weights; its layers hold what is left of
these after they were quantized. Printed are the relative error of one prediction and, as the steps go on, that of the
latents, beside the transformer in full precision; and how many GB the published model's weights take.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]
ROWS = COLUMNS = 16
# What is quantized, to four bits unless a pattern of layers asks for more; 16 is not at all.
LEAST = {
    "all layers at 4 bits": {},
    "img_mod at 8 bits, as here": {r"\.img_mod\.": 8},
    "all layers at 8 bits": {"": 8},
    "img_mod alone at 4 bits": {r"^(?!.*\.img_mod\.)": 16},
    "img_mod alone at 8 bits": {r"^(?!.*\.img_mod\.)": 16, r"\.img_mod\.": 8},
}


def build(blocks: int):
    from support.tiny import published

    from mflux.backend import nn
    from mflux.models.qwen.model.transformer import QwenTransformer, QwenTransformerConfig

    config = QwenTransformerConfig.from_dict(
        {
            "num_layers": blocks, "num_attention_heads": 8, "attention_head_dim": 128, "joint_attention_dim": 1024,
            "axes_dims_rope": [16, 56, 56],
        }
    )  # fmt: skip
    module = QwenTransformer(config)
    assert not any(isinstance(layer, nn.Conv2d) for layer in module.modules())
    module.load_weights(list(published(module, seed=1).items()))
    return module


def plan_of(module, least: dict[str, int]):
    """Which layers are quantized and to what, with other layers kept at other bits than the class says."""
    from mflux.checkpoints.quantization import Quantization, planned

    kind = type(module)
    kept, kind.least_bits = kind.least_bits, least
    try:
        return planned(module, Quantization(4))
    finally:
        kind.least_bits = kept


def rounded(module, least: dict[str, int]) -> None:
    """Weights as a quantized layer multiplies with them."""
    from mflux.backend import mx

    for path, found in plan_of(module, least).items():
        layer = module
        for step in path.split("."):
            layer = layer[int(step)] if isinstance(layer, list) else layer[step]
        options = {"group_size": found.group_size, "bits": found.bits}
        layer.weight = mx.dequantize(*mx.quantize(layer.weight, **options), **options)
        mx.eval(layer.weight)


def run(module, steps: int) -> list:
    """The first prediction, and the latents at the end."""
    from mflux.backend import mx

    latents = mx.random.normal((1, ROWS * COLUMNS, 64), key=mx.random.key(2))
    prompt = mx.random.normal((1, 20, 1024), key=mx.random.key(3))
    first = None
    for step in range(steps):
        sigma = 1 - step / steps
        velocity = module(latents, sigma=mx.array([sigma]), prompt_embeds=prompt, grids=[(ROWS, COLUMNS)])
        first = velocity if first is None else first
        latents = latents - velocity / steps
        mx.eval(first, latents)
    return [first, latents]


def error(found, exact) -> float:
    from mflux.backend import mx

    return (mx.linalg.norm(found - exact) / mx.linalg.norm(exact)).item()


def gigabytes(least: dict[str, int]) -> float:
    from stage_memory import CONFIGS, bytes_of

    from mflux.models.qwen.model.transformer import QwenTransformer, QwenTransformerConfig

    kept, QwenTransformer.least_bits = QwenTransformer.least_bits, least
    try:
        config = QwenTransformerConfig.from_dict(CONFIGS["Qwen-Image/transformer"])
        return bytes_of(QwenTransformer(config), 4) / 1e9
    finally:
        QwenTransformer.least_bits = kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=12, help="how many (default: 12; the published model has 60)")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 20], help="steps of the pictures (default: 4 20)")
    args = parser.parse_args()
    exact = {steps: run(build(args.blocks), steps) for steps in args.steps}
    heads = ["layers", "one prediction", *(f"after {steps} steps" for steps in args.steps), "GB, published"]
    print(f"| {' | '.join(heads)} |\n|---|{'---:|' * (len(heads) - 1)}")
    for label, least in LEAST.items():
        module = build(args.blocks)
        rounded(module, least)
        found = {steps: run(module, steps) for steps in args.steps}
        first = error(found[args.steps[0]][0], exact[args.steps[0]][0])
        errors = [first, *(error(found[steps][1], exact[steps][1]) for steps in args.steps)]
        print(f"| {label} | {' | '.join(f'{value:.1%}' for value in errors)} | {gigabytes(least):.1f} |")


if __name__ == "__main__":
    main()
