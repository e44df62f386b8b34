"""What every family asks of a GPU while it generates: nothing that Metal or CUDA refuse, and seldom to be waited for.

Each family's tiny model, stored in bfloat16, generates as on a GPU, and each call of MLX is looked at.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.cases import every
from support.gpu import Call, as_gpu, recording, refusal
from support.tiny_models import EVERY_TINY, TINY, TinyModel

from mflux.backend import mx, nn
from mflux.models.common.networks.autoencoders import kernels
from mflux.models.common.networks.autoencoders.strips import Map

ROOT = Path(__file__).parents[2]
CONFIGS = json.loads((ROOT / "tests" / "data" / "surface" / "configs.json").read_text())
# What takes most of the time, and is to be done in 16 bits.
PRODUCTS = ("matmul", "addmm", "array.__matmul__", "conv2d", "quantized_matmul", "fast.scaled_dot_product_attention")


@pytest.fixture(scope="module")
def calls_of(written_models):
    """Every call while a family's tiny model generates one image, and the image."""
    found: dict[str, tuple[list[Call], np.ndarray]] = {}

    def generate(tiny: TinyModel) -> tuple[list[Call], np.ndarray]:
        name = tiny.case.command
        if name not in found:
            folder = written_models(next(key for key, case in TINY.items() if case is tiny.case), False, sixteen=True)
            with as_gpu():
                model = tiny.pipeline(folder)
                with recording() as calls:
                    image = tiny.picture(model)
            found[name] = calls, image
        return found[name]

    return generate


@EVERY_TINY
def test_nothing_is_asked_that_a_gpu_refuses(tiny, calls_of):
    calls, _ = calls_of(tiny)
    refused = Counter(f"{call}: {why}" for call in calls if (why := refusal(call)) is not None)
    assert refused == {}


# Concept attention multiplies what it saw in float32, as its authors do, once a step and not in a block's way; and what
# is added to weights is multiplied out in float32 while these load.
WIDE = ("models/flux/model/concept_attention.py", "models/common/lora/adapters.py")


@EVERY_TINY
def test_products_are_in_sixteen_bits(tiny, calls_of):
    calls, _ = calls_of(tiny)
    products = [call for call in calls if call.name in PRODUCTS]
    assert len(products) > 50
    wide = [call for call in products if mx.float32 in {form.dtype for form in call.forms}]
    assert [str(call) for call in wide if not call.place.startswith(WIDE)] == []


@EVERY_TINY
def test_steps_wait_once_each(tiny, calls_of):
    """Within a network nothing is waited for: neither numpy nor a number's value. What may wait, and why:"""
    calls, _ = calls_of(tiny)
    waits = Counter(call.place.rpartition(":")[0] for call in calls if call.waits)
    allowed = {
        "checkpoints/loading.py",  # reading weights in batches, and whether they are finite
        "models/common/networks/layers.py",  # whether a token's id has a row
        "models/common/networks/modulation.py",  # before the steps, layer by layer; noise levels, which are known
        "models/flux/model/concept_attention.py",  # as above
        "models/ideogram4/model/autoencoder.py",  # whose statistics of latents a folder has, once an image
        "models/common/networks/qwen2_5_vl.py",  # where windows end, from ids alone
        "models/common/networks/vision.py",  # a tower is done before its images are forgotten
        "models/common/networks/autoencoders/kernels.py",  # a group norm's statistics of a whole map
        "models/common/networks/autoencoders/strips.py",
        "models/common/schedulers/linear_scheduler.py",  # a schedule's own few numbers
        "utils/image_util.py",
    }
    inside = {place for place in waits if "/networks/" in place or "/model/" in place}
    assert inside <= allowed, waits
    steps = [call for call in calls if call.waits and call.place.startswith("models/common/pipeline.py")]
    # The noise levels once. Of two steps each is evaluated and found finite together, so is the image; an encoded image
    # is evaluated. Some have a guided step's first pass done before the second one begins, see `Pipeline.both`.
    apart = 2 if tiny.case.pipeline.split(".")[2] in ("ernie_image", "fibo", "krea2") else 0
    assert len(steps) <= 1 + 2 * 2 + 2 + 1 + apart


# ---- at published width

sys.path.insert(0, str(ROOT / "benchmarks"))
import steps  # noqa: E402

