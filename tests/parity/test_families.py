"""Every component and every picture of every family against the reference (design section 7).

The cases are data: tests/families/<family>/cases*.py. Four things are shown of a component: it computes what the
reference computes from the same file; at full size it has the published file's names and shapes; no two tensors of its
file could be swapped without anyone noticing; a 16-bit file means exactly its rounded weights.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from itertools import combinations
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from safetensors.torch import load_file, save_file
from support.cases import Component, every
from support.gpu import WAYS, computing
from support.reference import COMPONENT, LOOP, as_numpy, draw, relative_error

from mflux.backend import mx, nn
from mflux.checkpoints.loading import FolderTensors, layout_turns, load_component, match

CONFIGS = json.loads((Path(__file__).parents[1] / "data" / "surface" / "configs.json").read_text())
COMPONENTS: dict[str, Component] = every("COMPONENTS")
PIPELINES = every("PIPELINES")
# A swap must show at least this much more than what parity lets pass.
MARGIN = 50


def build(component: Component, folder: Path, settings, seed: int = 0):
    """The reference with random weights, saved, and our module filled from its file."""
    model = draw(component.reference(**settings), seed, component.gains)
    if component.save is not None:
        component.save(model, folder)
    else:
        model.save_pretrained(folder)
    return model, load_component(component.module, folder, **component.options)


def within(bound: float, ours, expected: list) -> bool:
    """Whether all outputs are; asks for no more of them once one is not."""
    return all(relative_error(one, other) <= bound for one, other in zip(ours, expected, strict=True))


@torch.no_grad()
def outputs(component: Component, model, inputs) -> list[np.ndarray]:
    return [as_numpy(value) for value in component.theirs(model, inputs)]


# ---- one component


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    "name, settings", [(name, settings) for name, case in COMPONENTS.items() for settings in case.settings]
)
def test_component(tmp_path, name, settings, number):
    component = COMPONENTS[name]
    model, ours = build(component, tmp_path, component.settings[settings])
    inputs = component.inputs(model, number)
    expected = outputs(component, model, inputs)
    assert expected
    for way in WAYS:
        with computing(way):
            results = list(component.ours(ours, inputs))
            assert len(results) == len(expected)
            for one, other in zip(results, expected, strict=True):
                assert relative_error(one, other) <= COMPONENT, way


@pytest.mark.parametrize("name", COMPONENTS)
def test_it_is_tried_in_two_forms_and_sizes(name):
    component = COMPONENTS[name]
    assert len(component.settings) >= 2
    model = component.reference(**next(iter(component.settings.values())))
    small, large = (
        {key: np.shape(value) for key, value in component.inputs(model, number).items()} for number in (0, 1)
    )
    assert small != large


@pytest.mark.parametrize("name", COMPONENTS)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_files(tmp_path, name, stored):
    """Where computation is float32, a 16-bit file means exactly its rounded weights."""
    component = COMPONENTS[name]
    settings = next(iter(component.settings.values()))
    model, _ = build(component, tmp_path, settings)
    for path in tmp_path.glob("*.safetensors"):
        tensors = load_file(path)
        save_file(
            {key: value.to(stored) if value.is_floating_point() else value for key, value in tensors.items()}, path
        )
    ours = load_component(component.module, tmp_path, dtype=mx.float32, **component.options)
    inputs = component.inputs(model, 0)
    exact = outputs(component, model, inputs)
    # What the file holds, and nothing else: `model.to` would round tables of positions as well.
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(value.to(stored))
    expected = outputs(component, model, inputs)
    assert within(COMPONENT, component.ours(ours, inputs), expected)
    assert not within(COMPONENT, expected, exact), "rounding must show, else nothing was rounded"


# ---- full size


@pytest.mark.parametrize(
    "name, entry", [(name, entry) for name, case in COMPONENTS.items() for entry in case.published]
)
def test_full_size(name, entry):
    """Names, shapes and counts of the published file, without memory for any of them."""
    component = COMPONENTS[name]
    # A copy all the way down: reference classes write into what they are given.
    config = {key: copy.deepcopy(value) for key, value in CONFIGS[entry].items() if not key.startswith("_")}
    with torch.device("meta"):
        model = component.full_size(config)
    # Parameters, not the state dict: that one would list a tied tensor twice.
    expected = {component.published_name(key): tuple(value.shape) for key, value in model.named_parameters()}
    assert sum(prod(shape) for shape in expected.values()) == component.published[entry]
    stored = {key: tuple(value.shape) for key, value in model.named_buffers() if key.endswith(component.buffers)}
    expected |= {component.published_name(key): shape for key, shape in stored.items()}

    before = mx.get_active_memory()
    module = component.module(component.module.config_class.from_dict(config, source=entry))
    parameters = dict(tree_flatten(module.parameters()))
    turns = layout_turns(module)
    taken = {key: shape for key, shape in expected.items() if not key.endswith(component.ignored or ("\0",))}
    # Lazy on both sides: only shapes are asked for.
    as_loaded = {key: tuple(turns.get(key, lambda value: value)(mx.zeros(shape)).shape) for key, shape in taken.items()}
    assert {key: tuple(value.shape) for key, value in parameters.items()} == as_loaded
    assert match(module, parameters, expected, source="the published file") == {key: key for key in taken}
    assert mx.get_active_memory() - before < 10e6


@pytest.mark.parametrize("name", [name for name, case in COMPONENTS.items() if case.published])
def test_defaults_are_the_published_values(name):
    """A config.json that leaves a value out means a published model's."""
    component = COMPONENTS[name]
    config_class = component.module.config_class
    assert config_class() in [config_class.from_dict(CONFIGS[entry]) for entry in component.published]


