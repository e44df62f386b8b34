"""ER-SDE (Cui et al. 2023, https://arxiv.org/abs/2309.06169), of third order, as ComfyUI's `er_sde` has it.

A step goes to the predicted clean latents by the solution of a stochastic equation, and adds noise of its own. The
second step knows how the prediction changed as well, and from the third on how that changed.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from mflux.backend import mx
from mflux.models.common.schedulers.base_scheduler import ScheduleSettings
from mflux.models.common.schedulers.linear_scheduler import LinearScheduler

# Its names, of which families have their own meaning.
ER_SDE = ("er_sde", "ErSdeScheduler")
# Of the integrals over a step, which have no closed form.
_POINTS = 200


class ErSdeScheduler(LinearScheduler):
    """The model's own noise levels. One object goes through the steps of one image, in order.

    Attributes:
        stream: what the seed is mixed with (exclusive or), so that the noise of the steps is not that of the beginning.
    """

    stream: ClassVar[int] = 0x5DE

    def __init__(self, config: ScheduleSettings):
        super().__init__(config)
        self._key = mx.random.key(config.seed ^ self.stream)
        levels = np.array(self._sigmas, dtype=np.float64).tolist()
        self._alphas = [self.share(level) for level in levels]
        self._times = [level / share for level, share in zip(levels, self._alphas, strict=True)]
        self._clean: mx.array | None = None
        self._slope: mx.array | None = None

    def share(self, level: float) -> float:
        """How much of the latents the solver takes for image at a noise level. Its own time is the noise on that: here
        the noise level itself, for flow matching does not scale an image down on its way."""
        return 1.0

    def step(self, noise: mx.array, timestep: int, latents: mx.array, **_: Any) -> mx.array:
        clean = latents - self._sigmas[timestep] * noise
        here, there = self._times[timestep], self._times[timestep + 1]
        if there == 0:
            return clean
        alpha_here, alpha = self._alphas[timestep], self._alphas[timestep + 1]
        ratio = _spread(there) / _spread(here)
        x = alpha / alpha_here * ratio * latents + alpha * (1 - ratio) * clean
        if self._clean is not None:
            first, second = _integrals(here, there)
            way = there - here
            slope = (clean - self._clean) / (here - self._times[timestep - 1])
            x = x + alpha * (way + first * _spread(there)) * slope
            if self._slope is not None:
                bend = (slope - self._slope) / ((here - self._times[timestep - 2]) / 2)
                x = x + alpha * (way**2 / 2 + second * _spread(there)) * bend
            self._slope = slope
        self._clean = clean
        self._key, own = mx.random.split(self._key)
        missing = math.sqrt(max(there**2 - here**2 * ratio**2, 0.0))
        return x + alpha * missing * mx.random.normal(latents.shape, key=own)


def _spread(time: float) -> float:
    """How the noise that is added grows with that which is there."""
    return time * (math.exp(time**0.3) + 10)


def _integrals(here: float, there: float) -> tuple[float, float]:
    """Of 1 / spread, and of the distance from `here` over it, from `there` to `here`."""
    width = (here - there) / _POINTS
    times = there + width * np.arange(_POINTS)
    spread = times * (np.exp(times**0.3) + 10)
    return float((1 / spread).sum() * width), float(((times - here) / spread).sum() * width)
