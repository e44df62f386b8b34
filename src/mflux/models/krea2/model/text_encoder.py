"""Krea 2's text encoder: twelve hidden states of Qwen3-VL's language model, side by side for each token.

Reference class: transformers' `Qwen3VLModel`, as diffusers' `Krea2Pipeline` asks it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from mflux.backend import mx
from mflux.checkpoints.quantization import UNQUANTIZED
from mflux.models.common.networks.text_encoders.qwen3_vl import Qwen3VLEncoderConfig, Qwen3VLTextEncoder

_LAYERS = "text_encoder_select_layers"


@dataclass(frozen=True)
class Krea2TextConfig(Qwen3VLEncoderConfig):
    """`config.json` of the text encoder, and of `model_index.json` which hidden states are taken."""

    text_encoder_select_layers: tuple[int, ...] = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: object = "config.json") -> Self:
        inner = values.get(cls.part) if isinstance(values, Mapping) else None
        if isinstance(inner, Mapping) and _LAYERS in values:
            values = dict(values) | {cls.part: dict(inner) | {_LAYERS: values[_LAYERS]}}
        return super().from_dict(values, source=source)

    def check(self) -> str | None:
        layers = self.text_encoder_select_layers
        if not layers or any(not 0 <= layer <= self.num_hidden_layers for layer in layers):
            return f"{_LAYERS} {list(layers)} names hidden states that {self.num_hidden_layers} layers do not have"
        return super().check()


class Krea2TextEncoder(Qwen3VLTextEncoder):
    """Token ids (B, L) → (B, L, states, hidden_size)."""

    # What is saved, so that others can read it.
    saved_class: ClassVar[type[Qwen3VLTextEncoder]]
    config_class = Krea2TextConfig
    # mflux 0.24 found that quantizing it costs meaning.
    least_bits = {"": UNQUANTIZED}

    @classmethod
    def hidden_states_of(cls, config: Krea2TextConfig) -> tuple[int, ...]:
        return config.text_encoder_select_layers

    def __call__(  # type: ignore[override]  # one array of all the hidden states
        self, input_ids: mx.array, attention_mask: mx.array | None = None
    ) -> mx.array:
        return mx.stack(super().__call__(input_ids, attention_mask), axis=2)


class WholeTextEncoder(Qwen3VLTextEncoder):
    """All of the language model."""

    config_class = Krea2TextConfig
    least_bits = {"": UNQUANTIZED}


Krea2TextEncoder.saved_class = WholeTextEncoder
