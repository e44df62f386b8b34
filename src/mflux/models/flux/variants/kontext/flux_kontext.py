"""FLUX.1 Kontext: an image and an instruction to an image."""

from __future__ import annotations

from pathlib import Path

from mflux.backend import mx
from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator
from mflux.models.flux.model.transformer import latent_image_ids
from mflux.models.flux.pipeline import FluxPipeline
from mflux.models.flux.sources import fitted_size, needed
from mflux.utils.generated_image import GeneratedImage


class Flux1Kontext(FluxPipeline):
    """FLUX.1-Kontext-dev, and anything of that architecture in the diffusers layout; see `Model`.

    Source: Black Forest Labs 2025, https://arxiv.org/abs/2506.15742. Reference: diffusers' `FluxKontextPipeline`.
    """

    sees_image = True

    default_model = "dev-kontext"

    def generate_image(
        self,
        seed: int,
        prompt: str,
        num_inference_steps: int = 4,
        height: int | None = None,
        width: int | None = None,
        guidance: float = 4.0,
        image_path: Path | str | None = None,
        image_strength: float | None = None,
        scheduler: str | None = None,
        step_cache_ratio: float | None = None,
        cfg_end: float | None = None,
    ) -> GeneratedImage:
        """Edit an image.

        Args:
            seed, num_inference_steps, guidance, scheduler: as for `Flux1.generate_image`.
            prompt: what to do with the image; encoded once and kept.
            height, width: in pixels, rounded down to multiples of 16. None for the image's; if both are, an image of
                more than a megapixel is generated at about one, with a warning.
            image_path: the image to edit. The model sees it at the size that is generated.
            image_strength: has no use here, as a warning says: it starts from noise.
            step_cache_ratio, cfg_end: see `Pipeline.settings`.

        Raises:
            as `Flux1.generate_image`.
        """
        source = needed(image_path, "image_path (--image)")
        if height is None and width is None:
            width, height = fitted_size(source)
        config = self.settings(
            seed=seed,
            prompt=prompt,
            num_inference_steps=num_inference_steps,
            height=height,
            width=width,
            guidance=guidance,
            image_path=source,
            scheduler=scheduler,
            step_cache_ratio=step_cache_ratio,
            cfg_end=cfg_end,
        )

        # 1. Encode the prompt
        (encoded,) = self.encode_prompts(prompt)

        # 2. Make the noise to start from, and the tokens of the image to edit, on a plane of their own
        latents = FluxLatentCreator.create_noise(seed, config.height, config.width)
        reference = self.encode_image(config.image_path, config.height, config.width)
        rows, columns = config.height // 16, config.width // 16
        ids = mx.concatenate([latent_image_ids(rows, columns), latent_image_ids(rows, columns, plane=1)])

        # 3. Denoise
        predict = self.predictor(config, encoded, image_ids=ids)

        def velocity(latents: mx.array, sigma: mx.array) -> mx.array:
            return predict(mx.concatenate([latents, reference], axis=1), sigma)[:, : latents.shape[1]]

        latents = self.denoise(config, latents, velocity, seed=seed, prompt=prompt)

        # 4. Decode
        return self.make_image(config, latents, seed=seed, prompt=prompt)
