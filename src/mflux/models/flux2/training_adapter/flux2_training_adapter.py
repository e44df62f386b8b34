"""How LoRAs are trained for FLUX.2 klein: on images and captions, or on pairs of images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mflux.backend import mx
from mflux.models.common.config.config import Config
from mflux.models.common.training.adapter import TrainingAdapter
from mflux.models.flux2.lora_names import MFLUX
from mflux.models.flux2.pipeline import Prompt
from mflux.models.flux2.variants.edit.flux2_klein_edit import reference_picture
from mflux.utils.image_util import ImageUtil


class Flux2TrainingAdapter(TrainingAdapter):
    """The layers that diffusers' own training has by default."""

    targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.to_qkv_mlp_proj", "attn.to_out")
    blocks = ("transformer_blocks", "single_transformer_blocks")
    spelled = MFLUX

    def condition(self, encoded: Prompt) -> dict[str, mx.array]:
        return {"prompt_embeds": encoded.embeds}

    def velocity(self, config: Config, latents: mx.array, sigmas: mx.array, cond: Mapping[str, mx.array]) -> mx.array:
        beside = (cond["image_latents"], cond["image_latent_ids"][0]) if "image_latents" in cond else None
        predict = self.pipeline.predictor(config, Prompt(cond["prompt_embeds"]), beside=beside)
        predicted: mx.array = predict(latents, sigmas)
        return predicted


class Flux2EditTrainingAdapter(Flux2TrainingAdapter):
    """Images that an edit starts from have sizes of their own, so that each pair is learned by itself."""

    stacks = False

    def beside(self, image: Path) -> dict[str, mx.array]:
        tokens, ids = self.pipeline.encode_references([reference_picture(ImageUtil.load_image(image), image)])
        return {"image_latents": tokens, "image_latent_ids": ids[None]}

    def preview(self, image: Path | None) -> dict[str, Any]:
        return {"image_paths": [image]}
