"""Anima's text encoder: the last hidden state of Qwen3-0.6B-Base, after its norm.

Reference class: transformers' `Qwen3Model`.
"""

from __future__ import annotations

from dataclasses import dataclass

from mflux.backend import mx
from mflux.checkpoints.quantization import UNQUANTIZED
from mflux.models.common.networks.text_encoders.qwen3 import Qwen3Config, Qwen3TextEncoder


@dataclass(frozen=True)
class AnimaTextConfig(Qwen3Config):
    """`config.json` of the text encoder; defaults are those of Qwen3's 0.6B size."""

    hidden_size: int = 1024
    intermediate_size: int = 3072
    num_hidden_layers: int = 28
    num_attention_heads: int = 16


class AnimaTextEncoder(Qwen3TextEncoder):
    """Token ids (1, L) → hidden states (1, L, hidden_size)."""

    config_class = AnimaTextConfig
    hidden_states = (-1,)
    least_bits = {"": UNQUANTIZED}

    def __call__(  # type: ignore[override]  # the only one
        self, input_ids: mx.array, attention_mask: mx.array | None = None
    ) -> mx.array:
        (states,) = super().__call__(input_ids, attention_mask)
        return states
