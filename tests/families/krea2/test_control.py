"""Krea 2's depth ControlNet: the published file's names and sizes, what is refused, and its command."""

from __future__ import annotations

import json
import shutil
from math import prod
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from families.krea2.cases import write_tiny, write_tiny_controlled
from mflux.backend import mx, tree_flatten
from mflux.checkpoints.loading import FolderTensors
from mflux.errors import CheckpointError, UsageError
from mflux.models.krea2.model.depth_control import DepthControl, DepthControlConfig
from mflux.models.krea2.variants.controlnet.krea2_controlnet import Krea2Controlnet

SIZE = {"num_inference_steps": 2, "width": 48, "height": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_controlled(tmp_path_factory.mktemp("krea2") / "model", wide=True)


@pytest.fixture
def depth(tmp_path) -> Path:
    PIL.Image.linear_gradient("L").resize((90, 60)).save(tmp_path / "depth.png")
    return tmp_path / "depth.png"


def control(folder: Path, **options) -> Krea2Controlnet:
    return Krea2Controlnet(model_path=str(folder), **options)


def drawn(pipeline: Krea2Controlnet, depth: Path, **settings) -> np.ndarray:
    settings = {"seed": 1, "prompt": "a cat", "depth_image_path": depth} | SIZE | settings
    return np.asarray(pipeline.generate_image(**settings).image).astype(int)


def test_full_size():
    """The published file has 450 tensors of 215,488,512 numbers."""
    shapes = {name: value.shape for name, value in tree_flatten(DepthControl(DepthControlConfig()).parameters())}
    assert len(shapes) == 450 and sum(map(prod, shapes.values())) == 215_488_512
    assert shapes["first.weight"] == (6144, 128) and shapes["blocks.27.mlp.down.A"] == (64, 16384)
    assert shapes["blocks.0.attn.wk.B"] == (1536, 64)


def as_file(model: Path, target: Path, change=dict) -> Path:
    tensors = change(dict(FolderTensors(model / "controlnet").items()))
    mx.save_safetensors(str(target), tensors)
    return target


def test_a_file_or_a_folder_of_it(model, tmp_path, depth):
    plain = drawn(control(model), depth)
    alone = write_tiny(tmp_path / "alone", wide=True)
    (tmp_path / "control").mkdir()
    file = as_file(model, tmp_path / "control" / "depth-control-lora.safetensors")
    for path in (file, file.parent):
        assert np.array_equal(drawn(control(alone, controlnet_path=str(path)), depth), plain)
    saved = tmp_path / "saved"
    control(alone, controlnet_path=str(file)).save_model(str(saved))
    assert np.array_equal(drawn(control(saved), depth), plain)
    # The saved transformer is the plain one: other ControlNets, and none, fit it.
    one, other = (FolderTensors(folder / "transformer") for folder in (saved, alone))
    assert set(one) == set(other) and all(mx.array_equal(one[name], other[name]) for name in one)


def test_strength_and_what_it_does_not_touch(model, depth, tmp_path):
    full, none = drawn(control(model), depth), drawn(control(model, controlnet_strength=0.0), depth)
    half = drawn(control(model, controlnet_strength=0.5), depth)
    assert len({image.tobytes() for image in (full, none, half)}) == 3
    from mflux.models.krea2 import Krea2

    plain = Krea2(model_path=str(write_tiny(tmp_path / "plain", wide=True)))
    image = np.asarray(plain.generate_image(seed=1, prompt="a cat", **SIZE).image).astype(int)
    assert not np.array_equal(none, image)


@pytest.mark.parametrize("bake", [True, False])
def test_with_a_lora_of_the_entrance(model, depth, tmp_path, bake):
    """It means the image's half; its sum with the changes to the blocks is the same, baked or not."""
    file = tmp_path / "lora.safetensors"
    factors = {
        "diffusion_model.first.lora_A.weight": mx.random.normal((2, 64), key=mx.random.key(1)),
        "diffusion_model.first.lora_B.weight": mx.random.normal((64, 2), key=mx.random.key(2)),
        "diffusion_model.blocks.0.attn.wq.lora_A.weight": mx.random.normal((2, 64), key=mx.random.key(3)),
        "diffusion_model.blocks.0.attn.wq.lora_B.weight": mx.random.normal((64, 2), key=mx.random.key(4)),
    }
    mx.save_safetensors(str(file), factors)
    pipeline = control(model, lora_paths=[str(file)], lora_scales=[0.3], bake_lora=bake)
    baked = control(model, lora_paths=[str(file)], lora_scales=[0.3])
    assert np.abs(drawn(pipeline, depth) - drawn(baked, depth)).max() <= 1
    assert np.abs(drawn(baked, depth) - drawn(control(model), depth)).max() > 1
    weights = dict(tree_flatten(baked.transformer.parameters()))
    before = dict(tree_flatten(control(model).transformer.parameters()))
    change = 0.3 * factors["diffusion_model.first.lora_B.weight"] @ factors["diffusion_model.first.lora_A.weight"]
    assert mx.allclose(weights["img_in.weight"] - before["img_in.weight"], change, atol=1e-5)
    assert mx.array_equal(weights["control_in.weight"], before["control_in.weight"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda found: {name: value for name, value in found.items() if ".1.mlp.up.B" not in name}, "1 tensor missing"),
        (lambda found: found | {"blocks.0.attn.wx.A": mx.zeros((4, 64))}, "left over"),
        (lambda found: found | {"blocks.0.attn.wo.A": mx.zeros((3, 64))}, r"blocks\.0\.attn\.wo\.A"),
        (lambda found: {"x": mx.zeros(3)}, "holds no controlnet"),
        (lambda found: {name: value for name, value in found.items() if "blocks.1" not in name}, "num_layers is 1 and"),
    ],
)
def test_another_file_is_refused(model, tmp_path, change, told):
    file = as_file(model, tmp_path / "control.safetensors", change)
    with pytest.raises(CheckpointError, match=told):
        control(model, controlnet_path=str(file))


