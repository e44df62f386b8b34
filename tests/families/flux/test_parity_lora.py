"""LoRAs against diffusers, on pictures of two tiny FLUX.1 models.

Where diffusers' loader reads a layout at any width, it is the reference. Its converters of FLUX's fused single blocks
know only FLUX's own width; what they make of the layers around the blocks (`img_in`, `final_layer` …) lacks the prefix
by which its loader finds the transformer, and is left out there; and LoKr it does not know for FLUX.1. There the change
is multiplied out here, with torch, and added to diffusers' own weights.
"""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from diffusers.utils import logging as diffusers_logging
from peft import LoKrConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from support.reference import LOOP, as_numpy, relative_error

from mflux.models.common.config.model_config import ModelConfig
from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator
from mflux.models.flux.variants.txt2img.flux import Flux1

MODEL = {"plain": ModelConfig.schnell, "guided": ModelConfig.dev}
PROMPT = "an oil painting of a cat"
HEIGHT, WIDTH, STEPS, GUIDANCE = 48, 32, 2, 3.0
SCALES = (0.0, 0.7, 1.0)
# How much a LoRA of these tests changes at the least, against which an error of LOOP is nothing.
VISIBLE = 100 * LOOP

# Latents after the loop, and the picture in 0 to 255.
Drawn = tuple[np.ndarray, np.ndarray]

# What PEFT says when a second LoRA is loaded, and when a file has the last layer but not what else ends in its name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
    pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters, an inconsistency"),
    # A layer's bias, which PEFT saves as `lora_B.bias`, it takes for a matrix that lost a side.
    pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape"),
]
diffusers_logging.disable_progress_bar()
diffusers_logging.set_verbosity_error()


# ---- drawing


class Latents:
    def call_after_loop(self, latents, **_) -> None:
        self.last = latents


class Tiny:
    """One folder, drawn from by mflux and by diffusers."""

    def __init__(self, kind: str, folder: Path):
        self.folder = folder
        self.config = copy.copy(MODEL[kind]())
        # Of prompts of full length test_parity_pipeline.py draws pictures; most of their tokens are padding.
        self.config.max_sequence_length = 24
        self.pipeline = FluxPipeline.from_pretrained(folder)
        self.pipeline.set_progress_bar_config(disable=True)

    def ours(self, *loras: tuple[Path, float], bake: bool = True) -> Drawn:
        flux = Flux1(
            model_path=str(self.folder),
            model_config=self.config,
            lora_paths=[str(path) for path, _ in loras],
            lora_scales=[scale for _, scale in loras],
            bake_lora=bake,
        )
        seen = Latents()
        flux.callbacks.register(seen)
        image = flux.generate_image(3, PROMPT, STEPS, HEIGHT, WIDTH, guidance=GUIDANCE).image
        return as_numpy(seen.last), np.asarray(image).astype(int)

    def theirs(self) -> Drawn:
        """diffusers' picture with what is in its weights and loaded beside them now."""
        pipeline = self.pipeline
        latents = pipeline(
            PROMPT,
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            latents=torch.tensor(as_numpy(FluxLatentCreator.create_noise(3, HEIGHT, WIDTH))),
            max_sequence_length=self.config.max_sequence_length,
            output_type="latent",
        ).images
        vae = pipeline.vae.config
        unpacked = pipeline._unpack_latents(latents, HEIGHT, WIDTH, pipeline.vae_scale_factor)
        with torch.no_grad():
            image = pipeline.vae.decode(unpacked / vae.scaling_factor + vae.shift_factor).sample
        picture = pipeline.image_processor.postprocess(image, output_type="pil")[0]
        return as_numpy(latents), np.asarray(picture).astype(int)

    @cached_property
    def plain(self) -> Drawn:
        """Ours without a LoRA."""
        return self.ours()

    @cached_property
    def plain_theirs(self) -> Drawn:
        """To be asked for when nothing is loaded."""
        return self.theirs()

    def check(self, path: Path, scale: float, want: Drawn, *, bake: bool = True) -> None:
        got = self.ours((path, scale), bake=bake)
        same(got, want)
        if scale:
            assert relative_error(want[0], self.plain[0]) > VISIBLE
        else:
            assert np.array_equal(got[0], self.plain[0])

    @contextmanager
    def loaded(self, *loras: tuple[Path, float]) -> Iterator[None]:
        """diffusers with these files, by its own loader."""
        names = [f"lora_{number}" for number in range(len(loras))]
        try:
            for name, (path, _) in zip(names, loras, strict=True):
                self.pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
            self.pipeline.set_adapters(names, [scale for _, scale in loras])
            yield
        finally:
            self.pipeline.unload_lora_weights()

    @contextmanager
    def added(self, changes: Mapping[str, torch.Tensor], scale: float) -> Iterator[None]:
        """diffusers with these changes in the weights of its transformer."""
        layers = dict(self.pipeline.transformer.named_modules())
        before = {name: layers[name].weight.detach().clone() for name in changes}
        try:
            with torch.no_grad():
                for name, change in changes.items():
                    layers[name].weight += scale * change
            yield
        finally:
            with torch.no_grad():
                for name, weight in before.items():
                    layers[name].weight.copy_(weight)


