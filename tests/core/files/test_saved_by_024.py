"""Folders that mflux 0.24 saved: its own names and no configuration.

The archive holds one in 4 bits; MFLUX_024_ARCHIVE names one that holds more, which tools/fixture_024.py makes.
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from mflux.models.common.weights.loading.weight_loader import WeightLoader
from mflux.models.flux.weights.flux_weight_definition import FluxWeightDefinition
from support.saved_024 import write_source

from mflux.backend import mx, tree_flatten
from mflux.checkpoints.loading import FolderTensors, load_component
from mflux.errors import CheckpointError
from mflux.models.common.config import ModelConfig
from mflux.models.common.model import open_folder
from mflux.models.common.networks.autoencoders.kl import AutoencoderKL
from mflux.models.common.networks.modulation import ModulationLinear
from mflux.models.common.networks.text_encoders.clip import CLIPTextEncoder
from mflux.models.common.networks.text_encoders.t5 import T5Encoder
from mflux.models.flux.family import FAMILY
from mflux.models.flux.model.transformer import FluxTransformer
from mflux.models.flux.variants.txt2img.flux import Flux1

ARCHIVE = Path(os.environ.get("MFLUX_024_ARCHIVE") or Path(__file__).parents[2] / "data" / "mflux_024.tar.xz")
PROMPT = "a red circle on a white background"
with tarfile.open(ARCHIVE) as _archive:
    NAMES = sorted({name.partition("/")[0] for name in _archive.getnames()})
PARTS = {
    "transformer": FluxTransformer,
    "text_encoder": CLIPTextEncoder,
    "text_encoder_2": T5Encoder,
    "vae": AutoencoderKL,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The model that was saved, in the published layout."""
    return write_source(tmp_path_factory.mktemp("models") / "source")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """What mflux 0.24.0 made of it, in folders called `whole`, `q3`, …"""
    folder = tmp_path_factory.mktemp("saved")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def bits_of(name: str) -> int | None:
    return None if name == "whole" else int(name.removeprefix("q"))


@pytest.fixture(autouse=True)
def what_modulates_is_packed(monkeypatch):
    """As 0.24 did it, so that both sides are the same; `tests/families/test_modulation.py` has what is done here."""
    monkeypatch.setattr(ModulationLinear, "read_late", False)


def load_old(root: Path, part: str, **options):
    folder = open_folder(root, FAMILY)
    return load_component(PARTS[part], root / part, config=folder.config(part), tensors=folder.tensors(part), **options)


def test_the_archive_is_what_the_tool_describes(saved):
    assert "q4" in NAMES
    for root in saved.iterdir():
        assert list(root.rglob("config.json")) == []
        for part in PARTS:
            index = json.loads((root / part / "model.safetensors.index.json").read_text())
            assert index["metadata"]["mflux_version"] == "0.24.0"
            assert index["metadata"]["quantization_level"] == (root.name[1:] if root.name != "whole" else "None")
        names = FolderTensors(root / "text_encoder_2")
        assert "t5_blocks.1.attention.SelfAttention.relative_attention_bias.weight" in names


@pytest.mark.parametrize("name", NAMES)
def test_a_program_that_reads_weights_gets_them_as_0_24_did(saved, name):
    """Names of old exports are what a server looks for, before it loads a model."""
    part = next(part for part in FluxWeightDefinition.get_components() if part.name == "t5_encoder")
    loaded = WeightLoader.load_single_local(component=part, root_path=saved / name)
    assert loaded.meta_data.quantization_level == bits_of(name)
    names = dict(tree_flatten(loaded.components["t5_encoder"])).keys()
    assert names == set(FolderTensors(saved / name / "text_encoder_2"))
    assert "t5_blocks.1.attention.SelfAttention.relative_attention_bias.weight" in names


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", NAMES)
def test_every_array_is_that_of_the_unsaved_model(source, saved, part, name):
    old = dict(tree_flatten(load_old(saved / name, part).parameters()))
    ours = dict(tree_flatten(load_component(PARTS[part], source / part, quantize=bits_of(name)).parameters()))
    assert old.keys() == ours.keys()
    for key, value in ours.items():
        assert mx.array_equal(old[key], value).item(), key


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", NAMES)
def test_the_configuration_follows_from_the_shapes(source, saved, part, name):
    config_class = PARTS[part].config_class
    published = json.loads((source / part / "config.json").read_text())
    folder = open_folder(saved / name, FAMILY)
    assert config_class.from_dict(folder.config(part)) == config_class.from_dict(published)
    stored = folder.stored(part)
    assert (stored.bits if stored else None) == bits_of(name)


