"""FLUX.1-dev with an In-Context LoRA: an image in the manner of another one beside it."""

from __future__ import annotations

from pathlib import Path

from mflux.backend import mx
from mflux.models.common.networks.layers import parts_of
from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator
from mflux.models.flux.pipeline import FluxPipeline
from mflux.models.flux.sources import needed
from mflux.utils.generated_image import GeneratedImage


class Flux1InContextDev(FluxPipeline):
    """FLUX.1-dev that generates the right one of two images, while the left one is held; see `Model`.

    Source: Huang et al. 2024, https://arxiv.org/abs/2410.23775. The LoRA is the caller's; without one the two images
    have little to do with each other.
    """

    sees_image = True

    default_model = "dev"

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
        """Generate an image beside another.

        Args:
            seed, num_inference_steps, guidance, scheduler: as for `Flux1.generate_image`.
            prompt: what both images show; encoded once and kept.
            height, width: of one image in pixels, rounded down to multiples of 16; None for the left one's own.
            image_path: the left image.
            image_strength: has no use here, as a warning says: it starts from noise.
            step_cache_ratio, cfg_end: see `Pipeline.settings`.

        Returns:
            Both images; `get_right_half` gives the one that was generated.

        Raises:
            as `Flux1.generate_image`.
        """
        config = self.settings(
            seed=seed,
            prompt=prompt,
            num_inference_steps=num_inference_steps,
            height=height,
            width=width,
            guidance=guidance,
            image_path=needed(image_path, "image_path (--reference-image)"),
            scheduler=scheduler,
            side_by_side=2,
            step_cache_ratio=step_cache_ratio,
            cfg_end=cfg_end,
        )
        width = config.width // 2

        # 1. Encode the prompt
        (encoded,) = self.encode_prompts(prompt)

        # 2. Make the noise to start from, and the latents of the left image
        reference = self.encode_image(config.image_path, config.height, width)
        latent_size = config.height // 8, config.width // 8
        noise = mx.random.normal((1, 16, *latent_size), key=mx.random.key(seed))
        noise = FluxLatentCreator.pack_latents(noise, config.height, config.width)
        rows = config.height // 16

        def left_and_right(tokens: mx.array) -> list[mx.array]:
            return parts_of(tokens.reshape(1, rows, -1, tokens.shape[-1]), 2, axis=2)

        left, left_noise = reference.reshape(1, rows, -1, reference.shape[-1]), left_and_right(noise)[0]

        # 3. Denoise; the left image is as noisy after each step as the right one
        def hold(latents: mx.array, step: int) -> mx.array:
            sigma = config.scheduler.sigmas[step + 1]
            held = (1 - sigma) * left + sigma * left_noise
            return mx.concatenate([held, left_and_right(latents)[1]], axis=2).reshape(latents.shape)

        predict = self.predictor(config, encoded)
        latents = self.denoise(config, noise, predict, seed=seed, prompt=prompt, after_step=hold)

        # 4. Decode
        return self.make_image(config, latents, seed=seed, prompt=prompt, width=width)
