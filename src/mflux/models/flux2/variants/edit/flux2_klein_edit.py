"""FLUX.2 klein: editing, from a prompt and images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mflux.backend import mx
from mflux.models.common.networks.autoencoders import tiling
from mflux.models.common.references import reference_picture
from mflux.models.flux2.latent_creator.flux2_latent_creator import Flux2LatentCreator
from mflux.models.flux2.model.transformer import grid_ids
from mflux.models.flux2.pipeline import KleinPipeline
from mflux.utils.generated_image import GeneratedImage
from mflux.utils.image_util import ImageUtil

if TYPE_CHECKING:
    import PIL.Image

# References are so far apart in time, and from the picture, which is at 0.
TIME = 10


class Flux2KleinEdit(KleinPipeline):
    """Generates from a prompt and images; see `KleinPipeline`.

    Reference classes: diffusers' `Flux2KleinPipeline`, and `Flux2KleinKVPipeline` for klein 9B KV.
    """

    sees_image = True

    def generate_image(
        self,
        seed: int,
        prompt: str,
        num_inference_steps: int = 4,
        height: int | None = 1024,
        width: int | None = 1024,
        guidance: float = 1.0,
        image_paths: list[Path | str] | None = None,
        image_strength: float | None = None,
        scheduler: str | None = None,
        use_kv_cache: bool | None = None,
        step_cache_ratio: float | None = None,
        cfg_end: float | None = None,
    ) -> GeneratedImage:
        """Generate one image; arguments and errors are those of `Flux2Klein.generate_image` but for these.

        Args:
            prompt: what to make of the images; encoded once and kept.
            height, width: in pixels, rounded down to multiples of 16; None for the first image's, or 1024.
            image_paths: the images, each of a size of its own; none generates from the prompt alone.
            image_strength: has no use here, as a warning says: editing starts from noise.
            use_kv_cache: whether the images pass through the model once instead of in each step; None for what the
                model was trained for. It is faster, and right for klein 9B KV only.
            step_cache_ratio, cfg_end: see `Pipeline.settings`.
        """
        image_paths = list(image_paths or ())
        config = self.settings(
            seed=seed,
            prompt=prompt,
            num_inference_steps=num_inference_steps,
            height=height,
            width=width,
            guidance=guidance,
            image_path=image_paths[0] if image_paths else None,
            scheduler=scheduler,
            step_cache_ratio=step_cache_ratio,
            cfg_end=cfg_end,
        )
        pictures = [reference_picture(ImageUtil.load_image(path), path) for path in image_paths]

        # 1. Encode the prompt
        encoded = self.encode_prompts(*self.prompts_of(prompt, config.guidance))

        # 2. Make the latents: noise to start from, and the images
        latents = Flux2LatentCreator.create_noise(seed, config.height, config.width)
        beside = self.encode_references(pictures) if pictures else None

        # 3. Denoise
        kept = None
        if beside is not None and (self.keeps_references if use_kv_cache is None else use_kv_cache):
            dtype = encoded[0].embeds.dtype
            transformer = self.own_transformer()
            known = self.known(config, encoded[0], zero=True)(mx.array(0.0))
            kept = transformer.keep(beside[0].astype(dtype), beside[1], dtype, known)
            mx.eval(kept)
            beside = None
        velocity = self.predictor(config, *encoded, beside=beside, references=kept)
        latents = self.denoise(config, latents, velocity, seed=seed, prompt=prompt)
        del velocity, kept, beside

        # 4. Decode
        return self.make_image(
            config,
            latents,
            seed=seed,
            prompt=prompt,
            parameters=self.own_settings(config),
            image_path=None,
            image_paths=image_paths or None,
        )

    def encode_references(self, pictures: list[PIL.Image.Image]) -> tuple[mx.array, mx.array]:
        """Pictures as tokens (1, R, 128), one picture after the other, and their positions (R, 4)."""
        tokens, ids = [], []
        for number, picture in enumerate(pictures, start=1):
            latents = tiling.encode(self.vae, ImageUtil.to_array(picture), self.tiling_config).astype(mx.float32)
            tokens.append(Flux2LatentCreator.pack_latents(latents))
            ids.append(grid_ids(*latents.shape[2:], time=TIME * number))
            mx.eval(tokens)
        return mx.concatenate(tokens, axis=1), mx.concatenate(ids)
