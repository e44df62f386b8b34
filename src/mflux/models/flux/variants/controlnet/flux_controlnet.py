"""FLUX.1 with a ControlNet: images that follow the edges of another one, or show it with more pixels."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import PIL.Image

from mflux.backend import mx
from mflux.checkpoints.published import PublishedFolder
from mflux.errors import CheckpointError
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.controls.canny import canny
from mflux.models.common.family import Component
from mflux.models.common.memory import LazyComponent
from mflux.models.common.networks.once import Once
from mflux.models.flux.family import CONTROLNET, FAMILY
from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator
from mflux.models.flux.model.controlnet import FluxControlNet
from mflux.models.flux.model.transformer import latent_image_ids
from mflux.models.flux.pipeline import FluxPipeline
from mflux.models.flux.sources import needed, picture
from mflux.text import shown
from mflux.utils import values
from mflux.utils.generated_image import GeneratedImage
from mflux.utils.metadata_reader import MetadataReader


class Flux1Controlnet(FluxPipeline):
    """FLUX.1 dev or schnell with a ControlNet; see `Model`.

    Reference: diffusers' `FluxControlNetPipeline`.

    Args:
        controlnet_path: a folder or repository with a ControlNet in the published layout instead of the model's own.
    """

    default_model = "dev-controlnet-canny"
    components = (*FAMILY.components, CONTROLNET)
    transformer_controlnet: LazyComponent[FluxControlNet]

    def __init__(
        self,
        quantize: int | None = None,
        model_path: str | None = None,
        lora_paths: list[str] | None = None,
        lora_scales: list[float] | None = None,
        bake_lora: bool = True,
        controlnet_path: str | None = None,
        model_config: ModelConfig | None = None,
        *,
        text_encoder_paths: list[str] | None = None,
        vae_path: str | None = None,
        compute_precision: mx.Dtype | None = None,
    ):
        self._controlnet_path = controlnet_path
        super().__init__(
            quantize,
            model_path,
            lora_paths,
            lora_scales,
            bake_lora,
            model_config,
            text_encoder_paths=text_encoder_paths,
            vae_path=vae_path,
            compute_precision=compute_precision,
        )

    def opened(self) -> None:
        super().opened()
        # Refused now and not after the prompt is encoded.
        settings = self.folder_of(CONTROLNET).config(CONTROLNET.folder)
        if settings.get("_class_name", CONTROLNET.published_class) != CONTROLNET.published_class:
            raise CheckpointError(
                f"{self.folder_of(CONTROLNET).root} holds a {shown(settings['_class_name'], 60)}, not a ControlNet of "
                "FLUX.1"
            )

    def folder_of(self, component: Component) -> PublishedFolder:
        if component is CONTROLNET and self._controlnet_path is not None:
            return self.elsewhere(component, self._controlnet_path, at_root=True)
        return super().folder_of(component)

    def generate_image(
        self,
        seed: int,
        prompt: str,
        controlnet_image_path: str | bytes | os.PathLike,
        num_inference_steps: int = 4,
        height: int | None = None,
        width: int | None = None,
        guidance: float = 4.0,
        controlnet_strength: float = 1.0,
        scheduler: str | None = None,
        step_cache_ratio: float | None = None,
        cfg_end: float | None = None,
    ) -> GeneratedImage:
        """Generate one image.

        Args:
            seed, prompt, num_inference_steps, guidance, scheduler: as for `Flux1.generate_image`.
            controlnet_image_path: the image to follow; for a ControlNet of edges they are found in it.
            height, width: in pixels, rounded down to multiples of 16; None for the image's own.
            controlnet_strength: how closely to follow the image; 0 is not at all.
            step_cache_ratio, cfg_end: see `Pipeline.settings`.

        Raises:
            as `Flux1.generate_image`.
        """
        given = needed(controlnet_image_path, "controlnet_image_path (--controlnet-image-path)")
        source = values.image(given, "controlnet_image_path")
        strength = values.real(controlnet_strength, "controlnet_strength")
        config = self.settings(
            seed=seed,
            prompt=prompt,
            num_inference_steps=num_inference_steps,
            height=height,
            width=width,
            guidance=guidance,
            image_path=source,
            controlnet_strength=strength,
            scheduler=scheduler,
            step_cache_ratio=step_cache_ratio,
            cfg_end=cfg_end,
        )

        # 1. Encode the prompt
        (encoded,) = self.encode_prompts(prompt)

        # 2. Make the noise to start from, and the latents of the image to follow
        latents = FluxLatentCreator.create_noise(seed, config.height, config.width)
        shown = picture(source, config.width, config.height)
        edges = PIL.Image.fromarray(canny(np.asarray(shown))) if self.model_config.is_canny() else None
        control = self.encode_image(shown if edges is None else edges.convert("RGB"), config.height, config.width)

        # 3. Denoise
        predict = self.predictor(config, encoded)
        asks = self.transformer_controlnet.config.guidance_embeds
        common: dict[str, Any] = {
            "control": control.astype(encoded.embeds.dtype),
            "strength": strength,
            "prompt_embeds": encoded.embeds,
            "pooled_prompt_embeds": encoded.pooled,
            "image_ids": latent_image_ids(config.height // 16, config.width // 16),
            "guidance": mx.array([config.guidance]) if asks else None,
            "once": Once(),
        }

        known = self.ahead(
            config,
            "transformer_controlnet",
            lambda controlnet, sigma: controlnet.time_text_embed(sigma[None], common["guidance"], encoded.pooled),
            of=(config.guidance, encoded.digest),
        )

        def velocity(latents: mx.array, sigma: mx.array) -> mx.array:
            seen = latents.astype(encoded.embeds.dtype)
            residuals = self.transformer_controlnet(seen, sigma=sigma[None], known=known(sigma), **common)
            return predict(latents, sigma, residuals=residuals)

        latents = self.denoise(config, latents, velocity, seed=seed, prompt=prompt, canny_image=edges)

        # 4. Decode
        about: dict[str, Any] = {"image_path": None, "controlnet_image_path": source}
        about["init_metadata"] = MetadataReader.read_all_metadata(source)
        image = self.make_image(config, latents, seed=seed, prompt=prompt, **about)
        image.canny_image = edges
        return image
