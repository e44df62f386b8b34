"""Attention and feed-forwards in float16, where they may: every family that has it, on request and by itself."""

from __future__ import annotations

import json
import logging
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from support.tiny_models import TINY

from mflux.backend import mx, nn, tree_flatten
from mflux.checkpoints.late import late_layers
from mflux.chips import M1_AND_M2
from mflux.errors import MfluxError, UsageError
from mflux.models.common.lora.adapters import Adapter, put_on
from mflux.models.common.networks.interiors import Interior, compute_in, watched

# The first of each family; FLUX.1's ControlNet has a second part with such layers, and who looks into FLUX.1's double
# blocks while they compute never has them in float16 unasked.
FIRST = {name.split()[0]: name for name in reversed(TINY)}
HAVE = [name for name in FIRST.values() if TINY[name].pipeline_class().family.float16] + ["flux generate-controlnet"]
CONCEPT = "flux concept"


@pytest.fixture
def on_m1(monkeypatch):
    """What would compute is an M1's GPU."""
    monkeypatch.setattr("mflux.chips.has_gpu", lambda: True)
    monkeypatch.setattr("mflux.chips.architecture", lambda: f"{M1_AND_M2[0]}s")


def interiors(model) -> dict[str, Interior]:
    """Of all parts that are in memory, by their paths."""
    return {
        f"{component.folder}/{path}": part
        for component in model.components
        if component.stage == "denoise"
        for path, part in getattr(model, component.name).named_modules()
        if isinstance(part, Interior)
    }


def narrow(part: nn.Module) -> set[str]:
    return {name for name, value in tree_flatten(part.parameters()) if value.dtype == mx.float16}


@pytest.mark.parametrize("tiny", HAVE, indirect=True)
def test_on_request(tiny):
    whole, half = tiny.pipeline(), tiny.pipeline(compute_precision=mx.float16)
    whole.keep = half.keep = whole.keep.__class__(transformer=True, for_next_image=True)
    difference = np.abs(tiny.picture(whole) - tiny.picture(half))
    assert 0 < difference.max() < 12
    assert not any(part.dtype for part in interiors(whole).values())
    for path, part in interiors(half).items():
        inside = part.inside()
        assert part.dtype == mx.float16 and inside, path
        for one in inside:
            assert len(narrow(one)) == len(tree_flatten(one.parameters())), path
    # What lies between them stays as it is.
    for component in half.components:
        module = getattr(half, component.name)
        within = {id(value) for part in module.modules() if isinstance(part, Interior)
                  for one in part.inside() for _, value in tree_flatten(one.parameters())}  # fmt: skip
        rest = [value for _, value in tree_flatten(module.parameters()) if id(value) not in within]
        assert rest and all(value.dtype != mx.float16 for value in rest)
        assert not any(isinstance(layer, nn.Linear) and layer.weight.dtype == mx.float16
                       for layer in late_layers(module).values())  # fmt: skip


