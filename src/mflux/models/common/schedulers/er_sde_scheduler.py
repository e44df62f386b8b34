"""ER-SDE (Cui et al. 2023, https://arxiv.org/abs/2309.06169): steps of the third order, with new noise in each.

What mflux 0.24 takes for Krea 2 where nothing is said. For flow matching, whose images are not scaled down along the
way, the solver's own time is the noise level.
"""

from __future__ import annotations

from typing import Any

from mflux.backend import mx
from mflux.models.common.schedulers.base_scheduler import ScheduleSettings
from mflux.models.common.schedulers.linear_scheduler import LinearScheduler

# Of the integrals over a step, which have no closed form.
_POINTS = 200
# So that the noise of the steps is not the noise of the beginning.
_STREAM = 0x5DE


class ErSdeScheduler(LinearScheduler):
    """The noise levels are those of `linear`. One object goes through the steps of one image, in order."""

    def __init__(self, config: ScheduleSettings):
        super().__init__(config)
        self._key = mx.random.key(config.seed ^ _STREAM)
        self._denoised: mx.array | None = None
        self._slope: mx.array | None = None

    def step(self, noise: mx.array, timestep: int, latents: mx.array, **_: Any) -> mx.array:
        sigmas = self.sigmas
        here, there = sigmas[timestep], sigmas[timestep + 1]
        denoised, before = latents - here * noise, self._denoised
        self._denoised = denoised
        if not there.item():
            return denoised

        # 1. Towards the image that is predicted now
        ratio = _weight(there) / _weight(here)
        x = ratio * latents + (1 - ratio) * denoised
        if before is not None:
            # 2. As far as the prediction moves
            length = there - here
            width = -length / _POINTS
            points = there + mx.arange(_POINTS, dtype=mx.float32) * width
            weights = _weight(points)
            slope, last = (denoised - before) / (here - sigmas[timestep - 1]), self._slope
            x = x + (length + (1 / weights).sum() * width * _weight(there)) * slope
            self._slope = slope
            if last is not None:
                # 3. And as far as that changes
                bend = (slope - last) / ((here - sigmas[timestep - 2]) / 2)
                moment = ((points - here) / weights).sum() * width
                x = x + (length**2 / 2 + moment * _weight(there)) * bend

        # 4. What noise is missing for this level
        self._key, key = mx.random.split(self._key)
        missing = mx.sqrt(mx.maximum(there**2 - here**2 * ratio**2, 0))
        return x + mx.random.normal(latents.shape, key=key) * missing


def _weight(sigma: mx.array) -> mx.array:
    """How much noise the solver lets go on, at a noise level."""
    return sigma * (mx.exp(sigma**0.3) + 10)
