"""Ideogram 4 without torch: captions, presets, float8 in both layouts, folders that mflux 0.24 saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.saved_024 import write_as_024

from families.ideogram4.cases import PROMPT, write_tiny
from mflux.backend import mx, tree_flatten
from mflux.errors import UsageError
from mflux.models.common.networks.modulation import ModulationLinear
from mflux.models.ideogram4 import Ideogram4
from mflux.models.ideogram4.captions import caption
from mflux.models.ideogram4.cli.ideogram4_generate import PRESETS as COMMANDS_PRESETS
from mflux.models.ideogram4.latent_creator import Ideogram4LatentCreator
from mflux.models.ideogram4.presets import PRESETS

SIZE = {"num_inference_steps": 2, "width": 48, "height": 32}
# Ours → theirs.
NAMES_024 = {
    "transformer": ((r"attention\.to_out\.0\.", "attention.o."),),
    "unconditional_transformer": ((r"attention\.to_out\.0\.", "attention.o."),),
    "text_encoder": ((r"^language_model\.", ""),),
    "vae": ((r"to_out\.0\.", "to_out."),),
}
# What no shape of a saved folder tells is as published.
AS_PUBLISHED = {"vae": {"norm_num_groups": 32, "block_out_channels": [64, 64, 64, 64], "layers_per_block": 1}}
FUSED = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.o": ("attention.to_out.0",),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("ideogram") / "model")


def drawn(pipeline: Ideogram4, **settings) -> np.ndarray:
    settings = {"seed": 1, "prompt": PROMPT} | SIZE | settings
    return np.asarray(pipeline.generate_image(**settings).image).astype(int)


# ---- captions


def element(**changes) -> dict:
    return {"compositional_deconstruction": {"background": "a wall", "elements": [
        {"type": "obj", "bbox": [0, 10, 20, 1000], "desc": "a cat", "color_palette": ["#00FFAB"]} | changes,
    ]}}  # fmt: skip


def style(**values) -> dict:
    return {"style_description": values, "compositional_deconstruction": {"background": "a wall", "elements": []}}


PHOTO = {"aesthetics": "calm", "lighting": "soft", "photo": "35 mm", "medium": "film"}


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        (PROMPT, None),
        (element(), None),
        (style(**PHOTO, color_palette=["#000000"] * 16), None),
        (style(aesthetics="a", lighting="b", medium="c", art_style="d"), None),
        ({"high_level_description": "x", **element()}, None),
        (element(type="text", text="Café") | {}, "stand in the order"),
        ("a red circle", "plain text"),
        ("", "plain text"),
        ('["a"]', "plain text"),
        ('{"a": ', "begins as JSON and is none"),
        ({"a": 1, **element()}, "the caption has keys that belong elsewhere or nowhere: a"),
        ({"high_level_description": 3, **element()}, "high_level_description of the caption is no text"),
        ({"high_level_description": "x"}, "no compositional_deconstruction"),
        ({"style_description": [], **element()}, "style_description is no table"),
        (style(aesthetics="a", lighting="b", medium="c"), "one of photo and art_style"),
        (style(**PHOTO, art_style="d"), "one of photo and art_style"),
        (style(**dict(reversed(PHOTO.items()))), "stand in the order"),
        (style(aesthetics="a", lighting="b", photo="c"), "lacks medium"),
        (style(**PHOTO, color_palette=["#000000"] * 17), "17 colours, and 16"),
        (style(**PHOTO | {"lighting": 3}), "lighting of style_description is no text"),
        ({"compositional_deconstruction": {"elements": []}}, "lacks background"),
        ({"compositional_deconstruction": {"background": "x", "elements": {}}}, "has to have elements"),
        ({"compositional_deconstruction": {"elements": [], "background": "x"}}, "stand in the order"),
        ({"compositional_deconstruction": 3}, "compositional_deconstruction is no table"),
        (element(type="thing"), "neither obj nor text"),
        (element(desc=3), "desc of elements[0] is no text"),
        (element(bbox=[0, 0, 1]), "not four whole numbers"),
        (element(bbox=[0, 0, 1, 1.5]), "not four whole numbers"),
        (element(bbox=[0, 0, 1, True]), "not four whole numbers"),
        (element(bbox=[0, 0, 1, 1001]), "not within 0 to 1000"),
        (element(bbox=[5, 0, 1, 7]), "ends before it begins"),
        (element(color_palette=["#00ffab"]), "in capitals"),
        (element(color_palette=["#000000"] * 6), "6 colours, and 5"),
        (element(color_palette="#000000"), "is no list"),
        (element(colour="red"), "elements[0] has keys that belong elsewhere or nowhere: colour"),
        (json.dumps(element(desc="Café")), "\\u00e9 stands in it"),
    ],
)
def test_captions(prompt, problem):
    text, problems = caption(prompt)
    if problem is None:
        assert problems == []
    else:
        assert any(problem in found for found in problems), problems
    if isinstance(prompt, dict) or problems == []:
        assert json.loads(text) == (prompt if isinstance(prompt, dict) else json.loads(prompt))
        assert text == json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":"))


@pytest.mark.parametrize("prompt", [3, None, ["a"], {"a": float("nan")}, {"a": object()}])
def test_what_is_no_caption(model, prompt):
    with pytest.raises(UsageError, match="prompt"):
        drawn(Ideogram4(model_path=str(model)), prompt=prompt)


def test_a_caption_is_one_however_it_is_written(model, caplog):
    pipeline = Ideogram4(model_path=str(model))
    table = element()
    first = pipeline.generate_image(seed=1, prompt=table, **SIZE)
    assert first.prompt == json.dumps(table, separators=(",", ":"))
    assert np.array_equal(drawn(pipeline, prompt=json.dumps(table, indent=2)), np.asarray(first.image))
    assert not caplog.records
    drawn(pipeline, prompt="a red circle")
    assert "plain text" in caplog.text
    caplog.clear()
    drawn(pipeline, prompt="a red circle", warn_on_caption_issues=False)
    assert not caplog.records
    with pytest.raises(UsageError, match="plain text"):
        drawn(pipeline, prompt="a red circle", strict_caption_validation=True)


def test_a_prompt_that_is_too_long(model):
    with pytest.raises(UsageError, match="this model reads 2,048: shorten it"):
        drawn(Ideogram4(model_path=str(model)), prompt="the cat " * 2000)


# ---- presets


def test_the_commands_presets_are_the_presets():
    assert tuple(PRESETS) == COMMANDS_PRESETS
    assert all(name.endswith(f"_{one.steps}") and len(one.guidance) == one.steps for name, one in PRESETS.items())


def test_a_preset_is_generated_with_again(cli, in_folder, model):
    words = ["--model", model, "--base-model", "ideogram4", "--prompt", PROMPT, "--seed", 3]
    words += ["--width", 48, "--height", 32]
    first = cli("generate-ideogram4", *words, "--preset", "V4_TURBO_12", "--metadata", "--output", "a.png")
    assert first.status == 0 and not first.warnings, first.err
    said = json.loads((in_folder / "a.metadata.json").read_text())
    assert said["preset"] == "V4_TURBO_12" and said["steps"] == 12 and said["guidance"] is None
    again = cli("generate-ideogram4", "-C", "a.metadata.json", "--model", model, "--output", "b.png")
    assert again.status == 0, again.err
    assert (in_folder / "a.png").read_bytes()[-200:] and _pixels("a.png") == _pixels("b.png")
    # As mflux 0.24 noted it: the first step's guidance, which was not that of all.
    old = {name: value for name, value in said.items() if name != "preset"}
    old |= {"steps": 20, "guidance": 7.0, "mflux_version": "0.24.0"}
    Path("old.json").write_text(json.dumps(old))
    replayed = cli("generate-ideogram4", "-C", "old.json", "--model", model, "--output", "c.png")
    assert replayed.status == 0, replayed.err
    usual = cli("generate-ideogram4", *words, "--output", "d.png")
    assert usual.status == 0 and _pixels("c.png") == _pixels("d.png")


def _pixels(path: str) -> bytes:
    from support.images import opened

    return opened(path).tobytes()


def test_what_the_command_says(cli, in_folder, model):
    words = ["--model", model, "--base-model", "ideogram4", "--prompt", PROMPT, "--steps", 2, "--seed", 1]
    words += ["--width", 48, "--height", 32]
    result = cli("generate-ideogram4", *words, "--negative-prompt", "a dog", "--scheduler", "linear")
    assert result.status == 0, result.err
    assert {line.split(" is ignored")[0].split("--")[-1] for line in result.warnings} == {
        "negative-prompt",
        "scheduler",
    }
    for wrong, why in (
        (["--preset", "V4"], "invalid choice"),
        (["--strict-caption-validation", "--prompt", "a red circle"], "plain text"),
        (["--pid-decode"], "not built"),
    ):
        result = cli("generate-ideogram4", *words, *wrong)
        assert result.status in (1, 2) and why in result.err, result.err


def test_guidance_of_one_needs_no_second_model(model):
    pipeline = Ideogram4(model_path=str(model))
    drawn(pipeline, guidance=1.0)
    assert "unconditional_transformer" not in pipeline.loaded()
    drawn(pipeline, guidance=2.0)
    assert {"transformer", "unconditional_transformer"} <= pipeline.loaded().keys()


def test_what_mflux_024_gave_for_a_seed():
    mx.random.seed(7)
    expected = mx.random.normal((1, 18, 128))
    assert mx.array_equal(Ideogram4LatentCreator.create_noise(7, 96, 48), expected)


# ---- files


def test_statistics_of_flux2_are_not_taken(model, tmp_path):
    """ComfyUI's users have FLUX.2's own autoencoder beside this model."""
    copy = shutil.copytree(model, tmp_path / "copy")
    file = next((copy / "vae").glob("*.safetensors"))
    tensors = dict(mx.load(str(file)))
    tensors["bn.running_mean"][0] = -0.0676
    mx.save_safetensors(str(file), tensors)
    mean, deviation = Ideogram4(model_path=str(copy)).vae.statistics()
    assert mean.shape == deviation.shape == (128,)
    assert abs(mean[0].item() - 0.01984364) < 1e-7 and abs(deviation[-1].item() - 1.68533454) < 1e-6
    own, _ = Ideogram4(model_path=str(model)).vae.statistics()
    assert mx.array_equal(own, mx.load(str(next((model / "vae").glob("*.safetensors"))))["bn.running_mean"])


def _float8(folder: Path, *, fused: bool, as_024: bool = False) -> None:
    """Turn the linear layers of a folder into float8 with a scale a row, and the others as the published one has."""
    for part in ("transformer", "unconditional_transformer", "text_encoder"):
        file = next((folder / part).glob("*.safetensors"))
        tensors = dict(mx.load(str(file)))
        for whole, parts in FUSED.items() if fused and part != "text_encoder" else ():
            for layer in {name.split("attention.")[0] for name in tensors if ".attention." in name}:
                split = [tensors.pop(f"{layer}{one}.weight") for one in parts]
                tensors[f"{layer}{whole}.weight"] = mx.concatenate(split)
        stored, kinds = {}, {}
        for name, value in tensors.items():
            if value.ndim == 2 and "embed" not in name:
                scale = mx.max(mx.abs(value), axis=1) / 448
                stored[name] = mx.to_fp8(value / scale[:, None])
                stored[name.replace(".weight", ".weight_scale")] = scale
                kinds[name] = "U8" if as_024 else "F8_E4M3"
            else:
                stored[name] = value.astype(mx.bfloat16)
        mx.save_safetensors(str(file), stored)
        _retyped(file, kinds)


def _retyped(file: Path, kinds: dict[str, str]) -> None:
    """MLX writes float8 as bytes: the header says what they are."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, kind in kinds.items():
        header[name]["dtype"] = kind
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.parametrize("bits", [None, 4])
def test_the_published_float8(tmp_path, bits, caplog):
    """Fused or split, and as mflux 0.24 takes it for bytes: the same model, near to what it was made from."""
    source = write_tiny(tmp_path / "source", wide=True)
    dense = drawn(Ideogram4(model_path=str(source)))
    found = []
    for name, options in (("split", {}), ("fused", {"fused": True}), ("bytes", {"as_024": True})):
        folder = shutil.copytree(source, tmp_path / name)
        _float8(folder, **{"fused": False} | options)
        pipeline = Ideogram4(model_path=str(folder), quantize=bits)
        found.append(drawn(pipeline))
    assert all(np.array_equal(found[0], other) for other in found[1:])
    # Three bits of a number's are stored, and 4-bit weights say less.
    assert 0 < np.abs(found[0] - dense).mean() < (8 if bits is None else 40)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_a_folder_of_mflux_024(tmp_path, bits, monkeypatch):
    # 0.24 packed what modulates as well.
    monkeypatch.setattr(ModulationLinear, "read_late", False)
    source = write_tiny(tmp_path / "source", wide=True, changes=AS_PUBLISHED)
    old = write_as_024(source, tmp_path / "old", NAMES_024, bits=bits, lost=("bn.num_batches_tracked",))
    fresh, stored = Ideogram4(model_path=str(source), quantize=bits), Ideogram4(model_path=str(old))
    assert stored.bits == bits
    for part in ("text_encoder", "transformer", "unconditional_transformer", "vae"):
        one, other = (dict(tree_flatten(getattr(each, part).parameters())) for each in (fresh, stored))
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert mx.array_equal(value, other[name]), (part, name)
    assert np.array_equal(drawn(fresh), drawn(stored))
    stored.save_model(str(tmp_path / "new"))
    assert np.array_equal(drawn(Ideogram4(model_path=str(tmp_path / "new"))), drawn(fresh))


