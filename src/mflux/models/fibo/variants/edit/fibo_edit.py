"""FIBO-Edit: an image and an instruction to an image; with FIBO-Edit-RMBG, to the matte of what is in front."""

from __future__ import annotations

from pathlib import Path

from mflux.backend import mx
from mflux.models.common.networks.mmdit import latent_image_ids
from mflux.models.common.sizes import MEGAPIXEL, nearest, shrunk
from mflux.models.fibo.latent_creator.fibo_latent_creator import FiboLatentCreator
from mflux.models.fibo.pipeline import FiboPipeline
from mflux.models.fibo.prompts import check_edit
from mflux.models.fibo.sources import source_picture
from mflux.utils.generated_image import GeneratedImage
from mflux.utils.scale_factor import GRID


class FIBOEdit(FiboPipeline):
    """FIBO-Edit and FIBO-Edit-RMBG, and anything of that architecture in the diffusers layout; see `Model`."""

    default_model = "fibo-edit"

    def generate_image(
        self,
        seed: int,
        prompt: str,
        image_path: Path | str,
        mask_path: Path | str | None = None,
        num_inference_steps: int = 50,
        height: int | None = None,
        width: int | None = None,
        guidance: float = 4.0,
        scheduler: str | None = None,
        negative_prompt: str | None = None,
        step_cache_ratio: float | None = None,
        cfg_end: float | None = None,
    ) -> GeneratedImage:
        """Edit an image; arguments and errors are those of `FIBO.generate_image` but for these.

        Args:
            prompt: a JSON object with an `edit_instruction`, see `FiboVLM.edit`; encoded once and kept.
            image_path: the image to edit. The model sees it at its own size, up to about a megapixel.
            mask_path: an image of the same size, white where it is to be edited; the model sees grey there.
            height, width: in pixels, rounded down to multiples of 16; None for the size at which the model sees it.
            step_cache_ratio, cfg_end: see `Pipeline.settings`.
        """
        check_edit(prompt)
        source = source_picture(image_path, mask_path)
        seen_width, seen_height = shrunk(source.size, MEGAPIXEL, nearest(GRID))
        config = self.settings(
            seed=seed,
            prompt=prompt,
            num_inference_steps=num_inference_steps,
            height=seen_height if height is None else height,
            width=seen_width if width is None else width,
            guidance=guidance,
            scheduler=scheduler,
            step_cache_ratio=step_cache_ratio,
            cfg_end=cfg_end,
        )

        # 1. Encode the prompts
        encoded = self.encode_prompts(prompt, *([negative_prompt or ""] if config.guidance > 1 else []))

        # 2. Make the noise to start from, and the tokens of the image to edit, on a plane of their own
        latents = FiboLatentCreator.create_noise(seed, config.height, config.width)
        reference = self.encode_image(source, seen_height, seen_width)
        ids = mx.concatenate(
            [
                latent_image_ids(config.height // 16, config.width // 16),
                latent_image_ids(seen_height // 16, seen_width // 16, plane=1),
            ]
        )

        # 3. Denoise
        velocity = self.predictor(config, *encoded, image_ids=ids, reference=reference)
        del encoded
        latents = self.denoise(config, latents, velocity, seed=seed, prompt=prompt)

        # 4. Decode
        image = self.make_image(
            config,
            latents,
            seed=seed,
            prompt=prompt,
            negative_prompt=negative_prompt,
            image_path=image_path,
            masked_image_path=mask_path,
        )
        image.prompt_beside = "fibo-edit-rmbg" not in self.model_config.aliases
        return image
