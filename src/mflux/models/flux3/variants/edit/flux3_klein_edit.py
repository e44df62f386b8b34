"""FLUX.3 image klein: editing, from a prompt and images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mflux.backend import mx
from mflux.models.common.networks.autoencoders import tiling
from mflux.models.common.references import reference_picture
from mflux.models.flux3.latent_creator.flux3_latent_creator import Flux3LatentCreator
from mflux.models.flux3.model.transformer import grid_ids
from mflux.models.flux3.pipeline import Flux3Pipeline
from mflux.models.flux3.sources import canvas_of, check_count, on_canvas
from mflux.utils.generated_image import GeneratedImage
from mflux.utils.image_util import ImageUtil

if TYPE_CHECKING:
    import PIL.Image


class Flux3KleinEdit(Flux3Pipeline):
    """Generates from a prompt and images; see `Flux3Pipeline`. Reference class: diffusers' `Flux3ModularPipeline`."""

    sees_image = True

    def generate_image(
        self,
        seed: int,
        prompt: str,
        image_paths: list[Path | str],
        num_inference_steps: int | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance: float | None = None,
        scheduler: str | None = None,
        step_cache_ratio: float | None = None,
        cfg_end: float | None = None,
    ) -> GeneratedImage:
        """Generate one image; arguments and errors are those of `Flux3Klein.generate_image` but for these.

        Args:
            prompt: what the result shows, best as a whole caption of it.
            image_paths: 1 to 10 images. One is seen whole; several are seen with at most a million pixels each.
            height, width: in pixels, rounded down to multiples of 16; None for those of the first image as the model
                sees it. The size of a single image, which need not be such multiples, is kept to the pixel.
        """
        check_count(len(image_paths))
        loaded = [ImageUtil.load_image(path) for path in image_paths]
        alone = canvas_of(loaded[0].size) if len(loaded) == 1 else None
        images = (
            [on_canvas(loaded[0])]
            if alone
            else [reference_picture(image, path) for image, path in zip(loaded, image_paths, strict=True)]
        )
        natural_width, natural_height = images[0].size
        # With the canvas around it, which is cut off again.
        is_natural = alone is not None and (width, height) in ((None, None), alone.image)
        config = self.settings(
            seed=seed,
            prompt=prompt,
            num_inference_steps=self.steps_of(num_inference_steps),
            height=natural_height if height is None or is_natural else height,
            width=natural_width if width is None or is_natural else width,
            guidance=self.guidance_of(guidance),
            scheduler=scheduler,
            step_cache_ratio=step_cache_ratio,
            cfg_end=cfg_end,
        )

        # 1. Encode the prompt
        encoded = self.encode_prompts(*self.prompts_of(prompt, config.guidance))

        # 2. Make the latents: noise to start from, and the images
        latents = Flux3LatentCreator.create_noise(seed, config.height, config.width)
        references = self.encode_references(images)

        # 3. Denoise
        velocity = self.predictor(config, *encoded, references=references)
        latents = self.denoise(config, latents, velocity, seed=seed, prompt=prompt)
        del velocity, references

        # 4. Decode
        image = self.make_image(
            config,
            latents,
            seed=seed,
            prompt=prompt,
            image_paths=list(image_paths),
        )
        if alone is not None and is_natural:
            image.image = image.image.crop(alone.box)
            image.width, image.height = image.image.size
        return image

    def encode_references(self, images: list[PIL.Image.Image]) -> tuple[mx.array, mx.array]:
        """Images as tokens (1, R, 128), one image after the other, and their positions (R, 4)."""
        tokens, ids = [], []
        for number, image in enumerate(images, start=1):
            latents = tiling.encode(self.vae, ImageUtil.to_array(image), self.tiling_config).astype(mx.float32)
            tokens.append(Flux3LatentCreator.pack_latents(latents))
            ids.append(grid_ids(*latents.shape[2:], reference=number))
            mx.eval(tokens)
        return mx.concatenate(tokens, axis=1), mx.concatenate(ids)
