"""ERNIE-Image's text encoder: what all layers but the last of Ministral 3's language model make of a prompt.

Reference class: transformers' `Mistral3Model`, as diffusers' `ErnieImagePipeline` asks it. Its positions are YaRN's,
however short the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mflux.models.common.networks.decoder import DecoderConfig, DecoderTextEncoder

# Tokens that ERNIE-Image reads of a prompt.
LONGEST = 2048


@dataclass(frozen=True)
class ErnieTextConfig(DecoderConfig):
    """The language model's part of a config.json; defaults are Ministral 3's 3B size."""

    model_type: str = "mistral"
    vocab_size: int = 131072
    hidden_size: int = 3072
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    rms_norm_eps: float = 1e-5
    rope_parameters: Mapping[str, Any] | None = field(
        default_factory=lambda: {
            "rope_type": "yarn", "type": "yarn", "rope_theta": 1_000_000.0, "factor": 16.0, "beta_fast": 32.0,
            "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384,
            # For texts that are longer than those of the first training; no prompt is.
            "llama_4_scaling_beta": 0.1,
        }
    )  # fmt: skip
    sliding_window: int | None = None
    bos_token_id: int = 1

    kind = "mistral"
    part = "text_config"
    qk_norm = False
    rope_types = ("default", "yarn")

    def check(self) -> str | None:
        if self.sliding_window is not None and self.sliding_window < LONGEST:
            return f"a sliding_window of {self.sliding_window} tokens, which is less than a prompt has, is not built"
        if not 0 <= self.bos_token_id < self.vocab_size:
            return f"the bos_token_id {self.bos_token_id} is none of {self.vocab_size} tokens"
        return super().check()


class ErnieTextEncoder(DecoderTextEncoder):
    """Token ids → hidden states (B, L, hidden_size) before the last layer, without a norm."""

    # What is saved, so that others can read it.
    saved_class: ClassVar[type[DecoderTextEncoder]]
    config_class = ErnieTextConfig
    config: ErnieTextConfig
    hidden_states = (-2,)
    place = "language_model.model"
    beside = ("vision_tower.", "multi_modal_projector.")


class WholeTextEncoder(ErnieTextEncoder):
    """All of the language model."""

    hidden_states = (-1,)


ErnieTextEncoder.saved_class = WholeTextEncoder
