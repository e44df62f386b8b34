"""Evenly spaced sigmas, moved towards noise for large pictures: FLUX.1's schedule."""

from __future__ import annotations

import math
from typing import Any

from mflux.backend import mx
from mflux.errors import CheckpointError, UsageError
from mflux.models.common.schedulers.base_scheduler import BaseScheduler, ModelShift, ScheduleSettings

# Of the exponential shift: FLUX.1's largest images are shifted by 12, and what is far beyond leaves float32.
_FARTHEST = 30


class LinearScheduler(BaseScheduler):
    """Euler steps on a straight path (Esser et al. 2024, arxiv.org/abs/2403.03206, section 5.3.2 for the shift).

    Reference class: diffusers' `FlowMatchEulerDiscreteScheduler`, as its `FluxPipeline` sets it up.
    """

    def __init__(self, config: ScheduleSettings):
        # A subclass may override `_get_sigmas` and `_get_timesteps`, as with mflux 0.24.
        self.config = config
        self._sigmas = self._get_sigmas()
        self._timesteps = self._get_timesteps()

    def _get_sigmas(self) -> mx.array:
        """The noise levels, (steps + 1,); called once."""
        model, steps = self.config.model_config, self.config.num_inference_steps
        grid = getattr(model, "sigma_grid", None)
        if grid is None:
            sigmas = mx.linspace(1.0, 1.0 / steps, steps, dtype=mx.float32)
        else:
            sigmas = picked(grid, steps)
        if model.requires_sigma_shift:
            sigmas = shift_exponentially(sigmas, resolution_mu(model, self.config.image_seq_len))
        elif model.sigma_shift != 1.0:
            sigmas = model.sigma_shift * sigmas / (1 + (model.sigma_shift - 1) * sigmas)
        if (terminal := model.sigma_shift_terminal) is not None:
            sigmas = stretch_to_terminal(sigmas, terminal)
        return mx.concatenate([sigmas, mx.zeros(1)])

    def _get_timesteps(self) -> mx.array:
        """What identifies each step to the model, (steps,); called once, after `_get_sigmas`."""
        return self._sigmas[:-1] * 1000

    @property
    def sigmas(self) -> mx.array:
        return self._sigmas

    @property
    def timesteps(self) -> mx.array:
        return self._timesteps

    def step(self, noise: mx.array, timestep: int, latents: mx.array, **_: Any) -> mx.array:
        return latents + (self._sigmas[timestep + 1] - self._sigmas[timestep]).astype(latents.dtype) * noise

    @staticmethod
    def shift_sigmas(sigmas: mx.array, config: ScheduleSettings, *, use_terminal: bool = True) -> mx.array:
        """Noise levels of one's own, (steps,), moved as far as a model wants it for the image's size: (steps + 1,).

        Args:
            use_terminal: whether they are stretched to the model's last noise level, if it has one.
        """
        model = config.model_config
        shifted = shift_exponentially(sigmas, resolution_mu(model, config.image_seq_len))
        if use_terminal and model.sigma_shift_terminal is not None:
            shifted = stretch_to_terminal(shifted, model.sigma_shift_terminal)
        return mx.concatenate([shifted, mx.zeros(1)])


def picked(grid: int, steps: int) -> mx.array:
    """Noise levels from 1 down, as evenly spaced as a grid of so many allows: ComfyUI's "simple"."""
    if steps > grid:
        raise UsageError(f"num_inference_steps (--steps) is {steps}: this model has {grid} noise levels; take fewer")
    return mx.array([(grid - int(number * grid / steps)) / grid for number in range(steps)])


class SeedVR2EulerScheduler(LinearScheduler):
    """Evenly spaced sigmas without a shift: mflux 0.24's for SeedVR2, which takes one step."""

    def _get_sigmas(self) -> mx.array:
        return mx.linspace(1.0, 0.0, self.config.num_inference_steps + 1, dtype=mx.float32)


class LightningScheduler(LinearScheduler):
    """Evenly spaced sigmas with a shift of 3 whatever the size: what the few-step "Lightning" LoRAs of Qwen-Image were
    distilled on (ModelTC, 2025)."""

    def _get_sigmas(self) -> mx.array:
        steps = self.config.num_inference_steps
        sigmas = mx.linspace(1.0, 1.0 / steps, steps, dtype=mx.float32)
        return mx.concatenate([shift_exponentially(sigmas, math.log(3)), mx.zeros(1)])


def resolution_mu(model: ModelShift, image_seq_len: int) -> float:
    """How far to shift for an image of that many tokens: linear between the two lengths that the model was given.

    Raises:
        CheckpointError: so far that every noise level would be 1, or 0.
    """
    slope = (model.sigma_max_shift - model.sigma_base_shift) / (model.sigma_max_seq_len - model.sigma_base_seq_len)
    mu = model.sigma_base_shift + slope * (image_seq_len - model.sigma_base_seq_len)
    if not abs(mu) <= _FARTHEST:
        raise CheckpointError(
            f"scheduler_config.json shifts the noise levels by {mu:.3g} for an image of {image_seq_len} tokens, and "
            f"{_FARTHEST} is the most: take another copy of this model, or another size"
        )
    return mu


def shift_exponentially(sigmas: mx.array, mu: float) -> mx.array:
    """e^mu / (e^mu + 1/sigma - 1): 0 and 1 stay, everything between moves up for positive mu."""
    return math.exp(mu) / (math.exp(mu) + (1 / sigmas - 1))


def stretch_to_terminal(sigmas: mx.array, terminal: float) -> mx.array:
    """Stretch the distance from 1 so that the last sigma is `terminal`; a single step has nothing to stretch."""
    if sigmas.size == 1:
        return sigmas
    distance = 1 - sigmas
    if not distance[-1].item():
        return sigmas  # shifted so far that every level is 1: no stretch moves them
    return 1 - distance * ((1 - terminal) / distance[-1])
