"""The embedded model: complete, small, offline, and drawing what captions say. `tools/score_demo.py` in small."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.images import opened

from mflux.backend import mx, nn
from mflux.demo import checkpoint_folder

TOOLS = Path(__file__).parents[3] / "tools"
# Of 24 captions. Of 200 the shape is right in 98.5 %; of 24 one or two may happen to be wrong then.
FLOOR = {"colour": 95, "shape": 90, "background": 95, "size": 90, "place": 90}
SQUARE_LORA = Path(__file__).parents[2] / "data" / "demo_square_lora.safetensors"


@pytest.fixture(scope="module")
def tools(monkeypatch_module):
    monkeypatch_module.syspath_prepend(str(TOOLS))
    found = {}
    for name in ("demo_scenes", "score_demo"):
        spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch_module.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        found[name] = module
    return found


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_it_is_at_most_six_megabytes():
    assert sum(file.stat().st_size for file in checkpoint_folder().rglob("*") if file.is_file()) <= 6_000_000


def test_widths_are_multiples_of_64():
    """So that quantization applies to it."""
    config = json.loads((checkpoint_folder() / "transformer" / "config.json").read_text())
    widths = [config["attention_head_dim"] * config["num_attention_heads"], config["joint_attention_dim"]]
    assert all(width % 64 == 0 for width in [*widths, config["in_channels"], config["pooled_projection_dim"]])


@pytest.fixture
def marks(tools, monkeypatch):
    """Draw 24 held-out captions and say how often each claim was kept, in percent; and the class that drew them."""
    from mflux.models.common.config import ModelConfig
    from mflux.models.flux.variants.txt2img.flux import Flux1

    monkeypatch.setenv("TQDM_DISABLE", "1")

    def draw(expect=None, **options):
        config = ModelConfig.demo()
        flux = Flux1(model_config=config, **options)
        figures, _ = tools["score_demo"].score(flux, 24, steps=config.default_steps, seed=1, expect=expect, quiet=True)
        return tools["score_demo"].percentages(figures), flux

    return draw


@pytest.mark.parametrize("bits", [None, 8])
def test_it_draws_what_held_out_captions_say(tools, marks, bits):
    percent, flux = marks(quantize=bits)
    assert set(percent) == set(tools["score_demo"].GOALS) == set(FLOOR)
    below = {claim: value for claim, value in percent.items() if value < FLOOR[claim]}
    assert not below
    if bits:
        layers = [layer for _, layer in flux.transformer.named_modules() if isinstance(layer, nn.QuantizedLinear)]
        in_them = sum(layer.weight.size * 32 // bits for layer in layers)
        assert {layer.bits for layer in layers} == {bits}
        path = checkpoint_folder() / "transformer" / "diffusion_pytorch_model.safetensors"
        # Modulation is worked out before the steps, from weights as they are stored.
        tensors = {name: value for name, value in mx.load(str(path)).items() if not re.search(r"norm.*linear", name)}
        assert in_them >= 0.9 * sum(tensor.size for tensor in tensors.values())


def test_a_lora_turns_everything_into_squares(marks):
    """More with its scale; colours and backgrounds stay what the caption says, and without it so do shapes."""
    squares = {}
    for scale in (0.0, 0.5, 1.0):
        percent, _ = marks(expect="square", lora_paths=[SQUARE_LORA], lora_scales=[scale])
        squares[scale] = percent["shape"]
        assert percent["colour"] >= 95 and percent["background"] >= 95
    assert squares[0.0] < squares[0.5] < squares[1.0]
    # A third of the captions ask for one.
    assert squares[0.0] <= 50
    assert squares[1.0] >= 75
    unchanged, _ = marks(lora_paths=[SQUARE_LORA], lora_scales=[0.0])
    assert unchanged["shape"] >= FLOOR["shape"]


def test_the_command_draws_offline_from_a_cold_start(tools, tmp_path):
    prompt = "a small blue square on a white background, at the left"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "nothing")}
    command = [sys.executable, "-m", "mflux.models.flux.cli.flux_generate", "--model", "demo", "--prompt", prompt]
    done = subprocess.run(
        [*command, "--seed", "1", "--output", str(tmp_path / "out.png")],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert done.stdout.splitlines() == [str(tmp_path / "out.png")]
    picture = opened(tmp_path / "out.png")
    verdict = tools["demo_scenes"].judge(np.asarray(picture))
    assert picture.size == (128, 128)
    assert (verdict.colour, verdict.background, verdict.size, verdict.place) == ("blue", "white", "small", "left")


def test_the_judge_knows_its_own_drawings_and_tells_others_apart(tools):
    """A judge that always agreed would make the scores worthless."""
    scenes = tools["demo_scenes"]
    rng = np.random.default_rng(0)
    for scene in rng.permutation(np.array(scenes.every_scene(), dtype=object))[:60]:
        drawn = scenes.render(scene, 128, 128, rng)
        assert all(scenes.agrees(scene, scenes.judge(drawn)).values())
    circle = scenes.Scene("circle", "red", "white", "large", "left")
    square = scenes.Scene("square", "blue", "black", "small", "right")
    assert not any(scenes.agrees(square, scenes.judge(scenes.render(circle, 128, 128))).values())
    assert scenes.judge(np.full((128, 128, 3), 250, np.uint8)).shape is None
