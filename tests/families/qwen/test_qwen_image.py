"""Qwen-Image's own: folders of mflux 0.24, LoRAs, Lightning, layers that keep their bits, edits that are refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from support.saved_024 import write_as_024

from families.qwen.cases import write_tiny
from mflux.backend import mx, nn
from mflux.checkpoints.loading import FolderTensors
from mflux.checkpoints.published import PublishedFolder
from mflux.errors import UsageError
from mflux.models.common.config import ModelConfig
from mflux.models.common.model import open_folder
from mflux.models.common.networks.modulation import ModulationLinear
from mflux.models.qwen.family import FAMILY
from mflux.models.qwen.variants.edit.qwen_image_edit import QwenImageEdit
from mflux.models.qwen.variants.txt2img.qwen_image import QwenImage

SIZE = {"num_inference_steps": 2, "width": 48, "height": 32, "guidance": 2.0}


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    monkeypatch.setattr("mflux.models.qwen.variants.edit.qwen_image_edit._AREA", 64 * 64)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("qwen") / "narrow")


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("qwen") / "wide", wide=True)


def draw(folder: Path, **options) -> np.ndarray:
    pipeline = QwenImage(model_path=str(folder), model_config=ModelConfig.qwen_image(), **options)
    return np.asarray(pipeline.generate_image(seed=1, prompt="a cat", **SIZE).image).astype(int)


def edit(folder: Path, *pictures: Path, config=None, **settings) -> np.ndarray:
    pipeline = QwenImageEdit(model_path=str(folder), model_config=config or ModelConfig.qwen_image_edit())
    return np.asarray(pipeline.generate_image(1, "red", list(pictures), **SIZE | settings).image).astype(int)


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    paths = [tmp_path / "one.png", tmp_path / "two.png"]
    for number, path in enumerate(paths):
        pixels = np.random.default_rng(number).integers(0, 256, (20 + 30 * number, 40, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(path)
    return paths


# ---- folders of mflux 0.24


def flat_to_nested(match: re.Match) -> str:
    level, place = divmod(int(match[1]), 3)
    part = "downsamplers.0" if place == 2 else f"resnets.{place}"
    return f"encoder.down_blocks.{level}.{part}."


# Ours → theirs.
NAMES_024 = {
    "transformer": (
        (r"\.to_out\.", ".attn_to_out."),
        (r"\.(img|txt)_mod\.1\.", r".\1_mod_linear."),
        (r"\.(img|txt)_mlp\.net\.0\.proj\.", r".\1_ff.mlp_in."),
        (r"\.(img|txt)_mlp\.net\.2\.", r".\1_ff.mlp_out."),
    ),
    "text_encoder": (
        (r"^model\.", "encoder."),
        (r"^visual\.", "encoder.visual."),
        (r"\.mlp\.0\.", ".mlp_0."),
        (r"\.mlp\.2\.", ".mlp_1."),
    ),
    "vae": (
        (r"\.conv_shortcut\.", ".skip_conv."),
        (r"(?<=\.)(conv_in|conv_out|conv1|conv2|skip_conv)\.", r"\1.conv3d."),
        (r"^(post_)?quant_conv\.", r"\1quant_conv.conv3d."),
        (r"\.resample\.1\.", ".resample_conv."),
        (r"\.gamma$", ".weight"),
        (r"^decoder\.up_blocks\.(\d+)\.", r"decoder.up_block\1."),
        (r"^encoder\.down_blocks\.(\d+)\.", flat_to_nested),
    ),
}


def saved_by_024(source: Path, target: Path, *, lost: tuple[str, ...] = ()) -> Path:
    return write_as_024(source, target, NAMES_024, lost=lost, flat_norms=True)


@pytest.fixture(scope="module")
def as_published(tmp_path_factory) -> Path:
    """With heads as wide as published, which no shape of a saved folder tells."""
    return write_tiny(
        tmp_path_factory.mktemp("qwen") / "heads",
        text={
            "hidden_size": 128, "num_attention_heads": 1, "num_key_value_heads": 1,
            "rope_scaling": {"mrope_section": [16, 24, 24], "type": "default"},
        },
        vision={"hidden_size": 80, "num_heads": 1, "out_hidden_size": 128, "depth": 2, "fullatt_block_indexes": [7]},
    )  # fmt: skip


def test_a_folder_that_024_saved(as_published, pictures, tmp_path):
    old = saved_by_024(as_published, tmp_path / "old")
    assert type(open_folder(as_published, FAMILY)) is PublishedFolder
    assert np.array_equal(draw(old), draw(as_published))
    assert np.array_equal(edit(old, *pictures), edit(as_published, *pictures))


def test_a_folder_that_024_saved_says_by_its_model_what_no_shape_tells(as_published, pictures, tmp_path):
    old = saved_by_024(as_published, tmp_path / "old")
    new = tmp_path / "new"
    shutil.copytree(as_published, new)
    path = new / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"zero_cond_t": True}))
    expected = edit(new, *pictures)
    assert np.array_equal(edit(old, *pictures, config=ModelConfig.qwen_image_edit_2511()), expected)
    assert not np.array_equal(edit(old, *pictures), expected)


def test_a_folder_without_the_bias_that_older_versions_lost(as_published, tmp_path):
    name = "norm_out.linear.bias"
    old = saved_by_024(as_published, tmp_path / "old", lost=(name,))
    zero = tmp_path / "zero"
    shutil.copytree(as_published, zero)
    (path,) = (zero / "transformer").glob("*.safetensors")
    tensors = dict(FolderTensors(zero / "transformer"))
    mx.eval(tensors)
    mx.save_safetensors(str(path), tensors | {name: mx.zeros_like(tensors[name])})
    assert np.array_equal(draw(old), draw(zero))


# ---- LoRAs


@pytest.mark.parametrize(
    ("layer", "spelling", "parts"),
    [
        ("transformer_blocks.1.attn.to_q", "transformer.{}.lora_{}.weight", "AB"),
        ("transformer_blocks.0.img_mod.1", "{}.lora_{}.weight", ("down", "up")),
        ("transformer_blocks.1.txt_mlp.net.0.proj", "diffusion_model.{}.lora_{}.weight", "AB"),
        ("transformer_blocks.1.attn.to_add_out", "{}.lora_{}.default.weight", "AB"),
        ("transformer_blocks.0.attn.to_out.0", "lora_unet_{}.lora_{}.weight", ("down", "up")),
        ("norm_out.linear", "transformer.{}.lora_{}.weight", "AB"),
        ("img_in", "{}.lora_{}.weight", "AB"),
    ],
)
def test_a_lora_changes_the_layer_that_it_names(model, tmp_path, monkeypatch, layer, spelling, parts):
    monkeypatch.setattr(ModulationLinear, "read_late", False)
    random = np.random.default_rng(1)

    def weight(**options) -> np.ndarray:
        found = QwenImage(model_path=str(model), **options).transformer
        for step in layer.split("."):
            found = found[int(step)] if isinstance(found, list) else found[step]
        return np.array(found.weight)

    plain = weight()
    down = random.standard_normal((2, plain.shape[1])).astype(np.float32)
    up = random.standard_normal((plain.shape[0], 2)).astype(np.float32)
    name = layer.replace(".", "_") if spelling.startswith("lora_unet_") else layer
    path = tmp_path / "style.safetensors"
    tensors = {spelling.format(name, part): mx.array(value) for part, value in zip(parts, (down, up), strict=True)}
    mx.save_safetensors(str(path), tensors)
    changed = weight(lora_paths=[str(path)], lora_scales=[0.5])
    np.testing.assert_allclose(changed - plain, 0.5 * up @ down, rtol=1e-4, atol=1e-5)


def lightning(folder: Path, name: str) -> Path:
    path = folder / name
    layer = "transformer_blocks.0.attn.to_q"
    mx.save_safetensors(
        str(path), {f"{layer}.lora_down.weight": mx.ones((1, 64)), f"{layer}.lora_up.weight": mx.ones((64, 1))}
    )
    return path


def pixels(path: Path) -> np.ndarray:
    with PIL.Image.open(path) as image:
        return np.asarray(image).astype(int)


def settings_of(path: Path) -> dict:
    from mflux.utils.metadata_reader import MetadataReader

    return MetadataReader.read_all_metadata(path)["exif"]


def test_a_lightning_lora_brings_its_schedule(cli, in_folder, model):
    lora = lightning(in_folder, "Qwen-Image-Lightning-4steps-V1.0.safetensors")
    call = ["generate-qwen", "--model", model, "--base-model", "qwen-image", "--prompt", "x", "--seed", 1]
    call += ["--width", 32, "--height", 32, "--lora-paths", lora]
    result = cli(*call, "--output", "a.png")
    assert result.status == 0, result.err
    assert "is a Lightning LoRA: --scheduler lightning, --guidance 1.0, --steps 4" in result.err
    settings = settings_of(in_folder / "a.png")
    assert (settings["scheduler"], settings["steps"], settings["guidance"]) == ("lightning", 4, 1.0)
    result = cli(*call, "--output", "b.png", "--steps", 2, "--guidance", 2, "--scheduler", "linear")
    assert result.status == 0, result.err
    assert "is a Lightning LoRA" not in result.err
    assert settings_of(in_folder / "b.png")["steps"] == 2
    # Drawn again, each is as it was; with another LoRA, which is said now, as that one asks for.
    for name in ("a", "b"):
        again = cli(*call[:5], "-C", f"{name}.png", "--output", "again.png")
        assert again.status == 0, again.err
        assert "is a Lightning LoRA" not in again.err
        assert np.array_equal(pixels(again.paths[0]), pixels(in_folder / f"{name}.png"))
    other = lightning(in_folder, "lightning-8steps.safetensors")
    result = cli(*call[:5], "-C", "b.png", "--lora-paths", other, "--output", "c.png")
    assert settings_of(result.paths[0])["steps"] == 8


def test_the_lightning_schedule_is_a_shift_of_three(model):
    pipeline = QwenImage(model_path=str(model))
    config = pipeline.settings(
        seed=1, prompt="x", num_inference_steps=4, height=32, width=512, guidance=1.0, scheduler="lightning"
    )
    even = np.array([1, 0.75, 0.5, 0.25])
    expected = [*(3 * even / (1 + 2 * even)), 0]
    np.testing.assert_allclose(np.array(config.scheduler.sigmas), expected, rtol=1e-6)


# ---- bits


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_what_is_quantized_and_what_keeps_its_bits(wide, tmp_path, bits):
    def kinds(folder: Path, **options) -> dict[str, set]:
        pipeline = QwenImage(model_path=str(folder), **options)
        found: dict[str, set] = {"img_mod": set(), "others": set(), "text encoder": set()}
        for path, layer in pipeline.transformer.named_modules():
            if isinstance(layer, (nn.Linear, nn.QuantizedLinear)):
                found["img_mod" if ".img_mod." in path else "others"].add(getattr(layer, "bits", None))
        for _, layer in pipeline.text_encoder.named_modules():
            if isinstance(layer, (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)):
                found["text encoder"].add(getattr(layer, "bits", None))
        return found

    # What modulates is read before the steps, as it is stored.
    expected = {"img_mod": set(), "others": {bits}, "text encoder": {None}}
    assert kinds(wide, quantize=bits) == expected
    QwenImage(model_path=str(wide), quantize=bits).save_model(str(tmp_path / "saved"))
    assert kinds(tmp_path / "saved") == expected
    assert np.array_equal(draw(tmp_path / "saved"), draw(wide, quantize=bits))
    assert QwenImage(model_path=str(tmp_path / "saved")).bits == bits
    # Saved after drawing, it can edit as well.
    assert any(name.startswith("visual.") for name in FolderTensors(tmp_path / "saved" / "text_encoder"))


# ---- edits


def test_the_first_release_takes_one_picture(model, pictures, tmp_path):
    first = tmp_path / "first"
    shutil.copytree(model, first)
    (first / "model_index.json").write_text(json.dumps({"_class_name": "QwenImageEditPipeline"}))
    edit(first, pictures[0])
    with pytest.raises(UsageError, match="takes one picture, and there are 2"):
        edit(first, *pictures)


def test_a_picture_and_its_order_matter(model, pictures):
    first, second = pictures
    assert not np.array_equal(edit(model, first, second), edit(model, second, first))
    assert not np.array_equal(edit(model, first), edit(model, first, second))


def test_the_last_picture_gives_the_shape(model, pictures):
    narrow, tall = pictures
    size = {"width": None, "height": None}
    assert edit(model, tall, narrow, **size).shape == (32, 96, 3)
    assert edit(model, narrow, tall, **size).shape == (64, 64, 3)
    assert edit(model, narrow, tall, width=32, height=None).shape == (64, 32, 3)


def test_auto_is_the_first_picture_s_size_where_it_is_said(cli, in_folder, model, pictures):
    """As with mflux 0.24; where nothing is said, it is the trained area in the last one's shape."""
    call = ["generate-qwen-edit", "--model", model, "--base-model", "qwen-image-edit", "--prompt", "x", "--steps", 1]
    call += ["--image-paths", *pictures, "--guidance", 1]

    def size(*words) -> tuple[int, int]:
        result = cli(*call, *words)
        assert result.status == 0, result.err
        height, width, _ = pixels(result.paths[0]).shape
        return width, height

    assert size() == (64, 64)
    assert size("--width", "auto", "--height", "auto") == (32, 16)
    assert size("--height", "auto", "--width", 64) == (64, 16)
    assert size("--width", "2x", "--height", "2x") == (80, 32)


def test_edits_that_are_refused(model, pictures, cli):
    with pytest.raises(UsageError, match="no list of pictures"):
        edit(model)
    pipeline = QwenImageEdit(model_path=str(model))
    with pytest.raises(UsageError, match="stands for a picture"):
        pipeline.generate_image(1, "a <|image_pad|>", pictures, **SIZE)
    result = cli("generate-qwen-edit", "--model", model, "--base-model", "qwen-image-edit", "--prompt", "x")
    assert (result.status, result.err) == (2, "error: no picture to edit was given: use --image-paths PATH …\n")


def test_one_step_draws(model):
    pipeline = QwenImage(model_path=str(model))
    assert pipeline.generate_image(1, "x", **SIZE | {"num_inference_steps": 1}).image.size == (48, 32)
