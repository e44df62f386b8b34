"""ERNIE-Image without torch: folders that mflux 0.24 saved, guidance, and what its commands refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.saved_024 import write_as_024

from families.ernie_image.cases import write_tiny
from mflux.backend import mx, tree_flatten
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.networks.modulation import ModulationLinear
from mflux.models.ernie_image import ErnieImage

SIZE = {"num_inference_steps": 2, "width": 48, "height": 32}
# Ours → theirs.
NAMES_024 = {
    "transformer": ((r"adaLN_modulation\.1\.", "adaln_modulation."),),
    "text_encoder": (),
    "vae": ((r"to_out\.0\.", "to_out."),),
}
# What no shape of a saved folder tells is as published.
AS_PUBLISHED = {"vae": {"norm_num_groups": 32, "block_out_channels": [64, 64, 64, 64], "layers_per_block": 1}}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("ernie") / "model")


def ernie(folder: Path, name: str = "ernie-image-turbo", **options) -> ErnieImage:
    return ErnieImage(model_path=str(folder), model_config=ModelConfig.from_name(name), **options)


def drawn(pipeline: ErnieImage, **settings) -> np.ndarray:
    settings = {"seed": 1, "prompt": "a red circle"} | SIZE | settings
    return np.asarray(pipeline.generate_image(**settings).image).astype(int)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_a_folder_of_mflux_024(tmp_path, bits, monkeypatch):
    # 0.24 packed what modulates as well.
    monkeypatch.setattr(ModulationLinear, "read_late", False)
    source = write_tiny(tmp_path / "source", wide=True, changes=AS_PUBLISHED)
    old = write_as_024(source, tmp_path / "old", NAMES_024, bits=bits, lost=("bn.num_batches_tracked",))
    fresh, stored = ernie(source, quantize=bits), ernie(old)
    assert stored.bits == bits
    for part in ("text_encoder", "transformer", "vae"):
        one, other = (dict(tree_flatten(getattr(each, part).parameters())) for each in (fresh, stored))
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert mx.array_equal(value, other[name]), (part, name)
    assert np.array_equal(drawn(fresh), drawn(stored))
    stored.save_model(str(tmp_path / "new"))
    again = ernie(tmp_path / "new")
    assert again.model_config.sigma_shift == 4.0
    assert np.array_equal(drawn(again), drawn(fresh))


def test_a_saved_text_encoder_is_whole(model, tmp_path):
    """Of the language model also what no image needs."""
    ernie(model).save_model(str(tmp_path / "saved"))
    before, after = (
        mx.load(str(next((root / "text_encoder").glob("*.safetensors")))) for root in (model, tmp_path / "saved")
    )
    assert before.keys() == after.keys() and all(mx.array_equal(before[name], after[name]) for name in before)


def test_a_model_of_one_fifth_of_the_guidance_is_another_image(model):
    pipeline = ernie(model, "ernie-image")
    plain, guided = drawn(pipeline), drawn(pipeline, guidance=4.0)
    assert np.abs(plain - guided).max() > 0
    assert np.array_equal(drawn(pipeline, guidance=1.0, negative_prompt="a dog"), plain)
    assert np.array_equal(drawn(pipeline, guidance=0.3), plain)
    assert not np.array_equal(drawn(pipeline, guidance=4.0, negative_prompt="a dog"), guided)
    # A blank is a word of its own, and nothing is nothing.
    assert np.array_equal(drawn(pipeline, guidance=4.0, negative_prompt=""), guided)
    assert not np.array_equal(drawn(pipeline, guidance=4.0, negative_prompt=" "), guided)


@pytest.mark.parametrize("words", [["--guidance", "4"], ["--guidance", "0"]])
def test_turbo_refuses_guidance(cli, in_folder, model, words):
    model_words = ["--model", model, "--base-model", "ernie-image-turbo"]
    result = cli("generate-ernie-image-turbo", *model_words, "--prompt", "a cat", *words)
    assert result.status == 2 and "mflux-generate-ernie-image" in result.err


def test_turbo_takes_a_guidance_of_one(cli, in_folder, model):
    words = ["--model", model, "--base-model", "ernie-image-turbo", "--prompt", "a cat", "--steps", 1, "--seed", 1]
    size = ["--width", 32, "--height", 32]
    plain = cli("generate-ernie-image-turbo", *words, *size)
    result = cli("generate-ernie-image-turbo", *words, *size, "--guidance", "1.0", "--negative-prompt", "a dog")
    assert (plain.status, result.status) == (0, 0), result.err
    assert any("--negative-prompt is ignored" in line for line in result.warnings)


@pytest.mark.parametrize(
    ("command", "other"),
    [("generate-ernie-image", "ernie-image-turbo"), ("generate-ernie-image-turbo", "ernie-image")],
)
def test_the_other_model_has_a_command_of_its_own(cli, in_folder, command, other):
    result = cli(command, "--model", other, "--prompt", "a cat")
    assert result.status in (1, 2) and f"mflux-generate-{other}" in result.err


def test_pid_is_refused(cli, in_folder, model):
    words = ["--model", model, "--base-model", "ernie-image", "--prompt", "a cat", "--pid-decode"]
    result = cli("generate-ernie-image", *words)
    assert result.status in (1, 2) and "PiD" in result.err and "not built" in result.err
