"""LoRAs against diffusers' own loader, on pictures of a tiny FLUX.1 model.

Its converter of the fused single blocks knows only FLUX's width: those, and LoKr, are compared with what they are
multiplied out, in tests/core/test_lora.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from diffusers.utils import logging as diffusers_logging
from reference import LOOP, as_numpy, relative_error
from safetensors.torch import save_file

from mflux.models.common.config.model_config import ModelConfig
from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator
from mflux.models.flux.variants.txt2img.flux import Flux1

MODEL = {"plain": ModelConfig.schnell, "guided": ModelConfig.dev}
PROMPT = "an oil painting of a cat"
HEIGHT, WIDTH, STEPS, GUIDANCE = 48, 32, 2, 3.0
SCALES = (0.0, 0.7, 1.0)
# How much a LoRA of these tests changes at the least, against which an error of LOOP is nothing.
VISIBLE = 100 * LOOP

diffusers_logging.disable_progress_bar()
diffusers_logging.set_verbosity_error()


@pytest.fixture(scope="module", params=["plain"])
def model(request, tiny_flux) -> tuple[Path, str, FluxPipeline]:
    folder = tiny_flux[request.param]
    pipeline = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return folder, request.param, pipeline


class Latents:
    def call_after_loop(self, latents, **_) -> None:
        self.last = latents


def ours(model, paths=(), scales=(), **options) -> tuple[np.ndarray, np.ndarray]:
    """Latents after the loop, and the picture in 0 to 255."""
    folder, kind, _ = model
    flux = Flux1(
        model_path=str(folder),
        model_config=MODEL[kind](),
        lora_paths=[str(path) for path in paths],
        lora_scales=list(scales),
        **options,
    )
    seen = Latents()
    flux.callbacks.register(seen)
    image = flux.generate_image(3, PROMPT, STEPS, HEIGHT, WIDTH, guidance=GUIDANCE).image
    return as_numpy(seen.last), np.asarray(image).astype(int)


def theirs(model) -> tuple[torch.Tensor, np.ndarray]:
    _, kind, pipeline = model
    noise = torch.tensor(as_numpy(FluxLatentCreator.create_noise(3, HEIGHT, WIDTH)))
    latents = pipeline(
        PROMPT,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=noise,
        max_sequence_length=MODEL[kind]().max_sequence_length,
        output_type="latent",
    ).images
    config = pipeline.vae.config
    unpacked = pipeline._unpack_latents(latents, HEIGHT, WIDTH, pipeline.vae_scale_factor)
    with torch.no_grad():
        image = pipeline.vae.decode(unpacked / config.scaling_factor + config.shift_factor).sample
    return latents, np.asarray(pipeline.image_processor.postprocess(image, output_type="pil")[0]).astype(int)


def same(got: tuple[np.ndarray, np.ndarray], want: tuple[torch.Tensor, np.ndarray]) -> None:
    assert relative_error(got[0], want[0]) <= LOOP
    assert np.abs(got[1] - want[1]).max() <= 2


@contextmanager
def loaded(model, *loras: tuple[Path, float]) -> Iterator[None]:
    """diffusers with these files, by its own loader."""
    pipeline = model[2]
    names = [f"lora_{number}" for number in range(len(loras))]
    try:
        for name, (path, _) in zip(names, loras, strict=True):
            pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
        pipeline.set_adapters(names, [scale for _, scale in loras])
        yield
    finally:
        pipeline.unload_lora_weights()


# ---- files


class Writer:
    """Random LoRA tensors of a visible size. `changes` are what they amount to, by layer."""

    def __init__(self, model, seed: int):
        self.model = model
        self.layers = {
            name: layer.weight
            for name, layer in model[2].transformer.named_modules()
            if isinstance(layer, torch.nn.Linear)
        }
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, torch.Tensor] = {}
        self.changes: dict[str, torch.Tensor] = {}

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator) / shape[-1] ** 0.5

    def shape(self, *layers: str) -> tuple[int, int]:
        return sum(self.layers[layer].shape[0] for layer in layers), self.layers[layers[0]].shape[1]

    def record(self, change: torch.Tensor, *layers: str) -> None:
        """Give each layer its rows."""
        for layer, rows in zip(layers, change.split([self.layers[layer].shape[0] for layer in layers]), strict=True):
            assert layer not in self.changes
            self.changes[layer] = rows

    def low_rank(
        self, stem: str, *layers: str, rank: int = 4, alpha: float | None = None, ends=("lora_A", "lora_B"), swap=False
    ) -> None:
        height, width = self.shape(*layers)
        down, up = self.draw(rank, width), 0.5 * self.draw(height, rank)
        self.tensors[f"{stem}.{ends[0]}.weight"] = down
        self.tensors[f"{stem}.{ends[1]}.weight"] = up
        if alpha is not None:
            self.tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        change = (up @ down) * (1 if alpha is None else alpha / rank)
        self.record(torch.cat(change.chunk(2)[::-1]) if swap else change, *layers)

    def save(self, folder: Path, name: str, **options) -> Path:
        save_file({name: value.contiguous() for name, value in self.tensors.items()}, folder / name, **options)
        return folder / name


def blocks(model) -> Iterator[tuple[str, str, int]]:
    """Kind of block, where its layers are, and its number."""
    config = model[2].transformer.config
    for number in range(config.num_layers):
        yield "double", f"transformer_blocks.{number}", number
    for number in range(config.num_single_layers):
        yield "single", f"single_transformer_blocks.{number}", number


DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}
AROUND = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}


def black_forest_labs(model, *, fused_single: bool = True, around: bool = True) -> Iterator[tuple[str, list[str]]]:
    """Names in Black Forest Labs' checkpoint and the layers that they are."""
    for kind, place, number in blocks(model):
        for name, layers in (DOUBLE if kind == "double" else SINGLE).items():
            if name != "linear1" or fused_single:
                yield f"{kind}_blocks.{number}.{name}", [f"{place}.{layer}" for layer in layers]
    if around:
        layers = dict(model[2].transformer.named_modules())
        for name, layer in AROUND.items():
            if layer in layers:
                yield name, [layer]


