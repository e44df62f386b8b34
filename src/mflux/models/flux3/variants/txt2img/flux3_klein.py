"""FLUX.3 image klein: text to image."""

from __future__ import annotations

from mflux.models.flux3.latent_creator.flux3_latent_creator import Flux3LatentCreator
from mflux.models.flux3.pipeline import Flux3Pipeline
from mflux.utils.generated_image import GeneratedImage


class Flux3Klein(Flux3Pipeline):
    """Generates images; see `Flux3Pipeline`. Reference class: diffusers' `Flux3ModularPipeline`."""

    def generate_image(
        self,
        seed: int,
        prompt: str,
        num_inference_steps: int | None = None,
        height: int | None = 1024,
        width: int | None = 1024,
        guidance: float | None = None,
        scheduler: str | None = None,
        step_cache_ratio: float | None = None,
        cfg_end: float | None = None,
    ) -> GeneratedImage:
        """Generate one image.

        Args:
            seed: the same seed and settings give the same image.
            prompt: what the image shows; encoded once and kept.
            num_inference_steps: None for 16, of a base model 50.
            height, width: in pixels, rounded down to multiples of 16.
            guidance: how far to go from no prompt to the prompt; 1 is the prompt, in one pass. None for 3.5. A
                distilled model has it already.
            scheduler: None for the model's schedule.
            step_cache_ratio, cfg_end: see `Pipeline.settings`.

        Raises:
            UsageError: a setting makes no sense.
            StopImageGenerationException: Ctrl-C, or a callback, stopped it.
        """
        config = self.settings(
            seed=seed,
            prompt=prompt,
            num_inference_steps=self.steps_of(num_inference_steps),
            height=height,
            width=width,
            guidance=self.guidance_of(guidance),
            scheduler=scheduler,
            step_cache_ratio=step_cache_ratio,
            cfg_end=cfg_end,
        )

        # 1. Encode the prompt
        encoded = self.encode_prompts(*self.prompts_of(prompt, config.guidance))

        # 2. Make the noise to start from
        latents = Flux3LatentCreator.create_noise(seed, config.height, config.width)

        # 3. Denoise
        latents = self.denoise(config, latents, self.predictor(config, *encoded), seed=seed, prompt=prompt)

        # 4. Decode
        return self.make_image(config, latents, seed=seed, prompt=prompt)
