"""FLUX.2's other names against diffusers: single files and LoRAs, as its own converters read them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from safetensors.torch import save_file
from support.images import pipeline_reference
from support.reference import as_numpy, relative_error

from families.flux2.cases import SCHEDULER, TRANSFORMER, write_klein
from mflux.backend import tree_flatten
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.networks.modulation import ModulationLinear
from mflux.models.flux2.variants.txt2img.flux2_klein import Flux2Klein

DOUBLE = (
    "img_attn.qkv", "img_attn.proj", "img_mlp.0", "img_mlp.2", "txt_attn.qkv", "txt_attn.proj", "txt_mlp.0",
    "txt_mlp.2",
)  # fmt: skip


@pytest.fixture(autouse=True)
def all_at_once(monkeypatch):
    """Modulation is loaded with the rest: these tests look at every weight."""
    monkeypatch.setattr(ModulationLinear, "read_late", False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_klein(tmp_path_factory.mktemp("flux2") / "klein-4b", is_distilled=True)


def black_forest_labs(model: Flux2Transformer2DModel, seed: int) -> dict[str, torch.Tensor]:
    """Random tensors of a model's shapes under the names of Black Forest Labs' files."""
    config = model.config
    width = config.num_attention_heads * config.attention_head_dim
    hidden, head = int(width * config.mlp_ratio), config.attention_head_dim
    shapes = {
        "img_in.weight": (width, config.in_channels),
        "txt_in.weight": (width, config.joint_attention_dim),
        "time_in.in_layer.weight": (width, config.timestep_guidance_channels),
        "time_in.out_layer.weight": (width, width),
        "double_stream_modulation_img.lin.weight": (6 * width, width),
        "double_stream_modulation_txt.lin.weight": (6 * width, width),
        "single_stream_modulation.lin.weight": (3 * width, width),
        "final_layer.linear.weight": (config.in_channels, width),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
    }
    for block in range(config.num_layers):
        sizes = (3 * width, width), (width, width), (2 * hidden, width), (width, hidden)
        for layer, size in zip(DOUBLE, 2 * sizes, strict=True):
            shapes[f"double_blocks.{block}.{layer}.weight"] = size
        for stream in ("img", "txt"):
            for norm in ("query_norm", "key_norm"):
                shapes[f"double_blocks.{block}.{stream}_attn.norm.{norm}.scale"] = (head,)
    for block in range(config.num_single_layers):
        shapes[f"single_blocks.{block}.linear1.weight"] = (3 * width + 2 * hidden, width)
        shapes[f"single_blocks.{block}.linear2.weight"] = (width, width + hidden)
        for norm in ("query_norm", "key_norm"):
            shapes[f"single_blocks.{block}.norm.{norm}.scale"] = (head,)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) / (shape[-1] ** 0.5 if len(shape) > 1 else 1)
        for name, shape in shapes.items()
    }


def flat(pipeline: Flux2Klein) -> dict[str, np.ndarray]:
    return {name: as_numpy(value) for name, value in tree_flatten(pipeline.transformer.parameters())}


def klein(path, **options) -> Flux2Klein:
    return Flux2Klein(model_path=str(path), model_config=ModelConfig.flux2_klein_4b(), **options)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_single_file(folder, tmp_path, monkeypatch, prefix):
    model = pipeline_reference(folder, "Flux2KleinPipeline").transformer
    tensors = black_forest_labs(model, seed=5)
    file = tmp_path / "flux-2-klein-4b.safetensors"
    save_file({prefix + name: value for name, value in tensors.items()}, file)
    monkeypatch.setattr("mflux.models.common.model.resolve", lambda *_, **__: folder)

    pipeline = klein(file)
    expected = convert_flux2_transformer_checkpoint_to_diffusers(dict(tensors))
    assert set(expected) == set(model.state_dict())
    ours = flat(pipeline)
    assert set(ours) == set(expected)
    for name, value in expected.items():
        assert np.array_equal(ours[name], value.numpy()), name
    config = pipeline.transformer.config
    for name, value in TRANSFORMER.items():
        if name not in ("in_channels", "joint_attention_dim", "timestep_guidance_channels"):
            assert getattr(config, name) == (tuple(value) if isinstance(value, list) else value), name


# ---- LoRAs


def low_rank(layers: dict[str, tuple[int, int]], down: str, up: str, rank: int = 3) -> dict[str, torch.Tensor]:
    """Random factors for layers of these shapes (out, in)."""
    generator = torch.Generator().manual_seed(11)
    factors = {}
    for name, (height, width) in layers.items():
        factors[f"{name}.{down}.weight"] = torch.randn(rank, width, generator=generator) / width**0.5
        factors[f"{name}.{up}.weight"] = torch.randn(height, rank, generator=generator)
    return factors


def linear_shapes(model) -> dict[str, tuple[int, int]]:
    return {
        name.removesuffix(".weight"): tuple(value.shape)
        for name, value in model.state_dict().items()
        if value.ndim == 2
    }


def peft(model):
    return {f"transformer.{name}": value for name, value in low_rank(linear_shapes(model), "lora_A", "lora_B").items()}


def original(prefix: str, down: str, up: str, alpha: bool = False, joint: str = "."):
    def make(model):
        shapes = {
            name.removesuffix(".weight"): tuple(value.shape)
            for name, value in black_forest_labs(model, seed=1).items()
            # diffusers leaves the exchanged halves of this one as they are.
            if value.ndim == 2 and "adaLN" not in name and not (joint == "_" and "block" not in name)
        }
        layers = {prefix + name.replace(".", joint): shape for name, shape in shapes.items()}
        tensors = low_rank(layers, down, up)
        return tensors | ({f"{name}.alpha": torch.tensor(1.5) for name in layers} if alpha else {})

    return make


# Name → what our file holds, and what diffusers', which does not read all that tools write, is given in its stead.
_READ = original("diffusion_model.", "lora_A", "lora_B")
LAYOUTS = {
    "PEFT": (peft, peft),
    "Black Forest Labs": (_READ, _READ),
    "ComfyUI": (original("diffusion_model.", "lora_down", "lora_up"), _READ),
    "PEFT's own prefix": (original("base_model.model.", "lora_A.default", "lora_B.default"), _READ),
    "no prefix": (original("", "lora_A", "lora_B"), _READ),
    "kohya": (original("lora_unet_", "lora_down", "lora_up", alpha=True, joint="_"),) * 2,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lora_as_diffusers_reads_it(folder, tmp_path, layout):
    model = pipeline_reference(folder, "Flux2KleinPipeline").transformer
    files = [tmp_path / f"{whose}.safetensors" for whose in ("ours", "theirs")]
    for file, make in zip(files, LAYOUTS[layout], strict=True):
        save_file({name: value.contiguous() for name, value in make(model).items()}, file)

    reference = Flux2KleinPipeline.from_pretrained(folder)
    reference.load_lora_weights(str(files[1]))
    reference.fuse_lora(lora_scale=0.7)
    expected = {
        name.replace(".base_layer", ""): value.detach().numpy()
        for name, value in reference.transformer.state_dict().items()
        if "lora_" not in name
    }
    ours, before = flat(klein(folder, lora_paths=[str(files[0])], lora_scales=[0.7])), flat(klein(folder))
    changed = 0
    for name, value in expected.items():
        assert relative_error(ours[name], value) <= 1e-6, name
        changed += relative_error(ours[name], before[name]) > 1e-2
    assert changed >= 26


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("lycoris_transformer_blocks_0_attn_to_q", "transformer_blocks.0.attn.to_q"),
        (
            "lycoris_single_transformer_blocks_1_attn_to_qkv_mlp_proj",
            "single_transformer_blocks.1.attn.to_qkv_mlp_proj",
        ),
        ("lora_unet_single_blocks_1_linear2", "single_transformer_blocks.1.attn.to_out"),
        ("diffusion_model.double_blocks.1.txt_mlp.0", "transformer_blocks.1.ff_context.linear_in"),
        ("transformer.transformer_blocks.0.attn.to_out", "transformer_blocks.0.attn.to_out.0"),
        ("diffusion_model.sformer_blocks.1.attn.to_add_out", "transformer_blocks.1.attn.to_add_out"),
    ],
)
def test_lokr_and_single_names(folder, tmp_path, name, layer):
    before = flat(klein(folder))
    height, width = before[f"{layer}.weight"].shape
    generator = torch.Generator().manual_seed(3)
    w1 = torch.randn(2, 4, generator=generator)
    w2 = torch.randn(height // 2, width // 4, generator=generator)
    save_file({f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2}, tmp_path / "lokr.safetensors")
    ours = flat(klein(folder, lora_paths=[str(tmp_path / "lokr.safetensors")], lora_scales=[0.5]))
    for other, value in before.items():
        if other != f"{layer}.weight":
            assert np.array_equal(ours[other], value), other
    assert relative_error(ours[f"{layer}.weight"] - before[f"{layer}.weight"], 0.5 * torch.kron(w1, w2)) <= 1e-5


def test_exchanged_halves_in_a_lora(folder, tmp_path):
    """What is first in Black Forest Labs' last modulation is second in diffusers'."""
    width = TRANSFORMER["num_attention_heads"] * TRANSFORMER["attention_head_dim"]
    factors = low_rank({"final": (2 * width, width)}, "down", "up")
    down, up = factors["final.down.weight"], factors["final.up.weight"]
    name = "diffusion_model.final_layer.adaLN_modulation.1"
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, tmp_path / "lora.safetensors")
    ours = flat(klein(folder, lora_paths=[str(tmp_path / "lora.safetensors")]))["norm_out.linear.weight"]
    before = flat(klein(folder))["norm_out.linear.weight"]
    shift, scale = (up @ down).chunk(2)
    assert relative_error(ours - before, torch.cat([scale, shift])) <= 1e-5


def test_schedule(folder):
    """The published shift: what diffusers' scheduler makes of the fitted mu."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    pipeline = klein(folder)
    for steps, width, height in ((1, 64, 64), (4, 1024, 1024), (50, 1360, 768), (9, 2048, 1024), (300, 512, 512)):
        config = pipeline.settings(
            seed=1, prompt="", num_inference_steps=steps, width=width, height=height,
            scheduler="flow_match_euler_discrete",
        )  # fmt: skip
        scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
        mu = compute_empirical_mu(width * height // 256, steps)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        assert np.abs(as_numpy(config.scheduler.sigmas) - scheduler.sigmas.numpy()).max() < 1e-6
