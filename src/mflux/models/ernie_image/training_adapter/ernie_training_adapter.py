"""How LoRAs are trained for ERNIE-Image and ERNIE-Image-Turbo."""

from __future__ import annotations

from collections.abc import Mapping

from mflux.backend import mx
from mflux.models.common.config.config import Config
from mflux.models.common.training.adapter import TrainingAdapter
from mflux.models.ernie_image.lora_names import MFLUX


class ErnieTrainingAdapter(TrainingAdapter):
    """The attention of all layers."""

    targets = (
        "self_attention.to_q", "self_attention.to_k", "self_attention.to_v", "self_attention.to_out.0",
    )  # fmt: skip
    blocks = ("layers",)
    spelled = MFLUX

    def condition(self, encoded: mx.array) -> dict[str, mx.array]:
        return {"prompt_embeds": encoded}

    def velocity(self, config: Config, latents: mx.array, sigmas: mx.array, cond: Mapping[str, mx.array]) -> mx.array:
        predicted: mx.array = self.pipeline.predictor(config, cond["prompt_embeds"])(latents, sigmas)
        return predicted
