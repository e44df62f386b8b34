"""FLUX.1 Depth: a prompt and a depth map to an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mflux.backend import mx
from mflux.errors import UsageError
from mflux.models.common.controls.depth import FindsDepth
from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator
from mflux.models.flux.pipeline import FluxPipeline
from mflux.utils.generated_image import GeneratedImage


class Flux1Depth(FluxPipeline, FindsDepth):
    """FLUX.1-Depth-dev, and anything of that architecture in the diffusers layout; see `Model`.

    Reference: diffusers' `FluxControlPipeline`. Each token has, beside its 64 channels of latents, 64 of the depth map.
    """

    sees_image = True

    default_model = "dev-depth"
    in_channels = 128

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
        depth_image_path: Path | str | None = None,
        scheduler: str | None = None,
        step_cache_ratio: float | None = None,
        cfg_end: float | None = None,
    ) -> GeneratedImage:
        """Generate one image.

        Args:
            seed, prompt, num_inference_steps, scheduler: as for `Flux1.generate_image`.
            height, width: in pixels, rounded down to multiples of 16; None for the given image's own.
            guidance: how closely to follow the prompt; the model was made for about 10.
            image_path: an image whose depth Depth Pro finds.
            image_strength: has no use here, as a warning says: it starts from noise.
            depth_image_path: a depth map, white where it is near; with it Depth Pro is not loaded.
            step_cache_ratio, cfg_end: see `Pipeline.settings`.

        Returns:
            The image; `depth_image` is Depth Pro's map, None where one was given.

        Raises:
            as `Flux1.generate_image`.
        """
        if depth_image_path is None and image_path is None:
            raise UsageError(
                "this model draws from depth: use image_path (--image-path) for a picture whose depth is found, or "
                "depth_image_path (--depth-image-path) for a depth map"
            )
        config = self.settings(
            seed=seed,
            prompt=prompt,
            num_inference_steps=num_inference_steps,
            height=height,
            width=width,
            guidance=guidance,
            image_path=depth_image_path or image_path,
            depth_image_path=depth_image_path,
            scheduler=scheduler,
            step_cache_ratio=step_cache_ratio,
            cfg_end=cfg_end,
        )

        # 1. Encode the prompt, and find the depth
        (encoded,) = self.encode_prompts(prompt)
        found = self.find_depth(image_path) if depth_image_path is None and image_path is not None else None

        # 2. Make the noise to start from, and the channels of the depth map
        latents = FluxLatentCreator.create_noise(seed, config.height, config.width)
        shown = depth_image_path if found is None else found.convert("RGB")
        depth = self.encode_image(shown, config.height, config.width)

        # 3. Denoise
        predict = self.predictor(config, encoded)

        def velocity(latents: mx.array, sigma: mx.array) -> mx.array:
            return predict(mx.concatenate([latents, depth], axis=-1), sigma)

        latents = self.denoise(config, latents, velocity, seed=seed, prompt=prompt, depth_image=found)

        # 4. Decode
        about: dict[str, Any] = {"image_path": image_path, "depth_image_path": depth_image_path}
        image = self.make_image(config, latents, seed=seed, prompt=prompt, **about)
        image.depth_image = found
        return image
