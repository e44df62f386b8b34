"""Steps that use the prediction before again, and guidance that ends early: which passes are left out, and no other."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
from support.tiny_models import EVERY_TINY, TINY, TinyModel, pixels

from mflux.backend import mx
from mflux.errors import UsageError
from mflux.models.common.config import Config, ModelConfig
from mflux.models.common.fewer_passes import guided_steps, left_out
from mflux.utils.metadata_reader import MetadataReader

FIRST = {name.split()[0]: name for name in reversed(TINY)}.values()
EVERY_FAMILY = pytest.mark.parametrize("tiny", FIRST, indirect=True)
STEPS = 12


def shifted(steps: int, mu: float) -> list[float]:
    return [math.exp(mu) / (math.exp(mu) + 1 / level - 1) for level in (1 - step / steps for step in range(steps))]


@pytest.mark.parametrize(
    ("steps", "mu", "ratio", "expected"),
    [
        # As mflux 0.24.0's `StepCache.select_skip_steps` has them.
        (20, 1.15, 0.25, {2, 3, 4, 5, 6}),
        (28, 3.0, 0.5, set(range(2, 16))),
        (10, 0.5, 0.3, {1, 2, 3}),
        (10, 0.5, 0.99, set(range(1, 9))),
        (10, 0.5, 0.01, set()),
        (9, 0.5, 0.5, set()),
    ],
)
def test_which_steps_are_left_out(steps, mu, ratio, expected):
    assert left_out(shifted(steps, mu), ratio) == expected


@pytest.mark.parametrize(
    ("steps", "part", "guided"), [(20, None, 20), (20, 1, 20), (20, 0.6, 12), (5, 0.01, 1), (4, 0.5, 2)]
)
def test_how_many_steps_are_guided(steps, part, guided):
    assert guided_steps(steps, part) == guided


class Calls:
    """How often a model's transformer is called."""

    def __init__(self, model, monkeypatch):
        self.count = 0
        kind = type(model.transformer)
        real = kind.__call__

        def counted(*args, **kwargs):
            self.count += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(kind, "__call__", counted)

    def of(self, tiny: TinyModel, model, **settings) -> int:
        self.count = 0
        tiny.generate(model, num_inference_steps=STEPS, **settings)
        return self.count


