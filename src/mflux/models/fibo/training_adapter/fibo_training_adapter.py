"""How LoRAs are trained for FIBO. Captions are its own JSON."""

from __future__ import annotations

from collections.abc import Mapping

from mflux.backend import mx
from mflux.models.common.config.config import Config
from mflux.models.common.networks.mmdit import latent_image_ids
from mflux.models.common.training.adapter import TrainingAdapter


class FiboTrainingAdapter(TrainingAdapter):
    """The attention of all blocks."""

    targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
    blocks = ("transformer_blocks", "single_transformer_blocks")

    def condition(self, encoded: list[mx.array]) -> dict[str, mx.array]:
        # All hidden states of the text encoder, in one array.
        return {"text_layers": mx.stack(encoded, axis=1)}

    def velocity(self, config: Config, latents: mx.array, sigmas: mx.array, cond: Mapping[str, mx.array]) -> mx.array:
        layers = cond["text_layers"]
        ids = latent_image_ids(config.height // 16, config.width // 16)
        states = [layers[:, number] for number in range(layers.shape[1])]
        predicted: mx.array = self.pipeline.predictor(config, states, image_ids=ids)(latents, sigmas)
        return predicted
