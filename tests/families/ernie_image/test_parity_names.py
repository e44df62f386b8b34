"""ERNIE-Image's other names against diffusers and transformers: single files, LoRAs, prompts, the schedule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import ErnieImagePipeline, FlowMatchEulerDiscreteScheduler
from diffusers.loaders.single_file_utils import convert_ernie_image_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from support.lora_files import flat, fused, linear_shapes, low_rank, written
from support.reference import as_numpy, relative_error
from transformers import AutoTokenizer

from families.ernie_image.cases import PROMPT, SCHEDULER, write_ernie
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.networks.modulation import ModulationLinear
from mflux.models.ernie_image import ErnieImage

SCALE = 0.7


@pytest.fixture(autouse=True)
def all_at_once(monkeypatch):
    """Modulation is loaded with the rest: these tests look at every weight."""
    monkeypatch.setattr(ModulationLinear, "read_late", False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_ernie(tmp_path_factory.mktemp("ernie") / "model")


def ernie(path, **options) -> ErnieImage:
    return ErnieImage(model_path=str(path), model_config=ModelConfig.ernie_image(), **options)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_single_file(folder, tmp_path, monkeypatch, prefix):
    published = load_file(next((folder / "transformer").glob("*.safetensors")))
    theirs = {prefix + name: value for name, value in published.items()}
    file = tmp_path / "ernie-image-turbo.safetensors"
    save_file(theirs, file)
    monkeypatch.setattr("mflux.models.common.model.resolve", lambda *_, **__: folder)
    model = ernie(file)
    ours = flat(model.transformer)
    ours["x_embedder.proj.weight"] = np.moveaxis(ours["x_embedder.proj.weight"], -1, 1)
    expected = published
    if prefix != "diffusion_model.":
        expected = convert_ernie_image_transformer_checkpoint_to_diffusers(dict(theirs))
    assert set(ours) == set(expected)
    for name, value in expected.items():
        assert np.array_equal(ours[name], value.numpy()), name
    # What the shapes tell is what the folder says.
    assert model.transformer.config == ernie(folder).transformer.config


# Name → what our file holds before and between a layer's names, how its factors are called, and whether diffusers reads
# that.
LAYOUTS = {
    "PEFT": ("transformer.{}", ("lora_A", "lora_B"), None, True),
    "PEFT's own prefix": ("base_model.model.{}", ("lora_A", "lora_B"), None, False),
    "ai-toolkit": ("diffusion_model.{}", ("lora_A", "lora_B"), None, False),
    "no prefix": ("{}", ("lora_down", "lora_up"), 1.5, False),
    "kohya": ("lora_unet_{}", ("lora_down", "lora_up"), 1.5, False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("their_spelling", [False, True])
def test_lora(folder, tmp_path, layout, their_spelling):
    reference = ErnieImagePipeline.from_pretrained(folder)
    shapes = linear_shapes(reference.transformer)
    pattern, factors, alpha, is_read = LAYOUTS[layout]

    def spelled(layer: str) -> str:
        if their_spelling:
            # As mflux 0.24 has it.
            layer = layer.replace("adaLN_modulation.1", "adaln_modulation")
        return pattern.format(layer.replace(".", "_") if layout == "kohya" else layer)

    if their_spelling and layout == "kohya":
        pytest.skip("mflux 0.24 spells it as all do there")
    ours = written(
        tmp_path / "ours.safetensors",
        low_rank({spelled(name): shape for name, shape in shapes.items()}, *factors, alpha=alpha),
    )
    if is_read and not their_spelling:
        expected = fused(reference, ours, SCALE)
    else:
        # Multiplied out here: diffusers reads no other names.
        expected = {name: value.detach().numpy() for name, value in reference.transformer.state_dict().items()}
        pairs = low_rank(shapes, alpha=alpha)
        for name in shapes:
            change = pairs[f"{name}.lora_B.weight"] @ pairs[f"{name}.lora_A.weight"]
            expected[f"{name}.weight"] = expected[f"{name}.weight"] + SCALE * (alpha or 3) / 3 * change.numpy()
    found = flat(ernie(folder, lora_paths=[str(ours)], lora_scales=[SCALE]).transformer)
    before = flat(ernie(folder).transformer)
    found["x_embedder.proj.weight"] = np.moveaxis(found["x_embedder.proj.weight"], -1, 1)
    assert found.keys() == expected.keys()
    assert all(relative_error(found[name], value) <= 1e-6 for name, value in expected.items())
    changed = {name for name in before if found[name].ndim == 2 and relative_error(found[name], before[name]) > 1e-2}
    assert changed == {f"{name}.weight" for name in shapes}


@pytest.mark.parametrize("prompt", [PROMPT, "", "  two  spaces ", "a blue square " * 900, "<s> in words, 広場"])
def test_prompts(folder, prompt):
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    expected = tokenizer(prompt, add_special_tokens=True, truncation=True, padding=False)["input_ids"]
    ours = ernie(folder).tokenizers["ernie"].encode(prompt, max_length=2048)
    assert ours == expected
    assert ours[0] == tokenizer.bos_token_id and len(ours) <= 2048


@pytest.mark.parametrize("steps", [1, 8, 50])
@pytest.mark.parametrize("name", [None, "linear"])
def test_schedule(folder, steps, name):
    """The checkpoint's static shift; what mflux 0.24 calls linear differs from it by a rounding of ln 4."""
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1])
    for width, height in ((64, 64), (1024, 768)):
        config = ernie(folder).settings(
            seed=1, prompt="", num_inference_steps=steps, width=width, height=height, scheduler=name
        )
        assert np.abs(as_numpy(config.scheduler.sigmas) - scheduler.sigmas.numpy()).max() < 1e-6


def test_what_mflux_024_gave_for_a_seed():
    from mflux.backend import mx
    from mflux.models.ernie_image.latent_creator import ErnieLatentCreator

    noise = ErnieLatentCreator.create_noise(7, 96, 48)
    assert noise.dtype == mx.float32
    assert mx.array_equal(noise, mx.random.normal((1, 128, 6, 3), key=mx.random.key(7)).astype(mx.bfloat16))


def test_a_saved_model_is_read_by_the_reference(folder, tmp_path):
    """Towers of the text encoder are not saved, and no prompt goes through them; diffusers says that it makes some."""
    ernie(folder).save_model(str(tmp_path / "saved"))
    saved = ErnieImagePipeline.from_pretrained(tmp_path / "saved")
    before = ErnieImagePipeline.from_pretrained(folder)
    for part in ("text_encoder", "transformer", "vae"):
        ours, theirs = (getattr(model, part).state_dict() for model in (saved, before))
        kept = [name for name in theirs if not name.startswith(("vision_tower.", "multi_modal_projector."))]
        kept = [name for name in kept if "num_batches_tracked" not in name]
        assert kept and all(torch.equal(ours[name], theirs[name]) for name in kept)
