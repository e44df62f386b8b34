"""How one picture is to be made: size, steps, guidance, source picture, schedule."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from mflux.errors import UsageError
from mflux.models.common.config.model_config import ModelConfig, check_model_config
from mflux.models.common.fewer_passes import guided_steps
from mflux.text import shown, written
from mflux.utils import values
from mflux.utils.scale_factor import GRID, LARGEST

if TYPE_CHECKING:
    from mflux.backend import mx
    from mflux.models.common.schedulers import BaseScheduler

log = logging.getLogger(__name__)


class Config:
    """The settings of one picture.

    Width and height are rounded down to multiples of 16, with a warning; None means the source picture's, or the
    model's default size.

    Raises:
        UsageError: a size below 16, fewer than one step, or a strength outside 0 to 1.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        num_inference_steps: int = 4,
        height: int | None = 1024,
        width: int | None = 1024,
        guidance: float = 4.0,
        image_path: Path | str | None = None,
        image_strength: float | None = None,
        depth_image_path: Path | str | None = None,
        redux_image_paths: list[Path | str] | None = None,
        redux_image_strengths: list[float] | None = None,
        masked_image_path: Path | str | None = None,
        controlnet_strength: float | None = None,
        scheduler: str = "linear",
        step_cache_ratio: float | None = None,
        cfg_end: float | None = None,
        seed: int = 0,
    ):
        from mflux.utils.dimension_resolver import DimensionResolver

        check_model_config(model_config)
        num_inference_steps = values.whole(num_inference_steps, "num_inference_steps (--steps)", least=1, most=10_000)
        image_strength = values.real(image_strength, "image_strength", least=0, most=1, optional=True)
        guidance = values.real(guidance, "guidance", least=0, optional=True)
        image_path = values.image(image_path, "image_path", optional=True)
        across, down = DimensionResolver.resolve(
            height=values.side(height, "height"),
            width=values.side(width, "width"),
            reference_image_path=image_path,
            default=model_config.default_size,
        )
        self.model_config = model_config
        # Of what a schedule draws beside the first noise.
        self.seed = seed
        self.num_inference_steps = num_inference_steps
        self.width, self.height = on_grid(across, "width"), on_grid(down, "height")
        self.guidance = 0.0 if guidance is None else float(guidance)
        self.image_path = image_path
        self.image_strength = image_strength
        self._tell_strength()
        self.depth_image_path = values.image(depth_image_path, "depth_image_path", optional=True)
        self.redux_image_paths = values.images(redux_image_paths, "redux_image_paths") if redux_image_paths else None
        self.redux_image_strengths = redux_image_strengths
        self.masked_image_path = values.image(masked_image_path, "masked_image_path", optional=True)
        self.controlnet_strength = controlnet_strength
        self.step_cache_ratio = values.number(step_cache_ratio, "step_cache_ratio", values.some_of_them)
        self.cfg_end = values.number(cfg_end, "cfg_end", values.part_of_them)
        self.scheduler_name = values.text(scheduler, "scheduler")
        self._scheduler: BaseScheduler | None = None

    def _tell_strength(self) -> None:
        """A strength that cancels the picture, or the drawing, does what it says, and says so."""
        if self.image_path is None or self.image_strength is None:
            return
        if self.image_strength == 0:
            log.warning("a strength of 0 keeps nothing of %s but its size", self.image_path)
        elif self.init_time_step >= self.num_inference_steps:
            log.warning(
                "a strength of %g leaves none of %d steps to take: the picture is %s as the autoencoder gives it back",
                self.image_strength,
                self.num_inference_steps,
                self.image_path,
            )

    @property
    def image_seq_len(self) -> int:
        """Picture tokens: one for each 16 x 16 pixels."""
        return (self.height // GRID) * (self.width // GRID)

    @property
    def precision(self) -> mx.Dtype:
        return ModelConfig.precision

    @property
    def num_train_steps(self) -> int | None:
        return self.model_config.num_train_steps

    @property
    def init_time_step(self) -> int:
        """The step to start at: 0 for text to image; strength x steps, at least 1, when a picture is given."""
        if self.image_path is None or not self.image_strength:
            return 0
        return max(1, int(self.num_inference_steps * self.image_strength))

    @property
    def scheduler(self) -> BaseScheduler:
        """The schedule, built when first asked for.

        Raises:
            UsageError: no schedule of that name.
        """
        if self._scheduler is None:
            from mflux.models.common.schedulers import scheduler_class

            self._scheduler = scheduler_class(self.scheduler_name)(self)
        return self._scheduler

    def use(self, scheduler: BaseScheduler) -> None:
        """Take a schedule that was made for this image, in place of the named one."""
        self._scheduler = scheduler

    def guides(self, sigma: mx.array) -> bool:
        """Whether the step at a noise level is one of those that `cfg_end` lets guidance have."""
        if self.cfg_end is None:
            return True
        return float(sigma) > float(self.scheduler.sigmas[guided_steps(self.num_inference_steps, self.cfg_end)])

    @property
    def time_steps(self) -> range:
        """The steps to take."""
        return range(self.init_time_step, self.num_inference_steps)


def on_grid(size: int, name: str) -> int:
    """A side rounded down to a multiple of 16, with a warning if that changes it.

    Raises:
        UsageError: it is below 16 or above 16384.
    """
    if size < GRID:
        raise UsageError(f"a {name} of {shown(written(size), 40)} is too small: it must be at least {GRID}")
    if size > LARGEST:
        raise UsageError(f"a {name} of {shown(written(size), 40)} is too large: it must be at most {LARGEST}")
    rounded = size - size % GRID
    if rounded != size:
        log.warning("a %s of %d is not a multiple of %d: %d is taken", name, size, GRID, rounded)
    return rounded
