"""How LoRAs are trained for FLUX.1."""

from __future__ import annotations

from collections.abc import Mapping

from mflux.backend import mx
from mflux.models.common.config.config import Config
from mflux.models.common.training.adapter import TrainingAdapter
from mflux.models.flux.lora_names import MFLUX
from mflux.models.flux.pipeline import Prompt


class FluxTrainingAdapter(TrainingAdapter):
    """The layers that diffusers' own training has by default."""

    targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
        "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    )  # fmt: skip
    blocks = ("transformer_blocks", "single_transformer_blocks")
    spelled = MFLUX

    def condition(self, encoded: Prompt) -> dict[str, mx.array]:
        return {"prompt_embeds": encoded.embeds, "pooled_prompt_embeds": encoded.pooled}

    def velocity(self, config: Config, latents: mx.array, sigmas: mx.array, cond: Mapping[str, mx.array]) -> mx.array:
        prompt = Prompt(cond["prompt_embeds"], cond["pooled_prompt_embeds"])
        predicted: mx.array = self.pipeline.predictor(config, prompt)(latents, sigmas)
        return predicted
