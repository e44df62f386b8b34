"""FLUX.1 with a ControlNet: pictures that follow the edges of another one, or show it with more pixels."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import PIL.Image

from mflux.backend import mx
from mflux.checkpoints.published import PublishedFolder
from mflux.errors import CheckpointError
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.controls.canny import canny
from mflux.models.common.family import Component
from mflux.models.flux.family import CONTROLNET, FAMILY
from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator
from mflux.models.flux.model.transformer import latent_image_ids
from mflux.models.flux.sources import needed, picture
from mflux.models.flux.variants.txt2img.flux import Flux1
from mflux.utils import values
from mflux.utils.generated_image import GeneratedImage
from mflux.utils.metadata_reader import MetadataReader


class Flux1Controlnet(Flux1):
    """FLUX.1 dev or schnell with a ControlNet; see `Pipeline`.

    Reference: diffusers' `FluxControlNetPipeline`.

    Args:
        controlnet_path: a folder or repository with a ControlNet in the published layout instead of the model's own.
    """

    default_model = "dev-controlnet-canny"
    components = (*FAMILY.components, CONTROLNET)

    def __init__(
        self,
        quantize: int | None = None,
        model_path: str | None = None,
        lora_paths: list[str] | None = None,
        lora_scales: list[float] | None = None,
        bake_lora: bool = True,
        controlnet_path: str | None = None,
        model_config: ModelConfig | None = None,
    ):
        self._controlnet_path = controlnet_path
        super().__init__(quantize, model_path, lora_paths, lora_scales, bake_lora, model_config)
        # Told now and not after the prompt is encoded.
        settings = self.folder_of(CONTROLNET).config(CONTROLNET.folder)
        if settings.get("_class_name", CONTROLNET.published_class) != CONTROLNET.published_class:
            raise CheckpointError(
                f"{self.folder_of(CONTROLNET).root} holds a {settings['_class_name']}, not a ControlNet of FLUX.1"
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
        scheduler: str = "linear",
    ) -> GeneratedImage:
        """Draw one picture.

        Args:
            seed: 0 to 2^64 - 1; the same seed and settings give the same picture.
            prompt: what to draw; encoded once and kept.
            controlnet_image_path: the picture to follow; for a ControlNet of edges they are found in it.
            num_inference_steps: 1 or more.
            height, width: in pixels, rounded down to multiples of 16; None for the picture's own.
            guidance: how closely to follow the prompt; models without guidance (schnell) have no use for it.
            controlnet_strength: how closely to follow the picture; 0 is not at all.
            scheduler: "linear", "flow_match_euler_discrete", or "package.module.Class".

        Raises:
            MfluxError: sizes, steps, picture or weights are unusable; the message says which.
            StopImageGenerationException: Ctrl-C, or a callback, stopped it.
        """
        source = Path(os.fsdecode(needed(controlnet_image_path, "controlnet_image_path (--controlnet-image-path)")))
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
        )

        # 1. Encode the prompt
        embeds = self.encode_prompt(prompt)

        # 2. Make the noise to start from, and the latents of the picture to follow
        latents = FluxLatentCreator.create_noise(seed, config.height, config.width)
        shown = picture(source, config.width, config.height)
        edges = PIL.Image.fromarray(canny(np.asarray(shown))) if self.model_config.is_canny() else None
        control = self.encode_image(shown if edges is None else edges.convert("RGB"), config.height, config.width)

        # 3. Denoise
        predict = self.predictor(config, *embeds)
        asks = self.transformer_controlnet.config.guidance_embeds
        common = {
            "control": control.astype(embeds[0].dtype),
            "strength": strength,
            "prompt_embeds": embeds[0],
            "pooled_prompt_embeds": embeds[1],
            "image_ids": latent_image_ids(config.height // 16, config.width // 16),
            "guidance": mx.array([config.guidance]) if asks else None,
        }

        def velocity(latents: mx.array, sigma: mx.array) -> mx.array:
            seen = latents.astype(embeds[0].dtype)
            residuals = self.transformer_controlnet(seen, sigma=sigma[None], **common)
            return predict(latents, sigma, residuals=residuals)

        latents = self.denoise(config, latents, velocity, seed=seed, prompt=prompt, canny_image=edges)

        # 4. Decode
        about = {"image_path": None, "controlnet_image_path": source}
        about["init_metadata"] = MetadataReader.read_all_metadata(source)
        image = self.picture(config, latents, seed=seed, prompt=prompt, **about)
        image.canny_image = edges
        return image
