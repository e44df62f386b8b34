"""How LoRAs are trained for Z-Image and Z-Image-Turbo."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mflux.backend import mx
from mflux.models.common.config.config import Config
from mflux.models.common.training.adapter import TrainingAdapter
from mflux.models.z_image.latent_creator import ZImageLatentCreator


class ZImageTrainingAdapter(TrainingAdapter):
    """Files have `diffusion_model.` before the names, as mflux 0.24 wrote it: ComfyUI and diffusers both read it."""

    targets = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
    blocks = ("noise_refiner", "context_refiner", "layers")
    prefix = "diffusion_model"

    def latents(self, image: Path, width: int, height: int) -> mx.array:
        return ZImageLatentCreator.unpack_latents(super().latents(image, width, height))

    def condition(self, encoded: mx.array) -> dict[str, mx.array]:
        return {"prompt_embeds": encoded}

    def velocity(self, config: Config, latents: mx.array, sigmas: mx.array, cond: Mapping[str, mx.array]) -> mx.array:
        predict = self.pipeline.predictor(config, cond["prompt_embeds"])
        predicted: mx.array = predict(ZImageLatentCreator.pack_latents(latents), sigmas)
        return ZImageLatentCreator.unpack_latents(predicted)