# Widths of heads that Metal's fused attention takes for long queries, `has_fused_kernel` in
# backend/metal/scaled_dot_product_attention.cpp of MLX 0.32; any other writes all scores down, without a word.
FUSED = {64, 72, 80, 96, 128}
# An autoencoder's one head is as wide as its map; `kernels.attention` takes it in pieces.
PIECES = "models/common/networks/autoencoders/kernels.py"
# Scores of one piece.
MOST_SCORES = 32 << 20


def calls_at(part: steps.Part, pixels: int, wait: Callable[[mx.array], None] = lambda _: None) -> list[Call]:
    """What one part of a published model asks for, from its sizes alone: nothing is computed."""
    component = every("COMPONENTS")[part.component]
    config = steps.changed(CONFIGS[part.entry], part.changes)
    with as_gpu(), pytest.MonkeyPatch.context() as patch:
        # Whatever would have it computed: statistics of a map, and waiting for a strip.
        patch.setattr(kernels.OnGPU, "moments", staticmethod(lambda x: (np.zeros((x.shape[0], x.shape[-1])),) * 2))
        patch.setattr(kernels.OnGPU, "evaluate", staticmethod(wait))
        patch.setattr(kernels.OnGPU, "begun", staticmethod(lambda x: x))
        for name in ("eval", "async_eval"):
            patch.setattr(mx, name, lambda *_: None)
        module = component.module(component.module.config_class.from_dict(config))
        module.set_dtype(mx.bfloat16)
        inputs = part.inputs(module.config, pixels)
        given = {
            name: mx.zeros(value.shape, mx.bfloat16)
            if isinstance(value, np.ndarray) and value.ndim > 1 and name != "grids"
            else value
            for name, value in inputs.items()
        }
        with recording() as calls:
            if part.sized == "decode":
                module.decode(given["whole"])
            elif part.sized == "encode":
                module.encode(given["whole"])
            elif part.component == "flux2 transformer":
                steps.flux2_ours(module, given)
            else:
                list(component.ours(module, given))
    return calls


@pytest.mark.parametrize("part", [part for part in steps.ALL if part.sized == "decode"], ids=lambda part: part.name)
def test_a_decode_waits_little(part, monkeypatch):
    """At 1024 pixels on a Mac with 64 GB: once for the statistics of each group norm, and no strip is waited for."""
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 48 << 30})
    waits: Counter[str] = Counter()
    counted = Map._count_moments

    def count(a_map: Map) -> tuple[np.ndarray, np.ndarray]:
        waits["moments"] += 1
        return counted(a_map)

    monkeypatch.setattr(Map, "_count_moments", count)
    calls_at(part, 1024, wait=lambda _: waits.update(["strip"]))
    component = every("COMPONENTS")[part.component]
    vae = component.module(component.module.config_class.from_dict(steps.changed(CONFIGS[part.entry], part.changes)))
    norms = sum(isinstance(layer, nn.GroupNorm) for layer in vae.decoder.modules())
    assert (waits["moments"], waits["strip"]) == (norms, 0)


SIZED = [part for part in steps.ALL if part.sized != "no"]


@pytest.mark.parametrize("part", SIZED, ids=lambda part: part.name)
def test_at_published_width_nothing_is_refused(part):
    """At 1024 pixels; decoded without tiles at 4096, where the widest maps have tens of gigabytes."""
    before = mx.get_active_memory()
    for pixels in (4096,) if part.sized == "decode" else (1024,):
        calls = calls_at(part, pixels)
        assert Counter(f"{call}: {why}" for call in calls if (why := refusal(call)) is not None) == {}
        for call in calls:
            if call.name == "fast.scaled_dot_product_attention":
                queries, keys = call.inputs[:2]
                if call.place.startswith(PIECES):
                    assert queries.shape[2] * keys.shape[2] * queries.dtype.size <= MOST_SCORES or queries.shape[2] == 1
                else:
                    # Ideogram's are taken by force on Metal, see `layers.attention`.
                    assert queries.shape[-1] in FUSED | {256}, call
        products = [call for call in calls if call.name in PRODUCTS]
        assert products
        assert [str(call) for call in products if mx.float32 in {form.dtype for form in call.forms}] == []
    assert mx.get_active_memory() - before < 300e6