def test_the_settings_beside_the_components(source, saved):
    folder = open_folder(saved / "q4", FAMILY)
    told, published = folder.scheduler(), json.loads((source / "scheduler" / "scheduler_config.json").read_text())
    assert told == published


@pytest.mark.parametrize("name", NAMES)
def test_the_picture_is_that_of_the_unsaved_model(source, saved, name):
    settings = {"seed": 5, "prompt": PROMPT, "num_inference_steps": 2, "height": 32, "width": 48}
    ours = Flux1(bits_of(name), model_path=str(source), model_config=ModelConfig.dev())
    old = Flux1(model_path=str(saved / name), model_config=ModelConfig.dev())
    assert old.bits == bits_of(name)
    assert old.model_config.requires_sigma_shift and old.model_config.supports_guidance
    one, other = (np.asarray(flux.generate_image(**settings).image) for flux in (ours, old))
    assert one.std() > 5
    assert (one == other).all()


def test_saved_anew_it_is_in_the_published_layout(cli, in_folder, source, saved):
    result = cli("save", "--model", saved / "q4", "--base-model", "dev", "--path", "new")
    assert result.status == 0, result.err
    assert json.loads(Path("new/mflux_model.json").read_text())["quantize"] == 4
    assert json.loads(Path("new/model_index.json").read_text())["_class_name"] == "FluxPipeline"
    for part, module_class in PARTS.items():
        one = dict(tree_flatten(load_component(module_class, Path("new") / part).parameters()))
        other = dict(tree_flatten(load_component(module_class, source / part, quantize=4).parameters()))
        assert one.keys() == other.keys()
        assert all(mx.array_equal(one[key], other[key]).item() for key in one)
    assert cli("generate", "--model", "new", "--prompt", "x", "--steps", 1, "--width", 16, "--height", 16).status == 0


def test_without_an_index(source, saved, tmp_path):
    """As the earliest versions saved: numbered files and nothing else, of which there may be ten."""
    root = tmp_path / "old"
    shutil.copytree(saved / "q4", root)
    part = root / "transformer"
    tensors = mx.load(str(part / "0.safetensors"))
    (part / "0.safetensors").unlink()
    (part / "model.safetensors.index.json").unlink()
    names = sorted(tensors)
    for number in range(11):
        mx.save_safetensors(str(part / f"{number}.safetensors"), {key: tensors[key] for key in names[number::11]})
    old = dict(tree_flatten(load_old(root, "transformer").parameters()))
    ours = dict(tree_flatten(load_component(FluxTransformer, source / "transformer", quantize=4).parameters()))
    assert all(mx.array_equal(old[key], value).item() for key, value in ours.items())


def test_what_is_not_flux(saved, tmp_path):
    root = tmp_path / "other"
    shutil.copytree(saved / "q4", root)
    path = root / "transformer" / "0.safetensors"
    tensors = mx.load(str(path))
    mx.save_safetensors(str(path), {f"other.{key}": value for key, value in tensors.items()})
    (root / "transformer" / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no transformer of FLUX\.1 as mflux 0\.24 saves it"):
        Flux1(model_path=str(root))


def test_a_tensor_that_is_missing_is_named(saved, tmp_path):
    root = tmp_path / "damaged"
    shutil.copytree(saved / "q4", root)
    path = root / "vae" / "0.safetensors"
    tensors = mx.load(str(path))
    tensors.pop("decoder.conv_norm_out.norm.bias")
    mx.save_safetensors(str(path), tensors)
    with pytest.raises(CheckpointError, match=r"1 tensor missing \(decoder\.conv_norm_out\.bias\)"):
        load_old(root, "vae")
