"""The settings that images of several families have: one table for writing, for reading back, and for showing them.

What one family alone has stands in its own table, and `mflux.models.common.family.all_settings` has both. The source
images of FLUX.1's variants stand here, because 0.24's `GeneratedImage` has a place for each.

Loads nothing heavy. What a file says is checked like what a person types: by a kind from `values`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from operator import attrgetter
from typing import Any, Literal

from mflux.text import plain
from mflux.utils import values
from mflux.utils.paths import recorded_file, recorded_source
from mflux.utils.version_util import VersionUtil


class _Seeds(values.Kind):
    """A seed; an option takes several."""

    def of_setting(self, value: Any) -> list[int]:
        return [values.seed.of_setting(value)]


def _guidance(picture: Any) -> Any:
    return picture.guidance if picture.model_config.supports_guidance else None


def _strength(picture: Any) -> Any:
    return picture.image_strength if picture.image_path or picture.image_paths else None


def _prompt(picture: Any) -> Any:
    return plain(picture.prompt) if isinstance(picture.prompt, str) else picture.prompt


def _negative_prompt(picture: Any) -> Any:
    return plain(picture.negative_prompt) if picture.negative_prompt else None


def _source(name: str) -> Callable[[Any], Any]:
    """The attribute, a model, a LoRA or several, without the folders of this machine."""
    return lambda picture: _each(recorded_source, getattr(picture, name))


def _named(name: str) -> Callable[[Any], Any]:
    """The same of the picture's model."""
    return lambda picture: _each(recorded_source, getattr(picture.model_config, name))


def _file(name: str) -> Callable[[Any], Any]:
    """The attribute, a file or several, likewise."""
    return lambda picture: _each(recorded_file, getattr(picture, name))


def _each(named: Callable[[Any], str], value: Any) -> Any:
    if not value:
        return None
    return [named(item) for item in value] if isinstance(value, (list, tuple)) else named(value)


def _floats(name: str) -> Callable[[Any], Any]:
    return lambda picture: [float(value) for value in getattr(picture, name) or ()] or None


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: in the file.
        label: for a person.
        write: what a `GeneratedImage` has to say of it; None for what pictures note in `generation_parameters`.
        kind: what a file may say; None for what no command line can say.
        option: what says it on a command line, for messages.
        beaten_by: other options, by their destinations, that override this one.
        takes: which of this machine's files it may name, of a stranger's file: "file" for a bare name, "source" for a
            repository as well, see `bare`; nothing where it names none.
        after: where a family's own setting stands in the order: after the setting of this name.
    """

    name: str
    label: str
    write: Callable[[Any], Any] | None = None
    kind: values.Kind | None = None
    option: str = ""
    beaten_by: tuple[str, ...] = ()
    after: str = ""
    takes: Literal["", "file", "source"] = ""


_TEXT, _SWITCH = values.Text(), values.Switch()
_TEXTS, _REALS = values.Several(_TEXT), values.Several(values.Real())
# Settings that name files, and what may be named.
_FILE: Any = {"takes": "file"}
_SOURCE: Any = {"takes": "source"}
_LORA = ("lora", "lora_paths", "lora_style")

# In the order in which they are written and shown.
SETTINGS = (
    Setting("prompt", "Prompt", _prompt, _TEXT, "--prompt", ("prompt_file",)),
    Setting("negative_prompt", "Negative prompt", _negative_prompt, _TEXT, "--negative-prompt"),
    Setting(
        "model",
        "Model",
        lambda picture: _each(recorded_source, picture.model_config.model_name),
        option="--model",
        takes="source",
    ),
    Setting("model_path", "Weights", _source("model_path"), None, "--model", **_SOURCE),
    Setting(
        "base_model",
        "Base model",
        lambda picture: _each(recorded_source, picture.model_config.base_model),
        option="--base-model",
        takes="source",
    ),
    Setting("width", "Width", lambda picture: picture.width, values.pixels, "--width"),
    Setting("height", "Height", lambda picture: picture.height, values.pixels, "--height"),
    Setting("seed", "Seed", lambda picture: picture.seed, _Seeds(), "--seed", ("auto_seeds",)),
    Setting("steps", "Steps", lambda picture: picture.steps, values.steps, "--steps"),
    Setting("guidance", "Guidance", _guidance, values.guidance, "--guidance"),
    Setting("scheduler", "Scheduler", None, _TEXT, "--scheduler"),
    Setting("step_cache_ratio", "Step cache", None, values.some_of_them, "--step-cache-ratio"),
    Setting("cfg_end", "Guided part of the steps", None, values.part_of_them, "--cfg-end"),
    Setting("quantize", "Quantization (bits)", lambda picture: picture.quantization, values.bits, "--quantize"),
    Setting("precision", "Precision", lambda picture: str(picture.precision)),
    Setting("compute_precision", "Compute precision", None, _TEXT, "--compute-precision"),
    Setting("vae_full_precision", "Whole autoencoder in float32", None, _SWITCH, "--vae-full-precision"),
    Setting("text_encoder_paths", "Text encoders", _source("text_encoder_paths"), _TEXTS, "--text-encoder", **_SOURCE),
    Setting("vae_path", "Autoencoder", _source("vae_path"), _TEXT, "--vae", **_SOURCE),
    Setting("lora_paths", "LoRAs", _source("lora_paths"), _TEXTS, "--lora", _LORA, **_SOURCE),
    Setting("lora_scales", "LoRA scales", _floats("lora_scales"), _REALS, "--lora-scales", _LORA),
    Setting("bake_lora", "LoRAs in the weights", None, _SWITCH, "--bake-lora"),
    Setting("image_path", "Source picture", _file("image_path"), _TEXT, "--image", ("image",), **_FILE),
    Setting("image_paths", "Source pictures", _file("image_paths"), _TEXTS, "--image-paths", **_FILE),
    Setting("image_strength", "Image strength", _strength, values.strength, "--image-strength", ("image",)),
    Setting(
        "controlnet_image_path",
        "Control picture",
        _file("controlnet_image_path"),
        _TEXT,
        "--controlnet-image-path",
        **_FILE,
    ),
    Setting(
        # 0, too, says something.
        "controlnet_strength",
        "Control strength",
        attrgetter("controlnet_strength"),
        values.Real(),
        "--controlnet-strength",
    ),
    Setting("masked_image_path", "Mask", _file("masked_image_path"), _TEXT, "--masked-image-path", **_FILE),
    Setting("depth_image_path", "Depth picture", _file("depth_image_path"), _TEXT, "--depth-image-path", **_FILE),
    Setting(
        "redux_image_paths", "Redux pictures", _file("redux_image_paths"), _TEXTS, "--redux-image-paths", takes="file"
    ),
    Setting(
        "redux_image_strengths",
        "Redux strengths",
        _floats("redux_image_strengths"),
        _REALS,
        "--redux-image-strengths",
    ),
    Setting("pid_decode", "Decoded with PiD", None, _SWITCH, "--pid-decode"),
    Setting("generation_time_seconds", "Generation time (s)", lambda picture: round(picture.generation_time, 2)),
    Setting("created_at", "Created", lambda picture: datetime.now().isoformat()),
    Setting("mflux_version", "mflux version", lambda picture: VersionUtil.get_mflux_version()),
)


def settings_of(picture: Any) -> dict[str, Any]:
    """What is written into a picture, a `GeneratedImage`, beside its `generation_parameters`."""
    return {setting.name: setting.write(picture) for setting in SETTINGS if setting.write is not None}