def test_numbers_that_are_not_finite(model, tmp_path, depth):
    name = "blocks.0.attn.wo.A"
    file = as_file(model, tmp_path / "c.safetensors", lambda found: found | {name: mx.full(found[name].shape, mx.nan)})
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.wo\.A.* finite"):
        drawn(control(model, controlnet_path=str(file)), depth)


def test_a_depth_is_needed(model):
    with pytest.raises(UsageError, match="depth_image_path"):
        control(model).generate_image(seed=1, prompt="a cat", **SIZE)


def test_the_photo_s_depth_is_found_once(model, depth, tmp_path, monkeypatch):
    """With a Depth Pro that a program keeps; the photo itself has no part in the image."""

    class DepthPro:
        asked = 0

        def create_depth_map(self, image_path):
            DepthPro.asked += 1
            with PIL.Image.open(depth) as image:
                return type("Found", (), {"depth_image": image.convert("L")})

    photo = tmp_path / "photo.png"
    PIL.Image.new("RGB", (40, 40), "red").save(photo)
    pipeline = control(model)
    pipeline.depth_pro = DepthPro()
    for _ in range(2):
        found = drawn(pipeline, None, image_path=photo)
    assert DepthPro.asked == 1
    assert np.array_equal(found, drawn(pipeline, depth))
    # A map that is given comes first.
    assert np.array_equal(drawn(pipeline, depth, image_path=photo), found) and DepthPro.asked == 1


def test_the_command(cli, in_folder, model, depth):
    words = ("--model", model, "--base-model", "krea-2-controlnet-depth", "--prompt", "a cat", "--steps", 1)
    plain = cli("generate-krea2-controlnet", *words, "--depth-image-path", depth, "--seed", 1, "--metadata")
    assert plain.status == 0, plain.err
    with PIL.Image.open(plain.paths[0]) as image:
        assert image.size == (80, 48)
    settings = json.loads(Path(plain.paths[0]).with_suffix(".metadata.json").read_text())
    assert settings["controlnet_strength"] == 1.0 and settings["depth_image_path"] == "depth.png"
    file = as_file(model, Path("control.safetensors"))
    shutil.copytree(model, "alone", ignore=shutil.ignore_patterns("controlnet"))
    other = ("--model", "./alone", *words[2:], "--depth-image-path", depth, "--seed", 1, "--controlnet-path", file)
    same = cli("generate-krea2-controlnet", *other, "--output", "same.png")
    weak = cli("generate-krea2-controlnet", *other, "--controlnet-strength", 0.2, "--output", "weak.png")
    one, two, three = (np.asarray(PIL.Image.open(result.paths[0])) for result in (plain, same, weak))
    assert np.array_equal(one, two) and not np.array_equal(one, three)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--image-path PATH, or --depth-image-path"),
        (["--depth-image-path", "nowhere.png"], "nowhere.png"),
        (["--depth-image-path", "depth.png", "--save-depth-map"], "--save-depth-map writes the map"),
        (["--depth-image-path", "depth.png", "--controlnet-strength", "nan"], "nan"),
    ],
)
def test_refused(cli, in_folder, model, depth, words, told):
    base = ("--model", model, "--base-model", "krea-2-controlnet-depth", "--prompt", "a cat")
    result = cli("generate-krea2-controlnet", *base, *words)
    assert result.status in (1, 2) and told in result.err
