"""FLUX.2's own: small parts, float16, kept references, folders of mflux 0.24, and what its commands refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from support.saved_024 import write_as_024
from support.tiny import published, write_json

from families.flux2.cases import ADAPTER, write_tiny
from mflux.backend import mx, tree_flatten
from mflux.checkpoints.loading import FolderTensors, layout_turns
from mflux.errors import CheckpointError, ImageError, UsageError
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.networks.autoencoders.flux2 import AutoencoderKLFlux2
from mflux.models.common.networks.modulation import ModulationLinear
from mflux.models.flux2 import small_parts
from mflux.models.flux2.latent_creator.flux2_latent_creator import Flux2LatentCreator
from mflux.models.flux2.model.text_encoder import AdapterConfig, SmallQwen3, SmallTextAdapter
from mflux.models.flux2.variants.edit.flux2_klein_edit import Flux2KleinEdit, reference_picture
from mflux.models.flux2.variants.txt2img.flux2_klein import Flux2Klein

SIZE = {"num_inference_steps": 2, "width": 48, "height": 32}
PROMPT = "a red circle"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("flux2") / "klein")


@pytest.fixture
def photo(tmp_path) -> Path:
    pixels = np.random.default_rng(1).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    PIL.Image.fromarray(pixels).resize((70, 40), PIL.Image.Resampling.BICUBIC).save(path)
    return path


def klein(folder: Path, kind=Flux2Klein, name: str = "flux2-klein-4b", **options):
    return kind(model_path=str(folder), model_config=ModelConfig.from_name(name), **options)


def drawn(pipeline, seed: int = 1, **settings) -> np.ndarray:
    return np.asarray(pipeline.generate_image(seed=seed, prompt=PROMPT, **SIZE | settings).image).astype(int)


def with_index(source: Path, target: Path, **index) -> Path:
    shutil.copytree(source, target)
    write_json(target / "model_index.json", {"_class_name": "Flux2KleinPipeline"} | index)
    return target


# ---- noise


def test_noise_is_0_24_s():
    """Drawn channel by channel, in bfloat16; one token for 16 × 16 pixels."""
    drawn = mx.random.normal((1, 128, 2, 3), key=mx.random.key(7)).astype(mx.bfloat16).astype(mx.float32)
    noise = Flux2LatentCreator.create_noise(7, 32, 48)
    assert noise.shape == (1, 6, 128)
    assert mx.array_equal(noise[0, 4], drawn[0, :, 1, 1])
    assert mx.array_equal(Flux2LatentCreator.unpack_latents(noise, 32, 48), drawn)


# ---- guidance


@pytest.mark.parametrize(
    ("index", "name", "distilled"),
    [
        ({"is_distilled": True}, "flux2-klein-base-4b", True),
        ({"is_distilled": False}, "flux2-klein-4b", False),
        ({}, "flux2-klein-4b", True),
        ({}, "flux2-klein-base-9b", False),
        ({"_class_name": "Flux2KleinKVPipeline"}, "flux2-klein-base-9b", True),
    ],
)
def test_only_base_models_are_guided(model, tmp_path, caplog, index, name, distilled):
    pipeline = klein(with_index(model, tmp_path / "model", **index), name=name)
    assert pipeline.is_distilled is distilled
    plain, guided = drawn(pipeline), drawn(pipeline, guidance=4.0)
    assert np.array_equal(plain, guided) is distilled
    assert any("guidance 4 is ignored" in line for line in caplog.messages) is distilled


def test_which_models_keep_their_references(model, tmp_path):
    assert not klein(model, Flux2KleinEdit).keeps_references
    assert klein(model, Flux2KleinEdit, "flux2-klein-9b-kv").keeps_references
    assert klein(
        with_index(model, tmp_path / "kv", _class_name="Flux2KleinKVPipeline"), Flux2KleinEdit
    ).keeps_references


def test_kept_references_are_another_picture_only_where_there_are_some(model, photo):
    pipeline = klein(model, Flux2KleinEdit)
    assert np.array_equal(drawn(pipeline, use_kv_cache=True), drawn(pipeline))
    beside = drawn(pipeline, image_paths=[photo])
    assert not np.array_equal(drawn(pipeline, image_paths=[photo], use_kv_cache=True), beside)
    assert not np.array_equal(drawn(pipeline, image_paths=[photo, photo]), beside)


# ---- references


@pytest.mark.parametrize(
    ("size", "seen"),
    [
        ((64, 64), (64, 64)),
        ((79, 95), (64, 80)),
        ((2048, 1024), (1440, 720)),
        ((16, 400), (16, 400)),
        ((17, 31), (16, 16)),
    ],
)
def test_a_reference_keeps_its_shape_and_loses_its_edges(size, seen):
    picture = PIL.Image.new("RGB", size, "white")
    assert reference_picture(picture, "photo.png").size == seen


def test_a_reference_loses_as_much_on_either_side():
    picture = PIL.Image.fromarray(np.arange(64 * 26, dtype=np.uint32).reshape(64, 26).astype(np.uint8))
    kept = np.asarray(reference_picture(picture, "photo.png"))
    assert np.array_equal(kept, np.asarray(picture)[:, 5:21])


@pytest.mark.parametrize("size", [(15, 64), (64, 8), (140_000, 30)])
def test_a_reference_of_which_nothing_is_left(size):
    with pytest.raises(ImageError, match=r"photo\.png is too small or too narrow"):
        reference_picture(PIL.Image.new("RGB", size), "photo.png")


def test_editing_starts_from_noise(model, photo, caplog):
    """A page with one slider for all models always sends a strength."""
    edit = klein(model, Flux2KleinEdit)
    plain = drawn(edit, image_paths=[photo])
    assert not caplog.messages
    assert np.array_equal(drawn(edit, image_paths=[photo], image_strength=0.4), plain)
    assert [text.partition(":")[0] for text in caplog.messages] == ["image_strength is ignored"]
    with pytest.raises(UsageError, match="image_strength is 1.5"):
        drawn(edit, image_paths=[photo], image_strength=1.5)


# ---- other precisions


def test_float16_inside_draws_nearly_the_same(model, photo):
    for kind, words in ((Flux2Klein, {}), (Flux2KleinEdit, {"image_paths": [photo], "use_kv_cache": True})):
        whole, half = klein(model, kind), klein(model, kind, compute_precision=mx.float16)
        difference = np.abs(drawn(whole, **words) - drawn(half, **words))
        assert 0 < difference.max() < 12
        kept = [name for name, value in tree_flatten(half.transformer.parameters()) if value.dtype == mx.float32]
        assert kept
        assert not any(".attn." in name or ".ff" in name for name in kept)


def test_what_overflows_in_float16_is_its_largest_number(model):
    pipeline = klein(model, compute_precision=mx.float16)
    layer = pipeline.transformer.transformer_blocks[0].ff
    layer.linear_out.weight = layer.linear_out.weight * 1e4
    out = layer(mx.full((1, 3, layer.linear_in.weight.shape[1]), 5.0))
    assert out.dtype == mx.float32
    assert mx.max(mx.abs(out)).item() == 65504


def test_precisions_are_noted_and_taken_again(cli, in_folder, model):
    words = ("--seed", 2, "--steps", 1, "--width", 32, "--height", 32, "--metadata")
    call = ("generate-flux2", "--model", model, "--base-model", "flux2-klein-4b")
    result = cli(*call, "--prompt", PROMPT, *words, "--compute-precision", "float16", "--vae-full-precision")
    assert result.status == 0, result.err
    settings = json.loads(result.paths[0].with_suffix(".metadata.json").read_text())
    assert settings["compute_precision"] == "float16"
    assert settings["vae_full_precision"] is True
    again = cli(*call, "-C", result.paths[0], "--metadata")
    assert again.status == 0, again.err
    same = json.loads(again.paths[0].with_suffix(".metadata.json").read_text())
    assert (same["compute_precision"], same["vae_full_precision"]) == ("float16", True)


# ---- the small text encoder and the small decoder


@pytest.fixture
def small_encoder(tmp_path, monkeypatch, model) -> dict[str, str]:
    """A small Qwen3 and its adapter, in the place of what would be downloaded; the adapter's metadata."""
    vocabulary = json.loads((model / "text_encoder" / "config.json").read_text())["vocab_size"]
    config = {
        "model_type": "qwen3", "vocab_size": vocabulary, "hidden_size": 8, "intermediate_size": 16,
        "num_hidden_layers": 28, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
    }  # fmt: skip
    folder = tmp_path / "qwen3"
    write_json(folder / "config.json", config)
    encoder = SmallQwen3.saved_class(SmallQwen3.config_class.from_dict(config))
    mx.save_safetensors(str(folder / "model.safetensors"), published(encoder, seed=3))
    sizes = AdapterConfig(**ADAPTER | {"out_features": 96, "max_length": 40})
    metadata = {
        "student_layers": "2,9,14,18,23,27", "teacher_layers": "9,18,27", "drop_first": "5", "len": "40",
        "norm": "ln-per-layer", "attention": "2", "attn_heads": "2", "attn_dim": "16", "proj_layers": "3",
        "hidden": "24",
    }  # fmt: skip
    adapter = published(SmallTextAdapter(sizes), seed=4)

    def write() -> tuple[Path, Path]:
        file = tmp_path / "adapter.safetensors"
        mx.save_safetensors(str(file), adapter, metadata=metadata)
        return folder, file

    monkeypatch.setattr(small_parts, "PROMPT_EMBEDS", 96)
    monkeypatch.setattr(small_parts, "text_encoder_folders", write)
    return metadata


