"""A trained LoRA under ComfyUI's and kohya's names changes what it changed under diffusers'."""

from __future__ import annotations

import pytest
from support.tiny import write_checkpoint

from mflux.backend import mx, named_arrays
from mflux.checkpoints.readers.safetensors import SafetensorsFile
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.training import lora
from mflux.models.flux.variants.txt2img.flux import Flux1

# Of the fused matrices some have all their layers, some only a few, with ranks and alphas of their own.
LAYERS = (
    lora.Layer("transformer_blocks.0.attn.to_q", 4, 8),
    lora.Layer("transformer_blocks.0.attn.to_k", 4, 8),
    lora.Layer("transformer_blocks.0.attn.to_v", 4, 8),
    lora.Layer("transformer_blocks.0.attn.add_k_proj", 2, 3),
    lora.Layer("transformer_blocks.0.ff.net.0.proj", 2, 2),
    lora.Layer("single_transformer_blocks.0.attn.to_v", 3, 1.5),
    lora.Layer("single_transformer_blocks.0.proj_mlp", 2, 5),
    lora.Layer("single_transformer_blocks.0.proj_out", 2, 2),
    lora.Layer("norm_out.linear", 2, 4),
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    model = write_checkpoint(folder / "model", seed=1, guidance=False)
    shapes = dict(named_arrays(changed(model, None)))
    weights = {}
    for number, layer in enumerate(LAYERS):
        out, width = shapes[f"{layer.path}.weight"].shape
        weights[f"{layer.path}.lora_A.weight"] = mx.random.normal((layer.rank, width), key=mx.random.key(number))
        weights[f"{layer.path}.lora_B.weight"] = mx.random.normal((out, layer.rank), key=mx.random.key(50 + number))
    lora.save(folder / "a.safetensors", weights, LAYERS, prefix="transformer", model="schnell", beside=shapes)
    return model, folder / "a.safetensors"


def changed(model, path):
    loras = {"lora_paths": [str(path)], "lora_scales": [1.0]} if path else {}
    pipeline = Flux1(model_path=str(model), model_config=ModelConfig.schnell(), **loras)
    pipeline.works_ahead = False
    return pipeline.transformer.parameters()


@pytest.mark.parametrize(
    ("layout", "name", "shape"),
    [
        ("kohya", "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", (12, 32)),
        ("comfyui", "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight", (12, 32)),
    ],
)
def test_the_same_change_under_other_names(layout, name, shape, written, cli, tmp_path):
    model, path = written
    target = tmp_path / "b.safetensors"
    result = cli("convert", str(path), str(target), "--lora-layout", layout)
    assert (result.status, result.out) == (0, f"{target}\n"), result.err
    file = SafetensorsFile(target)
    assert tuple(file[name].shape) == shape
    plain, wanted, found = (dict(named_arrays(changed(model, one))) for one in (None, path, target))
    moved = [key for key, value in wanted.items() if not mx.array_equal(value, plain[key])]
    assert sorted(moved) == sorted(f"{layer.path}.weight" for layer in LAYERS)
    for key, value in wanted.items():
        assert mx.allclose(found[key], value, rtol=1e-5, atol=1e-6), key
        assert (key in moved) != mx.array_equal(found[key], plain[key])


def test_what_cannot_have_other_names(written, cli, tmp_path):
    _, path = written
    target = tmp_path / "b.safetensors"
    assert cli("convert", str(path), str(target), "--lora-layout", "kohya").status == 0
    for source, words, message in (
        (target, ("--base-model", "dev"), "another program's name already"),
        (target, (), "does not say which model"),
        (path, ("--dtype", "float32"), "do not go together"),
    ):
        result = cli("convert", str(source), str(tmp_path / "c"), "--lora-layout", "comfyui", *words)
        assert result.status == 2 and message in result.err, result.err
    result = cli("convert", str(path), str(tmp_path / "c"), "--base-model", "dev")
    assert result.status == 2 and "leave it out" in result.err
