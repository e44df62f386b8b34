"""FLUX.1 Depth: a prompt and a depth map to a picture."""

from __future__ import annotations

from pathlib import Path

import PIL.Image

from mflux.backend import mx
from mflux.errors import UsageError
from mflux.models.common.memory import give_back_memory
from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator
from mflux.models.flux.sources import refuse_strength
from mflux.models.flux.variants.txt2img.flux import Flux1
from mflux.utils.generated_image import GeneratedImage
from mflux.utils.image_util import ImageUtil


class Flux1Depth(Flux1):
    """FLUX.1-Depth-dev, and anything of that architecture in the diffusers layout; see `Pipeline`.

    Reference: diffusers' `FluxControlPipeline`. Each token has, beside its 64 channels of latents, 64 of the depth map.
    """

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
        scheduler: str = "linear",
    ) -> GeneratedImage:
        """Draw one picture.

        Args:
            seed: 0 to 2^64 - 1; the same seed and settings give the same picture.
            prompt: what to draw; encoded once and kept.
            num_inference_steps: 1 or more.
            height, width: in pixels, rounded down to multiples of 16; None for the given picture's own.
            guidance: how closely to follow the prompt; the model was made for about 10.
            image_path: a picture whose depth Depth Pro is to find.
            image_strength: refused.
            depth_image_path: a depth map, white where it is near; with it Depth Pro is not loaded.
            scheduler: "linear", "flow_match_euler_discrete", or "package.module.Class".

        Returns:
            The picture; `depth_image` is Depth Pro's map, None where one was given.

        Raises:
            MfluxError: sizes, steps, pictures or weights are unusable; the message says which.
            StopImageGenerationException: Ctrl-C, or a callback, stopped it.
        """
        refuse_strength(image_strength)
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
        )

        # 1. Encode the prompt, and find the depth
        embeds = self.encode_prompt(prompt)
        found = None if depth_image_path else self.find_depth(image_path)

        # 2. Make the noise to start from, and the channels of the depth map
        latents = FluxLatentCreator.create_noise(seed, config.height, config.width)
        depth = self.encode_image(depth_image_path or found.convert("RGB"), config.height, config.width)

        # 3. Denoise
        predict = self.predictor(config, *embeds)

        def velocity(latents: mx.array, sigma: mx.array) -> mx.array:
            return predict(mx.concatenate([latents, depth], axis=-1), sigma)

        latents = self.denoise(config, latents, velocity, seed=seed, prompt=prompt, depth_image=found)

        # 4. Decode
        about = {"image_path": image_path, "depth_image_path": depth_image_path}
        image = self.picture(config, latents, seed=seed, prompt=prompt, **about)
        image.depth_image = found
        return image

    def find_depth(self, image_path: Path | str) -> PIL.Image.Image:
        """A picture's depth map; found once, and Depth Pro is let go of before the transformer is loaded."""
        picture = ImageUtil.load_image(image_path)
        key = "depth", picture.size, picture.tobytes()
        if key not in self.prompt_cache:
            from mflux.models.common.controls.depth_pro.depth_pro import DepthPro

            self.enter("encode")
            self.prompt_cache[key] = DepthPro(quantize=self._quantize).create_depth_map(image_path).depth_image
            give_back_memory()
        return self.prompt_cache[key]