def same(got: Drawn, want: Drawn) -> None:
    assert relative_error(got[0], want[0]) <= LOOP
    assert np.abs(got[1] - want[1]).max() <= 2


@pytest.fixture(scope="module")
def models(tiny_flux) -> Iterator[dict[str, Tiny]]:
    # Between its stages a picture collects garbage: most of its time here, if that looks through all of torch.
    gc.freeze()
    yield {kind: Tiny(kind, tiny_flux[kind]) for kind in MODEL}
    gc.unfreeze()


@pytest.fixture(params=MODEL)
def model(request, models) -> Tiny:
    return models[request.param]


# ---- files


class Writer:
    """Random LoRA tensors of a visible size for a module of diffusers'. `changes` are what they amount to, by layer."""

    def __init__(self, module: torch.nn.Module, seed: int):
        self.layers = {
            name: layer.weight.detach() for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)
        }
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, torch.Tensor] = {}
        self.changes: dict[str, torch.Tensor] = {}

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator) / shape[-1] ** 0.5

    def shape(self, layers: list[str]) -> tuple[int, int]:
        return sum(self.layers[layer].shape[0] for layer in layers), self.layers[layers[0]].shape[1]

    def weight(self, layers: list[str], *, swapped: bool = False) -> torch.Tensor:
        weight = torch.cat([self.layers[layer] for layer in layers])
        return halves_swapped(weight) if swapped else weight

    def record(self, change: torch.Tensor, layers: list[str], *, swapped: bool = False) -> None:
        """Give each layer its rows."""
        change = halves_swapped(change) if swapped else change
        for layer, rows in zip(layers, change.split([self.layers[layer].shape[0] for layer in layers]), strict=True):
            assert layer not in self.changes
            self.changes[layer] = rows

    def low_rank(
        self,
        stem: str,
        layers: list[str],
        *,
        rank: int = 4,
        alpha: float | None = None,
        ends: tuple[str, str] = ("lora_A", "lora_B"),
        swapped: bool = False,
    ) -> None:
        height, width = self.shape(layers)
        down, up = self.draw(rank, width), 0.5 * self.draw(height, rank)
        self.tensors |= {f"{stem}.{ends[0]}.weight": down, f"{stem}.{ends[1]}.weight": up}
        if alpha is not None:
            self.tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        self.record((up @ down) * (1 if alpha is None else alpha / rank), layers, swapped=swapped)

    def lokr(self, stem: str, layers: list[str], form: str, *, alpha: float, swapped: bool = False) -> None:
        """LyCORIS' LoKr: w1 ⊗ w2, each whole or as a product; with magnitudes (`dora_scale`) if asked for."""
        height, width = self.shape(layers)
        inner, outer, rank, strength = height // 4, width // 2, 2, 1.0
        parts = {"alpha": torch.tensor(alpha)}
        if "a1" in form:
            parts |= {"lokr_w1_a": 0.5 * self.draw(4, rank), "lokr_w1_b": self.draw(rank, 2)}
            w1, strength = parts["lokr_w1_a"] @ parts["lokr_w1_b"], alpha / rank
        else:
            w1 = parts["lokr_w1"] = 0.5 * self.draw(4, 2)
        if "a2" in form:
            parts |= {"lokr_w2_a": self.draw(inner, rank), "lokr_w2_b": self.draw(rank, outer)}
            w2, strength = parts["lokr_w2_a"] @ parts["lokr_w2_b"], alpha / rank
        elif "t2" in form:
            parts |= {"lokr_w2_a": self.draw(rank, inner), "lokr_w2_b": self.draw(rank, outer)}
            parts["lokr_t2"] = torch.randn((rank, rank, 1, 1), generator=self.generator)
            w2, strength = parts["lokr_w2_a"].T @ parts["lokr_t2"][:, :, 0, 0] @ parts["lokr_w2_b"], alpha / rank
        else:
            w2 = parts["lokr_w2"] = self.draw(inner, outer)
        change = strength * torch.kron(w1, w2)
        if "rows" in form or "columns" in form:
            weight = self.weight(layers, swapped=swapped)
            lengths = (weight + change).norm(dim=1 if "rows" in form else 0, keepdim=True)
            factors = 1 + 0.3 * torch.randn(lengths.shape, generator=self.generator)
            parts["dora_scale"] = lengths * factors
            change = (weight + change) * factors - weight
        self.tensors |= {f"{stem}.{part}": value for part, value in parts.items()}
        self.record(change, layers, swapped=swapped)

    def save(self, path: Path) -> Path:
        save_file({name: value.contiguous() for name, value in self.tensors.items()}, path)
        return path


