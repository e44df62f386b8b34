"""FLUX.1: text to image and image to image."""

from __future__ import annotations

from pathlib import Path

from mflux.models.common.pipeline import refuse_pid
from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator
from mflux.models.flux.pipeline import FluxPipeline
from mflux.utils.generated_image import GeneratedImage


class Flux1(FluxPipeline):
    """FLUX.1 schnell, dev and krea-dev, and anything of that architecture in the diffusers layout; see `Model`."""

    default_model = "schnell"
    divides = True

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
        negative_prompt: str | None = None,
        pid_decode: bool = False,
        pid_degrade_sigma: float = 0.0,
        step_cache_ratio: float | None = None,
        cfg_end: float | None = None,
    ) -> GeneratedImage:
        """Generate one image.

        Args:
            seed: 0 to 2^64 - 1; the same seed and settings give the same image.
            prompt: what the image shows; encoded once and kept.
            num_inference_steps: 1 or more.
            height, width: in pixels, rounded down to multiples of 16; None for the source image's or the model's own.
            guidance: how closely to follow the prompt; models without guidance (schnell) have no use for it.
            image_path: an image to start from.
            image_strength: how much of it to keep: the share of steps that are left out, from 0 (nothing is kept) to 1.
            scheduler: None for the checkpoint's schedule; "linear", "flow_match_euler_discrete", or
                "package.module.Class".
            negative_prompt: FLUX.1 has no use for it; a warning says so.
            pid_decode, pid_degrade_sigma: not built in this version.
            step_cache_ratio, cfg_end: see `Pipeline.settings`.

        Raises:
            MfluxError: sizes, steps, image or weights are unusable; the message says which.
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
            step_cache_ratio=step_cache_ratio,
            cfg_end=cfg_end,
        )

        # 1. Encode the prompt
        (encoded,) = self.encode_prompts(prompt)

        # 2. Make the latents to start from: noise, or an image with noise over it
        latents = self.start(config, FluxLatentCreator.create_noise(seed, config.height, config.width))

        # 3. Denoise
        velocity = self.predictor(config, encoded)
        latents = self.denoise(config, latents, velocity, seed=seed, prompt=prompt)

        # 4. Decode
        return self.make_image(config, latents, seed=seed, prompt=prompt)
