"""Whole pictures against diffusers' FluxPipeline, from the same folder and the same noise."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file, save_file
from support.images import opened
from support.reference import LOOP, as_numpy, relative_error

from mflux.errors import CheckpointError
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator
from mflux.models.flux.variants.txt2img.flux import Flux1

MODEL = {"plain": ModelConfig.schnell, "guided": ModelConfig.dev}
PROMPT = "an oil painting of a Café in Zürich, 4k 🐱"

diffusers_logging.disable_progress_bar()


class Latents:
    """What the denoising loop ended with."""

    def call_after_loop(self, latents, **_) -> None:
        self.last = latents


def ours(folder: Path, kind: str, seed: int, prompt: str, **settings) -> tuple[np.ndarray, np.ndarray]:
    """Latents after the loop, (1, L, 64), and the picture, (H, W, 3) in 0 to 255."""
    flux = Flux1(model_path=str(folder), model_config=MODEL[kind]())
    seen = Latents()
    flux.callbacks.register(seen)
    image = flux.generate_image(seed, prompt, **settings).image
    return as_numpy(seen.last), np.asarray(image).astype(int)


@cache
def reference_pipeline(folder: Path) -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(folder).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    # Were the reference to miss its tensors, it would go on with random ones.
    tensors = load_file(next((folder / "text_encoder").glob("*.safetensors")))
    for name, value in tensors.items():
        loaded = pipeline.text_encoder.state_dict()[name.removeprefix("text_model.")]
        assert torch.equal(loaded, value.float()), name
    return pipeline


def noise(seed: int, height: int, width: int) -> torch.Tensor:
    return torch.tensor(as_numpy(FluxLatentCreator.create_noise(seed, height, width)))


def decode(pipeline: FluxPipeline, latents: torch.Tensor, height: int, width: int) -> np.ndarray:
    config = pipeline.vae.config
    unpacked = pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor)
    with torch.no_grad():
        image = pipeline.vae.decode(unpacked / config.scaling_factor + config.shift_factor).sample
    return np.asarray(pipeline.image_processor.postprocess(image, output_type="pil")[0]).astype(int)


def same(got: tuple[np.ndarray, np.ndarray], latents: torch.Tensor, picture: np.ndarray) -> None:
    assert relative_error(got[0], latents) <= LOOP
    assert got[1].shape == picture.shape
    assert ((picture > 0) & (picture < 255)).mean() > 0.5, "a picture that is mostly clipped shows little"
    assert picture.std() > 10
    assert np.abs(got[1] - picture).max() <= 2


def text_to_image(
    pipeline: FluxPipeline, kind: str, seed: int, prompt: str, *, num_inference_steps: int, height: int, width: int,
    guidance: float = 4.0,
) -> tuple[torch.Tensor, np.ndarray]:  # fmt: skip
    latents = pipeline(
        prompt,
        height=height,
        width=width,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance,
        latents=noise(seed, height, width),
        max_sequence_length=MODEL[kind]().max_sequence_length,
        output_type="latent",
    ).images
    return latents, decode(pipeline, latents, height, width)


@pytest.mark.parametrize(
    "kind, seed, prompt, settings",
    [
        ("plain", 1, PROMPT, dict(num_inference_steps=4, height=64, width=96)),
        ("plain", 2, "a cat", dict(num_inference_steps=1, height=48, width=32)),
        ("plain", 3, "", dict(num_inference_steps=9, height=32, width=32)),
        ("guided", 4, PROMPT, dict(num_inference_steps=5, height=96, width=64, guidance=3.5)),
        ("guided", 5, "word " * 300, dict(num_inference_steps=2, height=32, width=80, guidance=1.5)),
        ("guided", 6, "a cat", dict(num_inference_steps=12, height=48, width=48, guidance=0.0)),
    ],
)
def test_text_to_image(tiny_flux, kind, seed, prompt, settings):
    folder = tiny_flux[kind]
    same(
        ours(folder, kind, seed, prompt, **settings),
        *text_to_image(reference_pipeline(folder), kind, seed, prompt, **settings),
    )


def test_what_must_matter_matters(tiny_flux):
    """Were prompt, seed, steps or guidance of no account, the comparisons above would show little."""
    settings = dict(num_inference_steps=3, height=32, width=48, guidance=3.5)
    first, _ = ours(tiny_flux["guided"], "guided", 1, "a cat", **settings)
    for seed, prompt, change in [
        (2, "a cat", {}),
        (1, "a dog", {}),
        (1, "a cat", dict(num_inference_steps=4)),
        (1, "a cat", dict(guidance=1.0)),
    ]:
        other, _ = ours(tiny_flux["guided"], "guided", seed, prompt, **settings | change)
        assert relative_error(other, first) > 100 * LOOP


# ---- image to image


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A picture of another size and shape than what is drawn from it."""
    rows, columns = np.mgrid[0:90, 0:110]
    pixels = np.stack([2 * rows, 2 * columns, 255 - rows - columns], axis=-1)
    pixels[20:50, 30:80] = (250, 30, 60)
    path = tmp_path_factory.mktemp("source") / "source.png"
    PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return path