def peft_file(model, folder: Path, *, prefix: str = "transformer.", seed: int = 1, alpha=None) -> Path:
    writer = Writer(model, seed)
    for number, layer in enumerate(writer.layers):
        writer.low_rank(prefix + layer, layer, rank=4 if alpha else 1 + number % 4, alpha=alpha)
    return writer.save(folder, f"peft_{seed}.safetensors")


def kohya_file(model, folder: Path, *, seed: int = 2) -> Path:
    """What diffusers' converter reads at any width."""
    writer = Writer(model, seed)
    for number, (name, layers) in enumerate(black_forest_labs(model, fused_single=False, around=False)):
        stem = "lora_unet_" + name.replace(".", "_")
        rank = 2 + number % 3
        writer.low_rank(stem, *layers, rank=rank, alpha=1.5 + number, ends=("lora_down", "lora_up"))
    return writer.save(folder, f"kohya_{seed}.safetensors")


def comfy_file(model, folder: Path) -> Path:
    """Black Forest Labs' names with dots, in the part that diffusers' converter reads at any width."""
    writer = Writer(model, 3)
    for name, layers in black_forest_labs(model, fused_single=False, around=False):
        writer.low_rank(f"diffusion_model.{name}", *layers, alpha=3.0, ends=("lora_down", "lora_up"))
    return writer.save(folder, "comfy.safetensors")


def xlabs_file(model, folder: Path) -> Path:
    writer = Writer(model, 4)
    for kind, place, number in blocks(model):
        parts = {"qkv_lora1": DOUBLE["img_attn.qkv"], "qkv_lora2": DOUBLE["txt_attn.qkv"]}
        parts |= {"proj_lora1": DOUBLE["img_attn.proj"], "proj_lora2": DOUBLE["txt_attn.proj"]}
        if kind == "single":
            parts = {"qkv_lora": SINGLE["linear1"][:3], "proj_lora": SINGLE["linear2"]}
        for name, layers in parts.items():
            stem = f"{kind}_blocks.{number}.processor.{name}"
            writer.low_rank(stem, *(f"{place}.{layer}" for layer in layers), ends=("down", "up"))
    return writer.save(folder, "xlabs.safetensors")


# ---- layouts that diffusers reads


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("write", [peft_file, kohya_file, comfy_file, xlabs_file])
def test_a_layout_that_diffusers_reads(model, tmp_path, write: Callable[..., Path], scale):
    plain = ours(model)
    path = write(model, tmp_path)
    got = ours(model, [path], [scale])
    with loaded(model, (path, scale)):
        same(got, theirs(model))
    if scale:
        assert relative_error(got[0], plain[0]) > VISIBLE
    else:
        assert np.array_equal(got[0], plain[0])
