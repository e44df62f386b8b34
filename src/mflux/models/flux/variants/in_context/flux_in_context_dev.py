"""FLUX.1-dev with an In-Context LoRA: a picture in the manner of another one that stands beside it."""

from __future__ import annotations

from pathlib import Path

from mflux.backend import mx
from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator
from mflux.models.flux.sources import needed, refuse_strength
from mflux.models.flux.variants.txt2img.flux import Flux1
from mflux.utils.generated_image import GeneratedImage


class Flux1InContextDev(Flux1):
    """FLUX.1-dev that draws the right one of two pictures, while the left one is held; see `Pipeline`.

    Source: Huang et al. 2024, https://arxiv.org/abs/2410.23775. The LoRA is the caller's; without one the two pictures
    have little to do with each other.
    """

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
        scheduler: str = "linear",
    ) -> GeneratedImage:
        """Draw one picture beside another.

        Args:
            seed: 0 to 2^64 - 1; the same seed and settings give the same picture.
            prompt: what both pictures show; encoded once and kept.
            num_inference_steps: 1 or more.
            height, width: of one picture in pixels, rounded down to multiples of 16; None for the given one's own.
            guidance: how closely to follow the prompt.
            image_path: the left picture.
            image_strength: refused.
            scheduler: "linear", "flow_match_euler_discrete", or "package.module.Class".

        Returns:
            Both pictures; `get_right_half` gives the one that was drawn.

        Raises:
            MfluxError: sizes, steps, picture or weights are unusable; the message says which.
            StopImageGenerationException: Ctrl-C, or a callback, stopped it.
        """
        refuse_strength(image_strength)
        config = self.settings(
            seed=seed,
            prompt=prompt,
            num_inference_steps=num_inference_steps,
            height=height,
            width=width,
            guidance=guidance,
            image_path=needed(image_path, "image_path (--reference-image)"),
            scheduler=scheduler,
        )

        # 1. Encode the prompt
        embeds = self.encode_prompt(prompt)

        # 2. Make the noise to start from, and the latents of the left picture
        reference = self.encode_image(config.image_path, config.height, config.width)
        width, config.width = config.width, 2 * config.width
        latent_size = config.height // 8, config.width // 8
        noise = mx.random.normal((1, 16, *latent_size), key=mx.random.key(seed))
        noise = FluxLatentCreator.pack_latents(noise, config.height, config.width)
        rows = config.height // 16

        def left_and_right(tokens: mx.array) -> list[mx.array]:
            return mx.split(tokens.reshape(1, rows, -1, tokens.shape[-1]), 2, axis=2)

        left, left_noise = reference.reshape(1, rows, -1, reference.shape[-1]), left_and_right(noise)[0]

        # 3. Denoise; the left picture is as noisy after each step as the right one
        def hold(latents: mx.array, step: int) -> mx.array:
            sigma = config.scheduler.sigmas[step + 1]
            held = (1 - sigma) * left + sigma * left_noise
            return mx.concatenate([held, left_and_right(latents)[1]], axis=2).reshape(latents.shape)

        predict = self.predictor(config, *embeds)
        latents = self.denoise(config, noise, predict, seed=seed, prompt=prompt, after_step=hold)

        # 4. Decode
        image = self.picture(config, latents, seed=seed, prompt=prompt)
        # What is to be said to draw it again.
        image.width = width
        return image