def image_to_image(
    pipeline: FluxPipeline, seed: int, prompt: str, start: int, source: Path, *, num_inference_steps: int, height: int,
    width: int, guidance: float = 4.0,
) -> tuple[torch.Tensor, np.ndarray]:  # fmt: skip
    """diffusers' image to image, told the start step and the latents: its own strength counts steps differently, and
    it draws from the autoencoder's posterior where mflux takes the mean."""
    config = pipeline.vae.config
    image = pipeline.image_processor.preprocess(opened(source), height=height, width=width)
    with torch.no_grad():
        mean = pipeline.vae.encode(image).latent_dist.mode()
    mean = (mean - config.shift_factor) * config.scaling_factor
    packed = pipeline._pack_latents(mean, 1, 16, height // 8, width // 8)

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    shift = calculate_shift(packed.shape[1], *(scheduler.config[name] for name in names))
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_inference_steps, num_inference_steps), mu=shift)
    latents = scheduler.scale_noise(packed, scheduler.timesteps[start : start + 1], noise(seed, height, width))

    resumed = FluxImg2ImgPipeline(**pipeline.components)
    resumed.set_progress_bar_config(disable=True)
    latents = resumed(
        prompt,
        image=opened(source),
        latents=latents,
        height=height,
        width=width,
        num_inference_steps=num_inference_steps,
        # Half a step less, so that rounding cannot move the start.
        strength=(num_inference_steps - start - 0.5) / num_inference_steps,
        guidance_scale=guidance,
        max_sequence_length=256 if guidance == 4.0 else 512,
        output_type="latent",
    ).images
    assert resumed.num_timesteps == num_inference_steps - start
    return latents, decode(pipeline, latents, height, width)


@pytest.mark.parametrize(
    "kind, strength, start, settings",
    [
        ("plain", 0.5, 2, dict(num_inference_steps=4, height=64, width=96)),
        # A little strength still skips the first step, which would forget the picture.
        ("plain", 0.05, 1, dict(num_inference_steps=4, height=48, width=32)),
        ("guided", 0.4, 2, dict(num_inference_steps=6, height=96, width=64, guidance=3.5)),
        ("guided", 0.9, 4, dict(num_inference_steps=5, height=80, width=112, guidance=2.0)),
    ],
)
def test_image_to_image(tiny_flux, source, kind, strength, start, settings):
    folder = tiny_flux[kind]
    got = ours(folder, kind, 7, PROMPT, image_path=source, image_strength=strength, **settings)
    same(got, *image_to_image(reference_pipeline(folder), 7, PROMPT, start, source, **settings))


def test_without_strength_the_picture_gives_only_its_size(tiny_flux, source):
    settings = dict(num_inference_steps=2, height=64, width=96)
    plain = ours(tiny_flux["plain"], "plain", 7, PROMPT, **settings)
    for strength in (None, 0.0):
        got = ours(tiny_flux["plain"], "plain", 7, PROMPT, image_path=source, image_strength=strength, **settings)
        assert np.array_equal(got[1], plain[1])
    sized = ours(
        tiny_flux["plain"], "plain", 7, PROMPT, num_inference_steps=1, image_path=source, height=None, width=None
    )
    assert sized[1].shape == (80, 96, 3)


