"""FLUX.1 Fill on two pictures side by side: editing with IC-Edit, and trying on clothes with CatVTON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mflux.backend import mx
from mflux.checkpoints.published import PublishedFolder
from mflux.errors import UsageError
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.family import Component
from mflux.models.common.model import resolve
from mflux.models.flux.sources import mask, needed, picture
from mflux.models.flux.variants.fill.flux_fill import FillPipeline
from mflux.utils.generated_image import GeneratedImage
from mflux.utils.image_util import ImageUtil


class Flux1InContextFill(FillPipeline):
    """FLUX.1-Fill-dev with two images side by side, of which the right one is painted; see `Model`.

    Sources: Zhang et al. 2025, https://arxiv.org/abs/2504.20690 (IC-Edit), whose LoRA the caller names;
    https://github.com/nftblackmagic/catvton-flux, whose transformer takes the place of Fill's where the model is
    dev-fill-catvton and no folder is given.
    """

    sees_image = True

    def resolve_folder(self, model_path: str | None, model_config: ModelConfig) -> Path:
        # In place of Fill's, which would be a long download for nothing.
        self._transformer_name = None if model_path else model_config.custom_transformer_model
        if self._transformer_name is None:
            return super().resolve_folder(model_path, model_config)
        own = [component for component in self.components if component.name != "transformer"]
        return resolve(model_config.model_name, own, self.family.beside)

    def folder_of(self, component: Component) -> PublishedFolder:
        if component.name == "transformer" and self._transformer_name is not None:
            return self.elsewhere(component, self._transformer_name, at_root=True)
        return super().folder_of(component)

    def generate_image(
        self,
        seed: int,
        prompt: str,
        left_image_path: str,
        num_inference_steps: int = 4,
        height: int | None = None,
        width: int | None = None,
        guidance: float = 4.0,
        right_image_path: str | None = None,
        masked_image_path: Path | str | None = None,
        image_strength: float | None = None,
        scheduler: str | None = None,
        step_cache_ratio: float | None = None,
        cfg_end: float | None = None,
    ) -> GeneratedImage:
        """Paint the right one of two images.

        Args:
            seed, num_inference_steps, scheduler: as for `Flux1.generate_image`.
            prompt: what both images show, and how they differ; encoded once and kept.
            left_image_path: the image that is only looked at.
            height, width: of one image in pixels, rounded down to multiples of 16; None for the left one's own.
            guidance: how closely to follow the prompt; the model was made for about 30.
            right_image_path: an image to paint in; without it all of the right one is painted.
            masked_image_path: of the right image, white where to paint and black elsewhere.
            image_strength: has no use here, as a warning says: it starts from noise.
            step_cache_ratio, cfg_end: see `Pipeline.settings`.

        Returns:
            Both images; `get_right_half` gives the right one.

        Raises:
            as `Flux1.generate_image`.
        """
        if (right_image_path is None) != (masked_image_path is None):
            raise UsageError("right_image_path and masked_image_path go together: one says where the other is painted")
        config = self.settings(
            seed=seed,
            prompt=prompt,
            num_inference_steps=num_inference_steps,
            height=height,
            width=width,
            guidance=guidance,
            image_path=needed(left_image_path, "left_image_path"),
            masked_image_path=masked_image_path,
            scheduler=scheduler,
            side_by_side=2,
            step_cache_ratio=step_cache_ratio,
            cfg_end=cfg_end,
        )
        size = config.width // 2, config.height
        left = ImageUtil.to_array(picture(left_image_path, *size))
        if right_image_path is None or masked_image_path is None:
            right, white = mx.zeros_like(left), mx.ones((1, 1, config.height, size[0]))
        else:
            right = ImageUtil.to_array(picture(right_image_path, *size))
            white = mask(masked_image_path, *size, right_image_path)
        pixels = mx.concatenate([left, right], axis=-1)
        white = mx.concatenate([mx.zeros_like(white), white], axis=-1)
        latents = self.fill(config, pixels, white, seed=seed, prompt=prompt)
        about: dict[str, Any] = {"width": size[0], "masked_image_path": masked_image_path}
        if right_image_path:
            about |= {"image_path": None, "image_paths": [left_image_path, right_image_path]}
        return self.make_image(config, latents, seed=seed, prompt=prompt, **about)
