"""The callbacks of one pipeline, and one generation's way of calling them."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mflux.backend import mx
    from mflux.models.common.config.config import Config

_MOMENTS = ("before_loop", "in_loop", "after_loop", "interrupt")


class CallbackRegistry:
    """Callbacks by the moment they are called at, in the order they were registered."""

    def __init__(self):
        self.before_loop: list[Any] = []
        self.in_loop: list[Any] = []
        self.after_loop: list[Any] = []
        self.interrupt: list[Any] = []

    def register(self, callback: Any) -> None:
        """Add an object that has one or more of the methods in `mflux.callbacks.callback`."""
        for moment in _MOMENTS:
            if hasattr(callback, f"call_{moment}"):
                getattr(self, moment).append(callback)

    def start(self, seed: int, prompt: str, config: Config) -> GenerationContext:
        """Begin a generation whose callbacks all get this seed, prompt and configuration."""
        return GenerationContext(self, seed, prompt, config)


class GenerationContext:
    """Calls the registered callbacks with what they are promised."""

    def __init__(self, registry: CallbackRegistry, seed: int, prompt: str, config: Config):
        self._registry = registry
        self._settings = {"seed": seed, "prompt": prompt, "config": config}

    def before_loop(
        self, latents: mx.array, *, canny_image=None, depth_image=None, control_images: list | None = None
    ) -> None:
        images = {"canny_image": canny_image, "depth_image": depth_image, "control_images": control_images}
        for callback in self._registry.before_loop:
            callback.call_before_loop(latents=latents, **images, **self._settings)

    def in_loop(self, t: int, latents: mx.array, denoised: mx.array | None = None) -> None:
        """`denoised` goes to the callbacks that declare it; nothing computes it unless one of them looks at it."""
        for callback in self._registry.in_loop:
            more = {"denoised": denoised} if _takes_denoised(callback) else {}
            callback.call_in_loop(t=t, latents=latents, time_steps=self._time_steps, **more, **self._settings)

    def after_loop(self, latents: mx.array) -> None:
        for callback in self._registry.after_loop:
            callback.call_after_loop(latents=latents, **self._settings)

    def interruption(self, t: int, latents: mx.array) -> None:
        for callback in self._registry.interrupt:
            callback.call_interrupt(t=t, latents=latents, time_steps=self._time_steps, **self._settings)

    @property
    def _time_steps(self):
        return self._settings["config"].time_steps


def _takes_denoised(callback: Any) -> bool:
    return "denoised" in inspect.signature(callback.call_in_loop).parameters
