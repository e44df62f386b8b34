"""What a family tells about itself, so that the tests that every family has to pass are written once.

A family's files `tests/families/<family>/cases*.py` hold `COMPONENTS`, `PIPELINES`, `TINY` and
`TRAINING`. They are read without torch as well: whatever needs the reference implementations imports them inside a
function.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

FAMILIES = Path(__file__).parents[1] / "families"

Settings = Mapping[str, Any]
Neutral = Callable[[str, str], bool]


def unchanged(name: str) -> str:
    return name


@dataclass(frozen=True, kw_only=True)
class Component:
    """One component of a family beside its reference class.

    Attributes:
        name: what it is called in the tests; the component's folder in a published model, if it has one there.
        module: our class.
        reference: builds the reference class, very small; takes the entries of `settings` as keywords. Its weights
            are drawn by the tests.
        settings: at least two ways to build it, by name, as unlike as the architecture allows.
        inputs: arrays for the two modules, from the reference module and a number, 0 or 1, that changes all sizes:
            batches of 1 and 3, rows and columns that differ.
        ours, theirs: run a module on inputs; each gives all outputs, one by one.
        gains: makes weights larger or smaller whose name ends so, see `reference.draw`.
        save: writes the reference module as it is published; `save_pretrained` by default.
        published: the entries of tests/data/surface/configs.json that describe it, and their parameter counts.
        full_size: builds the reference from such an entry; called on torch's meta device.
        published_name: a parameter's name in the published file, from its name in the reference class.
        buffers: ends of names that the published file has beside the parameters that are counted.
        ignored: ends of names that the published file has and our module does not take.
        swap: settings under which as many tensors as possible have the same shape; None leaves the swapping test out.
        neutral: which pairs of tensors may be swapped without effect, each with its reason in its docstring.
        neutral_pairs: how many such pairs `swap` has.
        options: what `load_component` is told beside the class and the folder.
    """

    name: str
    module: type
    reference: Callable[..., Any]
    settings: Mapping[str, Settings]
    inputs: Callable[[Any, int], dict[str, Any]]
    ours: Callable[[Any, dict[str, Any]], Iterable]
    theirs: Callable[[Any, dict[str, Any]], Iterable]
    gains: Mapping[str, float] = field(default_factory=dict)
    save: Callable[[Any, Path], Path] | None = None
    published: Mapping[str, int] = field(default_factory=dict)
    full_size: Callable[[dict[str, Any]], Any] | None = None
    published_name: Callable[[str], str] = unchanged
    buffers: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    swap: Settings | None = None
    neutral: tuple[Neutral, ...] = ()
    neutral_pairs: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Whole pictures beside the reference's.

    Attributes:
        name: what it is called in the tests.
        folders: writes tiny models with the reference classes, each in the published layout, by name.
        pictures: name → (folder, settings): what to draw with which model.
        ours, theirs: draw: (folder, settings) → (latents after the loop, picture as whole numbers (H, W, 3)).
    """

    name: str
    folders: Mapping[str, Callable[[Path], Path]]
    pictures: Mapping[str, tuple[str, Settings]]
    ours: Callable[[Path, Settings], tuple[Any, Any]]
    theirs: Callable[[Path, Settings], tuple[Any, Any]]


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """A model of random weights for the tests that need neither torch nor a reference.

    Attributes:
        write: (folder, wide=False) writes it with nothing but MLX, in the published layout; wide: rows of 64 and its
            multiples, so that nearly every layer can be quantized.
        command: draws with it: "generate-z-image".
        base_model: what `--base-model` says.
        words: what else the command line needs, beside model, prompt, seed, size and steps.
        pipeline: the class, "module:Name".
        generate: keywords for `generate_image` beside seed, prompt, size and steps.
        prompt: one that the model takes.
        pictures: writes what `words` and `generate` name into a folder, which is the working directory.
        right_half: whether the command writes the right half of what the class draws.
        changes_weights: whether it changes another component's weights before they are packed, so that a saved model,
            whose weights are packed already, computes the change beside them.
        refused: (component, change, message): a change to the component's configuration with which the class is not
            made, and a pattern that the message of the `CheckpointError` matches.
        refused_later: the same, of what shows when the component is loaded.
        patches: what stands at a path while the tests run, so that they take seconds: "module.name" → value.
    """

    write: Callable[..., Path]
    command: str
    base_model: str
    words: Sequence[str] = ()
    pipeline: str
    generate: Settings = field(default_factory=dict)
    prompt: str = "a red circle"
    pictures: Callable[[Path], None] | None = None
    right_half: bool = False
    changes_weights: bool = False
    refused: Sequence[tuple[str, Settings, str]] = ()
    refused_later: Sequence[tuple[str, Settings, str]] = ()
    patches: Mapping[str, Any] = field(default_factory=dict)

    def pipeline_class(self) -> type:
        module, _, name = self.pipeline.partition(":")
        return getattr(importlib.import_module(module), name)


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a family's LoRAs are trained, beside its reference.

    Attributes:
        name: what it is called in the tests.
        model: the key that the tiny model is trained as.
        write: writes it with the reference classes, in the published layout.
        pipeline: the reference's pipeline class, which reads LoRA files.
        targets: the configuration's layers, with ranks and alphas that differ.
        encoded: (folder, image, prompt, width, height, source) → the reference's latents, as a batch of one, and its
            conditions by the names that `DataItem.cond` has.
        velocity: (transformer, latents, sigma, conditions, width, height, guidance) → the reference's velocity.
        transformer: the reference's class.
        captions: of the three images.
        guidance: what the configuration says of it.
        pairs: whether it learns from pairs of images.
        prefix: what stands before the names in the file.
    """

    name: str
    model: str
    write: Callable[[Path], Path]
    pipeline: str
    targets: Sequence[Settings]
    encoded: Callable[..., tuple[Any, dict[str, Any]]]
    velocity: Callable[..., Any]
    transformer: str
    captions: Sequence[str] = ("a red circle", "two blue squares on a table", "a red circle")
    guidance: float = 0.0
    pairs: bool = False
    prefix: str = "transformer"


def families() -> list[str]:
    """The families that are to be tested: all of them, or the one that MFLUX_TEST_FAMILY names."""
    chosen = os.environ.get("MFLUX_TEST_FAMILY")
    known = sorted(path.parent.name for path in FAMILIES.glob("*/__init__.py"))
    if chosen and chosen not in known:
        raise LookupError(f"there is no family {chosen}: {', '.join(known)}")
    return [chosen] if chosen else known


def case_modules(family: str) -> list[ModuleType]:
    """The files in which a family tells about itself; none where it has tests of its own only."""
    paths = sorted((FAMILIES / family).glob("cases*.py"))
    return [importlib.import_module(f"families.{family}.{path.stem}") for path in paths]


def every(what: str) -> dict[str, Any]:
    """`COMPONENTS`, `PIPELINES`, `TINY` or `TRAINING` of all families, by "family name"."""
    found = {}
    for family in families():
        for case in (case for module in case_modules(family) for case in getattr(module, what, ())):
            name = f"{family} {getattr(case, 'name', None) or case.command}"
            assert name not in found, name
            found[name] = case
    return found
