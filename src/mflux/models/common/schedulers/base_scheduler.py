"""What a noise schedule offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mflux.backend import mx


class BaseScheduler(ABC):
    """Steps are counted from 0; `sigmas` has one entry more than there are steps, the last one 0."""

    @property
    @abstractmethod
    def sigmas(self) -> mx.array:
        """Noise level before each step and after the last, (steps + 1,) float32."""

    @property
    def timesteps(self) -> mx.array:
        """What identifies each step to the model, (steps,)."""
        return self.sigmas[:-1] * 1000

    @abstractmethod
    def step(self, noise: mx.array, timestep: int, latents: mx.array, **kwargs) -> mx.array:
        """The latents after step `timestep`, given the model's prediction there."""

    def scale_model_input(self, latents: mx.array, t: int) -> mx.array:
        """The latents as the model wants them; unchanged for flow matching."""
        return latents
