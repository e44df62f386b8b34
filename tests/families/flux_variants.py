"""FLUX.1's variants: what the tests of all families need to know of them."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path

import numpy as np

from families.cases import Pipeline, Tiny
from families.fibo import Last, mask, photo
from mflux.models.common.config import ModelConfig
from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator

PROMPT = "an oil painting of a Café in Zürich, 4k 🐱"
_VARIANTS = "mflux.models.flux.variants"


# ---- whole pictures


def write_model(folder: Path, **settings) -> Path:
    from reference import write_flux

    return write_flux(folder, **dict(seed=30, guidance=True, scheduler="dynamic") | settings)


def ours(module: str, key: str):
    """Draws with our class and the model's configuration."""

    def draw(folder: Path, settings):
        path, _, name = module.partition(":")
        pipeline = getattr(importlib.import_module(f"{_VARIANTS}.{path}"), name)
        config = ModelConfig.from_name(key)
        # The tiny tokenizers' limit, not the model's, decides what a prompt becomes; 512 tokens would only take time.
        config.max_sequence_length = 64
        return drawn(pipeline(model_path=str(folder), model_config=config), **settings)

    return draw


def drawn(pipeline, **settings):
    """Latents after the loop, and the picture; pictures among the settings go through files."""
    import PIL.Image

    def path(name: str, value):
        if isinstance(value, list):
            return [path(f"{name}-{number}", one) for number, one in enumerate(value)]
        if not isinstance(value, PIL.Image.Image):
            return value
        value.save(pipeline.root / f"{name}.png")
        return pipeline.root / f"{name}.png"

    last = Last()
    pipeline.callbacks.register(last)
    image = pipeline.generate_image(**{name: path(name, value) for name, value in settings.items()}).image
    return np.array(last.latents), np.asarray(image)


@cache
def reference(folder: Path, name: str):
    """A pipeline of the reference, made of a FLUX.1 folder's components."""
    import diffusers
    import torch

    parts = diffusers.FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32).components
    parts = {key: part for key, part in parts.items() if part is not None}
    pipeline = getattr(diffusers, name)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(settings):
    import torch

    return torch.tensor(
        np.array(FluxLatentCreator.create_noise(settings["seed"], settings["height"], settings["width"]))
    )


def both(pipeline, settings, **inputs):
    """Latents and picture of the reference, drawn once and decoded as it does."""
    import torch

    height, width = settings["height"], settings["width"]
    latents = pipeline(
        prompt=settings["prompt"],
        height=height,
        width=width,
        num_inference_steps=settings["num_inference_steps"],
        guidance_scale=settings["guidance"],
        max_sequence_length=64,
        latents=noise(settings),
        output_type="latent",
        **inputs,
    ).images
    config = pipeline.vae.config
    unpacked = pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor)
    with torch.no_grad():
        decoded = pipeline.vae.decode(unpacked / config.scaling_factor + config.shift_factor).sample
    return latents, np.asarray(pipeline.image_processor.postprocess(decoded, output_type="pil")[0])


def kontext_reference(folder: Path, settings):
    pipeline = reference(folder, "FluxKontextPipeline")
    size = settings["width"], settings["height"]
    # The reference would take the nearest of its sizes of about a megapixel.
    image = pipeline.image_processor.resize(settings["image_path"], settings["height"], settings["width"])
    assert image.size == size
    return both(pipeline, settings, image=image, max_area=size[0] * size[1], _auto_resize=False)


def fill_reference(folder: Path, settings):
    images = {"image": settings["image_path"], "mask_image": settings["masked_image_path"]}
    return both(reference(folder, "FluxFillPipeline"), settings, **images)


