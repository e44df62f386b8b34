"""Training a LoRA: memory and seconds a step, beside torch with PEFT, in one run.

    python benchmarks/training.py [--width 1024] [--blocks 2 6] [--side 256] [--words 256] [--steps 2]

A FLUX.1 transformer of random weights in float32, which both programs compute in on a CPU, and a LoRA of rank 16 on
the layers that are trained by default. Each way has a process of its own. Peaks are MLX's counter, and for torch the
growth of the process's largest resident size from where only the weights were there, plus these; so torch's lacks
nothing and has the allocator's own on top. Needs what the tests need.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WAYS = (
    "torch",
    "torch, checkpointing",
    "mflux",
    "mflux, checkpointing",
    "mflux, 4 bits",
    "mflux, 4 bits, checkpointing",
)
TARGETS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
    "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
)  # fmt: skip
RANK = 16


def settings(args: argparse.Namespace) -> dict:
    return {
        "num_layers": args.blocks[0], "num_single_layers": args.blocks[1], "attention_head_dim": 128,
        "num_attention_heads": args.width // 128, "axes_dims_rope": [16, 56, 56], "joint_attention_dim": 512,
        "pooled_projection_dim": 256, "guidance_embeds": True, "in_channels": 64,
    }  # fmt: skip


def with_torch(args: argparse.Namespace, *, checkpointing: bool) -> dict:
    import torch
    from diffusers import FluxPipeline, FluxTransformer2DModel
    from peft import LoraConfig

    torch.manual_seed(0)
    model = FluxTransformer2DModel(**settings(args)).requires_grad_(False)
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS)))
    if checkpointing:
        model.enable_gradient_checkpointing()
    model.train()
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    weights = sum(one.numel() * 4 for one in model.parameters())
    side = args.side // 16
    x, noise = torch.randn(1, side * side, 64), torch.randn(1, side * side, 64)
    given = dict(
        encoder_hidden_states=torch.randn(1, args.words, 512), pooled_projections=torch.randn(1, 256),
        guidance=torch.tensor([1.0]), timestep=torch.tensor([0.5]), txt_ids=torch.zeros(args.words, 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(1, side, side, "cpu", torch.float32),
    )  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = []
    for _ in range(args.steps + 1):
        start = time.perf_counter()
        loss = (model(0.5 * x + 0.5 * noise, **given).sample - (noise - x)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {"peak": weights + grown, "weights": weights, "seconds": min(seconds[1:])}


def with_mflux(args: argparse.Namespace, *, checkpointing: bool, bits: int | None) -> dict:
    from mflux import cpu
    from mflux.backend import mx, named_arrays, nn
    from mflux.checkpoints.quantization import Quantization, make_room, pack, planned
    from mflux.models.common.lora.adapters import linear_layers
    from mflux.models.common.training import lora, objective
    from mflux.models.common.training.optimizer import Optimizer
    from mflux.models.common.training.recompute import forget
    from mflux.models.common.training.spec import OptimizerSpec
    from mflux.models.flux.model.transformer import FluxTransformer, FluxTransformerConfig, latent_image_ids

    mx.random.seed(0)
    model = FluxTransformer(FluxTransformerConfig.from_dict(settings(args)))
    mx.eval(model.parameters())
    shapes = linear_layers(model)
    if bits is not None:
        plan = planned(model, Quantization(bits))
        packed = {path: pack(lora.get_at_path(model, path).weight, one) for path, one in plan.items()}
        biases = {path: lora.get_at_path(model, path).get("bias") for path in plan}
        mx.eval(packed)
        make_room(model, plan)
        for path, parts in packed.items():
            layer = lora.get_at_path(model, path)
            for name, value in parts.items():
                layer[name] = value
            if biases[path] is not None:
                layer.bias = biases[path]
        del packed
    model.freeze()
    trained = lora.inject(model, lora.chosen(None, TARGETS, shapes, {}), shapes, 0)
    if checkpointing:
        forget(model, ("transformer_blocks", "single_transformer_blocks"))
    weights = lora.weights_of(trained)
    optimizer = Optimizer(OptimizerSpec("AdamW", 1e-4), weights)
    side = args.side // 16
    x, noise = mx.random.normal((1, side * side, 64)), mx.random.normal((1, side * side, 64))
    given = {
        "prompt_embeds": mx.random.normal((1, args.words, 512)), "pooled_prompt_embeds": mx.random.normal((1, 256)),
        "guidance": mx.array([1.0]), "sigma": mx.array([0.5]), "image_ids": latent_image_ids(side, side),
    }  # fmt: skip
    mx.eval(x, noise, given)
    assert isinstance(model, nn.Module)

    def loss(values: dict) -> mx.array:
        lora.put_weights(trained, values)
        velocity = model(objective.noisy(x, noise, mx.array([0.5])), **given)
        return objective.losses(velocity, x, noise).sum()

    mx.clear_cache()
    mx.reset_peak_memory()
    resting = mx.get_active_memory()
    seconds = []
    for _ in range(args.steps + 1):
        start = time.perf_counter()
        # As a run has it: nobody asks for a gradient of these gradients.
        with cpu.first_order():
            value, gradients = mx.value_and_grad(loss)(weights)
            mx.eval(value, gradients)
        weights = optimizer.apply(weights, gradients)
        del value, gradients
        seconds.append(time.perf_counter() - start)
    assert all(one.dtype == mx.float32 for _, one in named_arrays(weights))
    return {"peak": mx.get_peak_memory(), "weights": resting, "seconds": min(seconds[1:])}


def measure(way: str, args: argparse.Namespace) -> dict:
    checkpointing = "checkpointing" in way
    if way.startswith("torch"):
        return with_torch(args, checkpointing=checkpointing)
    return with_mflux(args, checkpointing=checkpointing, bits=4 if "4 bits" in way else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--blocks", type=int, nargs=2, default=(2, 6))
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--words", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args)))
        return
    found = {}
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    for way in WAYS:
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, __file__, "--way", way, "--width", str(args.width), "--side", str(args.side)]
            words += ["--words", str(args.words), "--steps", str(args.steps), "--blocks", *map(str, args.blocks)]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=environment, cwd=folder)
        found[way] = json.loads(done.stdout.splitlines()[-1])
        print(way, found[way], file=sys.stderr)
    first = found["torch"]
    print(
        "| | weights | peak | beside the weights | of torch's | s a step | of torch's |\n|---|---|---|---|---|---|---|"
    )
    for way, one in found.items():
        beside = one["peak"] - one["weights"]
        print(
            f"| {way} | {one['weights'] / 1e6:,.0f} MB | {one['peak'] / 1e6:,.0f} MB | {beside / 1e6:,.0f} MB | "
            f"{beside / (first['peak'] - first['weights']):.2f} | {one['seconds']:.1f} | "
            f"{one['seconds'] / first['seconds']:.2f} |"
        )


if __name__ == "__main__":
    main()
