"""Anima: text to image."""

from __future__ import annotations

from mflux.models.anima.latent_creator.anima_latent_creator import AnimaLatentCreator
from mflux.models.anima.pipeline import AnimaPipeline
from mflux.utils.generated_image import GeneratedImage


class Anima(AnimaPipeline):
    """Generates images; see `AnimaPipeline`. Reference class: diffusers' `AnimaModularPipeline`."""

    def generate_image(
        self,
        seed: int,
        prompt: str,
        num_inference_steps: int | None = None,
        height: int | None = 1024,
        width: int | None = 1024,
        guidance: float | None = None,
        negative_prompt: str | None = None,
        scheduler: str | None = None,
        step_cache_ratio: float | None = None,
        cfg_end: float | None = None,
    ) -> GeneratedImage:
        """Generate one image.

        Args:
            seed: the same seed and settings give the same image.
            prompt: what the image shows, in words or tags; encoded once and kept.
            num_inference_steps: None for 10 of Turbo, 30 of the others.
            height, width: in pixels, rounded down to multiples of 16.
            guidance: how far to go from the negative prompt to the prompt; 1 is the prompt, in one pass. None for 1 of
                Turbo, 4 of the others.
            negative_prompt: what the image is not to show.
            scheduler: None or "er_sde" for the schedule that its authors advise, which adds noise in each step;
                "euler" adds none. "linear" stands for the first, as in mflux 0.24.
            step_cache_ratio, cfg_end: see `Pipeline.settings`.

        Raises:
            UsageError: a setting makes no sense.
            StopImageGenerationException: Ctrl-C, or a callback, stopped it.
        """
        config = self.settings(
            seed=seed,
            prompt=prompt,
            num_inference_steps=self.model_config.default_steps if num_inference_steps is None else num_inference_steps,
            height=height,
            width=width,
            guidance=self.guidance_of(guidance),
            scheduler=None if scheduler == "linear" else scheduler,
            step_cache_ratio=step_cache_ratio,
            cfg_end=cfg_end,
        )

        # 1. Encode the prompts
        prompts = [prompt, negative_prompt or ""] if self.is_guided(config.guidance) else [prompt]
        encoded = self.encode_prompts(*prompts)

        # 2. Make the noise to start from
        latents = AnimaLatentCreator.create_noise(seed, config.height, config.width)

        # 3. Denoise
        latents = self.denoise(config, latents, self.predictor(config, *encoded), seed=seed, prompt=prompt)

        # 4. Decode
        return self.make_image(
            config,
            latents,
            seed=seed,
            prompt=prompt,
            negative_prompt=negative_prompt,
        )
