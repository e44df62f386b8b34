"""Krea 2's other names against diffusers: single files, LoRAs in all layouts, the schedule."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel
from diffusers.loaders.single_file_utils import convert_krea2_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from support.lora_files import flat, fused, linear_shapes, low_rank, written
from support.reference import as_numpy, relative_error
from transformers import AutoTokenizer, Qwen3VLModel

from families.krea2.cases import SCHEDULER, write_krea2
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.networks.modulation import ModulationLinear
from mflux.models.krea2 import Krea2

SCALE = 0.7
_LAYERS = (
    (r"^img_in\b", "first"), (r"^time_embed\.linear_1\b", "tmlp.0"), (r"^time_embed\.linear_2\b", "tmlp.2"),
    (r"^time_mod_proj\b", "tproj.1"), (r"^txt_in\.linear_1\b", "txtmlp.1"), (r"^txt_in\.linear_2\b", "txtmlp.3"),
    (r"^text_fusion\b", "txtfusion"), (r"^transformer_blocks\b", "blocks"), (r"^final_layer\.linear\b", "last.linear"),
    (r"\.attn\.to_q\b", ".attn.wq"), (r"\.attn\.to_k\b", ".attn.wk"), (r"\.attn\.to_v\b", ".attn.wv"),
    (r"\.attn\.to_out\.0\b", ".attn.wo"), (r"\.attn\.to_gate\b", ".attn.gate"), (r"\.ff\.", ".mlp."),
)  # fmt: skip
_OTHERS = (
    (r"^txt_in\.norm\.weight", "txtmlp.0.scale"), (r"\.attn\.norm_q\.weight", ".attn.qknorm.qnorm.scale"),
    (r"\.attn\.norm_k\.weight", ".attn.qknorm.knorm.scale"), (r"\.norm1\.weight", ".prenorm.scale"),
    (r"\.norm2\.weight", ".postnorm.scale"), (r"^final_layer\.norm\.weight", "last.norm.scale"),
    (r"^final_layer\.scale_shift_table", "last.modulation.lin"), (r"\.scale_shift_table", ".mod.lin"),
)  # fmt: skip


def authors(name: str, *, whole: bool = False) -> str:
    """A layer's name, or a tensor's, as the authors have it."""
    for pattern, new in (*_LAYERS, *(_OTHERS if whole else ())):
        name = re.sub(pattern, new, name)
    return name


def original(published: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    found = {prefix + authors(name, whole=True): value for name, value in published.items()}
    return {name: value.flatten() if ".mod.lin" in name else value for name, value in found.items()}


@pytest.fixture(autouse=True)
def all_at_once(monkeypatch):
    """Modulation is loaded with the rest: these tests look at every weight."""
    monkeypatch.setattr(ModulationLinear, "read_late", False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_krea2(tmp_path_factory.mktemp("krea2") / "model")


def krea2(path, name: str = "krea-2", **options) -> Krea2:
    return Krea2(model_path=str(path), model_config=ModelConfig.from_name(name), **options)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_single_file(folder, tmp_path, monkeypatch, prefix):
    published = load_file(next((folder / "transformer").glob("*.safetensors")))
    theirs = original(published, prefix)
    assert not set(theirs) & set(published)
    file = tmp_path / "turbo.safetensors"
    save_file(theirs | {f"{prefix}last.up.weight": torch.ones(3)}, file)
    monkeypatch.setattr("mflux.models.krea2.pipeline.resolve", lambda *_: folder)
    model = krea2(file)
    ours = flat(model.transformer)
    expected = convert_krea2_transformer_checkpoint_to_diffusers(dict(theirs))
    assert set(ours) == set(expected) == set(published)
    for name, value in expected.items():
        assert np.array_equal(ours[name], value.numpy()), name
    # What the shapes tell is what the folder says.
    assert model.transformer.config == krea2(folder).transformer.config


# Name → what our file holds before a layer's name, whether that is the authors', how its factors are called, and
# whether diffusers reads that.
LAYOUTS = {
    "PEFT": ("transformer.{}", False, ("lora_A", "lora_B"), None, True),
    "no prefix": ("{}", False, ("lora_A.default", "lora_B.default"), None, False),
    "ComfyUI": ("diffusion_model.{}", True, ("lora_A", "lora_B"), None, True),
    "ai-toolkit": ("base_model.model.{}", True, ("lora_A", "lora_B"), None, True),
    "dotted": ("diffusion_model.{}", True, ("lora.down", "lora.up"), None, False),
    "bare": ("{}", True, ("lora_down", "lora_up"), 1.5, False),
    "kohya": ("lora_unet_{}", False, ("lora_down", "lora_up"), 1.5, False),
    "kohya, the authors' names": ("lora_unet_{}", True, ("lora_down", "lora_up"), 1.5, False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lora(folder, tmp_path, layout):
    reference = Krea2Pipeline.from_pretrained(folder)
    pattern, is_theirs, factors, alpha, is_read = LAYOUTS[layout]
    shapes = linear_shapes(reference.transformer)
    if is_read and is_theirs:
        # These diffusers knows under other names only.
        shapes = {name: shape for name, shape in shapes.items() if "text_fusion.projector" not in name}

    def spelled(layer: str) -> str:
        name = authors(layer) if is_theirs else layer
        return pattern.format(name.replace(".", "_") if layout.startswith("kohya") else name)

    ours = written(
        tmp_path / "ours.safetensors",
        low_rank({spelled(name): shape for name, shape in shapes.items()}, *factors, alpha=alpha),
    )
    if is_read:
        expected = fused(reference, ours, SCALE)
    else:
        # Multiplied out here: diffusers reads no other names.
        expected = {name: value.detach().numpy() for name, value in reference.transformer.state_dict().items()}
        pairs = low_rank(shapes)
        for name in shapes:
            change = pairs[f"{name}.lora_B.weight"] @ pairs[f"{name}.lora_A.weight"]
            expected[f"{name}.weight"] = expected[f"{name}.weight"] + SCALE * (alpha or 3) / 3 * change.numpy()
    found = flat(krea2(folder, lora_paths=[str(ours)], lora_scales=[SCALE]).transformer)
    before = flat(krea2(folder).transformer)
    assert found.keys() == expected.keys()
    assert all(relative_error(found[name], value) <= 1e-6 for name, value in expected.items())
    changed = {name for name in before if relative_error(found[name], before[name]) > 1e-2}
    assert changed == {f"{name}.weight" for name in shapes}


@pytest.mark.parametrize("prefix", ["diffusion_model.", "", "transformer."])
@pytest.mark.parametrize("layer", ["transformer_blocks.1.attn.to_gate", "text_fusion.refiner_blocks.0.ff.down"])
@pytest.mark.parametrize("is_decomposed", [False, True])
def test_lokr(folder, tmp_path, prefix, layer, is_decomposed):
    before = flat(krea2(folder).transformer)
    height, width = before[f"{layer}.weight"].shape
    generator = torch.Generator().manual_seed(3)
    w1 = torch.randn(2, 4, generator=generator)
    a, b = torch.randn(height // 2, 3, generator=generator), torch.randn(3, width // 4, generator=generator)
    stem = prefix + (layer if prefix == "transformer." else authors(layer))
    factors = {"lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(3.0)} if is_decomposed else {"lokr_w2": a @ b}
    file = written(tmp_path / "lokr.safetensors", {f"{stem}.{name}": value for name, value in factors.items()}
                   | {f"{stem}.lokr_w1": w1})  # fmt: skip
    ours = flat(krea2(folder, lora_paths=[str(file)], lora_scales=[0.5]).transformer)
    for other, value in before.items():
        if other != f"{layer}.weight":
            assert np.array_equal(ours[other], value), other
    assert relative_error(ours[f"{layer}.weight"] - before[f"{layer}.weight"], 0.5 * torch.kron(w1, a @ b)) <= 1e-5


@pytest.mark.parametrize("prompt", ["a cat", "", "a blue square " * 200, "猫 <|im_end|> été"])
def test_prompts(folder, prompt, monkeypatch):
    """The tokens that are read, in the reference's two parts and without its padding between them."""
    reference = Krea2Pipeline.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    text = reference.prompt_template_encode_prefix + prompt
    first = tokenizer([text], truncation=True, max_length=512 + 34 - 5).input_ids[0]
    second = tokenizer([reference.prompt_template_encode_suffix]).input_ids[0]
    model, seen = krea2(folder), []
    monkeypatch.setattr(type(model.text_encoder), "__call__", lambda _, ids: seen.append(ids.tolist()[0]) or ids)
    next(model._encode([prompt]))
    assert seen == [first + second]
    assert len(first) <= 541


