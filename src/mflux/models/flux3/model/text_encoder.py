"""FLUX.3's text encoder: eight hidden states of Qwen3-VL's language model side by side.

Reference class: transformers' `Qwen3VLForConditionalGeneration`, as diffusers' `Flux3TextEncoderStep` asks it.
"""

from __future__ import annotations

from mflux.backend import mx
from mflux.models.common.networks.decoder import causal_mask, text_rotary
from mflux.models.common.networks.layers import embedded
from mflux.models.common.networks.text_encoders.qwen3_vl import Qwen3VLTextEncoder


class Flux3TextEncoder(Qwen3VLTextEncoder):
    """Token ids → prompt embeds (1, L, 8 · hidden_size). Padding counts as text for the transformer."""

    hidden_states: tuple[int, ...] = (4, 8, 12, 16, 20, 24, 28, 32)
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