@pytest.mark.parametrize(
    ("pattern", "factors", "whole"),
    [
        ("transformer.{}", ("lora_A", "lora_B"), False),
        ("conditional_transformer.{}", ("lora_A", "lora_B"), True),
        ("diffusion_model.{}", ("lora_A", "lora_B"), True),
        ("{}", ("lora_down", "lora_up"), False),
        ("lora_unet_{}", ("lora_down", "lora_up"), True),
    ],
)
def test_loras(model, tmp_path, pattern, factors, whole, monkeypatch):
    """Beside the dense change, in each layout; what guidance leads away from stays as it is."""
    monkeypatch.setattr(ModulationLinear, "read_late", False)
    plain = Ideogram4(model_path=str(model))
    weights = dict(tree_flatten(plain.transformer.parameters()))
    layers = [
        name.removesuffix(".weight") for name, value in weights.items() if value.ndim == 2 and "embed" not in name
    ]
    generator, file, expected = np.random.default_rng(5), {}, {}
    groups: dict[str, list[str]] = {}
    for layer in layers:
        block, _, leaf = layer.partition("attention.")
        name = next((f"{block}{one}" for one, parts in FUSED.items() if f"attention.{leaf}" in parts), layer)
        groups.setdefault(name if whole else layer, []).append(layer)
    for name, parts in groups.items():
        rows = [weights[f"{part}.weight"].shape[0] for part in parts]
        columns = weights[f"{parts[0]}.weight"].shape[1]
        down = generator.standard_normal((2, columns)).astype(np.float32)
        up = generator.standard_normal((sum(rows), 2)).astype(np.float32)
        written = "final_linear" if "unet" in pattern and name == "final_layer.linear" else name
        key = pattern.format(written.replace(".", "_") if "unet" in pattern else written)
        file |= {f"{key}.{factors[0]}.weight": mx.array(down), f"{key}.{factors[1]}.weight": mx.array(up)}
        for part, change in zip(parts, np.split(up @ down, np.cumsum(rows)[:-1]), strict=True):
            expected[part] = np.array(weights[f"{part}.weight"]) + 0.5 * change
    mx.save_safetensors(str(tmp_path / "lora.safetensors"), file)
    pipeline = Ideogram4(model_path=str(model), lora_paths=[str(tmp_path / "lora.safetensors")], lora_scales=[0.5])
    found = dict(tree_flatten(pipeline.transformer.parameters()))
    for layer, value in expected.items():
        assert np.allclose(np.array(found[f"{layer}.weight"]), value, atol=1e-5), layer
    apart = [dict(tree_flatten(one.unconditional_transformer.parameters())) for one in (plain, pipeline)]
    assert all(mx.array_equal(value, apart[1][name]) for name, value in apart[0].items())