@pytest.mark.parametrize("tiny", [*HAVE, CONCEPT], indirect=True)
@pytest.mark.parametrize("way", ["as-gpu"], indirect=True)
def test_by_itself_where_bfloat16_is_slow(tiny, written_models, on_m1, monkeypatch, caplog, tmp_path, way):
    name = next(name for name, case in TINY.items() if case is tiny.case)
    stored = written_models(name, False, True)
    model = tiny.pipeline(stored)
    model.keep = model.keep.__class__(transformer=True, for_next_image=True)
    tiny.picture(model)
    found = interiors(model)
    if name == CONCEPT:
        assert not any(part.dtype for part in found.values())
        return
    assert all(part.dtype == mx.float16 for part in found.values())
    assert not any(part.dtype for part in interiors(tiny.pipeline(stored, compute_precision=mx.bfloat16)).values())
    # Weights that are not bfloat16 have been stored so for a reason.
    wide = tiny.pipeline(written_models(name, False))
    assert any(part.dtype for part in interiors(wide).values()) == bool(wide.component("transformer").dtype)

    # Values beyond float16: the first step shows it, and is taken again.
    folder = tmp_path / "large"
    shutil.copytree(stored, folder)
    path, part = next((path, part) for path, part in found.items() if path.startswith("transformer/"))
    layer = next(name for name, value in tree_flatten(part.inside()[-1].parameters()) if value.ndim == 2)
    enlarge(folder / "transformer", path.removeprefix("transformer/"), part, layer)
    with caplog.at_level(logging.WARNING):
        model = tiny.pipeline(folder)
        model.keep = model.keep.__class__(transformer=True, for_next_image=True)
        found = tiny.picture(model)
        again = tiny.picture(model)
    told = [record.getMessage() for record in caplog.records if "float16" in record.getMessage()]
    assert told == [f"{model.family.title} computes in bfloat16: some of its values are too large for float16"]
    assert not any(part.dtype for part in interiors(model).values())
    asked = tiny.picture(tiny.pipeline(folder, compute_precision=mx.bfloat16))
    # The first one worked its modulation out in each step.
    assert np.array_equal(again, asked) and np.abs(found - asked).mean() < 1
    caplog.clear()
    # Who asked for it gets it, and where there is no image, is told.
    with suppress(MfluxError):
        tiny.picture(tiny.pipeline(folder, compute_precision=mx.float16))
    assert sum("largest number" in record.getMessage() for record in caplog.records) == 1


def enlarge(folder: Path, path: str, part: Interior, layer: str) -> None:
    """Make a layer's weights in a folder so large that what it gives is beyond float16."""
    inside = part.inside()[-1]
    names = [name for name, one in part.named_modules() if one is inside]
    name = ".".join(filter(None, (path, names[0], layer)))
    for file in folder.glob("*.safetensors"):
        tensors = mx.load(str(file))
        if name in tensors:
            tensors[name] = tensors[name] * 1e7
            mx.save_safetensors(str(file), tensors)
            return
    raise AssertionError(f"no {name} in {folder}")


@pytest.mark.parametrize("tiny", ["flux generate"], indirect=True)
def test_a_layer_s_bias_is_as_large_as_before(tiny):
    """What comes out is what comes out without: values are an eighth inside, and so is the bias, digits and all."""
    wide, narrow = (tiny.pipeline().transformer for _ in range(2))
    for transformer in (wide, narrow):
        layer = transformer.transformer_blocks[0].ff.net[2]
        layer.bias = layer.bias + 1000
    compute_in(narrow, mx.float16)
    # So is what a LoRA adds to it.
    adapter = Adapter(1.0, 1.0, None, lambda: mx.full(layer.bias.shape, 500.0))
    for transformer in (wide, narrow):
        put_on(transformer, {"transformer_blocks.0.ff.net.2": [adapter]})
    x = 3 * mx.random.normal((1, 5, wide.config.inner_dim), key=mx.random.key(1))
    with watched() as too_large:
        one, other = (transformer.transformer_blocks[0].ff(x) for transformer in (wide, narrow))
    assert mx.max(mx.abs(one - other)).item() < 1
    assert [one.item() for one in too_large] == [False]


@pytest.mark.parametrize("tiny", HAVE[:-1], indirect=True)
def test_the_command_notes_it_and_takes_it_again(tiny, in_folder):
    words = ("--seed", 2, "--compute-precision", "float16", "--metadata")
    first = tiny.draw(*words)
    again = tiny.run("-C", first, "--metadata")
    assert again.status == 0, again.err
    for path in (first, again.paths[0]):
        assert json.loads(path.with_suffix(".metadata.json").read_text())["compute_precision"] == "float16"


@pytest.mark.parametrize("tiny", [HAVE[0], "ernie_image generate-ernie-image"], indirect=True)
def test_another_precision_is_refused(tiny):
    has = tiny.case.pipeline_class().family.float16
    with pytest.raises(UsageError, match="compute_precision is" if has else r"ERNIE-Image has no compute_precision"):
        tiny.pipeline(compute_precision=mx.float32 if has else mx.float16)
