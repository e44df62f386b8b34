"""Images that tests generate from, what a class generates, and the reference's pipelines to compare that with."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image


def photo(width: int, height: int) -> PIL.Image.Image:
    """Smooth colours, other ones for each width."""
    pixels = np.random.default_rng(width).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels).resize((width, height), PIL.Image.Resampling.BICUBIC)


def mask(width: int, height: int) -> PIL.Image.Image:
    """White in the upper right, black elsewhere."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[: height // 2, width // 3 :] = 255
    return PIL.Image.fromarray(pixels)


class Last:
    """What the denoising loop ended with."""

    def call_after_loop(self, latents, **_) -> None:
        self.latents = latents


def generated(pipeline: Any, **settings: Any) -> tuple[np.ndarray, np.ndarray]:
    """Latents after the loop, and the pixels; images among the settings go through files."""

    def in_files(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [in_files(f"{name}-{number}", one) for number, one in enumerate(value)]
        if not isinstance(value, PIL.Image.Image):
            return value
        value.save(pipeline.root / f"{name}.png")
        return pipeline.root / f"{name}.png"

    last = Last()
    pipeline.callbacks.register(last)
    image = pipeline.generate_image(**{name: in_files(name, value) for name, value in settings.items()}).image
    return np.array(as_reference(pipeline.latent_creator, last.latents, 0, 0)), np.asarray(image)


def noise(creator: Any, settings: Mapping[str, Any]):
    """What our class begins from, as the reference takes it."""
    import torch

    size = settings["height"], settings["width"]
    return torch.tensor(np.array(as_reference(creator, creator.create_noise(settings["seed"], *size), *size)))


def as_reference(creator: Any, latents: Any, height: int, width: int):
    """Latents as the reference has them: Z-Image's in a batch, all others' as ours."""
    return creator.unpack_latents(latents, height, width) if creator.__name__ == "ZImageLatentCreator" else latents


@cache
def pipeline_reference(folder: Path, name: str):
    """The reference's pipeline of that name, read from a whole folder."""
    import diffusers

    pipeline = getattr(diffusers, name).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def opened(path: str | Path) -> PIL.Image.Image:
    """An image whose file is read and closed."""
    with PIL.Image.open(path) as image:
        image.load()
        return image
