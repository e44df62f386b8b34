"""ERNIE-Image and ERNIE-Image-Turbo: text to image and image to image."""

from __future__ import annotations

from pathlib import Path

from mflux.models.common.pipeline import refuse_pid
from mflux.models.ernie_image.latent_creator.ernie_latent_creator import ErnieLatentCreator
from mflux.models.ernie_image.pipeline import ErniePipeline
from mflux.utils.generated_image import GeneratedImage


class ErnieImage(ErniePipeline):
    """ERNIE-Image, ERNIE-Image-Turbo, and anything of that architecture; see `ErniePipeline`."""

    def generate_image(
        self,
        seed: int,
        prompt: str,
        num_inference_steps: int = 8,
        height: int | None = 1024,
        width: int | None = 1024,
        guidance: float = 1.0,
        image_path: Path | str | None = None,
        image_strength: float | None = None,
        scheduler: str | None = None,
        negative_prompt: str | None = None,
        pid_decode: bool = False,
        pid_degrade_sigma: float = 0.0,
        *,
        step_cache_ratio: float | None = None,
        cfg_end: float | None = None,
    ) -> GeneratedImage:
        """Generate one image; arguments and errors are those of `Flux1.generate_image` but for these.

        Args:
            num_inference_steps: 1 or more; Turbo needs 8, ERNIE-Image 50.
            guidance: how far to go from the negative prompt's prediction to the prompt's: 1 is the prompt's own, and
                half the time. 4 is advised for ERNIE-Image; Turbo was made without.
            negative_prompt: what not to show; used with guidance above 1.
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
        is_guided = self.is_guided(config.guidance)

        # 1. Encode the prompts
        encoded = self.encode_prompts(*([prompt, negative_prompt or ""] if is_guided else [prompt]))

        # 2. Make the latents to start from: noise, or an image with noise over it
        latents = self.start(config, ErnieLatentCreator.create_noise(seed, config.height, config.width))

        # 3. Denoise
        latents = self.denoise(config, latents, self.predictor(config, *encoded), seed=seed, prompt=prompt)

        # 4. Decode
        negative_prompt = negative_prompt if is_guided else None
        return self.make_image(config, latents, seed=seed, prompt=prompt, negative_prompt=negative_prompt)