def test_small_text_encoder(model, tmp_path, small_encoder, cli):
    """It needs nothing of the model's own text encoder."""
    without = tmp_path / "without"
    shutil.copytree(model, without, ignore=shutil.ignore_patterns("text_encoder"))
    pipeline = klein(without, small_text_encoder=True)
    (prompt,) = pipeline.encode_prompts(PROMPT)
    assert prompt.embeds.shape == (1, 35, 96)
    assert prompt.ids[0].tolist() == [0, 0, 0, 5]
    assert prompt.ids[-1].tolist() == [0, 0, 0, 39]
    assert not np.array_equal(drawn(pipeline), drawn(klein(model)))
    image = pipeline.generate_image(seed=1, prompt=PROMPT, **SIZE)
    assert image.generation_parameters["small_text_encoder"] is True
    saved = image.save(tmp_path / "small.png")
    words = ("--model", without, "--base-model", "flux2-klein-4b", "--output", tmp_path / "again.png")
    result = cli("generate-flux2", "-C", saved, *words)
    assert result.status == 0, result.err
    assert np.array_equal(pixels(result.paths[0]), np.asarray(image.image))
    with pytest.raises(UsageError, match="small_text_encoder"):
        pipeline.save_model(str(tmp_path / "saved"))


@pytest.mark.parametrize(
    "change", [{"norm": "rms"}, {"student_layers": "1,2"}, {"hidden": "many"}, {"len": None}, {"hidden": "25"}]
)
def test_another_adapter_is_refused(model, small_encoder, change):
    for name, value in change.items():
        if value is None:
            del small_encoder[name]
        else:
            small_encoder[name] = value
    with pytest.raises(CheckpointError):
        klein(model, small_text_encoder=True).encode_prompts(PROMPT)


