"""Shows how a picture comes about: one picture for each step, and all of them side by side."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mflux.utils.image_util import ImageUtil
from mflux.utils.paths import user_path

if TYPE_CHECKING:
    import PIL.Image
    from tqdm import tqdm

    from mflux.backend import mx
    from mflux.models.common.config.config import Config
    from mflux.models.common.pipeline import Pipeline
    from mflux.utils.generated_image import GeneratedImage


class StepwiseHandler:
    """Writes `seed_S_stepNofM.png` after each step and keeps `seed_S_composite.png` up to date, also when stopped.

    Args:
        model: a `Pipeline`; its pictures are decoded as it decodes the last one.
        output_dir: created if need be.
        latent_creator: taken for compatibility with mflux 0.24; the pipeline knows its own.
    """

    def __init__(self, model: Pipeline, output_dir: str | Path, latent_creator: Any = None):
        self.model = model
        self.output_dir = user_path(output_dir)
        self.latent_creator = latent_creator
        self.step_wise_images: list[GeneratedImage] = []
        self._composite: Path | None = None
        self._start = time.perf_counter()

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
        # Each picture has its own strip.
        self.step_wise_images = []
        self._composite = None
        self._start = time.perf_counter()
        self._save(config.init_time_step, seed, prompt, latents, config)

    def call_in_loop(self, t: int, seed: int, prompt: str, latents: mx.array, config: Config, time_steps: tqdm) -> None:
        self._save(t + 1, seed, prompt, latents, config)

    def call_interrupt(
        self, t: int, seed: int, prompt: str, latents: mx.array, config: Config, time_steps: tqdm
    ) -> None:
        self._save_composite(seed)

    def _save(self, step: int, seed: int, prompt: str, latents: mx.array, config: Config) -> None:
        picture = ImageUtil.to_image(
            decoded_latents=self.model.decode(latents, config),
            config=config,
            seed=seed,
            prompt=prompt,
            quantization=self.model.bits,
            generation_time=time.perf_counter() - self._start,
            lora_paths=self.model.lora_paths,
            lora_scales=self.model.lora_scales,
        )
        name = f"seed_{seed}_step{step}of{config.num_inference_steps}.png"
        picture.save(self.output_dir / name)
        self.step_wise_images.append(picture)
        self._save_composite(seed)

    def _save_composite(self, seed: int) -> None:
        if self.step_wise_images:
            strip = ImageUtil.to_composite_image(self.step_wise_images)
            # Only its own strip is replaced, not that of an earlier run.
            path = self._composite or self.output_dir / f"seed_{seed}_composite.png"
            self._composite = ImageUtil.save_image(strip, path, overwrite=self._composite is not None)
