"""FLUX.3's other names against diffusers: single files and LoRAs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux3_transformer_checkpoint_to_diffusers
from safetensors.torch import save_file
from support.reference import as_numpy

from families.flux3.cases import transformer_reference, write_klein
from mflux.backend import tree_flatten
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.networks.modulation import ModulationLinear
from mflux.models.flux3.variants.txt2img.flux3_klein import Flux3Klein

# diffusers' names → Black Forest Labs', by what stands in them.
THEIRS = (
    ("single_transformer_blocks.", "single_blocks."), ("mode_blocks.image", "content_mode_blocks.image"),
    ("attn.to_q.", "q_proj."), ("attn.to_k.", "k_proj."), ("attn.to_v.", "v_proj."), ("attn.to_out.0.", "attn_out."),
    ("attn.norm_q.weight", "norm.query_norm.scale"), ("attn.norm_k.weight", "norm.key_norm.scale"),
    ("ff.linear_in.", "mlp_in."), ("ff.linear_out.", "mlp_out."), ("context_embedder.", "txt_in."),
    ("x_embedders.", "emb_in."), ("target_timestep_embedder.linear_1.", "ref_time_in.in_layer."),
    ("target_timestep_embedder.linear_2.", "ref_time_in.out_layer."),
    ("timestep_embedder.linear_1.", "time_in.in_layer."), ("timestep_embedder.linear_2.", "time_in.out_layer."),
    ("proj_out.", "final_layer.image.linear."), ("norm_out.linear.", "final_layer.image.adaLN_modulation.1."),
)  # fmt: skip


@pytest.fixture(autouse=True)
def all_at_once(monkeypatch):
    """Modulation is loaded with the rest: these tests look at every weight."""
    monkeypatch.setattr(ModulationLinear, "read_late", False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("flux3")
    return {kind: write_klein(root / str(kind), flow_map=kind) for kind in (True, False)}


def theirs(name: str) -> str:
    for ours, other in THEIRS:
        name = name.replace(ours, other)
    if name.endswith("linear.weight") and "modulations" in name:
        name = name.replace(".linear.", ".lin.")
    return name


def tensors_of(flow_map: bool) -> dict[str, torch.Tensor]:
    """Random tensors under Black Forest Labs' names."""
    model = transformer_reference(in_channels=128, cond_in_channels=128, timestep_channels=256, flow_map=flow_map)
    generator = torch.Generator().manual_seed(5)
    return {theirs(name): torch.randn(value.shape, generator=generator) for name, value in model.state_dict().items()}


def klein(path, flow_map: bool = True, **options) -> Flux3Klein:
    name = "flux3-image-klein" if flow_map else "flux3-image-klein-base"
    return Flux3Klein(model_path=str(path), model_config=ModelConfig.from_name(name), **options)


def flat(pipeline: Flux3Klein) -> dict[str, np.ndarray]:
    return {name: as_numpy(value) for name, value in tree_flatten(pipeline.transformer.parameters())}


@pytest.mark.parametrize("flow_map", [True, False])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_single_file(folders, tmp_path, monkeypatch, prefix, flow_map):
    tensors = tensors_of(flow_map)
    file = tmp_path / "flux-3-image-klein.safetensors"
    more = {"repa_projectors.0.weight": torch.ones(3, 3)}
    save_file({prefix + name: value for name, value in (tensors | more).items()}, file)
    monkeypatch.setattr("mflux.models.common.model.resolve", lambda *_: folders[flow_map])
    expected = convert_flux3_transformer_checkpoint_to_diffusers(dict(tensors))
    pipeline = klein(file, flow_map)
    ours = flat(pipeline)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(ours[name], value.numpy()), name
    assert pipeline.transformer.config.flow_map is flow_map


LAYERS = {
    "mode_blocks.image.0.attn.to_q": "content_mode_blocks.image.0.q_proj",
    "mode_blocks.image_cond.0.attn.to_out.0": "content_mode_blocks.image_cond.0.attn_out",
    "txt_mode_blocks.0.ff.linear_in": "txt_mode_blocks.0.mlp_in",
    "single_transformer_blocks.1.ff.linear_out": "single_blocks.1.mlp_out",
    "context_embedder": "txt_in",
    "target_timestep_embedder.linear_2": "ref_time_in.out_layer",
    "early_stream_modulations.txt.linear": "early_stream_modulations.txt.lin",
    "single_stream_modulations.image_cond.linear": "single_stream_modulations.image_cond.lin",
    "x_embedders.image": "emb_in.image",
    "proj_out": "final_layer.image.linear",
    "norm_out.linear": "final_layer.image.adaLN_modulation.1",
}


@pytest.mark.parametrize(
    ("spelled", "down", "up"),
    [
        (lambda ours, theirs: f"transformer.{ours}", "lora_A", "lora_B"),
        (lambda ours, theirs: f"diffusion_model.{theirs}", "lora_A", "lora_B"),
        (lambda ours, theirs: theirs, "lora_down", "lora_up"),
        (lambda ours, theirs: f"base_model.model.{ours}", "lora_A", "lora_B"),
        (lambda ours, theirs: f"lora_unet_{theirs.replace('.', '_')}", "lora_down", "lora_up"),
        (lambda ours, theirs: f"transformer.{ours.replace('to_out.0', 'to_out')}", "lora_A", "lora_B"),
    ],
    ids=["diffusers", "ComfyUI", "bare", "PEFT", "kohya", "mflux 0.24"],
)
def test_lora(folders, tmp_path, spelled, down, up):
    plain = flat(klein(folders[True]))
    generator = torch.Generator().manual_seed(11)
    file, expected = {}, dict(plain)
    for ours, other in LAYERS.items():
        height, width = plain[f"{ours}.weight"].shape
        one, two = torch.randn(3, width, generator=generator), torch.randn(height, 3, generator=generator)
        name = spelled(ours, other)
        file |= {f"{name}.{down}.weight": one, f"{name}.{up}.weight": two}
        change = (two @ one).numpy()
        if ours == "norm_out.linear" and "adaLN" in name:
            change = np.concatenate([change[height // 2 :], change[: height // 2]])
        expected[f"{ours}.weight"] = plain[f"{ours}.weight"] + 0.5 * change
    save_file(file, tmp_path / "lora.safetensors")
    changed = flat(klein(folders[True], lora_paths=[str(tmp_path / "lora.safetensors")], lora_scales=[0.5]))
    for name, value in expected.items():
        assert np.allclose(changed[name], value, atol=1e-4), name