def test_the_small_text_encoder_is_for_4b_models(model):
    with pytest.raises(UsageError, match="flux2-klein-base-4b"):
        klein(model, small_text_encoder=True)


def test_small_decoder(model, tmp_path, monkeypatch, cli):
    """Its decoder and post_quant_conv; encoder, quant_conv and statistics stay the model's own."""
    folder = tmp_path / "decoder"
    config = json.loads((model / "vae" / "config.json").read_text()) | {"decoder_block_out_channels": [4, 8, 8, 16]}
    write_json(folder / "config.json", config)
    vae = AutoencoderKLFlux2(AutoencoderKLFlux2.config_class.from_dict(config))
    tensors = published(vae, seed=9)
    tensors["bn.running_var"] = mx.abs(tensors["bn.running_var"])
    mx.save_safetensors(str(folder / small_parts.DECODER_FILE), tensors)
    monkeypatch.setattr(small_parts, "decoder_folder", lambda: folder)

    pipeline, plain = klein(model, small_decoder=True), klein(model)
    ours, own = (dict(tree_flatten(each.vae.parameters())) for each in (pipeline, plain))
    turns = layout_turns(pipeline.vae)
    for name, value in ours.items():
        stored = tensors[name] if name.startswith(("decoder.", "post_quant_conv.")) else None
        expected = own[name] if stored is None else turns.get(name, lambda same: same)(stored)
        assert mx.array_equal(value, expected), name
    assert not np.array_equal(drawn(pipeline), drawn(plain))
    image = pipeline.generate_image(seed=1, prompt=PROMPT, **SIZE)
    assert image.generation_parameters["small_decoder"] is True
    saved = image.save(tmp_path / "small.png")
    words = ("--model", model, "--base-model", "flux2-klein-4b", "--output", tmp_path / "again.png")
    result = cli("generate-flux2", "-C", saved, *words)
    assert result.status == 0, result.err
    with PIL.Image.open(result.paths[0]) as again:
        assert np.array_equal(np.asarray(again), np.asarray(image.image))
    with pytest.raises(UsageError, match="small_decoder"):
        pipeline.save_model(str(tmp_path / "saved"))


