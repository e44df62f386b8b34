"""ER-SDE (Cui et al. 2023, https://arxiv.org/abs/2309.06169), of third order, as ComfyUI's `er_sde` has it.

A step goes to the predicted clean latents by the solution of a stochastic equation, and adds noise of its own. The
second and third step know how the prediction changed, and from then on how that changed.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from mflux.backend import mx
from mflux.models.common.schedulers.base_scheduler import ScheduleSettings
from mflux.models.common.schedulers.linear_scheduler import LinearScheduler

# Of the integrals' sums.
_POINTS = 200
# How far below 1 the first noise level is moved, on the model's schedule: at 1 there would be no end of noise.
_BELOW = 1e-4


class ErSdeScheduler(LinearScheduler):
    """The model's own noise levels; what is added comes from a stream of numbers beside that of the first noise.

    Attributes:
        stream: what the seed is mixed with (exclusive or).
    """

    stream: ClassVar[int] = 0xA41A

    def __init__(self, config: ScheduleSettings):
        super().__init__(config)
        self._key = mx.random.key(config.seed ^ self.stream)
        levels = self._sigmas.tolist()
        # Of each level: how much of the latents is image, and the noise on it.
        self._alphas = [1 - level for level in levels]
        self._lambdas = [level / (1 - level) for level in levels]
        self._clean: mx.array | None = None
        self._slope: mx.array | None = None

    def _get_sigmas(self) -> mx.array:
        sigmas = super()._get_sigmas()
        if sigmas[0].item() < 1:
            return sigmas
        shift, level = self.config.model_config.sigma_shift, 1 - _BELOW
        first = shift * level / (1 + (shift - 1) * level)
        return mx.concatenate([mx.array([first]), sigmas[1:]])

    def step(self, noise: mx.array, timestep: int, latents: mx.array, **_: Any) -> mx.array:
        clean = latents - self._sigmas[timestep] * noise
        if timestep + 1 == len(self._lambdas) - 1:
            return clean
        here, there = self._lambdas[timestep], self._lambdas[timestep + 1]
        alpha_here, alpha = self._alphas[timestep], self._alphas[timestep + 1]
        ratio = _spread(there) / _spread(here)
        x = alpha / alpha_here * ratio * latents + alpha * (1 - ratio) * clean
        if timestep and self._clean is not None:
            before = self._lambdas[timestep - 1]
            first, second = _integrals(here, there)
            way = there - here
            slope = (clean - self._clean) / (here - before)
            x = x + alpha * (way + first * _spread(there)) * slope
            if timestep > 1 and self._slope is not None:
                bend = (slope - self._slope) / ((here - self._lambdas[timestep - 2]) / 2)
                x = x + alpha * (way**2 / 2 + second * _spread(there)) * bend
            self._slope = slope
        self._clean = clean
        self._key, own = mx.random.split(self._key)
        deviation = math.sqrt(max(there**2 - here**2 * ratio**2, 0.0))
        return x + alpha * deviation * mx.random.normal(latents.shape, key=own)


def _spread(level: float) -> float:
    """How the noise that is added grows with that which is there."""
    return level * (math.exp(level**0.3) + 10)


def _integrals(here: float, there: float) -> tuple[float, float]:
    """Of 1 / spread, and of the distance from `here` over it, from `there` to `here`."""
    width = (here - there) / _POINTS
    levels = there + width * np.arange(_POINTS)
    spread = levels * (np.exp(levels**0.3) + 10)
    return float((1 / spread).sum() * width), float(((levels - here) / spread).sum() * width)
