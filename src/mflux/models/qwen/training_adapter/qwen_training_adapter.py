"""How LoRAs are trained for Qwen-Image."""

from __future__ import annotations

from collections.abc import Mapping

from mflux.backend import mx
from mflux.models.common.config.config import Config
from mflux.models.common.training.adapter import TrainingAdapter


class QwenTrainingAdapter(TrainingAdapter):
    """The layers that diffusers' own training has by default."""

    targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
    blocks = ("transformer_blocks",)

    def condition(self, encoded: mx.array) -> dict[str, mx.array]:
        return {"prompt_embeds": encoded}

    def velocity(self, config: Config, latents: mx.array, sigmas: mx.array, cond: Mapping[str, mx.array]) -> mx.array:
        predicted: mx.array = self.pipeline.predictor(config, cond["prompt_embeds"])(latents, sigmas)
        return predicted
