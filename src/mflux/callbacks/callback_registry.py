"""The callbacks of one pipeline, and one generation's way of calling them."""

from __future__ import annotations

import inspect
from io import StringIO
from typing import TYPE_CHECKING, Any, Self

from mflux.errors import UsageError
from mflux.text import shown, written
from mflux.utils.progress import bar_class

if TYPE_CHECKING:
    import PIL.Image
    from tqdm import tqdm

    from mflux.backend import mx
    from mflux.models.common.config.config import Config

_MOMENTS = ("before_loop", "in_loop", "after_loop", "interrupt")


class CallbackRegistry:
    """Callbacks by the moment they are called at, in the order they were registered."""

    def __init__(self) -> None:
        self.before_loop: list[Any] = []
        self.in_loop: list[Any] = []
        self.after_loop: list[Any] = []
        self.interrupt: list[Any] = []

    def register(self, callback: Any) -> None:
        """Add an object that has one or more of the methods in `mflux.callbacks.callback`.

        Raises:
            UsageError: it has none, or is a class that needs an object.
        """
        name = shown(written(callback), 60)
        methods = {moment: f"call_{moment}" for moment in _MOMENTS if hasattr(callback, f"call_{moment}")}
        if not methods:
            known = ", ".join(f"call_{moment}" for moment in _MOMENTS)
            raise UsageError(f"the callback {name} has none of the methods that are called: {known}")
        for method in methods.values():
            if isinstance(callback, type) and inspect.isfunction(inspect.getattr_static(callback, method)):
                raise UsageError(f"the callback {name} is a class: register an object, {callback.__name__}(…)")
            if not callable(getattr(callback, method)):
                raise UsageError(f"the {method} of the callback {name} cannot be called: it has to be a method")
        for moment in methods:
            getattr(self, moment).append(callback)

    # mflux 0.24's way to the lists.

    def before_loop_callbacks(self) -> list[Any]:
        return self.before_loop

    def in_loop_callbacks(self) -> list[Any]:
        return self.in_loop

    def after_loop_callbacks(self) -> list[Any]:
        return self.after_loop

    def interrupt_callbacks(self) -> list[Any]:
        return self.interrupt

    def start(self, seed: int, prompt: str, config: Config, *, shows_progress: bool = False) -> GenerationContext:
        """Begin a generation whose callbacks all get this seed, prompt and configuration.

        Args:
            shows_progress: draw a bar on stderr.
        """
        return GenerationContext(self, seed, prompt, config, shows_progress)


class GenerationContext:
    """Calls the registered callbacks with what they are promised; left, it finishes the bar of progress."""

    def __init__(
        self, registry: CallbackRegistry, seed: int, prompt: str, config: Config, shows_progress: bool = False
    ):
        self._registry = registry
        self._settings: dict[str, Any] = {"seed": seed, "prompt": prompt, "config": config}
        self._steps = config.time_steps
        self._output = None if shows_progress else _Nowhere()
        self._bar: tqdm[int] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def time_steps(self) -> tqdm[int]:
        """The steps to take, with how many were taken and how fast; what callbacks are given."""
        if self._bar is None:
            self._bar = bar_class()(self._steps, desc="denoise", unit="step", leave=True, file=self._output)
        return self._bar

    def before_loop(
        self,
        latents: mx.array,
        *,
        canny_image: PIL.Image.Image | None = None,
        depth_image: PIL.Image.Image | None = None,
        control_images: list[PIL.Image.Image] | None = None,
    ) -> None:
        images = {"canny_image": canny_image, "depth_image": depth_image, "control_images": control_images}
        for callback in self._registry.before_loop:
            callback.call_before_loop(latents=latents, **images, **self._settings)
        # The bar appears now, at none of its steps.
        self.time_steps.refresh()

    def in_loop(self, t: int, latents: mx.array, denoised: mx.array | None = None) -> None:
        """`denoised` goes to the callbacks that declare it; nothing computes it unless one of them looks at it."""
        for callback in self._registry.in_loop:
            more = {"denoised": denoised} if _takes_denoised(callback) else {}
            callback.call_in_loop(t=t, latents=latents, time_steps=self.time_steps, **more, **self._settings)
        self.time_steps.update()

    def after_loop(self, latents: mx.array) -> None:
        for callback in self._registry.after_loop:
            callback.call_after_loop(latents=latents, **self._settings)

    def interruption(self, t: int, latents: mx.array) -> None:
        for callback in self._registry.interrupt:
            callback.call_interrupt(t=t, latents=latents, time_steps=self.time_steps, **self._settings)


class _Nowhere(StringIO):
    """Takes what a bar writes that nobody is to see."""

    def write(self, text: str) -> int:
        return len(text)


def _takes_denoised(callback: Any) -> bool:
    return "denoised" in inspect.signature(callback.call_in_loop).parameters
