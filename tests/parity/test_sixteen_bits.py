"""What a GPU computes from 16-bit checkpoints, beside the reference in the same dtype.

Both round; how far is measured and not guessed. The reference computes in float32 what the rounded weights mean, and
once more in the checkpoint's dtype, as torch does on a GPU: how far apart these two are is what the dtype costs. Ours
may cost 1.5 times as much.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.cases import Component
from support.gpu import as_gpu
from support.reference import as_numpy, draw, relative_error

from mflux.backend import mx
from mflux.checkpoints.loading import load_component
from parity.test_families import COMPONENTS, outputs

# How much further than the reference's own distance ours may be.
MARGIN = 1.5
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# These layers ask for their input in the dtype of their weights; a pipeline sees to it at the entrance.
_STRICT = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.ConvTranspose2d, torch.nn.LayerNorm)
# Inputs that no pipeline of ours rounds, and values of them that bfloat16 has, times 1000 as well: the reference rounds
# them, and that would hide everything else.
_HELD = {"sigma": 0.5, "timestep": 0.5, "guidance": 4.0}


def rounded(folder: Path, dtype: torch.dtype) -> None:
    """Store a folder's weights in 16 bits."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        save_file(
            {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}, path
        )


@torch.no_grad()
def in_dtype(model: torch.nn.Module, dtype: torch.dtype) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The reference with rounded weights: in float32, and as `from_pretrained(…, torch_dtype=dtype)` leaves it.

    Tables that are no part of a file, such as frequencies, stay as they are; so do the parts that the class names.
    """
    exact, rough = copy.deepcopy(model), copy.deepcopy(model)
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    if dtype == torch.bfloat16 and model.__module__.startswith("transformers."):
        # transformers keeps those for float16 alone.
        kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    stored = exact.state_dict().keys()
    for one, other in (
        (exact.named_parameters(), rough.named_parameters()),
        (exact.named_buffers(), rough.named_buffers()),
    ):
        for (name, value), (_, copied) in zip(one, other, strict=True):
            if name in stored and value.is_floating_point():
                value.data = value.data.to(dtype).to(torch.float32)
                wide = any(part in name.split(".") for part in kept)
                copied.data = value.data.clone() if wide else value.data.to(dtype)
    for module in rough.modules():
        if isinstance(module, _STRICT) and module.weight is not None:
            module.register_forward_pre_hook(_narrowed)
    return exact, rough


def _narrowed(layer: torch.nn.Module, inputs: tuple) -> tuple:
    first, *rest = inputs
    dtype = layer.weight.dtype
    return (first.to(dtype) if isinstance(layer, torch.nn.Linear) or dtype.itemsize < first.itemsize else first, *rest)


def held(inputs: dict) -> dict:
    """Inputs with noise levels that both keep."""

    def keep(key: str, value):
        if key not in _HELD:
            return value
        return [_HELD[key]] * len(value) if isinstance(value, list) else np.full_like(value, _HELD[key])

    return {key: keep(key, value) for key, value in inputs.items()}


def cast(inputs: dict, dtype: mx.Dtype) -> dict:
    """Inputs as a pipeline hands them to a network in this dtype."""
    return {
        key: mx.array(value).astype(dtype)
        if key not in _HELD and isinstance(value, np.ndarray) and value.dtype == np.float32
        else value
        for key, value in inputs.items()
    }


def wide(values, dtype: torch.dtype) -> list[np.ndarray]:
    """Outputs as a pipeline hands them on, in the network's dtype."""
    return [as_numpy(value.to(dtype).float()) for value in values]


Distance = Callable[[Any, Any], float]


def distances(
    component: Component, folder: Path, dtype: str, settings, distance: Distance, change=None
) -> list[tuple[float, float]]:
    """For each output, how far the reference in 16 bits is from float32, and how far ours is."""
    model = draw(component.reference(**settings), 0, component.gains)
    if change is not None:
        change(model)
    save = component.save or (lambda model, folder: model.save_pretrained(folder))
    save(model, folder)
    rounded(folder, DTYPES[dtype])
    exact, rough = in_dtype(model, DTYPES[dtype])
    inputs = held(component.inputs(model, 1))
    expected = outputs(component, exact, inputs)
    with torch.no_grad():
        theirs = wide(component.theirs(rough, inputs), DTYPES[dtype])
    with as_gpu():
        ours = load_component(component.module, folder, **component.options)
        found = list(component.ours(ours, cast(inputs, getattr(mx, dtype))))
    return [
        (distance(other, right), distance(one, right))
        for one, other, right in zip(found, theirs, expected, strict=True)
    ]


ALONE = list(COMPONENTS)
# What adds to the stream of tokens or pixels that runs through a network.
ADDS = (
    "o_proj.weight", "down_proj.weight", "wo.weight", "SelfAttention.o.weight", "out_proj.weight", "fc2.weight",
    "to_out.0.weight", "to_add_out.weight", "net.2.weight", "proj_out.weight", "w2.weight", "linear_out.weight",
    "conv2.weight",
)  # fmt: skip


def outliers(times: float, adds: tuple[str, ...] = ADDS) -> Callable[[torch.nn.Module], None]:
    """Makes one channel of the stream so many times as large as the others, as trained weights do."""

    @torch.no_grad()
    def change(model: torch.nn.Module) -> None:
        for name, weight in model.named_parameters():
            if name.endswith(adds) and weight.ndim > 1:
                weight[0] *= times

    return change


def of_two_forms(
    component: Component, folder: Path, dtype: str, distance: Distance, change=None
) -> list[tuple[float, float]]:
    """Distances of all outputs in two forms of a component, but of those that neither rounds."""
    found = []
    for name, settings in list(component.settings.items())[:2]:
        (folder / name).mkdir()
        found += distances(component, folder / name, dtype, settings, distance, change)
    return [pair for pair in found if pair != (0, 0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALONE)
def test_it_is_no_further_from_float32_than_the_reference(tmp_path, name, dtype):
    found = np.array(of_two_forms(COMPONENTS[name], tmp_path, dtype, relative_error))
    theirs, ours = np.sqrt(np.mean(found**2, axis=0))
    assert theirs / 5 < ours <= MARGIN * theirs


def usual_error(found, right) -> float:
    """How far the middle one of all values is off: what one channel of thousands does decides nothing."""
    found, right = (as_numpy(value).astype(np.float64) for value in (found, right))
    assert np.isfinite(found).all()
    return float(np.median(np.abs(found - right)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALONE)
def test_nor_with_channels_of_thousands(tmp_path, name, dtype):
    """float16 overflows in squares and products of such numbers, bfloat16 loses digits in sums: norms, rotary positions
    and attention's scores are in float32 wherever the reference's are."""
    change = outliers(1000 if dtype == "bfloat16" else 100)
    found = of_two_forms(COMPONENTS[name], tmp_path, dtype, usual_error, change)
    # The middle of so few is less sure than a mean of all.
    assert np.median([ours / theirs for theirs, ours in found if theirs]) <= 2 * MARGIN


@pytest.mark.parametrize("name", [name for name in ALONE if "text_encoder_2" in name])
def test_t5_in_float16_goes_beyond_its_numbers(tmp_path, name):
    """Trained T5s do: the reference keeps the last product of a feed-forward, and so the stream, in float32."""
    found = of_two_forms(COMPONENTS[name], tmp_path, "float16", usual_error, outliers(100_000, ("wo.weight",)))
    assert all(ours <= 2 * MARGIN * theirs for theirs, ours in found)