def side_by_side(folder: Path, settings):
    """The reference's Fill on a picture that is put together by hand."""
    import PIL.Image

    size = width, height = settings["width"], settings["height"]

    def beside(left, right):
        canvas = PIL.Image.new(left.mode, (2 * width, height))
        for place, half in ((0, left), (width, right)):
            canvas.paste(half.resize(size, PIL.Image.Resampling.LANCZOS), (place, 0))
        return canvas

    left = settings["left_image_path"]
    right = settings.get("right_image_path") or PIL.Image.new("RGB", size, (30, 200, 90))
    white = settings.get("masked_image_path") or PIL.Image.new("L", size, 255)
    images = {"image_path": beside(left, right)}
    images["masked_image_path"] = beside(PIL.Image.new("L", white.size, 0), white)
    return fill_reference(folder, settings | images | {"width": 2 * width})


def fill_model(folder: Path) -> Path:
    return write_model(folder, channels=384)


def _picture(**settings):
    return dict(seed=3, prompt=PROMPT, num_inference_steps=3, height=64, width=96, guidance=3.5) | settings


PIPELINES = (
    Pipeline(
        name="kontext",
        folders={"kontext": write_model},
        pictures={
            "of its size": ("kontext", _picture(image_path=photo(96, 64))),
            "of another size": (
                "kontext",
                _picture(image_path=photo(70, 121), height=80, width=48, num_inference_steps=5, guidance=2.5, seed=4),
            ),
        },
        ours=ours("kontext.flux_kontext:Flux1Kontext", "dev-kontext"),
        theirs=kontext_reference,
    ),
    Pipeline(
        name="fill",
        folders={"fill": fill_model},
        pictures={
            "of its size": (
                "fill",
                _picture(image_path=photo(96, 64), masked_image_path=mask(96, 64), guidance=30.0),
            ),
            "of other sizes": (
                "fill",
                _picture(
                    image_path=photo(70, 121), masked_image_path=mask(33, 90), height=80, width=48, seed=4,
                    num_inference_steps=5,
                ),
            ),
        },
        ours=ours("fill.flux_fill:Flux1Fill", "dev-fill"),
        theirs=fill_reference,
    ),
    Pipeline(
        name="in context",
        folders={"fill": fill_model},
        pictures={
            "editing": ("fill", _picture(left_image_path=photo(50, 64), height=64, width=48)),
            "trying on": (
                "fill",
                _picture(
                    left_image_path=photo(90, 61), right_image_path=photo(70, 44), masked_image_path=mask(70, 44),
                    height=48, width=64, num_inference_steps=4, guidance=30.0,
                ),
            ),
        },
        ours=ours("in_context.flux_in_context_fill:Flux1InContextFill", "dev-fill"),
        theirs=side_by_side,
    ),
)  # fmt: skip


# ---- models that need no reference


def tiny(**changes):
    """Writes a tiny FLUX.1 whose transformer differs from text to image's by `changes`."""

    def write(folder: Path, *, wide: bool = False) -> Path:
        from tiny import write_checkpoint

        return write_checkpoint(folder, seed=3, guidance=True, wide=wide, changes={"transformer": changes})

    return write


TINY = (
    Tiny(
        write=tiny(),
        command="generate-kontext",
        base_model="dev-kontext",
        words=("--image-path", "photo.png"),
        pipeline=f"{_VARIANTS}.kontext.flux_kontext:Flux1Kontext",
        generate={"image_path": "photo.png", "guidance": 2.5},
    ),
    Tiny(
        write=tiny(in_channels=384, out_channels=64),
        command="generate-fill",
        base_model="dev-fill",
        words=("--image-path", "photo.png", "--masked-image-path", "mask.png"),
        pipeline=f"{_VARIANTS}.fill.flux_fill:Flux1Fill",
        generate={"image_path": "photo.png", "masked_image_path": "mask.png", "guidance": 30.0},
    ),
    Tiny(
        write=tiny(in_channels=384, out_channels=64),
        command="generate-in-context-catvton",
        base_model="dev-fill-catvton",
        words=("--garment-image", "other.png", "--person-image", "photo.png", "--person-mask", "mask.png"),
        pipeline=f"{_VARIANTS}.in_context.flux_in_context_fill:Flux1InContextFill",
        generate={
            "left_image_path": "other.png",
            "right_image_path": "photo.png",
            "masked_image_path": "mask.png",
            "guidance": 30.0,
        },
    ),
)