def test_full_strength_is_the_picture_through_the_autoencoder(tiny_flux, source):
    pipeline = reference_pipeline(tiny_flux["guided"])
    image = pipeline.image_processor.preprocess(opened(source), height=64, width=96)
    with torch.no_grad():
        mean = pipeline.vae.encode(image).latent_dist.mode()
    mean = (mean - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor
    latents = pipeline._pack_latents(mean, 1, 16, 8, 12)
    got = ours(
        tiny_flux["guided"], "guided", 7, PROMPT, image_path=source, image_strength=1.0,
        num_inference_steps=4, height=64, width=96,
    )  # fmt: skip
    same(got, latents, decode(pipeline, latents, 64, 96))


# ---- other ways to store the same weights


@pytest.fixture
def stored(tiny_flux, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_flux["plain"], tmp_path / "stored"))


def test_sharded_files_give_the_same_picture(tiny_flux, stored):
    """Shards and an index, written by the reference libraries themselves."""
    pipeline = reference_pipeline(tiny_flux["plain"])
    for part in ("text_encoder_2", "transformer", "vae"):
        for path in (stored / part).glob("*.safetensors"):
            path.unlink()
        getattr(pipeline, part).save_pretrained(stored / part, max_shard_size="60KB")
        assert len(list((stored / part).glob("*.safetensors"))) > 1
        assert len(list((stored / part).glob("*.safetensors.index.json"))) == 1
    settings = dict(num_inference_steps=2, height=48, width=32)
    plain = ours(tiny_flux["plain"], "plain", 1, PROMPT, **settings)
    sharded = ours(stored, "plain", 1, PROMPT, **settings)
    assert np.array_equal(sharded[0], plain[0]) and np.array_equal(sharded[1], plain[1])


def test_clip_as_transformers_5_names_it_gives_the_same_picture(tiny_flux, stored):
    path = stored / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    assert all(name.startswith("text_model.") for name in tensors)
    save_file({name.removeprefix("text_model."): value for name, value in tensors.items()}, path)
    settings = dict(num_inference_steps=2, height=48, width=32)
    plain = ours(tiny_flux["plain"], "plain", 1, PROMPT, **settings)
    renamed = ours(stored, "plain", 1, PROMPT, **settings)
    assert np.array_equal(renamed[0], plain[0]) and np.array_equal(renamed[1], plain[1])
    same(renamed, *text_to_image(reference_pipeline(stored), "plain", 1, PROMPT, **settings))


@pytest.mark.parametrize("kind", MODEL)
def test_bfloat16_files_mean_their_rounded_weights(tiny_flux, tmp_path, kind):
    folder = Path(shutil.copytree(tiny_flux[kind], tmp_path / "bfloat16"))
    for path in folder.rglob("*.safetensors"):
        save_file({name: value.to(torch.bfloat16) for name, value in load_file(path).items()}, path)
    settings = dict(num_inference_steps=3, height=48, width=80)
    got = ours(folder, kind, 3, PROMPT, **settings)
    rounded = text_to_image(reference_pipeline(folder), kind, 3, PROMPT, **settings)
    same(got, *rounded)
    exact = text_to_image(reference_pipeline(tiny_flux[kind]), kind, 3, PROMPT, **settings)
    assert relative_error(got[0], exact[0]) > 10 * LOOP, "rounding must show, else nothing was rounded"


# ---- what would be another picture is refused


def edit(folder: Path, name: str, **changes) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [
        dict(time_shift_type="linear"),
        dict(use_karras_sigmas=True),
        dict(invert_sigmas=True),
        dict(num_train_timesteps=500),
        dict(_class_name="FlowMatchHeunDiscreteScheduler"),
    ],
    ids=str,
)
def test_a_schedule_that_is_not_built(stored, changes):
    edit(stored, "scheduler/scheduler_config.json", **changes)
    ((name, value),) = changes.items()
    with pytest.raises(CheckpointError, match=f"asks for {name} {value!r}"):
        Flux1(model_path=str(stored))


def test_a_transformer_that_draws_from_more_than_a_prompt(stored):
    edit(stored, "transformer/config.json", in_channels=384)
    with pytest.raises(CheckpointError, match="takes 384 channels a token, not 64"):
        Flux1(model_path=str(stored))
