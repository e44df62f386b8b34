"""A FLUX.1 transformer in one file with Black Forest Labs' names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.tiny import write_checkpoint

from mflux.backend import mx, tree_flatten
from mflux.checkpoints.loading import FolderTensors
from mflux.errors import CheckpointError
from mflux.models.common.config import ModelConfig
from mflux.models.flux.variants.redux.flux_redux import Flux1Redux
from mflux.models.flux.variants.txt2img.flux import Flux1

_EMBEDDERS = {"timestep": "time_in", "text": "vector_in", "guidance": "guidance_in"}
_LAYERS = {
    "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin", "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj", "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2", "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm", "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}  # fmt: skip
_SINGLE = {
    "norm.linear": "modulation.lin", "proj_out": "linear2", "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}  # fmt: skip
_FUSED = {
    "transformer_blocks.{}.attn.to_q": ("double_blocks.{}.img_attn.qkv", ("to_q", "to_k", "to_v")),
    "transformer_blocks.{}.attn.add_q_proj": (
        "double_blocks.{}.txt_attn.qkv", ("add_q_proj", "add_k_proj", "add_v_proj"),
    ),
    "single_transformer_blocks.{}.attn.to_q": ("single_blocks.{}.linear1", ("to_q", "to_k", "to_v")),
}  # fmt: skip
_GONE = ("to_k", "to_v", "add_k_proj", "add_v_proj", "proj_mlp")


def original(tensors: dict[str, mx.array], prefix: str = "") -> dict[str, mx.array]:
    """With Black Forest Labs' names."""
    found = {}
    for name, value in tensors.items():
        layer, _, leaf = name.rpartition(".")
        kind, _, rest = layer.partition(".")
        number, _, inner = rest.partition(".")
        if layer.endswith(_GONE):
            continue
        if layer in ("x_embedder", "context_embedder"):
            layer = {"x_embedder": "img_in", "context_embedder": "txt_in"}[layer]
        elif kind == "time_text_embed":
            embedder, place = rest.split(".")
            place = {"linear_1": "in_layer", "linear_2": "out_layer"}[place]
            layer = f"{_EMBEDDERS[embedder.removesuffix('_embedder')]}.{place}"
        elif layer == "proj_out":
            layer = "final_layer.linear"
        elif layer == "norm_out.linear":
            scale, shift = mx.split(value, 2)
            layer, value = "final_layer.adaLN_modulation.1", mx.concatenate([shift, scale])
        elif (fused := _FUSED.get(f"{kind}.{{}}.{inner}")) is not None:
            parts = [tensors[f"{kind}.{number}.attn.{part}.{leaf}"] for part in fused[1]]
            if kind.startswith("single"):
                parts.append(tensors[f"{kind}.{number}.proj_mlp.{leaf}"])
            layer, value = fused[0].format(number), mx.concatenate(parts)
        else:
            of_single = kind.startswith("single")
            layer = (
                f"{'single' if of_single else 'double'}_blocks.{number}.{(_SINGLE if of_single else _LAYERS)[inner]}"
            )
        if layer.endswith(("query_norm", "key_norm")):
            leaf = "scale"
        found[f"{prefix}{layer}.{leaf}"] = value
    return found


# Heads whose share of places is as published, since no shape tells it.
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 32, "axes_dims_rope": [4, 14, 14]}


@pytest.fixture(params=["schnell", "dev"])
def model(request, monkeypatch, tmp_path) -> Path:
    """A model's folder, which stands for the repository that all but the file comes from."""
    folder = tmp_path / f"tiny-{request.param}"
    write_checkpoint(folder, seed=3, guidance=request.param == "dev", changes={"transformer": _HEADS})
    request.node.asked = []

    def resolve(name, components, beside, **_):
        request.node.asked.append((name, sorted(component.folder for component in components)))
        return folder

    monkeypatch.setattr("mflux.models.common.model.resolve", resolve)
    return folder