@EVERY_TINY
def test_the_passes_of_every_class(tiny, monkeypatch):
    model = tiny.pipeline()
    calls = Calls(model, monkeypatch)
    whole = calls.of(tiny, model)
    passes = whole // STEPS
    assert whole == passes * STEPS and passes in (1, 2)
    assert calls.of(tiny, model, step_cache_ratio=0.25) == passes * (STEPS - 3)
    ended = calls.of(tiny, model, cfg_end=0.5)
    assert ended == (whole if passes == 1 else STEPS + STEPS // 2)
    assert calls.of(tiny, model, step_cache_ratio=0.25, cfg_end=1) == passes * (STEPS - 3)


# How each family is guided, where it is.
GUIDED = {"guidance": 3.0}


def is_guided(model, asked: float) -> bool:
    return model.is_guided(model.guidance_of(asked) if hasattr(model, "guidance_of") else asked)


def guidance_by_default(model) -> float:
    """What the class takes where a call names none."""
    return model.guidance_of(None) if hasattr(model, "guidance_of") else 4.0


@EVERY_TINY
def test_guidance_ends(tiny, monkeypatch):
    """The guided steps are those of the whole, and each after them is the prompt's own prediction."""
    model = tiny.pipeline()
    if not is_guided(model, 3.0):
        pytest.skip("it has one pass")
    calls = Calls(model, monkeypatch)
    assert calls.of(tiny, model, **GUIDED) == 2 * STEPS
    latents: list[list[np.ndarray]] = []

    class Watch:
        def call_in_loop(self, *, latents: mx.array, **_):
            seen.append(np.array(latents))

    for settings in ({}, {"cfg_end": 0.5}, {"cfg_end": 1}):
        seen: list[np.ndarray] = []
        model.callbacks.register(Watch())
        taken = calls.of(tiny, model, **GUIDED | settings)
        model.callbacks.in_loop.clear()
        latents.append(seen)
        assert taken == (STEPS + STEPS // 2 if settings.get("cfg_end") == 0.5 else 2 * STEPS)
    whole, half, all_of_it = latents
    assert all(map(np.array_equal, whole, all_of_it))
    assert all(map(np.array_equal, whole[: STEPS // 2], half[: STEPS // 2]))
    assert not np.array_equal(whole[STEPS // 2], half[STEPS // 2])


def test_a_step_without_its_pass():
    """What the loop does is what the schedule says, with the prediction of the step before."""
    tiny = next(iter(TINY.values()))
    pipeline = tiny.pipeline_class()
    model = pipeline.__new__(pipeline)
    config = Config(ModelConfig.dev(), STEPS, 32, 32, step_cache_ratio=0.4)
    start = mx.random.normal((1, 4, 64), key=mx.random.key(1))
    called: list[float] = []

    def velocity(latents: mx.array, sigma: mx.array) -> mx.array:
        called.append(float(sigma))
        return mx.sin(latents) * sigma

    found = list(model.steps(config, start, velocity))
    again = left_out([float(sigma) for sigma in config.scheduler.sigmas[:-1]], 0.4)
    assert len(again) == round(0.4 * STEPS)
    assert called == [float(config.scheduler.sigmas[step]) for step in range(STEPS) if step not in again]
    latents, prediction = start, None
    for step in range(STEPS):
        sigma = config.scheduler.sigmas[step]
        if step not in again:
            prediction = mx.sin(latents) * sigma
        denoised = latents - sigma * prediction
        latents = config.scheduler.step(noise=prediction, timestep=step, latents=latents)
        assert mx.array_equal(found[step].latents, latents).item()
        assert mx.array_equal(found[step].denoised, denoised).item()


@EVERY_FAMILY
def test_what_has_no_effect_is_told(tiny, caplog):
    model = tiny.pipeline()
    caplog.set_level(logging.WARNING)

    def told(**settings) -> list[str]:
        caplog.clear()
        tiny.generate(model, **settings)
        return [line for line in caplog.messages if "is ignored" in line]

    assert told(num_inference_steps=2, step_cache_ratio=0.5) == [
        "step_cache_ratio is ignored: of 2 steps it leaves none out (of fewer than 10 never)"
    ]
    guided = is_guided(model, tiny.case.generate.get("guidance", guidance_by_default(model)))
    assert told(cfg_end=1.0) == []
    lines = told(cfg_end=0.5)
    assert lines == [] if guided else lines[0].startswith("cfg_end is ignored: the steps have no second pass")


@EVERY_FAMILY
@pytest.mark.parametrize(
    "settings",
    [
        {"step_cache_ratio": 0}, {"step_cache_ratio": 1}, {"step_cache_ratio": "half"}, {"step_cache_ratio": math.nan},
        {"cfg_end": 0}, {"cfg_end": 1.1}, {"cfg_end": True},
    ],
)  # fmt: skip
def test_what_they_may_be(tiny, settings):
    (name,) = settings
    with pytest.raises(UsageError, match=name):
        tiny.generate(tiny.pipeline(), **settings)


@EVERY_FAMILY
def test_an_image_says_so_and_is_made_again(tiny):
    words = ("--seed", 3, "--steps", STEPS)
    plain = tiny.draw(*words, "--output", "plain.png")
    fewer = tiny.draw(*words, "--step-cache", "0.4", "--cfg-end", "1", "--output", "fewer.png")
    assert not np.array_equal(pixels(plain), pixels(fewer))
    settings = MetadataReader.read_exif_metadata(fewer)
    assert (settings["step_cache_ratio"], settings["cfg_end"]) == (0.4, 1.0)
    assert "step_cache_ratio" not in MetadataReader.read_exif_metadata(plain)
    result = tiny.run("-C", fewer)
    assert result.status == 0, result.err
    assert np.array_equal(pixels(result.paths[0]), pixels(fewer))
    for option, value in (("--step-cache-ratio", "1"), ("--cfg-end", "0"), ("--teacache-ratio", "x")):
        result = tiny.run("--prompt", tiny.case.prompt, option, value)
        assert result.status == 2 and option in result.err
