"""Train a LoRA for the embedded model that turns every object into the same shape, a square if not told otherwise.

The transformer's linear layers get low-rank changes (Hu et al. 2021) from peft; they learn the same captions with that
shape in the pictures. The result is a small file in diffusers' layout, which `mflux-generate --lora` reads:

    python tools/train_demo_lora.py [--shape square] [--steps 250] [--out tests/data/demo_square_lora.safetensors]

Needs what `train_demo.py` needs, and peft; a few minutes on two CPU cores. Seeded. A star, which the model never saw,
takes more than 400 steps: after those it has points in wrong places.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from demo_scenes import HEIGHTS, every_scene, render
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from train_demo import SIDE, TEXT_LENGTH, Tokens, as_pixels, pack, positions
from transformers import CLIPTextModel, T5EncoderModel

CHECKPOINT = Path(__file__).resolve().parents[1] / "src" / "mflux" / "demo" / "checkpoint"
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "proj_mlp"]
LAYERS += ["net.0.proj", "net.2", r"single_transformer_blocks.\d+.proj_out"]
BATCH = 48


def latents_of(shape: str, vae: AutoencoderKL, scenes: list, rng: np.random.Generator) -> torch.Tensor:
    """(N, 64, 64): one drawing of each scene, with another shape, in the transformer's own scale."""
    latents = []
    with torch.no_grad():
        for start in range(0, len(scenes), 64):
            changed = [replace(scene, shape=shape) for scene in scenes[start : start + 64]]
            pictures = np.stack([render(scene, SIDE, SIDE, rng) for scene in changed])
            mean = vae.encode(as_pixels(pictures)).latent_dist.mean
            latents.append(pack((mean - vae.config.shift_factor) * vae.config.scaling_factor))
    return torch.cat(latents)


def train(checkpoint: Path, out: Path, *, shape: str, steps: int, rank: int) -> None:
    torch.manual_seed(6)
    rng = np.random.default_rng(6)
    scenes = [scene for scene in every_scene() if not scene.held_out]
    vae = AutoencoderKL.from_pretrained(checkpoint / "vae", torch_dtype=torch.float32).eval()
    clip = CLIPTextModel.from_pretrained(checkpoint / "text_encoder", torch_dtype=torch.float32).eval()
    t5 = T5EncoderModel.from_pretrained(checkpoint / "text_encoder_2", torch_dtype=torch.float32).eval()
    transformer = FluxTransformer2DModel.from_pretrained(checkpoint / "transformer", torch_dtype=torch.float32)
    latents = latents_of(shape, vae, scenes, rng)
    tokens = Tokens(checkpoint)
    clip_ids, t5_ids = tokens([scene.caption for scene in scenes])
    with torch.no_grad():
        pooled = torch.cat([clip(ids).pooler_output for ids in clip_ids.split(256)])
        words = torch.cat([t5(ids).last_hidden_state for ids in t5_ids.split(256)])

    targets = "|".join(layer.replace(".", r"\.") for layer in LAYERS[:-1])
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=rf".*\.({targets})|{LAYERS[-1]}")
    transformer.requires_grad_(False)
    transformer.add_adapter(config)
    learned = [weight for weight in transformer.parameters() if weight.requires_grad]
    print(f"{sum(weight.numel() for weight in learned):,} weights in {len(learned) // 2} layers", flush=True)
    optimizer = torch.optim.AdamW(learned, lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)
    clock, losses = time.time(), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                2e-3 * min(1.0, (step + 1) / 30) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
            )
        chosen = torch.from_numpy(rng.integers(len(scenes), size=BATCH))
        noise = torch.from_numpy(rng.standard_normal((BATCH, *latents.shape[1:]), dtype=np.float32))
        sigma = torch.from_numpy(rng.random(BATCH, dtype=np.float32))[:, None, None]
        clean = latents[chosen]
        velocity = transformer(
            hidden_states=(1 - sigma) * clean + sigma * noise,
            timestep=sigma[:, 0, 0],
            pooled_projections=pooled[chosen],
            encoder_hidden_states=words[chosen],
            txt_ids=torch.zeros(TEXT_LENGTH, 3),
            img_ids=positions(SIDE // 16, SIDE // 16),
            return_dict=False,
        )[0]
        loss = ((velocity - (noise - clean)) ** 2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 25 == 0 or step == steps - 1:
            print(f"{step}/{steps} loss {np.mean(losses[-25:]):.4f} {time.time() - clock:.0f}s", flush=True)

    layers = {name: weight.to(torch.bfloat16) for name, weight in get_peft_model_state_dict(transformer).items()}
    FluxPipeline.save_lora_weights(
        out.parent,
        transformer_lora_layers=layers,
        weight_name=out.name,
        transformer_lora_adapter_metadata=config.to_dict(),
    )
    out.chmod(0o644)
    print(f"{out}: {out.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--out", type=Path, default=Path("tests/data/demo_square_lora.safetensors"))
    parser.add_argument("--shape", choices=HEIGHTS, default="square")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--rank", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    train(arguments.checkpoint, arguments.out, shape=arguments.shape, steps=arguments.steps, rank=arguments.rank)


if __name__ == "__main__":
    main()
