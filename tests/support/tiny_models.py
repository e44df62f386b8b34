"""A family's tiny model in a test: its folder, its command and its class. The fixture `tiny` gives one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from mflux.backend import mx
from mflux.models.common.config import ModelConfig
from support.cases import Tiny, every
from support.gpu import WAYS

TINY: dict[str, Tiny] = every("TINY")
# A test, or a module's `pytestmark`, that takes every family's model in turn.
EVERY_TINY = pytest.mark.parametrize("tiny", TINY, indirect=True)
# The same, and once more as on a GPU for the first model of each family: its others compute with the same parts.
FIRST = list({name.partition(" ")[0]: name for name in reversed(TINY)}.values())
EVERY_TINY_BOTH_WAYS = pytest.mark.parametrize(
    ("tiny", "way"),
    [pytest.param(name, "plain", id=name) for name in TINY]
    + [pytest.param(name, way, id=f"{name}, {way}") for way in WAYS[1:] for name in FIRST],
    indirect=True,
)
SIZE = ("--width", 64, "--height", 32)


@dataclass(frozen=True)
class TinyModel:
    """One family's tiny model.

    Attributes:
        case: what the family tells of it.
        cli: runs a command, as the fixture of that name does.
        written: the model's folder, written once for the session; the argument is `wide`.
    """

    case: Tiny
    cli: Callable[..., Any]
    written: Callable[[bool], Path]

    def folder(self, wide: bool = False) -> Path:
        """The model, not to be written to. `wide`: so that most layers can be quantized."""
        return self.written(wide)

    def run(self, *words: object, model: Path | None = None):
        """Run the family's command with this model, or with the one in another folder; returns how it ended."""
        which = ("--model", model or self.folder(), "--base-model", self.case.base_model)
        return self.cli(self.case.command, *which, *self.case.words, *words)

    def draw(self, *words: object) -> Path:
        """Run the command for one small picture and see it succeed; returns the picture's path."""
        result = self.run("--prompt", self.case.prompt, "--steps", 2, *SIZE, *words)
        assert result.status == 0, result.err
        assert result.errors == result.warnings == []
        # What else there is stands beside it.
        return result.paths[0]

    def save(self, *words: object, model: Path | None = None) -> Path:
        """Save this model, or the one in another folder, with `mflux-save`; returns the folder."""
        which = ("--model", model or self.folder(), "--base-model", self.case.base_model)
        result = self.cli("save", *which, "--path", "saved", *words)
        assert result.status == 0, result.err
        return Path("saved")

    def pipeline(self, root: Path | None = None, **options: Any):
        """Make the family's class for this model, or for the one in another folder."""
        root = root or self.folder()
        config = ModelConfig.from_name(str(root), self.case.base_model)
        return self.case.pipeline_class()(model_path=str(root), model_config=config, **options)

    def generate(self, pipeline: Any, **settings: Any):
        """Call `generate_image` with what the family needs beside `settings`."""
        plain = {"seed": 1, "prompt": self.case.prompt, "num_inference_steps": 2, "width": 64, "height": 32}
        return pipeline.generate_image(**plain | dict(self.case.generate) | settings)

    def picture(self, pipeline: Any) -> np.ndarray:
        """The pixels that the command would write."""
        generated = self.generate(pipeline)
        return np.asarray((generated.get_right_half() if self.case.right_half else generated).image).astype(int)


def in_sixteen_bits(source: Path, folder: Path) -> Path:
    """A copy of a model whose weights are stored in bfloat16, as published ones are."""
    shutil.copytree(source, folder)
    for path in folder.rglob("*.safetensors"):
        tensors = mx.load(str(path))
        floats = {name for name, value in tensors.items() if mx.issubdtype(value.dtype, mx.floating)}
        narrow = {name: value.astype(mx.bfloat16) if name in floats else value for name, value in tensors.items()}
        mx.save_safetensors(str(path), narrow)
    return folder


def pixels(path: Path) -> np.ndarray:
    with PIL.Image.open(path) as image:
        return np.asarray(image).astype(int)
