"""The settings of a picture: one table for writing them into it, for reading them back, and for showing them.

Loads nothing heavy. What a file says is checked like what a person types: by a type from `values`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mflux.utils import values


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise argparse.ArgumentTypeError(f"{str(value)[:40]} is not text")
    return value


def _number(read: Callable[[str], Any]) -> Callable[[Any], Any]:
    def check(value: Any):
        if type(value) not in (int, float):
            raise argparse.ArgumentTypeError(f"{str(value)[:40]!r} is not a number")
        return read(str(value))

    return check


def _list(read: Callable[[Any], Any]) -> Callable[[Any], list[Any]]:
    def check(value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise argparse.ArgumentTypeError(f"{str(value)[:40]} is not a list")
        return [read(item) for item in value]

    return check


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise argparse.ArgumentTypeError(f"{str(value)[:40]} is neither true nor false")
    return value


_strength = _number(values.number(float))


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: in the file.
        label: for a person.
        read: checks what a file says; None for what no command line can say.
        option: what says it on a command line, for messages.
        dest: where argparse puts it; `name` unless given.
        beaten_by: further destinations that, when given, take its place.
    """

    name: str
    label: str
    read: Callable[[Any], Any] | None = None
    option: str = ""
    dest: str = ""
    beaten_by: tuple[str, ...] = ()

    @property
    def target(self) -> str:
        return self.dest or self.name


_LORA = ("lora", "lora_paths", "lora_style")

# In the order in which they are written and shown.
SETTINGS = (
    Setting("prompt", "Prompt", _text, "--prompt", beaten_by=("prompt_file",)),
    Setting("negative_prompt", "Negative prompt", _text, "--negative-prompt"),
    Setting("model", "Model"),
    Setting("model_path", "Weights"),
    Setting("base_model", "Base model"),
    Setting("width", "Width", _number(values.pixels), "--width"),
    Setting("height", "Height", _number(values.pixels), "--height"),
    Setting("seed", "Seed", lambda value: [_number(values.seed)(value)], "--seed", beaten_by=("auto_seeds",)),
    Setting("steps", "Steps", _number(values.steps), "--steps"),
    Setting("guidance", "Guidance", _number(values.guidance), "--guidance"),
    Setting("scheduler", "Scheduler", _text, "--scheduler"),
    Setting("quantize", "Quantization (bits)", _number(values.bits), "--quantize"),
    Setting("precision", "Precision"),
    Setting("compute_precision", "Compute precision", _text, "--compute-precision"),
    Setting("float32", "float32 throughout", _switch, "--float32"),
    Setting("vae_full_precision", "Whole autoencoder in float32", _switch, "--vae-full-precision"),
    Setting("small_text_encoder", "Small text encoder", _switch, "--small-text-encoder"),
    Setting("small_decoder", "Small decoder", _switch, "--small-decoder"),
    Setting("lora_paths", "LoRAs", _list(_text), "--lora", beaten_by=_LORA),
    Setting("lora_scales", "LoRA scales", _list(_strength), "--lora-scales", beaten_by=_LORA),
    Setting("bake_lora", "LoRAs in the weights", _switch, "--bake-lora"),
    Setting("image_path", "Source picture", _text, "--image", beaten_by=("image",)),
    Setting("image_paths", "Source pictures", _list(_text), "--image-paths"),
    Setting("image_strength", "Image strength", _number(values.strength), "--image-strength", beaten_by=("image",)),
    Setting("controlnet_image_path", "Control picture", _text, "--controlnet-image-path"),
    Setting("controlnet_strength", "Control strength", _strength, "--controlnet-strength"),
    Setting("masked_image_path", "Mask", _text, "--masked-image-path"),
    Setting("depth_image_path", "Depth picture", _text, "--depth-image-path"),
    Setting("redux_image_paths", "Redux pictures", _list(_text), "--redux-image-paths"),
    Setting("redux_image_strengths", "Redux strengths", _list(_strength), "--redux-image-strengths"),
    Setting("pid_decode", "Decoded with PiD", _switch, "--pid-decode"),
    Setting("generation_time_seconds", "Generation time (s)"),
    Setting("created_at", "Created"),
    Setting("mflux_version", "mflux version"),
)
