"""What a program may hook into a generation: an object with any of these methods, registered with `model.callbacks`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import PIL.Image
    from tqdm import tqdm

    from mflux.backend import mx
    from mflux.models.common.config.config import Config


class BeforeLoopCallback(Protocol):
    def call_before_loop(
        self,
        seed: int,
        prompt: str,
        latents: mx.array,
        config: Config,
        canny_image: PIL.Image.Image | None = None,
        depth_image: PIL.Image.Image | None = None,
        control_images: list[PIL.Image.Image] | None = None,
    ) -> None:
        """Called once, with the latents that denoising starts from."""


class InLoopCallback(Protocol):
    def call_in_loop(self, t: int, seed: int, prompt: str, latents: mx.array, config: Config, time_steps: tqdm) -> None:
        """Called after step `t` with the latents it left.

        One that declares `denoised` as well gets the clean latents that the model predicts at this step.
        """


class AfterLoopCallback(Protocol):
    def call_after_loop(self, seed: int, prompt: str, latents: mx.array, config: Config) -> None:
        """Called once, with the final latents."""


class InterruptCallback(Protocol):
    def call_interrupt(
        self, t: int, seed: int, prompt: str, latents: mx.array, config: Config, time_steps: tqdm
    ) -> None:
        """Called when Ctrl-C stops step `t`."""
