"""FIBO: structured prompt to image, and image to image."""

from __future__ import annotations

from pathlib import Path

from mflux.models.common.networks.mmdit import latent_image_ids
from mflux.models.fibo.latent_creator.fibo_latent_creator import FiboLatentCreator
from mflux.models.fibo.pipeline import FiboPipeline
from mflux.models.fibo.prompts import check_prompt
from mflux.utils.generated_image import GeneratedImage


class FIBO(FiboPipeline):
    """FIBO and Fibo-lite, and anything of that architecture in the diffusers layout; see `Model`."""

    default_model = "fibo"

    def generate_image(
        self,
        seed: int,
        prompt: str,
        num_inference_steps: int = 50,
        height: int | None = None,
        width: int | None = None,
        guidance: float = 4.0,
        image_path: Path | str | None = None,
        image_strength: float | None = None,
        scheduler: str | None = None,
        negative_prompt: str | None = None,
        step_cache_ratio: float | None = None,
        cfg_end: float | None = None,
    ) -> GeneratedImage:
        """Generate one image; arguments and errors are those of `Flux1.generate_image` but for these.

        Args:
            prompt: a JSON object, see `FiboVLM.generate`; encoded once and kept.
            guidance: how closely to follow the prompt; up to 1 the negative prompt says nothing, and each step takes
                half the time. Fibo-lite was made without: it always takes 1.
            scheduler: None, "linear" and "flow_match_euler_discrete" are the checkpoint's own; or
                "package.module.Class".
            negative_prompt: what to stay away from, in JSON or in words.
            step_cache_ratio, cfg_end: see `Pipeline.settings`.
        """
        check_prompt(prompt)
        if "fibo-lite" in self.model_config.aliases:
            guidance = 1.0
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

        # 1. Encode the prompts
        encoded = self.encode_prompts(prompt, *([negative_prompt or ""] if config.guidance > 1 else []))

        # 2. Make the latents to start from: noise, or an image with noise over it
        latents = self.start(config, FiboLatentCreator.create_noise(seed, config.height, config.width))

        # 3. Denoise
        ids = latent_image_ids(config.height // 16, config.width // 16)
        velocity = self.predictor(config, *encoded, image_ids=ids)
        del encoded
        latents = self.denoise(config, latents, velocity, seed=seed, prompt=prompt)

        # 4. Decode
        image = self.make_image(config, latents, seed=seed, prompt=prompt, negative_prompt=negative_prompt)
        image.prompt_beside = True
        return image