@pytest.mark.parametrize("turbo", [True, False])
@pytest.mark.parametrize("scheduler", [None, "linear", "euler"])
def test_schedule(folder, tmp_path, turbo, scheduler):
    from diffusers.pipelines.krea2.pipeline_krea2 import calculate_shift

    model = krea2(folder if turbo else write_krea2(tmp_path / "raw", turbo=False))
    for steps, width, height in ((1, 64, 64), (8, 1024, 1024), (52, 1360, 768)):
        config = model.settings(
            seed=1, prompt="", num_inference_steps=steps, width=width, height=height, scheduler=scheduler
        )
        theirs = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
        mu = 1.15 if turbo else calculate_shift(width * height // 256, 256, 6400, 0.5, 1.15)
        theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        assert np.abs(as_numpy(config.scheduler.sigmas) - theirs.sigmas.numpy()).max() < 1e-6


def test_a_saved_model_is_read_by_the_reference(folder, tmp_path):
    """The tower of the text encoder is not saved, and no prompt goes through it; diffusers says that it makes some."""
    krea2(folder).save_model(str(tmp_path / "saved"))
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["is_distilled"] is True and index["text_encoder_select_layers"] == [1, 2, 4]
    for part, kind in (("text_encoder", Qwen3VLModel), ("transformer", Krea2Transformer2DModel)):
        ours, theirs = (kind.from_pretrained(path / part).state_dict() for path in (tmp_path / "saved", folder))
        kept = [name for name in theirs if not name.startswith("visual.")]
        assert kept and all(torch.equal(ours[name], theirs[name]) for name in kept)