# ---- saving, and folders of mflux 0.24


def test_a_saved_text_encoder_is_whole(model, tmp_path):
    """Layers that no picture needs are there for others to read."""
    klein(model).save_model(str(tmp_path / "saved"))
    names = set(FolderTensors(tmp_path / "saved" / "text_encoder"))
    assert names == set(FolderTensors(model / "text_encoder"))
    assert "model.layers.27.mlp.up_proj.weight" in names
    assert np.array_equal(drawn(klein(tmp_path / "saved")), drawn(klein(model)))


# What has no place in the files of 0.24 follows from shapes or is as published.
AS_PUBLISHED = {
    "text_encoder": {"rms_norm_eps": 1e-6, "rope_theta": 1_000_000},
    "vae": {"block_out_channels": [32, 32, 64, 64], "norm_num_groups": 32},
}


# Ours → theirs.
NAMES_024 = {
    "transformer": ((r"timestep_embedder\.", ""), (r"attn\.to_out\.0\.", "attn.to_out.")),
    "text_encoder": ((r"model\.", ""),),
    "vae": ((r"to_out\.0\.", "to_out."),),
}


def saved_by_024(source: Path, target: Path, bits: int | None) -> Path:
    more = {"text_encoder": {"rotary_emb.inv_freq": mx.ones(4)}}
    return write_as_024(source, target, NAMES_024, bits=bits, lost=("bn.num_batches_tracked",), more=more)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_a_folder_of_mflux_024(tmp_path, bits, monkeypatch):
    # 0.24 packed what modulates as well.
    monkeypatch.setattr(ModulationLinear, "read_late", False)
    source = write_tiny(tmp_path / "source", wide=True, changes=AS_PUBLISHED)
    old = saved_by_024(source, tmp_path / "old", bits)
    fresh, stored = klein(source, quantize=bits), klein(old)
    assert stored.bits == bits
    assert stored.is_distilled
    for part in ("text_encoder", "transformer", "vae"):
        one, other = (dict(tree_flatten(getattr(each, part).parameters())) for each in (fresh, stored))
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert mx.array_equal(value, other[name]), (part, name)
    assert np.array_equal(drawn(fresh), drawn(stored))
    stored.save_model(str(tmp_path / "new"))
    assert np.array_equal(drawn(klein(tmp_path / "new")), drawn(fresh))


# ---- what is no model of this kind


@pytest.mark.parametrize("content", [{"x": mx.zeros(3)}, {"double_blocks.0.img_attn.proj.weight": mx.zeros((3, 3))}])
def test_a_file_that_is_no_whole_transformer(model, tmp_path, monkeypatch, content):
    file = tmp_path / "klein-4b.safetensors"
    mx.save_safetensors(str(file), content)
    monkeypatch.setattr("mflux.models.common.model.resolve", lambda *_, **__: model)
    with pytest.raises(CheckpointError, match=file.name):
        klein(file)


