"""What a family of models is, as data: which components it has, where they lie, and which commands draw with it.

A family is a folder of `mflux.models` with a `family.py`, whose `FAMILY` is one of these. One table of components
serves the files to download, the stages, saving, LoRAs and the tests; the lists of commands and of models that can be
drawn with follow from it. Nothing heavy is loaded here: `--help` reads all of it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from mflux.models.common.registry import MODELS
from mflux.utils.settings import SETTINGS, Setting

# In the order in which they take their turn; the component of a later stage may be released when an earlier one begins.
STAGES = ("encode", "denoise", "decode")


def load_object(reference: str) -> Any:
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
        lora: whether LoRAs change it.
        dtype: what it is computed and saved in where there is a GPU, whatever the file holds: "bfloat16"; "" keeps the
            file's.
        repository: the attribute of `ModelConfig` that names a repository which holds it, where the model's own folder
            does not ("controlnet_model"), or such a repository; None where it always lies in the model's folder.
        at_root: whether its files lie in that repository without a folder of their own.
        beside: folders that lie beside it and are fetched and saved with it, where there are such.
    """

    name: str
    module: str
    folder: str
    stage: str = "denoise"
    published_class: str = ""
    lora: bool = False
    dtype: str = ""
    repository: str | None = None
    at_root: bool = False
    beside: tuple[str, ...] = ()

    @property
    def stem(self) -> str:
        """What its files of weights are called when it is saved: transformers' name or diffusers'."""
        return "model" if self.stage == "encode" and not self.published_class else "diffusion_pytorch_model"

    def module_class(self) -> Any:
        """Its class, an `nn.Module` with a `config_class`."""
        return load_object(self.module)


@dataclass(frozen=True)
class Command:
    """A command that belongs to a family.

    Attributes:
        name: without the `mflux-` prefix.
        module: has `build_parser()` and `main(argv)`.
        summary: one line about it.
        models: what it generates with, as keys of `registry.MODELS`; a model's first command is the one that is named.
        pipeline: the class that it generates with, "package.module:Class".
    """

    name: str
    module: str
    summary: str
    models: tuple[str, ...] = ()
    pipeline: str = ""

    @property
    def prog(self) -> str:
        """What it is called where it is installed."""
        return f"mflux-{self.name}"


@dataclass(frozen=True)
class Trained:
    """Models for which LoRAs can be trained.

    Attributes:
        models: as keys of `registry.MODELS`.
        command: what generates with the LoRA, one of the family's commands.
        adapter: what the family adds to training, "package.module:Class", a `training.adapter.TrainingAdapter`.
        pairs: whether it learns to make one image of another, from pairs of them, or images from prompts alone.
        continuous: whether noise levels are drawn from all there are, where a configuration does not say it; else from
            those of the steps that images are generated with.
        assistant: a LoRA that stands beside the one that is trained, and in no image, where a configuration says
            nothing of one: what distilling took away, so that it is not learned again.
    """

    models: tuple[str, ...]
    command: str
    adapter: str
    pairs: bool = False
    continuous: bool = False
    assistant: str | None = None


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        title: as a person says it: "FLUX.1".
        components: in the order in which they are saved.
        commands: those that draw with it, or do something else with it.
        beside: what a model's folder holds besides its components, and a saved one takes along.
        settings: those of its images that no other family's have; `after` says where they stand among all.
        lora: the names that LoRAs have for its layers, "package.module:LORA", a `lora.names.LoraNames`.
        layout: how its files look in other layouts than the published one, "package.module:LAYOUT", a
            `checkpoints.published.Layout`.
        single: models that are one network without components: the title of each, and "package.module:function" that
            says whether a folder or file is that model, by its headers alone; it raises `CheckpointError` where it is
            and something is wrong with it.
        published: of a model whose published `config.json` is not its class's defaults, what differs, by the model's
            key and the component's name; for planning, where nothing of the model is at hand.
        training: its models that LoRAs are trained for.
        float16: whether attention and feed-forwards may compute in float16 beside streams of another dtype, see
            `networks.interiors`; its commands have `--compute-precision` then.
    """

    title: str
    components: tuple[Component, ...] = ()
    commands: tuple[Command, ...] = ()
    beside: tuple[str, ...] = ("model_index.json", "scheduler", "tokenizer")
    settings: tuple[Setting, ...] = ()
    lora: str | None = None
    layout: str | None = None
    single: tuple[tuple[str, str], ...] = ()
    published: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    training: tuple[Trained, ...] = ()
    float16: bool = False

    def component(self, name: str) -> Component:
        return next(component for component in self.components if component.name == name)

    def command(self, name: str) -> Command:
        """One of `commands`, by its name without the prefix."""
        return next(command for command in self.commands if command.name == name)

    @property
    def pipelines(self) -> tuple[str, ...]:
        """The classes that its commands generate with, "package.module:Class"."""
        return tuple(dict.fromkeys(command.pipeline for command in self.commands if command.pipeline))

    def pipeline_class(self, key: str) -> type[Any]:
        """The class of a model, by its key in `registry.MODELS`: that of its first command."""
        return load_object(next(command.pipeline for command in self.commands if key in command.models))


@cache
def families() -> dict[str, Family]:
    """Every family that is built, by the name of its folder; those that come first in the registry come first."""
    folder = Path(__file__).parents[1]
    names = [path.parent.name for path in sorted(folder.glob("*/family.py"))]
    order = list(dict.fromkeys(model["family"] for model in MODELS.values()))
    names.sort(key=lambda name: order.index(name) if name in order else len(order))
    return {name: importlib.import_module(f"mflux.models.{name}.family").FAMILY for name in names if name != "common"}


@cache
def all_settings() -> tuple[Setting, ...]:
    """The settings of all families' images, in the order in which they are shown."""
    table = list(SETTINGS)
    for family in families().values():
        for setting in family.settings:
            place = next(number for number, other in enumerate(table) if other.name == setting.after)
            table.insert(place + 1, setting)
    return tuple(table)


@cache
def built() -> dict[str, str]:
    """The models that this version draws with, as keys of `registry.MODELS`, and the first command for each."""
    return {key: command.prog for key, command in _first_commands().items()}


def first_command(key: str) -> Command | None:
    """The first command that generates with a model, by its key in `registry.MODELS`; None if none does."""
    return _first_commands().get(key)


@cache
def _first_commands() -> dict[str, Command]:
    first: dict[str, Command] = {}
    for family in families().values():
        for command in family.commands:
            for key in command.models:
                first.setdefault(key, command)
    return first


def trained(key: str, *, pairs: bool = False) -> Trained | None:
    """How LoRAs are trained for a model, by its key in `registry.MODELS`; None if they are not.

    Args:
        pairs: from pairs of images.
    """
    fitting = (one for family in families().values() for one in family.training if one.pairs == pairs)
    return next((one for one in fitting if key in one.models), None)


def family_of(key: str) -> Family:
    """The family of a model that is built, by its key in `registry.MODELS`."""
    return families()[MODELS[key]["family"]]