def tensors_of(model: Path) -> dict[str, mx.array]:
    return dict(FolderTensors(model / "transformer"))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_single_file(model, tmp_path, prefix, request):
    key = "dev" if model.name.endswith("dev") else "schnell"
    file = tmp_path / f"flux1-{key}.safetensors"
    theirs = original(tensors_of(model), prefix)
    assert len(theirs) < len(tensors_of(model))
    mx.save_safetensors(str(file), theirs)
    pipeline = Flux1(model_path=str(file), model_config=ModelConfig.from_name(str(file)))
    others = ["text_encoder", "text_encoder_2", "vae"]
    assert request.node.asked == [(f"black-forest-labs/FLUX.1-{key}", others)]
    assert pipeline.key == key and pipeline.bits is None
    whole = Flux1(model_path=str(model), model_config=ModelConfig.from_name(key))
    ours, expected = (dict(tree_flatten(one.transformer.parameters())) for one in (pipeline, whole))
    assert ours.keys() == expected.keys()
    assert all(mx.array_equal(value, expected[name]) for name, value in ours.items())
    settings = {"seed": 1, "prompt": "a red circle", "num_inference_steps": 2, "width": 32, "height": 32}
    images = [np.asarray(one.generate_image(**settings).image) for one in (pipeline, whole)]
    assert np.array_equal(*images)


def test_published_names_in_one_file_and_the_file_in_a_folder(model, tmp_path):
    (own,) = (model / "transformer").glob("*.safetensors")
    config = ModelConfig.dev()
    expected = dict(tree_flatten(Flux1(model_path=str(model), model_config=config).transformer.parameters()))
    ours = dict(tree_flatten(Flux1(model_path=str(own), model_config=config).transformer.parameters()))
    assert all(mx.array_equal(value, expected[name]) for name, value in ours.items())


def test_through_the_commands(cli, in_folder, model):
    key = "dev" if model.name.endswith("dev") else "schnell"
    mx.save_safetensors("mine.safetensors", original(tensors_of(model)))
    words = ("--base-model", key, "--prompt", "a red circle", "--steps", 1, "--width", 32, "--height", 32)
    drawn = [cli("generate", "--model", name, *words) for name in ("mine.safetensors", model)]
    assert [result.status for result in drawn] == [0, 0], drawn[0].err
    assert drawn[0].paths[0].stat().st_size > 0
    saved = cli("save", "--model", "mine.safetensors", "--base-model", key, "--path", "saved")
    assert saved.status == 0, saved.err
    again = dict(FolderTensors(in_folder / "saved" / "transformer"))
    assert all(mx.array_equal(value, again[name]) for name, value in tensors_of(model).items())


@pytest.mark.parametrize("content", [{"x": mx.zeros(3)}, {"img_in.weight": mx.zeros((3, 3))}], ids=["x", "part"])
def test_a_file_that_is_no_whole_transformer(model, tmp_path, content, request):
    file = tmp_path / "flux1-dev.safetensors"
    mx.save_safetensors(str(file), content)
    with pytest.raises(CheckpointError, match=r"flux1-dev\.safetensors holds no transformer of FLUX\.1 \('.*' is miss"):
        Flux1(model_path=str(file), model_config=ModelConfig.dev())
    assert request.node.asked == [], "nothing is downloaded beside a file that is of no use"


def test_a_file_that_was_cut_short(model, tmp_path, request):
    file = tmp_path / "flux1-dev.safetensors"
    mx.save_safetensors(str(file), original(tensors_of(model)))
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(CheckpointError, match=r"flux1-dev\.safetensors"):
        Flux1(model_path=str(file), model_config=ModelConfig.dev())
    assert request.node.asked == []


def test_rows_that_do_not_divide(model, tmp_path):
    theirs = original(tensors_of(model))
    name = "double_blocks.0.img_attn.qkv.weight"
    theirs[name] = theirs[name][:-1]
    mx.save_safetensors(str(tmp_path / "x.safetensors"), theirs)
    pipeline = Flux1(model_path=str(tmp_path / "x.safetensors"), model_config=ModelConfig.dev())
    with pytest.raises(
        CheckpointError, match=r"x\.safetensors: double_blocks\.0\.img_attn\.qkv\.weight of shape .* 3$"
    ):
        _ = pipeline.transformer


def test_redux_takes_the_rest_from_the_model_it_stands_on(model, tmp_path, monkeypatch, request):
    mx.save_safetensors(str(tmp_path / "x.safetensors"), original(tensors_of(model)))
    with pytest.raises((CheckpointError, OSError)):
        Flux1Redux(model_path=str(tmp_path / "x.safetensors"), model_config=ModelConfig.dev_redux())
    assert request.node.asked[0][0] == "black-forest-labs/FLUX.1-dev"


def test_another_file_is_refused_as_before(tmp_path):
    file = tmp_path / "flux1-dev.ckpt"
    file.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="is a text file, no model: give a folder of a model in the diffusers"):
        Flux1(model_path=str(file), model_config=ModelConfig.dev())
