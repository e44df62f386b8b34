"""FLUX.1 Kontext: a picture and an instruction to a picture."""

from __future__ import annotations

from pathlib import Path

from mflux.backend import mx
from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator
from mflux.models.flux.model.transformer import latent_image_ids
from mflux.models.flux.sources import fitted_size, needed, refuse_strength
from mflux.models.flux.variants.txt2img.flux import Flux1
from mflux.utils.generated_image import GeneratedImage


class Flux1Kontext(Flux1):
    """FLUX.1-Kontext-dev, and anything of that architecture in the diffusers layout; see `Pipeline`.

    Source: Black Forest Labs 2025, https://arxiv.org/abs/2506.15742. Reference: diffusers' `FluxKontextPipeline`.
    """

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
        scheduler: str = "linear",
    ) -> GeneratedImage:
        """Edit one picture.

        Args:
            seed: 0 to 2^64 - 1; the same seed and settings give the same picture.
            prompt: what to do with the picture; encoded once and kept.
            num_inference_steps: 1 or more.
            height, width: in pixels, rounded down to multiples of 16. None for the picture's; if both are, a picture of
                more than a megapixel is drawn at about one, with a warning.
            guidance: how closely to follow the prompt.
            image_path: the picture to edit. The model sees it at the size that is drawn.
            image_strength: refused.
            scheduler: "linear", "flow_match_euler_discrete", or "package.module.Class".

        Raises:
            MfluxError: sizes, steps, picture or weights are unusable; the message says which.
            StopImageGenerationException: Ctrl-C, or a callback, stopped it.
        """
        refuse_strength(image_strength)
        image_path = needed(image_path, "image_path (--image)")
        if height is None and width is None:
            width, height = fitted_size(image_path)
        config = self.settings(
            seed=seed,
            prompt=prompt,
            num_inference_steps=num_inference_steps,
            height=height,
            width=width,
            guidance=guidance,
            image_path=image_path,
            scheduler=scheduler,
        )

        # 1. Encode the prompt
        embeds = self.encode_prompt(prompt)

        # 2. Make the noise to start from, and the tokens of the picture to edit, on a plane of their own
        latents = FluxLatentCreator.create_noise(seed, config.height, config.width)
        reference = self.encode_image(config.image_path, config.height, config.width)
        rows, columns = config.height // 16, config.width // 16
        ids = mx.concatenate([latent_image_ids(rows, columns), latent_image_ids(rows, columns, plane=1)])

        # 3. Denoise
        predict = self.predictor(config, *embeds, ids)

        def velocity(latents: mx.array, sigma: mx.array) -> mx.array:
            return predict(mx.concatenate([latents, reference], axis=1), sigma)[:, : latents.shape[1]]

        latents = self.denoise(config, latents, velocity, seed=seed, prompt=prompt)

        # 4. Decode
        return self.picture(config, latents, seed=seed, prompt=prompt)
