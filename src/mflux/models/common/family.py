"""What a family of models is, as data: which components it has, where they lie, and which commands draw with it.

A family is a folder of `mflux.models` with a `family.py`, whose `FAMILY` is one of these. One table of components
serves the files to download, the stages, saving, LoRAs and the tests; the lists of commands and of models that can be
drawn with follow from it. Nothing heavy is loaded here: `--help` reads all of it.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mflux.models.common.registry import MODELS

# In the order in which they take their turn; the component of a later stage may be released when an earlier one begins.
STAGES = ("encode", "denoise", "decode")


def found(reference: str) -> Any:
    """The object that "package.module:name" stands for."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class Component:
    """One part of a model.

    Attributes:
        name: what the pipeline calls it, as in mflux 0.24: "t5_text_encoder".
        module: its class, "package.module:Class".
        folder: where it lies in a published model: "text_encoder_2".
        stage: one of `STAGES`.
        published_class: the `_class_name` that its `config.json` has; "" where nothing says it.
        stem: what files of weights are called when it is saved.
        lora: whether LoRAs change it.
        dtype: what it is computed and saved in where there is a GPU, whatever the file holds: "bfloat16"; "" keeps the
            file's.
        repository: the attribute of `ModelConfig` that names a repository which holds it, where the model's own folder
            does not ("controlnet_model"), or such a repository; None where it always lies in the model's folder.
        at_root: whether its files lie in that repository without a folder of their own.
        optional: whether a model may do without it.
        beside: folders that lie beside it and are fetched and saved with it, where there are such.
    """

    name: str
    module: str
    folder: str
    stage: str = "denoise"
    published_class: str = ""
    stem: str = "diffusion_pytorch_model"
    lora: bool = False
    dtype: str = ""
    repository: str | None = None
    at_root: bool = False
    optional: bool = False
    beside: tuple[str, ...] = ()

    def module_class(self) -> type:
        return found(self.module)


@dataclass(frozen=True)
class Command:
    """A command that belongs to a family.

    Attributes:
        name: behind "mflux-".
        module: has `build_parser()` and `main(argv)`.
        summary: one line about it.
        models: what it draws with, as keys of `registry.MODELS`; a model's first command is the one that is named.
    """

    name: str
    module: str
    summary: str
    models: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        title: as a person says it: "FLUX.1".
        components: in the order in which they are saved.
        commands: those that draw with it, or do something else with it.
        pipelines: the class that loads a model for `mflux-save`, by its key in `registry.MODELS`; "*" for all others.
        beside: what a model's folder holds besides its components, and a saved one takes along.
        lora: the names that LoRAs have for its layers, "package.module:LORA", a `lora.names.LoraNames`.
        layout: how its files look in other layouts than the published one, "package.module:LAYOUT", a
            `checkpoints.published.Layout`.
        single: models that are one network without components: the title of each, and "package.module:function" that
            says whether a folder or file is that model, by its headers alone; it raises `CheckpointError` where it is
            and something is wrong with it.
    """

    title: str
    components: tuple[Component, ...] = ()
    commands: tuple[Command, ...] = ()
    pipelines: tuple[tuple[str, str], ...] = ()
    beside: tuple[str, ...] = ("model_index.json", "scheduler", "tokenizer")
    lora: str | None = None
    layout: str | None = None
    single: tuple[tuple[str, str], ...] = ()

    def component(self, name: str) -> Component:
        return next(component for component in self.components if component.name == name)

    def pipeline_class(self, key: str) -> type:
        """The class that draws with a model, by its key in `registry.MODELS`."""
        pipelines = dict(self.pipelines)
        return found(pipelines.get(key) or pipelines["*"])


@cache
def families() -> dict[str, Family]:
    """Every family that is built, by the name of its folder; those that come first in the registry come first."""
    folder = Path(__file__).parents[1]
    names = [path.parent.name for path in sorted(folder.glob("*/family.py"))]
    order = list(dict.fromkeys(model["family"] for model in MODELS.values()))
    names.sort(key=lambda name: order.index(name) if name in order else len(order))
    return {name: importlib.import_module(f"mflux.models.{name}.family").FAMILY for name in names if name != "common"}


@cache
def built() -> dict[str, str]:
    """The models that this version draws with, as keys of `registry.MODELS`, and the first command for each."""
    drawn: dict[str, str] = {}
    for family in families().values():
        for command in family.commands:
            for key in command.models:
                drawn.setdefault(key, f"mflux-{command.name}")
    return drawn


def family_of(key: str) -> Family | None:
    """The family of a model, by its key in `registry.MODELS`; None if that family is not built."""
    return families().get(MODELS[key]["family"])
