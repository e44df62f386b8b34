"""Ideogram 4's presets: how many steps, how strong guidance is in each, and which noise levels they pass.

Source: the authors' presets, as diffusers' `Ideogram4Pipeline` and mflux 0.24 have them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from mflux.backend import mx
from mflux.errors import UsageError
from mflux.models.common.schedulers.base_scheduler import ScheduleSettings
from mflux.models.common.schedulers.linear_scheduler import LinearScheduler
from mflux.text import shown, written

DEFAULT = "V4_DEFAULT_20"
# Where a number of steps is asked for that no preset is for.
GUIDANCE = 7.0
# Of the last steps, which refine.
_LAST_GUIDANCE = 3.0
# Logarithms of the squared ratio of signal to noise between which all steps lie.
_LEAST, _MOST = -15.0, 18.0
# 512 × 512 pixels in tokens: an image of this size has the noise levels of the preset itself.
_TOKENS = 1024


@dataclass(frozen=True)
class Preset:
    """One of the authors' settings.

    Attributes:
        steps: so many.
        refining: the last of them, which guidance leads less.
        mu, std: of the normal distribution whose quantiles are the steps' logits.
    """

    steps: int
    refining: int
    mu: float
    std: float

    @property
    def guidance(self) -> tuple[float, ...]:
        """From the first step to the last."""
        return (GUIDANCE,) * (self.steps - self.refining) + (_LAST_GUIDANCE,) * self.refining


PRESETS = {
    "V4_DEFAULT_20": Preset(20, 2, mu=0.0, std=1.75),
    "V4_QUALITY_48": Preset(48, 3, mu=0.0, std=1.5),
    "V4_TURBO_12": Preset(12, 1, mu=0.5, std=1.75),
}


def preset(name: str | None) -> Preset:
    """
    Args:
        name: one of `PRESETS`; None for the usual one.

    Raises:
        UsageError: there is none of this name.
    """
    name = DEFAULT if name is None else name
    if not isinstance(name, str) or name not in PRESETS:
        raise UsageError(f"the preset {shown(written(name), 60)} is none of {', '.join(PRESETS)}")
    return PRESETS[name]


class LogitNormalScheduler(LinearScheduler):
    """Noise levels at even quantiles of a logit-normal distribution (Esser et al. 2024, arxiv.org/abs/2403.03206,
    section 3.1), whose mean follows from the image's size."""

    def __init__(self, config: ScheduleSettings, preset: Preset):
        self.preset = preset
        super().__init__(config)

    def _get_sigmas(self) -> mx.array:
        steps = self.config.num_inference_steps
        normal = NormalDist(self.preset.mu + 0.5 * math.log(self.config.image_seq_len / _TOKENS), self.preset.std)
        # Quantiles of 1 and 0 lie at infinity, and are cut. Of time, which is 0 at noise.
        logits = np.array([math.inf, *(normal.inv_cdf(1 - step / steps) for step in range(1, steps))])
        times = 1 / (1 + np.exp(logits))
        least, most = (1 / (1 + math.exp(0.5 * level)) for level in (_MOST, _LEAST))
        return mx.array(np.append(1 - np.clip(times, least, most), 0).astype(np.float32))