# ---- what the commands refuse


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("generate-flux2", "--guidance", 3), "distilled"),
        (("generate-flux2", "--negative-prompt", "blue"), "no negative prompt"),
        (("generate-flux2", "--pid-decode"), "PiD"),
        (("generate-flux2", "--image-strength", 0.3), "--image-strength"),
        (("generate-flux2-edit",), "--image-paths"),
        (("generate-flux2-edit", "--image-paths", "none.png"), "none.png"),
        (("generate-flux2-edit", "--image-paths", "none.png", "--guidance", 0.5), "distilled"),
    ],
)
def test_refused(cli, in_folder, model, words, told):
    result = cli(*words, "--model", model, "--base-model", "flux2-klein-4b", "--prompt", PROMPT)
    assert result.status in (1, 2)
    assert len(result.errors) == 1
    assert told in result.errors[0]
    assert list(in_folder.glob("*.png")) == []


def test_small_text_encoder_of_a_9b_model_is_refused_before_any_download(cli, in_folder):
    result = cli("generate-flux2", "--model", "klein-9b", "--small-text-encoder", "--prompt", PROMPT)
    assert result.status == 2
    assert "--small-text-encoder is for" in result.errors[0]


def test_without_a_model_it_is_klein_4b(cli, in_folder):
    result = cli("generate-flux2", "--prompt", PROMPT)
    assert result.status == 1
    assert "black-forest-labs/FLUX.2-klein-4B" in result.errors[0]
    base = cli("generate-flux2", "--base-model", "flux2-klein-9b", "--prompt", PROMPT)
    assert "black-forest-labs/FLUX.2-klein-9B" in base.errors[0]


def test_the_scheduler_acts(cli, in_folder, model):
    call = ("generate-flux2", "--model", model, "--base-model", "flux2-klein-4b", "--prompt", PROMPT, "--seed", 1)
    words = ("--steps", 3, "--width", 32, "--height", 32, "--metadata")
    plain, same, linear = (
        cli(*call, *words, *more).paths[0]
        for more in ((), ("--scheduler", "flow_match_euler_discrete"), ("--scheduler", "linear"))
    )
    assert np.array_equal(pixels(plain), pixels(same))
    assert not np.array_equal(pixels(plain), pixels(linear))
    again = cli("generate-flux2", "--model", model, "--base-model", "flux2-klein-4b", "-C", linear).paths[0]
    assert np.array_equal(pixels(again), pixels(linear))
    assert pixels(plain).shape == (32, 32, 3)


def test_a_picture_of_mflux_024_is_drawn_with_the_schedule_it_had(cli, in_folder, model, photo):
    """0.24 wrote no schedule, a negative prompt it had no use for, and the first of several pictures twice."""
    settings = {
        "mflux_version": "0.24.0", "prompt": PROMPT, "negative_prompt": "blue", "seed": 1, "steps": 2, "width": 32,
        "height": 32, "guidance": 1.0, "image_path": str(photo), "image_paths": [str(photo)],
    }  # fmt: skip
    write_json(in_folder / "old.json", settings)
    call = ("generate-flux2-edit", "--model", model, "--base-model", "flux2-klein-4b")
    # A path is the user's to say.
    assert "its image_path names" in cli(*call, "-C", "old.json").err.replace("image_paths", "image_path")
    old = cli(*call, "-C", "old.json", "--image-paths", photo)
    assert old.status == 0, old.err
    words = ("--seed", 1, "--steps", 2, "--width", 32, "--height", 32, "--image-paths", photo)
    assert np.array_equal(pixels(old.paths[0]), pixels(cli(*call, "--prompt", PROMPT, *words).paths[0]))


def test_an_edit_has_the_first_picture_s_size(cli, in_folder, model, photo):
    call = ("generate-flux2-edit", "--model", model, "--base-model", "flux2-klein-4b", "--prompt", PROMPT)
    assert pixels(cli(*call, "--steps", 1, "--image-paths", photo).paths[0]).shape == (32, 64, 3)


def pixels(path: Path) -> np.ndarray:
    with PIL.Image.open(path) as image:
        return np.asarray(image).astype(int)
