"""FLUX.2 klein: text to image and image to image."""

from __future__ import annotations

from pathlib import Path

from mflux.models.common.pipeline import refuse_pid
from mflux.models.flux2.latent_creator.flux2_latent_creator import Flux2LatentCreator
from mflux.models.flux2.pipeline import KleinPipeline
from mflux.utils.generated_image import GeneratedImage


class Flux2Klein(KleinPipeline):
    """Generates images; see `KleinPipeline`. Reference class: diffusers' `Flux2KleinPipeline`."""

    def generate_image(
        self,
        seed: int,
        prompt: str,
        num_inference_steps: int = 4,
        height: int | None = 1024,
        width: int | None = 1024,
        guidance: float = 1.0,
        image_path: Path | str | None = None,
        image_strength: float | None = None,
        scheduler: str | None = None,
        pid_decode: bool = False,
        pid_degrade_sigma: float = 0.0,
        step_cache_ratio: float | None = None,
        cfg_end: float | None = None,
    ) -> GeneratedImage:
        """Generate one image; arguments and errors are those of `Flux1.generate_image` but for these.

        Args:
            num_inference_steps: 1 or more; 4 for the distilled models, 50 for the base models.
            guidance: above 1, classifier-free guidance for the base models; each step takes twice as long.
            step_cache_ratio, cfg_end: see `Pipeline.settings`.
        """
        refuse_pid(pid_decode, pid_degrade_sigma)
        config = self.settings(
            seed=seed,
            prompt=prompt,
            num_inference_steps=num_inference_steps,
            height=height,
            width=width,
            guidance=guidance,
            image_path=image_path,
            image_strength=image_strength,
            scheduler=scheduler,
            step_cache_ratio=step_cache_ratio,
            cfg_end=cfg_end,
        )

        # 1. Encode the prompt
        encoded = self.encode_prompts(*self.prompts_of(prompt, config.guidance))

        # 2. Make the latents to start from: noise, or an image with noise over it
        latents = self.start(config, Flux2LatentCreator.create_noise(seed, config.height, config.width))

        # 3. Denoise
        latents = self.denoise(config, latents, self.predictor(config, *encoded), seed=seed, prompt=prompt)

        # 4. Decode
        return self.make_image(config, latents, seed=seed, prompt=prompt, parameters=self.own_settings(config))
