"""FLUX.3's own: noise, canvases, which of two models a folder holds, other precisions, and folders of mflux 0.24."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from support.saved_024 import write_as_024
from support.tiny import write_json

from families.flux3.cases import write_tiny
from mflux.backend import mx, tree_flatten
from mflux.checkpoints.loading import FolderTensors
from mflux.errors import CheckpointError, ImageError, UsageError
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.networks.modulation import ModulationLinear
from mflux.models.flux3.latent_creator.flux3_latent_creator import Flux3LatentCreator
from mflux.models.flux3.sources import canvas_of, on_canvas
from mflux.models.flux3.variants.edit.flux3_klein_edit import Flux3KleinEdit
from mflux.models.flux3.variants.txt2img.flux3_klein import Flux3Klein

SIZE = {"num_inference_steps": 2, "width": 48, "height": 32}
PROMPT = "a red circle"
BASE = {"transformer": {"flow_map": False}}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("flux3") / "model")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("flux3") / "base", changes=BASE)


@pytest.fixture
def photo(tmp_path) -> Path:
    pixels = np.random.default_rng(1).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    PIL.Image.fromarray(pixels).resize((70, 90), PIL.Image.Resampling.BICUBIC).save(path)
    return path


def klein(folder: Path, kind=Flux3Klein, name: str = "flux3-image-klein", **options):
    return kind(model_path=str(folder), model_config=ModelConfig.from_name(name), **options)


def generated(pipeline, seed: int = 1, **settings) -> np.ndarray:
    return np.asarray(pipeline.generate_image(seed=seed, prompt=PROMPT, **SIZE | settings).image).astype(int)


def pixels(path: Path) -> np.ndarray:
    with PIL.Image.open(path) as image:
        return np.asarray(image).astype(int)


# ---- noise and steps


def test_noise_is_0_24_s():
    """Token by token, rounded to bfloat16."""
    plain = mx.random.normal((1, 6, 128), key=mx.random.key(7))
    noise = Flux3LatentCreator.create_noise(7, 32, 48)
    assert noise.dtype == mx.float32
    assert mx.array_equal(noise, plain.astype(mx.bfloat16).astype(mx.float32))


def test_steps_are_the_model_s_own(model, base):
    for folder, name, steps in ((model, "flux3-image-klein", 16), (base, "flux3-image-klein-base", 50)):
        pipeline = klein(folder, name=name)
        image = pipeline.generate_image(seed=1, prompt=PROMPT, width=16, height=16)
        assert image.steps == steps
    assert image.guidance == 3.5


def test_the_schedule_is_shifted_by_a_constant(model):
    config = klein(model).settings(seed=1, prompt=PROMPT, num_inference_steps=4, width=64, height=32)
    levels = np.array([1, 0.75, 0.5, 0.25, 0])
    assert np.allclose(config.scheduler.sigmas, 6.93 * levels / (1 + 5.93 * levels))


def test_a_scheduler_acts(model):
    pipeline = klein(model)
    plain = generated(pipeline)
    assert np.array_equal(generated(pipeline, scheduler="linear"), plain)
    assert not np.array_equal(generated(pipeline, scheduler="lightning"), plain)


# ---- which model it is


def test_the_base_model_is_guided(base, caplog):
    pipeline = klein(base, name="flux3-image-klein-base")
    plain = generated(pipeline)
    assert np.array_equal(generated(pipeline, guidance=3.5), plain)
    assert not np.array_equal(generated(pipeline, guidance=1.0), plain)
    assert caplog.messages == []


def test_guidance_of_the_distilled_model_is_ignored(cli, in_folder, model):
    call = ("generate-flux3", "--model", model, "--base-model", "flux3-image-klein", "--prompt", PROMPT)
    words = ("--steps", 1, "--width", 32, "--height", 32, "--seed", 1)
    plain, guided = cli(*call, *words), cli(*call, *words, "--guidance", 5)
    assert plain.warnings == []
    assert guided.warnings and all("guidance is ignored" in line for line in guided.warnings)
    assert np.array_equal(pixels(plain.paths[0]), pixels(guided.paths[0]))


@pytest.mark.parametrize("flow_map", [True, False])
def test_another_than_was_asked_for(model, base, flow_map):
    folder, names = model if flow_map else base, ("flux3-image-klein-base", "flux3-image-klein")
    with pytest.raises(CheckpointError, match=f"--base-model {names[flow_map]}$"):
        klein(folder, name=names[not flow_map])


# ---- prompts


@pytest.mark.parametrize(("words", "length"), [(1, 80), (60, 80), (400, 480)])
def test_prompts_are_padded_to_whole_windows(model, words, length):
    pipeline = klein(model)
    tokenizer = pipeline.tokenizers["qwen3_vl"]
    text = "a" + " a" * words
    (embeds,) = pipeline.encode_prompts(text)
    count = len(tokenizer.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"))
    assert embeds.shape[1] == -(-count // 80) * 80
    assert embeds.shape[1] >= length or words < 400


def test_an_endless_prompt_is_cut(model, caplog):
    (embeds,) = klein(model).encode_prompts("x y " * 3000)
    assert embeds.shape[1] == 8192
    assert any("8192 tokens" in line for line in caplog.messages)


# ---- references


@pytest.mark.parametrize(
    ("size", "image", "canvas"),
    [
        ((64, 64), (64, 64), (64, 64)),
        ((70, 90), (70, 90), (80, 96)),
        ((1, 1), (1, 1), (64, 64)),
        ((5000, 20), (4096, 16), (4096, 64)),
        ((4096, 4096), (2048, 2048), (2048, 2048)),
        ((2049, 2047), (2039, 2037), (2048, 2048)),
    ],
)
def test_canvases(size, image, canvas):
    found = canvas_of(size)
    assert (found.image, found.size) == (image, canvas)
    left, top, right, bottom = found.box
    assert (right - left, bottom - top) == image
    assert left == (canvas[0] - image[0]) // 2 and top == (canvas[1] - image[1]) // 2


@pytest.mark.parametrize("size", [(70, 90), (12, 37), (64, 64), (300, 17), (2100, 2050)])
def test_a_reference_is_reflected_as_the_reference_does(size):
    processor = pytest.importorskip("diffusers.modular_pipelines.flux3.image_processor")
    image = PIL.Image.fromarray(np.random.default_rng(3).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    theirs, about = processor.Flux3ImageProcessor().preprocess(image)
    ours = np.asarray(on_canvas(image)).astype(np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
    assert np.abs(ours - theirs.numpy()).max() < 1e-6
    assert about["reference_crop"] == canvas_of(size).box


def test_an_edit_has_the_image_s_size_and_is_made_again_with_it(cli, in_folder, model, photo):
    call = ("generate-flux3-edit", "--model", model, "--base-model", "flux3-image-klein", "--image-paths", photo)
    first = cli(*call, "--prompt", PROMPT, "--steps", 1, "--seed", 2).paths[0]
    assert pixels(first).shape == (90, 70, 3)
    again = cli(*call, "-C", first)
    assert again.warnings == []
    assert np.array_equal(pixels(again.paths[0]), pixels(first))
    # Another size is a picture without the canvas.
    other = cli(*call, "--prompt", PROMPT, "--steps", 1, "--seed", 2, "--width", 80, "--height", 96).paths[0]
    assert pixels(other).shape == (96, 80, 3)
    assert np.array_equal(pixels(other)[3:93, 5:75], pixels(first))


def test_references_are_told_apart(model, photo, tmp_path):
    edit, other = klein(model, Flux3KleinEdit), tmp_path / "other.png"
    PIL.Image.new("RGB", (64, 48), "green").save(other)
    one, both, turned = (generated(edit, image_paths=paths) for paths in ([photo], [photo, other], [other, photo]))
    assert not np.array_equal(one, both) and not np.array_equal(both, turned)


@pytest.mark.parametrize("count", [0, 11])
def test_how_many_references(model, photo, count):
    with pytest.raises(UsageError, match=f"there are {count} images to edit, and FLUX.3 takes 1 to 10"):
        generated(klein(model, Flux3KleinEdit), image_paths=[photo] * count)


def test_several_need_sixteen_pixels_each(model, photo, tmp_path):
    PIL.Image.new("RGB", (15, 64)).save(tmp_path / "narrow.png")
    with pytest.raises(ImageError, match=r"narrow\.png is too small or too narrow"):
        generated(klein(model, Flux3KleinEdit), image_paths=[photo, tmp_path / "narrow.png"])


# ---- other precisions


def test_there_is_headroom_in_float16(model):
    """Values beyond what float16 reaches come out of a feed-forward, and of attention, as they are."""
    block = klein(model, compute_precision=mx.float16).transformer.single_transformer_blocks[0]
    x = mx.full((1, 3, block.ff.linear_in.weight.shape[1]), 3.0)
    one = block.ff(x)
    block.ff.linear_out.weight = block.ff.linear_out.weight * (200_000 / mx.max(mx.abs(one)).item())
    assert mx.max(mx.abs(block.ff(x))).item() == pytest.approx(200_000, rel=0.01)


def test_precisions_are_noted_and_taken_again(cli, in_folder, model):
    call = ("generate-flux3", "--model", model, "--base-model", "flux3-image-klein")
    words = ("--prompt", PROMPT, "--seed", 2, "--steps", 1, "--width", 32, "--height", 32)
    first = cli(*call, *words, "--compute-precision", "float16", "--vae-full-precision", "--metadata")
    again = cli(*call, "-C", first.paths[0], "--metadata")
    for result in (first, again):
        assert result.status == 0, result.err
        settings = json.loads(result.paths[0].with_suffix(".metadata.json").read_text())
        assert (settings["compute_precision"], settings["vae_full_precision"]) == ("float16", True)


# ---- saving, and folders of mflux 0.24


def test_what_is_saved_of_the_text_encoder_is_what_is_read(model, tmp_path):
    klein(model).save_model(str(tmp_path / "saved"))
    names = set(FolderTensors(tmp_path / "saved" / "text_encoder"))
    assert "model.language_model.layers.31.mlp.up_proj.weight" in names
    assert not any(".layers.32." in name or "visual" in name for name in names)
    assert (tmp_path / "saved" / "text_encoder" / "merges.txt").is_file()
    assert np.array_equal(generated(klein(tmp_path / "saved")), generated(klein(model)))


# What has no place in the files of 0.24 follows from shapes or is as published.
AS_PUBLISHED = {
    "text_encoder": {
        "text_config": {
            "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 32, "num_attention_heads": 1,
            "num_key_value_heads": 1, "head_dim": 128, "rms_norm_eps": 1e-6,
            "rope_scaling": {"mrope_section": [24, 20, 20], "rope_type": "default", "rope_theta": 5e6},
        },
    },
    "transformer": {"joint_attention_dim": 1024},
    "vae": {"block_out_channels": [32, 32, 64, 64], "norm_num_groups": 32},
}  # fmt: skip
# Ours → theirs.
NAMES_024 = {
    "transformer": ((r"attn\.to_out\.0\.", "attn.to_out."),),
    "text_encoder": ((r"model\.language_model\.", ""),),
    "vae": ((r"to_out\.0\.", "to_out."),),
}


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("flow_map", [True, False])
def test_a_folder_of_mflux_024(tmp_path, bits, flow_map, monkeypatch):
    # 0.24 packed what modulates as well.
    monkeypatch.setattr(ModulationLinear, "read_late", False)
    changes = {part: dict(values) for part, values in AS_PUBLISHED.items()}
    changes["transformer"] |= {"flow_map": flow_map}
    vocabulary = json.loads((write_tiny(tmp_path / "sizes") / "text_encoder/config.json").read_text())["text_config"]
    changes["text_encoder"]["text_config"]["vocab_size"] = vocabulary["vocab_size"]
    source = write_tiny(tmp_path / "source", wide=True, changes=changes)
    more = {"text_encoder": {"rotary_emb.inv_freq": mx.ones(4)}}
    old = write_as_024(source, tmp_path / "old", NAMES_024, bits=bits, lost=("bn.num_batches_tracked",), more=more)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(source / "text_encoder" / name, old / "text_encoder" / name)
    name = "flux3-image-klein" if flow_map else "flux3-image-klein-base"
    fresh, stored = klein(source, name=name, quantize=bits), klein(old, name=name)
    assert stored.bits == bits
    for part in ("text_encoder", "transformer", "vae"):
        one, other = (dict(tree_flatten(getattr(each, part).parameters())) for each in (fresh, stored))
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert mx.array_equal(value, other[key]), (part, key)
    assert np.array_equal(generated(fresh), generated(stored))
    stored.save_model(str(tmp_path / "new"))
    assert np.array_equal(generated(klein(tmp_path / "new", name=name)), generated(fresh))


# ---- what the commands refuse


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("generate-flux3", "--negative-prompt", "blue"), "no negative prompt"),
        (("generate-flux3", "--scheduler", "nonsense"), "scheduler"),
        (("generate-flux3-edit",), "--image-paths"),
        (("generate-flux3-edit", "--image-paths", "none.png"), "none.png"),
        (("generate-flux3-edit", "--image-paths", *["none.png"] * 11), "1 to 10"),
    ],
)
def test_refused(cli, in_folder, model, words, told):
    result = cli(*words, "--model", model, "--base-model", "flux3-image-klein", "--prompt", PROMPT)
    assert result.status in (1, 2)
    assert len(result.errors) == 1
    assert told in result.errors[0]
    assert list(in_folder.glob("*.png")) == []


def test_without_a_model_it_is_the_distilled_one(cli, in_folder):
    result = cli("generate-flux3", "--prompt", PROMPT)
    assert result.status == 1
    assert "black-forest-labs/flux-3-image-klein" in result.errors[0]


def test_settings_of_mflux_024_are_taken(cli, in_folder, model, photo):
    """It wrote no schedule, and the size of the image that is cut out of the canvas."""
    settings = {
        "mflux_version": "0.24.0", "prompt": PROMPT, "negative_prompt": "blue", "seed": 1, "steps": 1, "width": 70,
        "height": 90,
    }  # fmt: skip
    write_json(in_folder / "old.json", settings)
    call = ("generate-flux3-edit", "--model", model, "--base-model", "flux3-image-klein", "--image-paths", photo)
    old = cli(*call, "-C", "old.json")
    assert old.status == 0, old.err
    new = cli(*call, "--prompt", PROMPT, "--seed", 1, "--steps", 1)
    assert np.array_equal(pixels(old.paths[0]), pixels(new.paths[0]))
