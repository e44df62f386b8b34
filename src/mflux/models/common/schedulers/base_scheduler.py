"""What a noise schedule offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from mflux.backend import mx


class ModelShift(Protocol):
    """What a schedule needs of a model: how far its sigmas are shifted, and by what."""

    requires_sigma_shift: bool | None
    sigma_base_shift: float
    sigma_max_shift: float
    sigma_base_seq_len: int
    sigma_max_seq_len: int
    sigma_shift: float
    sigma_shift_terminal: float | None
    sigma_grid: int | None


class ScheduleSettings(Protocol):
    """What a schedule is made from; a `Config` is one."""

    num_inference_steps: int
    seed: int

    @property
    def model_config(self) -> ModelShift: ...

    @property
    def image_seq_len(self) -> int:
        """Tokens of the image."""


class BaseScheduler(ABC):
    """Steps are counted from 0; `sigmas` has one entry more than there are steps, the last one 0."""

    def __init__(self, config: ScheduleSettings):
        self.config = config

    @property
    @abstractmethod
    def sigmas(self) -> mx.array:
        """Noise level before each step and after the last, (steps + 1,) float32."""

    @property
    def timesteps(self) -> mx.array:
        """What identifies each step to the model, (steps,)."""
        return self.sigmas[:-1] * 1000

    @abstractmethod
    def step(self, noise: mx.array, timestep: int, latents: mx.array, **_: Any) -> mx.array:
        """The latents after step `timestep`, given the model's prediction there."""

    def scale_model_input(self, latents: mx.array, t: int) -> mx.array:
        """The latents as the model wants them; unchanged for flow matching."""
        return latents
