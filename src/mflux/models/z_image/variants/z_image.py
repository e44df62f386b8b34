"""Z-Image and Z-Image-Turbo: text to image and image to image."""

from __future__ import annotations

from pathlib import Path

from mflux.models.common.pipeline import refuse_pid
from mflux.models.z_image.latent_creator import ZImageLatentCreator
from mflux.models.z_image.pipeline import ZImagePipeline
from mflux.utils.generated_image import GeneratedImage


class ZImage(ZImagePipeline):
    """Z-Image, Z-Image-Turbo, and anything of that architecture; see `ZImagePipeline`."""

    def generate_image(
        self,
        seed: int,
        prompt: str,
        num_inference_steps: int = 4,
        height: int | None = 1024,
        width: int | None = 1024,
        guidance: float | None = None,
        image_path: Path | str | None = None,
        image_strength: float | None = None,
        scheduler: str | None = None,
        negative_prompt: str | None = None,
        pid_decode: bool = False,
        pid_degrade_sigma: float = 0.0,
        *,
        cfg_normalization: float | bool = False,
        cfg_truncation: float | None = 1.0,
        step_cache_ratio: float | None = None,
        cfg_end: float | None = None,
    ) -> GeneratedImage:
        """Generate one image; arguments and errors are those of `Flux1.generate_image` but for these.

        Args:
            num_inference_steps: 1 or more; Turbo needs 8, Z-Image 28 to 50.
            guidance: how far to go beyond the prompt's prediction, away from the negative prompt's, as diffusers counts
                it: 0 is not at all, and half the time. Z-Image's default is 4; Turbo has no use for it.
            scheduler: None for the checkpoint's; "linear" or "flow_match_euler_discrete" for mflux 0.24's of that name,
                or "package.module.Class".
            negative_prompt: what not to show; used with guidance.
            cfg_normalization: how long a guided prediction may be, as a multiple of the prompt's own; False for any.
            cfg_truncation: from which time on (0 is noise, 1 the image) guidance stops.
            step_cache_ratio, cfg_end: see `Pipeline.settings`.
        """
        refuse_pid(pid_decode, pid_degrade_sigma)
        config = self.settings(
            seed=seed,
            prompt=prompt,
            num_inference_steps=num_inference_steps,
            height=height,
            width=width,
            guidance=self.guidance_of(guidance),
            image_path=image_path,
            image_strength=image_strength,
            scheduler=scheduler,
            step_cache_ratio=step_cache_ratio,
            cfg_end=cfg_end,
        )

        # 1. Encode the prompts
        encoded = self.encode_prompts(*([prompt, negative_prompt or ""] if config.guidance > 0 else [prompt]))

        # 2. Make the latents to start from: noise, or an image with noise over it
        latents = self.start(config, ZImageLatentCreator.create_noise(seed, config.height, config.width))

        # 3. Denoise
        velocity = self.predictor(config, *encoded, normalization=float(cfg_normalization), truncation=cfg_truncation)
        latents = self.denoise(config, latents, velocity, seed=seed, prompt=prompt)
        del velocity

        # 4. Decode
        return self.make_image(
            config,
            latents,
            seed=seed,
            prompt=prompt,
            negative_prompt=negative_prompt if config.guidance > 0 else None,
            parameters=self.parameters_of(scheduler),
        )


# mflux 0.24's second name for the class.
ZImageTurbo = ZImage
