"""`mflux.load`: a model's name, alias, folder or repository, and the class that generates with it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from support import not_built
from support.cases import Tiny, every

import mflux
from mflux.errors import DownloadError, MfluxError, ModelConfigError, UsageError
from mflux.models.common.config import ModelConfig
from mflux.models.common.family import family_of
from mflux.models.flux.variants.txt2img.flux import Flux1

TINY: dict[str, Tiny] = every("TINY")
IMAGE = {"seed": 1, "prompt": "a red circle", "num_inference_steps": 2}


@pytest.mark.parametrize("name", ["demo", "DEMO"])
def test_a_built_in_model_is_the_class_s_own(name):
    loaded, made = mflux.load(name, quantize=8), Flux1(model_config=ModelConfig.from_name("demo"), quantize=8)
    assert type(loaded) is Flux1 and loaded.model_path is None and loaded.bits == 8
    images = [np.asarray(model.generate_image(**IMAGE, width=64, height=64).image) for model in (loaded, made)]
    assert np.array_equal(*images)


@pytest.mark.parametrize("name", TINY)
def test_a_folder_is_its_family_s(name, tmp_path, monkeypatch):
    tiny = TINY[name]
    for path, value in tiny.patches.items():
        monkeypatch.setattr(path, value)
    folder = tiny.write(tmp_path / "model")
    model = mflux.load(folder, base_model=tiny.base_model)
    assert type(model) is family_of(model.key).pipeline_class(model.key)
    assert model.family is tiny.pipeline_class().family
    assert model.model_path == str(folder) and model.root == folder


def test_a_saved_folder_says_itself_what_it_is(tiny_dev, tmp_path):
    mflux.load(tiny_dev, base_model="dev", quantize=4).save_model(str(tmp_path / "x"))
    model = mflux.load(str(tmp_path / "x"))
    assert type(model) is Flux1 and model.key == "dev" and model.bits == 4


def test_a_name_with_weights_from_elsewhere(tiny_schnell):
    model = mflux.load("schnell", model_path=tiny_schnell, bake_lora=False)
    assert model.key == "schnell" and model.root == tiny_schnell and not model.bake_lora


def test_names_of_hugging_face(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name in ("z-image-turbo", "Tongyi-MAI/Z-Image-Turbo", "someone/Z-Image-Turbo-mine"):
        with pytest.raises(DownloadError, match="Z-Image-Turbo"):
            mflux.load(name)


@pytest.mark.parametrize(
    ("name", "settings", "error", "message"),
    [
        ("nothing", {}, ModelConfigError, "the model 'nothing' is not known"),
        ("schnel", {}, ModelConfigError, "did you mean schnell?"),
        ("schnell-mine", {}, ModelConfigError, "there is no model and no folder 'schnell-mine'"),
        (not_built.KEY, {}, UsageError, not_built.TOLD),
        ("schnell", {"base_model": "nothing"}, ModelConfigError, "the base model 'nothing' is not known"),
        ("demo", {"quantize": 7}, UsageError, "7"),
        ("demo", {"lora_scales": [1.0]}, UsageError, "scale"),
        ("demo", {"small_decoder": True}, UsageError, "FLUX.1 (Flux1) takes no small_decoder: leave it out, or use "),
        ("demo", {"model_config": None}, UsageError, "FLUX.1 (Flux1) takes no model_config"),
        ("demo", {"lora_paths": "a.safetensors"}, DownloadError, "there is no file a.safetensors here"),
        (
            "demo",
            {"lora_paths": 3},
            UsageError,
            "lora_paths is 3 (int), which is neither a name or path",
        ),
        ("demo", {"lora_scales": 0.5}, UsageError, "there are 1 LoRA scales for 0 LoRAs"),
        ("demo", {"lora_scales": ["1"]}, UsageError, "lora_scales is '1' (str), which is not a number"),
        ("demo", {"base_model": 3}, UsageError, "base_model is 3 (int), which is not text"),
        ("demo", {"model_path": 3}, UsageError, "model_path is 3 (int), which is not text"),
        (3, {}, UsageError, "name is 3 (int), which is not text"),
        (None, {}, UsageError, "name is None (NoneType), which is not text"),
        ("seedvr2", {"lora_paths": ["a"]}, UsageError, "SeedVR2 (SeedVR2) takes no lora_paths"),
    ],
)
def test_what_makes_no_sense(name, settings, error, message):
    with pytest.raises(error, match=re.escape(message)) as raised:
        mflux.load(name, **settings)
    assert isinstance(raised.value, MfluxError)


def test_what_lies_nowhere_is_said_before_anything_is_read(tiny_schnell, tmp_path):
    shutil.copytree(tiny_schnell, tmp_path / "model", ignore=shutil.ignore_patterns("transformer"))
    with pytest.raises(MfluxError, match="transformer"):
        mflux.load(tmp_path / "model", base_model="schnell")


def test_nothing_heavy_is_imported_before_it_is_called():
    code = """
import sys
import mflux
load = mflux.load
from mflux import load as the_same
assert load is the_same
heavy = {"mlx", "numpy", "PIL", "huggingface_hub", "tokenizers", "safetensors"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
