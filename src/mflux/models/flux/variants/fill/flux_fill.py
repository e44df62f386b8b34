"""FLUX.1 Fill: what is masked in a picture is painted anew."""

from __future__ import annotations

from pathlib import Path

from mflux.backend import mx
from mflux.models.common.config.config import Config
from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator
from mflux.models.flux.sources import mask, needed, pack_mask, picture, refuse_strength
from mflux.models.flux.variants.txt2img.flux import Flux1
from mflux.utils.generated_image import GeneratedImage
from mflux.utils.image_util import ImageUtil


class Flux1Fill(Flux1):
    """FLUX.1-Fill-dev, and anything of that architecture in the diffusers layout; see `Pipeline`.

    Reference: diffusers' `FluxFillPipeline`. Each token has, beside its 64 channels of latents, 64 of the picture
    without what is masked, and the mask's 256 pixels.
    """

    default_model = "dev-fill"
    in_channels = 384

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
        scheduler: str = "linear",
    ) -> GeneratedImage:
        """Paint one picture.

        Args:
            seed: 0 to 2^64 - 1; the same seed and settings give the same picture.
            prompt: what the whole picture shows; encoded once and kept.
            image_path: the picture to paint in.
            masked_image_path: a picture of it, white where is to be painted and black elsewhere.
            num_inference_steps: 1 or more.
            height, width: in pixels, rounded down to multiples of 16; both pictures are resized to it. None for the
                picture's own.
            guidance: how closely to follow the prompt; the model was made for about 30.
            image_strength: refused.
            scheduler: "linear", "flow_match_euler_discrete", or "package.module.Class".

        Raises:
            MfluxError: sizes, steps, pictures or weights are unusable; the message says which.
            StopImageGenerationException: Ctrl-C, or a callback, stopped it.
        """
        refuse_strength(image_strength)
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
        )
        pixels = ImageUtil.to_array(picture(image_path, config.width, config.height))
        white = mask(masked_image_path, config.width, config.height)
        latents = self.fill(config, pixels, white, seed=seed, prompt=prompt)
        return self.picture(config, latents, seed=seed, prompt=prompt, masked_image_path=masked_image_path)

    def fill(self, config: Config, pixels: mx.array, white: mx.array, *, seed: int, prompt: str) -> mx.array:
        """The latents of a picture (1, 3, H, W) that is painted anew where the mask (1, 1, H, W) is 1."""
        # 1. Encode the prompt
        embeds = self.encode_prompt(prompt)

        # 2. Make the noise to start from, and the channels of what is kept
        latents = FluxLatentCreator.create_noise(seed, config.height, config.width)
        kept = self.encode_pixels(pixels * (1 - white))
        channels = mx.concatenate([kept, pack_mask(white)], axis=-1)

        # 3. Denoise
        predict = self.predictor(config, *embeds)

        def velocity(latents: mx.array, sigma: mx.array) -> mx.array:
            return predict(mx.concatenate([latents, channels], axis=-1), sigma)

        return self.denoise(config, latents, velocity, seed=seed, prompt=prompt)