def halves_swapped(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat(rows.chunk(2)[::-1])


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
# Black Forest Labs' files have the shift first, diffusers' the scale.
SWAPPED = ["norm_out.linear"]


def blocks(model: Tiny) -> Iterator[tuple[str, int, str]]:
    """Kind of block, its number, and where its layers are."""
    config = model.pipeline.transformer.config
    for number in range(config.num_layers):
        yield "double", number, f"transformer_blocks.{number}"
    for number in range(config.num_single_layers):
        yield "single", number, f"single_transformer_blocks.{number}"


def black_forest_labs(model: Tiny) -> Iterator[tuple[str, list[str]]]:
    """Names in Black Forest Labs' checkpoint and the layers that they are."""
    for kind, number, place in blocks(model):
        for name, layers in (DOUBLE if kind == "double" else SINGLE).items():
            yield f"{kind}_blocks.{number}.{name}", [f"{place}.{layer}" for layer in layers]
    known = dict(model.pipeline.transformer.named_modules())
    yield from ((name, [layer]) for name, layer in AROUND.items() if layer in known)


def convertible(model: Tiny) -> Iterator[tuple[str, list[str]]]:
    """Those of them that diffusers' converter reads at any width, and its loader then does not leave out."""
    for name, layers in black_forest_labs(model):
        if "_blocks." in name and not name.endswith("linear1"):
            yield name, layers


def peft_file(model: Tiny, folder: Path, *, seed: int = 1) -> Path:
    writer = Writer(model.pipeline.transformer, seed)
    for number, layer in enumerate(writer.layers):
        writer.low_rank(f"transformer.{layer}", [layer], rank=1 + number % 4)
    return writer.save(folder / f"peft_{seed}.safetensors")


def kohya_file(model: Tiny, folder: Path, *, seed: int = 2) -> Path:
    writer = Writer(model.pipeline.transformer, seed)
    for number, (name, layers) in enumerate(convertible(model)):
        stem = "lora_unet_" + name.replace(".", "_")
        writer.low_rank(stem, layers, rank=2 + number % 3, alpha=1.5 + number % 5, ends=("lora_down", "lora_up"))
    return writer.save(folder / f"kohya_{seed}.safetensors")


def comfy_file(model: Tiny, folder: Path) -> Path:
    writer = Writer(model.pipeline.transformer, 3)
    for name, layers in convertible(model):
        writer.low_rank(f"diffusion_model.{name}", layers, alpha=3.0, ends=("lora_down", "lora_up"))
    return writer.save(folder / "comfy.safetensors")


def xlabs_file(model: Tiny, folder: Path) -> Path:
    writer = Writer(model.pipeline.transformer, 4)
    for kind, number, place in blocks(model):
        if kind == "double":
            parts = {"qkv_lora1": DOUBLE["img_attn.qkv"], "qkv_lora2": DOUBLE["txt_attn.qkv"]}
            parts |= {"proj_lora1": DOUBLE["img_attn.proj"], "proj_lora2": DOUBLE["txt_attn.proj"]}
        else:
            parts = {"qkv_lora": SINGLE["linear1"][:3], "proj_lora": SINGLE["linear2"]}
        for name, layers in parts.items():
            stem = f"{kind}_blocks.{number}.processor.{name}"
            writer.low_rank(stem, [f"{place}.{layer}" for layer in layers], ends=("down", "up"))
    return writer.save(folder / "xlabs.safetensors")


def mixture_file(model: Tiny, folder: Path) -> Path:
    """diffusers' own layer names in kohya's spelling. Of the blocks diffusers knows the attention's there."""
    writer = Writer(model.pipeline.transformer, 5)
    for number, layer in enumerate(writer.layers):
        if ".attn." in layer or "blocks" not in layer:
            stem = "lora_transformer_" + layer.replace(".", "_")
            writer.low_rank(stem, [layer], alpha=2.0 + number % 3, ends=("lora_down", "lora_up"))
    return writer.save(folder / "mixture.safetensors")


# ---- layouts that diffusers reads


def test_without_a_lora(model):
    same(model.plain, model.plain_theirs)


@pytest.mark.parametrize("write", [peft_file, kohya_file, comfy_file, xlabs_file, mixture_file])
def test_a_layout_that_diffusers_reads(model, tmp_path, write: Callable[[Tiny, Path], Path]):
    path = write(model, tmp_path)
    for scale in SCALES:
        with model.loaded((path, scale)):
            want = model.theirs()
        model.check(path, scale, want)


def test_alpha_beside_peft_names(model, tmp_path):
    """Each layer with an alpha and a rank of its own.

    diffusers hands PEFT those alphas that differ from the first one as patterns of how a name ends, of which the first
    that fits holds: the last layer's, `proj_out`, is to it every single block's `proj_out`'s as well. (Before a rank's
    name it puts ^ for just that reason.) Here a layer's alpha is its own; diffusers is asked without the last layer.
    """
    writer = Writer(model.pipeline.transformer, 6)
    for number, layer in enumerate(writer.layers):
        writer.low_rank(f"transformer.{layer}", [layer], rank=1 + number % 4, alpha=1.0 + 0.1 * number)
    path = writer.save(tmp_path / "all.safetensors")
    with model.added(writer.changes, 1.0):
        want = model.theirs()
    model.check(path, 1.0, want)

    last = "transformer.proj_out."
    writer.tensors = {name: value for name, value in writer.tensors.items() if not name.startswith(last)}
    assert len(writer.tensors) == 3 * (len(writer.layers) - 1)
    path = writer.save(tmp_path / "known.safetensors")
    with model.loaded((path, 0.7)):
        want = model.theirs()
    model.check(path, 0.7, want)


@pytest.mark.parametrize(
    ("clip", "t5", "ends"),
    [
        (
            "text_encoder.text_model.encoder.{layer}",
            "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
            ("lora_A", "lora_B"),
        ),
        ("text_encoder.encoder.{layer}", None, ("lora_A", "lora_B")),
        (
            "lora_te1_text_model_encoder_{layer}",
            "lora_te2_encoder_block_0_layer_0_SelfAttention_q",
            ("lora_down", "lora_up"),
        ),
        (
            "text_encoders.clip_l.transformer.text_model.encoder.{layer}",
            "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
            ("lora_down", "lora_up"),
        ),
    ],
    ids=["diffusers", "transformers 5", "kohya", "ComfyUI"],
)
def test_the_part_for_clip(models, tmp_path, clip, t5, ends):
    """Nothing but CLIP's layers; one for T5, which diffusers leaves out of FLUX.1, is left out here as well."""
    model = models["guided"]
    writer = Writer(model.pipeline.text_encoder, 7)
    assert len(writer.layers) == 6 * model.pipeline.text_encoder.config.num_hidden_layers
    for number, layer in enumerate(writer.layers):
        name = layer.removeprefix("text_model.").removeprefix("encoder.")
        name = name.replace(".", "_") if clip.startswith("lora_") else name
        # diffusers reads an alpha beside CLIP's layers in kohya's and ComfyUI's files.
        alpha = 1.0 + number % 3 if ends[0] == "lora_down" else None
        writer.low_rank(clip.format(layer=name), [layer], rank=2 + number % 3, alpha=alpha, ends=ends)
    if t5:
        query = model.pipeline.text_encoder_2.encoder.block[0].layer[0].SelfAttention.q.weight
        writer.tensors |= {f"{t5}.{ends[0]}.weight": writer.draw(4, query.shape[1])}
        writer.tensors |= {f"{t5}.{ends[1]}.weight": writer.draw(query.shape[0], 4)}
    path = writer.save(tmp_path / "clip.safetensors")
    with model.loaded((path, 0.7)):
        want = model.theirs()
    model.check(path, 0.7, want)


# ---- several at once


def test_two_loras_together(model, tmp_path):
    """Added to the weights, and computed in each step."""
    loras = [(peft_file(model, tmp_path), 0.7), (kohya_file(model, tmp_path), 0.4)]
    with model.loaded(*loras):
        want = model.theirs()
    baked, computed = (model.ours(*loras, bake=bake) for bake in (True, False))
    same(baked, want)
    same(computed, want)
    same(computed, baked)
    assert not np.array_equal(computed[0], baked[0]), "the same to the last bit: one of the two did as the other"
    for only in loras:
        assert relative_error(model.ours(only)[0], want[0]) > VISIBLE


def test_two_loras_of_which_diffusers_reads_one(model, tmp_path):
    known = peft_file(model, tmp_path), 0.7
    writer = fused(model, "lora_unet_", "_", ("lora_down", "lora_up"), 3.0)
    other = writer.save(tmp_path / "fused.safetensors"), -0.4
    with model.added(writer.changes, other[1]), model.loaded(known):
        want = model.theirs()
    for bake in (True, False):
        same(model.ours(known, other, bake=bake), want)
    with model.loaded(known):
        assert relative_error(model.theirs()[0], want[0]) > VISIBLE


# ---- what diffusers and PEFT save themselves

TARGETS = ["to_q", "to_out.0", "proj_mlp", "proj_out", "ff.net.2", "x_embedder"]


def patterns(**changes) -> dict:
    """Ranks and alphas by layer. As PEFT takes them, `proj_out` is the last layer and that of each single block."""
    return dict(
        target_modules=TARGETS,
        rank_pattern={"transformer_blocks.0.attn.to_q": 3, "proj_mlp": 2},
        alpha_pattern={r"^transformer_blocks\.0\.ff.*": 1.5, "x_embedder": 9, "proj_out": 7},
        **changes,
    )


def plain_json(config: LoraConfig) -> dict:
    """Settings as a training script hands them to diffusers: sets are none in JSON."""
    return json.loads(json.dumps(config.to_dict(), default=sorted))


@pytest.mark.parametrize(
    "settings", [dict(lora_alpha=6), dict(lora_alpha=3, use_rslora=True), dict(lora_alpha=6, lora_bias=True)]
)
def test_what_diffusers_saves_itself(model, tmp_path, settings):
    """With PEFT's settings in the header, and a part for CLIP with its own."""
    pipeline = model.pipeline
    config = LoraConfig(r=4, init_lora_weights=False, **patterns(**settings))
    clip = LoraConfig(r=3, target_modules=["q_proj", "fc1"], init_lora_weights=False, **settings | {"lora_alpha": 5})
    torch.manual_seed(0)
    try:
        pipeline.transformer.add_adapter(config, "default")
        pipeline.text_encoder.add_adapter(clip, "default")
        pipeline.save_lora_weights(
            tmp_path,
            transformer_lora_layers=get_peft_model_state_dict(pipeline.transformer),
            text_encoder_lora_layers=get_peft_model_state_dict(pipeline.text_encoder),
            transformer_lora_adapter_metadata=plain_json(config),
            text_encoder_lora_adapter_metadata=plain_json(clip),
        )
        trained = model.theirs()
    finally:
        pipeline.unload_lora_weights()
    path = tmp_path / "pytorch_lora_weights.safetensors"
    model.check(path, 1.0, trained)
    with model.loaded((path, 0.7)):
        want = model.theirs()
    model.check(path, 0.7, want)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, init_lora_weights=False, **patterns(lora_alpha=6)),
        LoraConfig(r=4, init_lora_weights=False, **patterns(lora_alpha=3, use_rslora=True)),
        LoraConfig(r=4, init_lora_weights=False, lora_bias=True, **patterns(lora_alpha=6)),
        LoKrConfig(r=4, init_weights=False, decompose_both=True, decompose_factor=8, **patterns(alpha=3)),
        # A rank above half of the factors' sizes: PEFT keeps them whole, and divides by the rank nevertheless.
        LoKrConfig(r=64, init_weights=False, **patterns(alpha=40)),
    ],
    ids=["lora", "rslora", "biases", "lokr", "lokr whole"],
)
def test_what_peft_saves_itself(model, tmp_path, config):
    """A folder with the settings beside the tensors. diffusers' loader takes the names for those of another layout."""
    pipeline = model.pipeline
    original = pipeline.transformer
    torch.manual_seed(0)
    try:
        wrapped = get_peft_model(copy.deepcopy(original), copy.deepcopy(config))
        wrapped.save_pretrained(tmp_path, save_embedding_layers=False)
        pipeline.transformer = wrapped.base_model.model
        want = model.theirs()
    finally:
        pipeline.transformer = original
    model.check(tmp_path, 1.0, want)