# ---- two tensors of the same shape are the mistake that strict loading cannot see


@pytest.fixture(scope="module", params=[name for name, case in COMPONENTS.items() if case.swap is not None])
def swapped(request, tmp_path_factory):
    component = COMPONENTS[request.param]
    folder = tmp_path_factory.mktemp("swap")
    model, module = build(component, folder, component.swap)
    tensors = FolderTensors(folder)
    parameters = match(module, dict(tree_flatten(module.parameters())), tensors, source=folder)
    names = {name: parameter for parameter, name in parameters.items()}
    shapes = {name: tuple(tensors[name].shape) for name in names}
    pairs = [pair for pair in combinations(sorted(shapes), 2) if shapes[pair[0]] == shapes[pair[1]]]
    neutral = [pair for pair in pairs if any(reason(*pair) for reason in component.neutral)]
    assert len(neutral) == component.neutral_pairs
    places = {name: place_of(module, parameter) for name, parameter in names.items()}
    return component, model, module, places, pairs, neutral


def test_swapping_two_tensors_shows(swapped):
    component, model, module, places, pairs, neutral = swapped
    inputs = component.inputs(model, 0)
    expected = outputs(component, model, inputs)
    assert within(COMPONENT, component.ours(module, inputs), expected)
    telling = [pair for pair in pairs if pair not in neutral]
    assert len(telling) > len(places) / 2
    unseen = []
    for first, second in telling:
        swap(places[first], places[second])
        if within(MARGIN * COMPONENT, component.ours(module, inputs), expected):
            unseen.append((first, second))
        swap(places[first], places[second])
    assert not unseen, f"{len(unseen)} of {len(telling)} swaps go unnoticed"
    assert within(COMPONENT, component.ours(module, inputs), expected), "the swaps were not undone"


@torch.no_grad()
def test_neutral_pairs_are_neutral_in_the_reference_too(swapped):
    component, model, module, places, _, neutral = swapped
    inputs = component.inputs(model, 0)
    expected = outputs(component, model, inputs)
    theirs = {component.published_name(name): value for name, value in model.named_parameters()}
    for first, second in neutral:
        swap(places[first], places[second])
        assert within(COMPONENT, component.ours(module, inputs), expected)
        swap(places[first], places[second])

        one, two = theirs[first], theirs[second]
        assert relative_error(one, two) > 0.1, "two equal tensors show nothing"
        exchange(one, two)
        assert within(COMPONENT, outputs(component, model, inputs), expected)
        exchange(one, two)


def place_of(module: nn.Module, parameter: str) -> tuple[dict | list, str | int]:
    """Where a parameter hangs in the module's tree: what holds it, and under which name."""
    *path, leaf = parameter.split(".")
    holder = module
    for step in path:
        holder = holder[int(step)] if isinstance(holder, list) else holder[step]
    return holder, int(leaf) if isinstance(holder, list) else leaf


def swap(first: tuple, second: tuple) -> None:
    (one, name), (other, other_name) = first, second
    assert one[name].shape == other[other_name].shape
    one[name], other[other_name] = other[other_name], one[name]


def exchange(one: torch.Tensor, other: torch.Tensor) -> None:
    kept = one.clone()
    one.copy_(other)
    other.copy_(kept)


# ---- whole pictures


@pytest.fixture(scope="session")
def written_folder(tmp_path_factory):
    """Tiny models by pipeline and name, each written when it is first asked for."""

    @cache
    def write(pipeline: str, folder: str) -> Path:
        return PIPELINES[pipeline].folders[folder](tmp_path_factory.mktemp("models") / folder)

    return write


@pytest.mark.parametrize(
    "name, picture", [(name, picture) for name, case in PIPELINES.items() for picture in case.pictures]
)
def test_picture(written_folder, monkeypatch, name, picture):
    # Z-Image's transformer is bfloat16's on a GPU whatever the file holds; rounding is test_sixteen_bits.py's.
    monkeypatch.setattr("mflux.models.common.model.has_gpu", lambda: False)
    pipeline = PIPELINES[name]
    folder, settings = pipeline.pictures[picture]
    path = written_folder(name, folder)
    expected_latents, expected = pipeline.theirs(path, settings)
    for way in WAYS:
        with computing(way):
            latents, pixels = pipeline.ours(path, settings)
        assert relative_error(latents, expected_latents) <= LOOP, way
        assert pixels.shape == expected.shape
        assert np.abs(pixels.astype(int) - expected.astype(int)).max() <= 2, way
    assert ((expected > 0) & (expected < 255)).mean() > 0.5, "a picture that is mostly clipped shows little"
    assert expected.std() > 10
