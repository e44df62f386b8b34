"""Ideogram 4's text encoder: thirteen hidden states of Qwen3-VL, a token's side by side.

Reference class: transformers' `Qwen3VLModel`, as diffusers' `Ideogram4Pipeline` asks it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mflux.backend import mx
from mflux.models.common.networks.text_encoders.qwen3_vl import Qwen3VLEncoderConfig, Qwen3VLTextEncoder


@dataclass(frozen=True)
class Ideogram4TextConfig(Qwen3VLEncoderConfig):
    """Defaults are Qwen3-VL's 8B size."""

    hidden_size: int = 4096
    intermediate_size: int = 12288


class Ideogram4TextEncoder(Qwen3VLTextEncoder):
    """Token ids → prompt embeds (B, L, 13 · hidden_size); number 13 c + k is channel c of the k-th state."""

    # What is saved, so that others can read it.
    saved_class: ClassVar[type[Qwen3VLTextEncoder]]
    config_class = Ideogram4TextConfig
    hidden_states = (*range(1, 35, 3), 36)
    norms_last = False

    def __call__(  # type: ignore[override]  # one array of all the hidden states
        self, input_ids: mx.array, attention_mask: mx.array | None = None
    ) -> mx.array:
        states = super().__call__(input_ids, attention_mask)
        return mx.stack(states, axis=-1).reshape(*input_ids.shape, -1)


class WholeTextEncoder(Ideogram4TextEncoder):
    """All of the language model, its last norm as well."""

    norms_last = True


Ideogram4TextEncoder.saved_class = WholeTextEncoder
