"""FLUX.1 Fill on two pictures side by side: editing with IC-Edit, and trying on clothes with CatVTON."""

from __future__ import annotations

from pathlib import Path

from mflux.backend import mx
from mflux.checkpoints.published import PublishedFolder
from mflux.errors import UsageError
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.family import Component
from mflux.models.common.pipeline import resolve
from mflux.models.flux.sources import mask, needed, picture, refuse_strength
from mflux.models.flux.variants.fill.flux_fill import Flux1Fill
from mflux.utils.generated_image import GeneratedImage
from mflux.utils.image_util import ImageUtil


class Flux1InContextFill(Flux1Fill):
    """FLUX.1-Fill-dev with two pictures side by side, of which the right one is painted; see `Pipeline`.

    Sources: Zhang et al. 2025, https://arxiv.org/abs/2504.20690 (IC-Edit), whose LoRA the caller names;
    https://github.com/nftblackmagic/catvton-flux, whose transformer takes the place of Fill's where the model is
    dev-fill-catvton and no folder is given.
    """

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
        scheduler: str = "linear",
    ) -> GeneratedImage:
        """Paint the right one of two pictures.

        Args:
            seed: 0 to 2^64 - 1; the same seed and settings give the same picture.
            prompt: what both pictures show, and how they differ; encoded once and kept.
            left_image_path: the picture that is only looked at.
            num_inference_steps: 1 or more.
            height, width: of one picture in pixels, rounded down to multiples of 16; None for the left one's own.
            guidance: how closely to follow the prompt; the model was made for about 30.
            right_image_path: a picture to paint in; without it all of the right one is painted.
            masked_image_path: of the right picture, white where is to be painted and black elsewhere.
            image_strength: refused.
            scheduler: "linear", "flow_match_euler_discrete", or "package.module.Class".

        Returns:
            Both pictures; `get_right_half` gives the right one.

        Raises:
            MfluxError: sizes, steps, pictures or weights are unusable; the message says which.
            StopImageGenerationException: Ctrl-C, or a callback, stopped it.
        """
        refuse_strength(image_strength)
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
        )
        size = config.width, config.height
        left = ImageUtil.to_array(picture(left_image_path, *size))
        if right_image_path is None:
            right, white = mx.zeros_like(left), mx.ones((1, 1, config.height, config.width))
        else:
            right, white = ImageUtil.to_array(picture(right_image_path, *size)), mask(masked_image_path, *size)
        config.width *= 2

        pixels = mx.concatenate([left, right], axis=-1)
        white = mx.concatenate([mx.zeros_like(white), white], axis=-1)
        latents = self.fill(config, pixels, white, seed=seed, prompt=prompt)
        both = {"image_path": None, "image_paths": [left_image_path, right_image_path]} if right_image_path else {}
        image = self.picture(config, latents, seed=seed, prompt=prompt, masked_image_path=masked_image_path, **both)
        # What is to be said to draw it again.
        image.width = size[0]
        return image