# ---- layouts whose change is multiplied out


def fused(model: Tiny, prefix: str, joint: str, ends: tuple[str, str], alpha: float | None) -> Writer:
    writer = Writer(model.pipeline.transformer, 8)
    for number, (name, layers) in enumerate(black_forest_labs(model)):
        stem, rank = prefix + name.replace(".", joint), 2 + number % 3
        writer.low_rank(stem, layers, rank=rank, alpha=alpha, ends=ends, swapped=layers == SWAPPED)
    return writer


def check_multiplied_out(model: Tiny, writer: Writer, path: Path) -> None:
    assert writer.changes.keys() == writer.layers.keys()
    for scale in SCALES:
        if scale:
            with model.added(writer.changes, scale):
                want = model.theirs()
        else:
            want = model.plain_theirs
        model.check(path, scale, want)
        if scale == 0.7:
            model.check(path, scale, want, bake=False)


@pytest.mark.parametrize(
    "layout",
    [
        ("lora_unet_", "_", ("lora_down", "lora_up"), 3.0),
        ("diffusion_model.", ".", ("lora_down", "lora_up"), 1.0),
        ("diffusion_model.", ".", ("lora_A", "lora_B"), None),
        ("base_model.model.", ".", ("lora_A", "lora_B"), None),
    ],
    ids=["kohya", "ComfyUI", "dots", "PEFT"],
)
def test_all_of_black_forest_labs_names(model, tmp_path, layout):
    writer = fused(model, *layout)
    check_multiplied_out(model, writer, writer.save(tmp_path / "fused.safetensors"))


@pytest.mark.parametrize("form", ["", "a1", "a1 a2", "rows", "columns a1"])
def test_lokr_of_the_layers(model, tmp_path, form):
    writer = Writer(model.pipeline.transformer, 9)
    for number, layer in enumerate(writer.layers):
        writer.lokr("lycoris_" + layer.replace(".", "_"), [layer], form, alpha=3.0 + number % 2)
    check_multiplied_out(model, writer, writer.save(tmp_path / "lokr.safetensors"))


@pytest.mark.parametrize("form", ["a2", "t2", "rows a2"])
def test_lokr_of_fused_layers(model, tmp_path, form):
    writer = Writer(model.pipeline.transformer, 10)
    for number, (name, layers) in enumerate(black_forest_labs(model)):
        stem = "lora_unet_" + name.replace(".", "_")
        writer.lokr(stem, layers, form, alpha=3.0 + number % 2, swapped=layers == SWAPPED)
    check_multiplied_out(model, writer, writer.save(tmp_path / "lokr.safetensors"))
