"""FLUX.1 Fill: what is masked in an image is painted anew."""

from __future__ import annotations

from pathlib import Path

from mflux.backend import mx
from mflux.models.common.config.config import Config
from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator
from mflux.models.flux.pipeline import FluxPipeline
from mflux.models.flux.sources import mask, needed, pack_mask, picture
from mflux.utils.generated_image import GeneratedImage
from mflux.utils.image_util import ImageUtil


class FillPipeline(FluxPipeline):
    """Paints what is masked.

    Reference: diffusers' `FluxFillPipeline`. Each token has, beside its 64 channels of latents, 64 of the image
    without what is masked, and the mask's 256 pixels.
    """

    default_model = "dev-fill"
    in_channels = 384

    def fill(self, config: Config, pixels: mx.array, white: mx.array, *, seed: int, prompt: str) -> mx.array:
        """The latents of an image (1, 3, H, W) that is painted anew where the mask (1, 1, H, W) is 1."""
        # 1. Encode the prompt
        (encoded,) = self.encode_prompts(prompt)

        # 2. Make the noise to start from, and the channels of what is kept
        latents = FluxLatentCreator.create_noise(seed, config.height, config.width)
        kept = self.encode_pixels(pixels * (1 - white))
        channels = mx.concatenate([kept, pack_mask(white)], axis=-1)

        # 3. Denoise
        predict = self.predictor(config, encoded)

        def velocity(latents: mx.array, sigma: mx.array) -> mx.array:
            return predict(mx.concatenate([latents, channels], axis=-1), sigma)

        return self.denoise(config, latents, velocity, seed=seed, prompt=prompt)


class Flux1Fill(FillPipeline):
    """FLUX.1-Fill-dev, and anything of that architecture in the diffusers layout; see `Model`."""

    sees_image = True

    def generate_image(
        self,
        seed: int,
        prompt: str,
        image_path: Path | str,
        masked_image_path: Path | str,
        num_inference_steps: int = 4,
        height: int | None = None,
        width: int | None = None,
        guidance: float = 4.0,
        image_strength: float | None = None,
        scheduler: str | None = None,
        step_cache_ratio: float | None = None,
        cfg_end: float | None = None,
    ) -> GeneratedImage:
        """Paint in an image.

        Args:
            seed, num_inference_steps, scheduler: as for `Flux1.generate_image`.
            prompt: what the whole image shows; encoded once and kept.
            image_path: the image to paint in.
            masked_image_path: an image of it, white where to paint and black elsewhere.
            height, width: in pixels, rounded down to multiples of 16; both images are resized to it. None for the
                image's own.
            guidance: how closely to follow the prompt; the model was made for about 30.
            image_strength: has no use here, as a warning says: it starts from noise.
            step_cache_ratio, cfg_end: see `Pipeline.settings`.

        Raises:
            as `Flux1.generate_image`.
        """
        config = self.settings(
            seed=seed,
            prompt=prompt,
            num_inference_steps=num_inference_steps,
            height=height,
            width=width,
            guidance=guidance,
            image_path=needed(image_path, "image_path (--image-path)"),
            masked_image_path=needed(masked_image_path, "masked_image_path (--masked-image-path)"),
            scheduler=scheduler,
            step_cache_ratio=step_cache_ratio,
            cfg_end=cfg_end,
        )
        pixels = ImageUtil.to_array(picture(image_path, config.width, config.height))
        white = mask(masked_image_path, config.width, config.height, image_path)
        latents = self.fill(config, pixels, white, seed=seed, prompt=prompt)
        return self.make_image(config, latents, seed=seed, prompt=prompt, masked_image_path=masked_image_path)
