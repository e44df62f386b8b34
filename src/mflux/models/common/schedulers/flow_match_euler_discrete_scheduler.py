"""The schedule that newer families use, with a shift that depends on the number of steps as well."""

from __future__ import annotations

from typing import Any

from mflux.backend import mx
from mflux.models.common.schedulers.base_scheduler import BaseScheduler, ScheduleSettings
from mflux.models.common.schedulers.linear_scheduler import shift_exponentially, stretch_to_terminal

_TERMINAL = 0.02
_TRAIN_STEPS = 1000


class FlowMatchEulerDiscreteScheduler(BaseScheduler):
    """mflux's `flow_match_euler_discrete`.

    A model that shifts by resolution gets FLUX.2's shift, fitted to picture size and number of steps; one that does
    not gets a fixed shift of 1, from 1 to 1/1000 before it, stretched to end at 0.02.
    """

    def __init__(self, config: ScheduleSettings):
        self.config = config
        steps = config.num_inference_steps
        if config.model_config.requires_sigma_shift:
            sigmas = mx.linspace(1.0, 1.0 / steps, steps, dtype=mx.float32)
            sigmas = shift_exponentially(sigmas, empirical_mu(config.image_seq_len, steps))
        elif steps == 1:
            sigmas = mx.ones(1)
        else:
            sigmas = shift_exponentially(mx.linspace(1.0, 1.0 / _TRAIN_STEPS, steps, dtype=mx.float32), 1.0)
            sigmas = stretch_to_terminal(sigmas, _TERMINAL)
        self._sigmas = mx.concatenate([sigmas, mx.zeros(1)])

    # mflux 0.24's ways to another shift.

    def set_image_seq_len(self, image_seq_len: int) -> None:
        """Shift as for an image of so many tokens, as FLUX.2 does."""
        self.set_mu(empirical_mu(image_seq_len, self.config.num_inference_steps))

    def set_mu(self, mu: float) -> None:
        """Shift by e^mu."""
        self._sigmas = shifted_by(mu, self.config.num_inference_steps)

    @staticmethod
    def get_timesteps_and_sigmas(
        image_seq_len: int, num_inference_steps: int, num_train_timesteps: int = _TRAIN_STEPS
    ) -> tuple[mx.array, mx.array]:
        """FLUX.2's timesteps (steps,) and sigmas (steps + 1,) for an image of so many tokens."""
        sigmas = shifted_by(empirical_mu(image_seq_len, num_inference_steps), num_inference_steps)
        return sigmas[:-1] * num_train_timesteps, sigmas

    @property
    def sigmas(self) -> mx.array:
        return self._sigmas

    def step(self, noise: mx.array, timestep: int, latents: mx.array, **_: Any) -> mx.array:
        return latents + (self._sigmas[timestep + 1] - self._sigmas[timestep]).astype(latents.dtype) * noise


def shifted_by(mu: float, steps: int) -> mx.array:
    """Evenly spaced noise levels, shifted by e^mu, and 0: (steps + 1,)."""
    sigmas = mx.linspace(1.0, 1.0 / steps, steps, dtype=mx.float32)
    return mx.concatenate([shift_exponentially(sigmas, mu), mx.zeros(1)])


def empirical_mu(image_seq_len: int, steps: int) -> float:
    """FLUX.2's fit: linear in the number of tokens at 10 and at 200 steps, linear in the steps between."""
    at_200 = 0.00016927 * image_seq_len + 0.45666666
    if image_seq_len > 4300:
        return at_200
    at_10 = 8.73809524e-05 * image_seq_len + 1.89833333
    slope = (at_200 - at_10) / 190
    return slope * steps + at_200 - 200 * slope
