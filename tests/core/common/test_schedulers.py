"""Noise schedules against their formulas, written out in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mflux.backend import mx
from mflux.errors import UsageError
from mflux.models.anima.schedule import AnimaErSdeScheduler
from mflux.models.common import schedulers
from mflux.models.common.config import ModelConfig
from mflux.models.common.config.config import Config
from mflux.models.common.schedulers import BaseScheduler, scheduler_class
from mflux.models.common.schedulers.flow_match_euler_discrete_scheduler import empirical_mu


def sigmas(model: ModelConfig, steps: int, size=(1024, 1024), scheduler: str = "linear") -> np.ndarray:
    config = Config(model, num_inference_steps=steps, width=size[0], height=size[1], scheduler=scheduler)
    return np.array(config.scheduler.sigmas)


def evenly(steps: int) -> np.ndarray:
    return np.linspace(1, 1 / steps, steps)


def moved(values: np.ndarray, mu: float) -> np.ndarray:
    return np.exp(mu) / (np.exp(mu) + 1 / values - 1)


@pytest.mark.parametrize("steps", [1, 2, 4, 25])
def test_without_shift(steps):
    """FLUX.1-schnell: the same steps at every size."""
    for size in ((1024, 1024), (512, 256)):
        assert np.allclose(sigmas(ModelConfig.schnell(), steps, size), [*evenly(steps), 0], atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.parametrize(("size", "mu"), [((256, 256), 0.5), ((1024, 1024), 1.15), ((512, 1024), None)])
def test_with_a_shift_by_resolution(steps, size, mu):
    """FLUX.1-dev: 0.5 for 256 tokens, 1.15 for 4096, a straight line through both."""
    tokens = size[0] // 16 * (size[1] // 16)
    mu = 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256) if mu is None else mu
    assert np.allclose(sigmas(ModelConfig.dev(), steps, size), [*moved(evenly(steps), mu), 0], atol=1e-6)


def test_with_a_fixed_shift():
    model = ModelConfig.schnell().with_scheduler({"shift": 3.0, "use_dynamic_shifting": False})
    even = evenly(5)
    assert np.allclose(sigmas(model, 5), [*(3 * even / (1 + 2 * even)), 0], atol=1e-6)


@pytest.mark.parametrize("steps", [2, 20])
def test_with_a_terminal(steps):
    """Qwen-Image: shifted, then stretched so that the last sigma is 0.02."""
    values = moved(evenly(steps), 0.5 + (4096 - 256) * (0.9 - 0.5) / (8192 - 256))
    stretched = 1 - (1 - values) * (1 - 0.02) / (1 - values[-1])
    found = sigmas(ModelConfig.qwen_image(), steps)
    assert np.allclose(found, [*stretched, 0], atol=1e-6)
    assert found[-2] == pytest.approx(0.02, abs=1e-6)


def test_one_step_has_nothing_to_stretch():
    assert sigmas(ModelConfig.qwen_image(), 1).tolist() == [1, 0]
    assert sigmas(ModelConfig.schnell(), 1, scheduler="flow_match_euler_discrete").tolist() == [1, 0]


@pytest.mark.parametrize("steps", [4, 28])
def test_flow_match_euler_discrete_without_shift(steps):
    values = np.linspace(1, 0.001, steps)
    values = moved(values, 1.0)
    stretched = 1 - (1 - values) * (1 - 0.02) / (1 - values[-1])
    assert np.allclose(sigmas(ModelConfig.schnell(), steps, scheduler="flow_match_euler_discrete"), [*stretched, 0])


def test_the_empirical_shift():
    """A line in the tokens at 10 and at 200 steps, a line in the steps between; from 4300 tokens on only the second."""
    at_10, at_200 = 8.73809524e-05 * 4096 + 1.89833333, 0.00016927 * 4096 + 0.45666666
    assert empirical_mu(4096, 10) == pytest.approx(at_10)
    assert empirical_mu(4096, 200) == pytest.approx(at_200)
    assert empirical_mu(4096, 105) == pytest.approx((at_10 + at_200) / 2)
    assert empirical_mu(5000, 10) == empirical_mu(5000, 200) == pytest.approx(0.00016927 * 5000 + 0.45666666)
    steps = 8
    expected = [*moved(evenly(steps), empirical_mu(1024, steps)), 0]
    found = sigmas(ModelConfig.dev(), steps, (512, 512), "flow_match_euler_discrete")
    assert np.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("scheduler", ["linear", "flow_match_euler_discrete"])
@pytest.mark.parametrize("model", [ModelConfig.dev(), ModelConfig.schnell()], ids=["dev", "schnell"])
def test_from_noise_to_nothing(scheduler, model):
    found = sigmas(model, 12, scheduler=scheduler)
    assert found.dtype == np.float32
    assert (found[0], found[-1]) == (1, 0)
    assert (np.diff(found) < 0).all()


@pytest.mark.parametrize("scheduler", ["linear", "flow_match_euler_discrete"])
def test_a_step_goes_straight_on(scheduler):
    """With the true velocity, noise minus picture, any schedule arrives at the picture."""
    config = Config(ModelConfig.dev(), num_inference_steps=5, height=64, width=64, scheduler=scheduler)
    picture, noise = mx.random.normal((1, 16, 64), key=mx.random.key(1)), mx.random.normal((1, 16, 64))
    latents = noise
    for step in range(5):
        sigma = config.scheduler.sigmas[step]
        assert mx.allclose(latents, (1 - sigma) * picture + sigma * noise, atol=1e-5)
        latents = config.scheduler.scale_model_input(latents, step)
        latents = config.scheduler.step(noise=noise - picture, timestep=step, latents=latents)
    assert mx.allclose(latents, picture, atol=1e-5)
    assert mx.allclose(config.scheduler.timesteps, 1000 * config.scheduler.sigmas[:-1])


def test_a_step_keeps_the_dtype():
    config = Config(ModelConfig.schnell(), num_inference_steps=2, height=32, width=32)
    latents = mx.zeros((1, 4, 64), dtype=mx.bfloat16)
    assert config.scheduler.step(noise=latents, timestep=0, latents=latents).dtype == mx.bfloat16


def test_names():
    for names, name in (
        (("linear", "LinearScheduler"), "LinearScheduler"),
        (("flow_match_euler_discrete", "FlowMatchEulerDiscreteScheduler"), "FlowMatchEulerDiscreteScheduler"),
    ):
        assert {scheduler_class(known).__name__ for known in names} == {name}


class Mine(BaseScheduler):
    """Half a step, whatever is asked for."""

    def __init__(self, config: Config):
        self.steps = config.num_inference_steps

    @property
    def sigmas(self):
        return mx.array([1.0] + [0.0] * self.steps)

    def step(self, noise, timestep, latents, **kwargs):
        return latents / 2


def test_one_s_own_by_its_path():
    config = Config(ModelConfig.schnell(), height=32, width=32, scheduler=f"{__name__}.Mine")
    assert isinstance(config.scheduler, Mine)
    assert config.scheduler is config.scheduler


def test_one_s_own_by_its_name(monkeypatch):
    monkeypatch.setattr(schedulers, "SCHEDULER_REGISTRY", dict(schedulers.SCHEDULER_REGISTRY))
    schedulers.register_contrib(Mine)
    schedulers.register_contrib(Mine, "my own")
    assert scheduler_class("Mine") is scheduler_class("my own") is Mine


def test_names_that_mean_nothing():
    for name, told in (
        ("nonsense", "is not known: use linear"),
        ("math.nonsense", "cannot be imported: module 'math' has no attribute 'nonsense'"),
        ("math.pi", "is not a class derived from"),
        ("no_such_module.Class", "cannot be imported: No module named 'no_such_module'"),
        ("..Class", "cannot be imported"),
    ):
        with pytest.raises(UsageError, match=told):
            scheduler_class(name)


# ---- where a picture comes in


@pytest.mark.parametrize(
    ("steps", "strength", "start"),
    [(4, None, 0), (4, 0.0, 0), (4, 0.1, 1), (4, 0.5, 2), (10, 0.75, 7), (25, 0.4, 10), (4, 1.0, 4), (1, 0.2, 1)],
)
def test_the_first_step(steps, strength, start):
    config = Config(ModelConfig.schnell(), steps, 32, 32, image_path="photo.png", image_strength=strength)
    assert config.init_time_step == start
    assert list(config.time_steps) == list(range(start, steps))
    # Without a picture the strength says nothing.
    assert Config(ModelConfig.schnell(), steps, 32, 32, image_strength=strength).init_time_step == 0


def test_the_number_of_tokens():
    assert Config(ModelConfig.schnell(), height=1024, width=512).image_seq_len == 64 * 32
    assert Config(ModelConfig.schnell(), height=47, width=33).image_seq_len == 2 * 2


# ---- er_sde


def spread(level: float) -> float:
    return level * (math.exp(level**0.3) + 10)


def er_sde_by_hand(levels: list[float], velocities: list[np.ndarray], x: np.ndarray, seed: int, order: int = 3):
    """Every step's latents, number by number, in double precision; `order` leaves what is higher out."""
    key = mx.random.key(seed ^ 0xA41A)
    noises = [level / (1 - level) for level in levels]
    cleans, slopes, found = [], [], []
    for step, velocity in enumerate(velocities):
        here, there = noises[step], noises[step + 1]
        cleans.append(x - levels[step] * velocity)
        if there == 0:
            found.append(cleans[-1])
            break
        ratio = spread(there) / spread(here)
        # Of latents without their scale.
        y = ratio * x / (1 - levels[step]) + (1 - ratio) * cleans[-1]
        width = (here - there) / 200
        at = [there + number * width for number in range(200)]
        slopes.append((cleans[-1] - cleans[-2]) / (here - noises[step - 1]) if step else None)
        if step and order > 1:
            y = y + (there - here + spread(there) * sum(width / spread(one) for one in at)) * slopes[-1]
        if step > 1 and order > 2:
            bend = (slopes[-1] - slopes[-2]) / ((here - noises[step - 2]) / 2)
            integral = sum(width * (one - here) / spread(one) for one in at)
            y = y + ((there - here) ** 2 / 2 + spread(there) * integral) * bend
        key, own = mx.random.split(key)
        y = y + math.sqrt(max(there**2 - (ratio * here) ** 2, 0)) * np.array(mx.random.normal(x.shape, key=own))
        x = (1 - levels[step + 1]) * y
        found.append(x)
    return found


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_er_sde_is_of_third_order(steps):
    scheduler = AnimaErSdeScheduler(Config(ModelConfig.from_name("anima-turbo"), steps, 32, 32, seed=7))
    levels = scheduler.sigmas.tolist()
    # At 1 there would be no end of noise.
    assert levels[0] == pytest.approx(3 * (1 - 1e-4) / (1 + 2 * (1 - 1e-4)))
    random = np.random.default_rng(1)
    x = random.standard_normal((1, 2, 3, 4))
    velocities = [random.standard_normal(x.shape) for _ in range(steps)]
    expected, latents, ours = er_sde_by_hand(levels, velocities, x, seed=7), mx.array(x.astype(np.float32)), []
    for step, velocity in enumerate(velocities):
        latents = scheduler.step(mx.array(velocity.astype(np.float32)), step, latents)
        ours.append(np.array(latents))
    assert all(np.allclose(one, other, rtol=0, atol=2e-5) for one, other in zip(ours, expected, strict=True))
    for order in (1, 2):
        lower = er_sde_by_hand(levels, velocities, x, seed=7, order=order)
        # The second step may be of second order, the third of third; the last is the prediction itself.
        assert np.allclose(ours[-1], lower[-1], rtol=0, atol=2e-5) == (steps <= order + 1)


def test_er_sde_is_the_seed_s():
    x, velocity = mx.ones((1, 2, 3)), mx.zeros((1, 2, 3))

    def first(seed: int) -> mx.array:
        config = Config(ModelConfig.from_name("anima-turbo"), 4, 32, 32, seed=seed)
        return AnimaErSdeScheduler(config).step(velocity, 0, x)

    assert mx.array_equal(first(1), first(1)) and not mx.array_equal(first(1), first(2))
    assert first(2**64 - 1).shape == x.shape
