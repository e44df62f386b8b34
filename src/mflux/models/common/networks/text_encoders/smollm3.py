"""SmolLM3 (Hugging Face 2025, https://huggingface.co/HuggingFaceTB/SmolLM3-3B) as a text encoder.

Reference class: transformers' `SmolLM3Model`, or `SmolLM3ForCausalLM` without its head. A LLaMA in which every fourth
layer knows no positions (NoPE, Yang et al. 2025, https://arxiv.org/abs/2501.18795).
"""

from __future__ import annotations

from dataclasses import dataclass

from mflux.models.common.networks.decoder import DecoderConfig, DecoderTextEncoder


@dataclass(frozen=True)
class SmolLM3Config(DecoderConfig):
    """`config.json` of a SmolLM3; defaults are those of the 3B size, which FIBO uses."""

    model_type: str = "smollm3"
    vocab_size: int = 128256
    hidden_size: int = 2048
    intermediate_size: int = 11008
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 4
    head_dim: int | None = None
    rope_theta: float = 5_000_000.0
    mlp_bias: bool = False
    bos_token_id: int = 128000
    no_rope_layers: tuple[int, ...] | None = None
    no_rope_layer_interval: int = 4

    kind = "smollm3"
    qk_norm = False

    def __post_init__(self) -> None:
        if self.no_rope_layers is None and self.no_rope_layer_interval > 0:
            # A 1 for every layer that turns queries and keys, in spite of the name.
            turned = (int(layer % self.no_rope_layer_interval != 0) for layer in range(1, self.num_hidden_layers + 1))
            object.__setattr__(self, "no_rope_layers", tuple(turned))

    def has_positions(self, layer: int) -> bool:
        return bool((self.no_rope_layers or ())[layer])

    def check(self) -> str | None:
        if self.no_rope_layer_interval < 1:
            return f"no_rope_layer_interval {self.no_rope_layer_interval} counts no layers"
        told = len(self.no_rope_layers or ())
        if told < self.num_hidden_layers:
            return f"no_rope_layers tells of {told} of {self.num_hidden_layers} layers"
        if not 0 <= self.bos_token_id < self.vocab_size:
            return f"the bos_token_id {self.bos_token_id} is none of {self.vocab_size} tokens"
        if self.mlp_bias:
            return "mlp_bias is not built"
        return super().check()


class SmolLM3TextEncoder(DecoderTextEncoder):
    """Token ids → all hidden states, embeddings first, the last one normed."""

    config_class = SmolLM3Config
    config: SmolLM3Config

    @classmethod
    def hidden_states_of(cls, config: SmolLM3Config) -> tuple[int, ...]:
        return tuple(range(config.num_hidden_layers + 1))
