"""FLUX.2 klein: text to image and image to image."""

from __future__ import annotations

from pathlib import Path

from mflux.models.common.pipeline import refuse_pid
from mflux.models.flux2.latent_creator.flux2_latent_creator import SIDE, Flux2LatentCreator
from mflux.models.flux2.pipeline import Klein
from mflux.utils.generated_image import GeneratedImage


class Flux2Klein(Klein):
    """Draws; see `Klein`. Reference class: diffusers' `Flux2KleinPipeline`."""

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
        scheduler: str = "flow_match_euler_discrete",
        pid_decode: bool = False,
        pid_degrade_sigma: float = 0.0,
    ) -> GeneratedImage:
        """Draw one picture.

        Args:
            seed: 0 to 2^64 - 1; the same seed and settings give the same picture.
            prompt: what to draw; encoded once and kept.
            num_inference_steps: 1 or more; 4 for the distilled models, 50 for the base models.
            height, width: in pixels, rounded down to multiples of 16; None for the source picture's, or 1024.
            guidance: above 1, classifier-free guidance for the base models; each step takes twice as long.
            image_path: a picture to start from.
            image_strength: how much of it to keep: the share of steps that are left out, from 0 (nothing is kept) to 1.
            scheduler: "flow_match_euler_discrete" as published, "linear", or "package.module.Class".
            pid_decode, pid_degrade_sigma: not built in this version.

        Raises:
            MfluxError: sizes, steps, picture or weights are unusable; the message says which.
            StopImageGenerationException: Ctrl-C, or a callback, stopped it.
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
        )

        # 1. Encode the prompt
        prompts = self.encode_prompts(prompt, config.guidance)

        # 2. Make the latents to start from: noise, or a picture with noise over it
        latents = self.start(config, Flux2LatentCreator.create_noise(seed, config.height, config.width))

        # 3. Denoise
        velocity = self.velocity(prompts, config.guidance, (config.height // SIDE, config.width // SIDE))
        latents = self.denoise(config, latents, velocity, seed=seed, prompt=prompt)

        # 4. Decode
        return self.picture(config, latents, seed=seed, prompt=prompt, parameters=self.own_settings(config))
