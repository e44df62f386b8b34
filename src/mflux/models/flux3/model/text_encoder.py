"""FLUX.3's text encoder: eight hidden states of Qwen3-VL's language model side by side.

Reference class: transformers' `Qwen3VLForConditionalGeneration`, as diffusers' `Flux3TextEncoderStep` asks it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mflux.backend import mx
from mflux.models.common.networks.decoder import causal_mask, text_rotary
from mflux.models.common.networks.layers import embedded
from mflux.models.common.networks.text_encoders.qwen3_vl import Qwen3VLEncoderConfig, Qwen3VLTextEncoder

_STATES = (4, 8, 12, 16, 20, 24, 28, 32)


@dataclass(frozen=True)
class Flux3TextConfig(Qwen3VLEncoderConfig):
    """`config.json` of the text encoder; defaults are Qwen3-VL-4B's."""

    rope_scaling: Mapping[str, Any] | None = field(
        default_factory=lambda: {
            "mrope_interleaved": True, "mrope_section": (24, 20, 20), "rope_type": "default", "rope_theta": 5_000_000,
        }
    )  # fmt: skip

    def layer_counts(self) -> Iterator[tuple[str, int]]:
        # Copies of it hold no more than is read, beside the whole model's configuration.
        return ((name, min(number, _STATES[-1])) for name, number in super().layer_counts())


class Flux3TextEncoder(Qwen3VLTextEncoder):
    """Token ids → prompt embeds (1, L, 8 · hidden_size). Padding counts as text for the transformer."""

    config_class = Flux3TextConfig
    hidden_states: tuple[int, ...] = _STATES
    # A copy without the layers above has 32 of them, whose last one is as it is in the whole model.
    norms_last = False
    place = "model.language_model"
    beside = ("model.visual.",)

    def __call__(  # type: ignore[override]  # one array of all the hidden states
        self, input_ids: mx.array, attention_mask: mx.array
    ) -> mx.array:
        """One prompt (1, L), whose padding stands where the model was trained with it: at position 1, all of it."""
        length = input_ids.shape[1]
        rotary = text_rotary(mx.where(attention_mask[0] != 0, mx.arange(length), 1), self.config)
        embeddings = embedded(self.decoder.embed_tokens, input_ids)
        mask = causal_mask(attention_mask, length)
        return mx.concatenate(self.decoder.hidden_states(embeddings, rotary, mask, self.wanted), axis=-1)
