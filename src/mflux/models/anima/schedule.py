"""Anima's schedule: ER-SDE, whose image fades in as the noise goes."""

from __future__ import annotations

from typing import ClassVar

from mflux.backend import mx
from mflux.models.common.schedulers.er_sde_scheduler import ErSdeScheduler

# How far below 1 the first noise level is moved, on the model's schedule: at 1 there would be no end of noise.
_BELOW = 1e-4


class AnimaErSdeScheduler(ErSdeScheduler):
    """As ComfyUI and mflux 0.24 take it for Anima."""

    stream: ClassVar[int] = 0xA41A

    def _get_sigmas(self) -> mx.array:
        sigmas = super()._get_sigmas()
        if float(sigmas[0]) < 1:
            return sigmas
        shift, level = self.config.model_config.sigma_shift, 1 - _BELOW
        first = shift * level / (1 + (shift - 1) * level)
        return mx.concatenate([mx.array([first]), sigmas[1:]])

    def share(self, level: float) -> float:
        return 1 - level
