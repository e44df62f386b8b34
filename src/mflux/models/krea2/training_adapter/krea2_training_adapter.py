"""How LoRAs are trained for Krea 2. Raw is what they are meant to be trained on, and Turbo draws with them."""

from __future__ import annotations

import json
from collections.abc import Mapping

from mflux.backend import mx
from mflux.models.common.config.config import Config
from mflux.models.common.training.adapter import TrainingAdapter


class Krea2TrainingAdapter(TrainingAdapter):
    """The attention of all blocks, its gate left out."""

    targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
    blocks = ("transformer_blocks",)

    def words(self, caption: str) -> str:
        """As mflux 0.24: of a caption that is Ideogram's JSON, what it says of the whole image."""
        if not (caption.startswith("{") and caption.endswith("}")):
            return caption
        try:
            described = json.loads(caption).get("high_level_description")
        except ValueError:
            return caption
        return described.strip() if isinstance(described, str) and described.strip() else caption

    def condition(self, encoded: mx.array) -> dict[str, mx.array]:
        return {"prompt_embeds": encoded}

    def velocity(self, config: Config, latents: mx.array, sigmas: mx.array, cond: Mapping[str, mx.array]) -> mx.array:
        predicted: mx.array = self.pipeline.predictor(config, cond["prompt_embeds"])(latents, sigmas)
        return predicted
