"""FLUX.2 klein's text encoders: three hidden states of Qwen3 side by side, or a small Qwen3 with an adapter.

Reference classes: transformers' `Qwen3ForCausalLM`, as diffusers' `Flux2KleinPipeline` asks it; for the adapter, its
authors' `AiArtLab/qwen3-0.6b-4b-adapter`.
"""

from __future__ import annotations

from dataclasses import dataclass

from mflux.backend import mx, nn
from mflux.models.common.component_config import ComponentConfig
from mflux.models.common.networks.layers import (
    Activation,
    LayerNorm,
    Linear,
    attention,
    layer_norm,
    merge_heads,
    product,
    split_heads,
)
from mflux.models.common.networks.text_encoders.qwen3 import Qwen3TextEncoder

_EPS = 1e-5


class KleinTextEncoder(Qwen3TextEncoder):
    """Token ids → prompt embeds (B, L, 3 · hidden_size). Padding counts as text for the transformer."""

    hidden_states: tuple[int, ...] = (9, 18, 27)
    # What is saved, so that others can read it.
    saved_class = Qwen3TextEncoder

    def __call__(  # type: ignore[override]  # one array of all the hidden states
        self, input_ids: mx.array, attention_mask: mx.array | None = None
    ) -> mx.array:
        return mx.concatenate(super().__call__(input_ids, attention_mask), axis=-1)


class SmallQwen3(KleinTextEncoder):
    """Qwen3-0.6B, whose hidden states the adapter takes for the 4B size's."""

    hidden_states = (2, 9, 14, 18, 23, 27)


class SmallTextEncoder(nn.Module):
    """Token ids → prompt embeds, from a small Qwen3 and the adapter that makes its hidden states another's.

    Args:
        encoder: a `SmallQwen3`.
        adapter: a `SmallTextAdapter`; it computes in float32.
        left_out: tokens at the beginning of which nothing was learned.
    """

    def __init__(self, encoder: SmallQwen3, adapter: SmallTextAdapter, left_out: int):
        super().__init__()
        self.encoder = encoder
        self.adapter = adapter
        self.left_out = left_out

    @property
    def max_length(self) -> int:
        return self.adapter.config.max_length

    def __call__(self, input_ids: mx.array, attention_mask: mx.array | None = None) -> mx.array:
        """(B, L) → (B, L - left_out, out_features), in the encoder's dtype."""
        states = self.encoder(input_ids, attention_mask)
        return self.adapter(states.astype(mx.float32)).astype(states.dtype)[:, self.left_out :]


# ---- the adapter


@dataclass(frozen=True)
class AdapterConfig(ComponentConfig):
    """The shape of the adapter; defaults are those of the published one, which says them in its metadata."""

    hidden_size: int = 1024
    hidden_states: int = 6
    out_features: int = 7680
    mlp_features: int = 8192
    attention_features: int = 1024
    attention_heads: int = 8
    attention_blocks: int = 2
    max_length: int = 256

    @property
    def in_features(self) -> int:
        return self.hidden_size * self.hidden_states

    def check(self) -> str | None:
        if self.attention_features % self.attention_heads:
            return f"{self.attention_features} channels do not divide into {self.attention_heads} heads"
        return None


class HiddenStateNorm(nn.Module):
    """Each hidden state is normed by itself, then all of them together, with weights."""

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.count = config.hidden_states
        self.all = LayerNorm(config.in_features, eps=_EPS)

    def __call__(self, x: mx.array) -> mx.array:
        apart = x.reshape(*x.shape[:-1], self.count, -1)
        return self.all(layer_norm(apart, _EPS).reshape(x.shape))


class SelfAttention(nn.Module):
    """Every token attends to every other, padding included; queries, keys and values from one matrix."""

    def __init__(self, features: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = mx.zeros((3 * features, features))
        self.in_proj_bias = mx.zeros(3 * features)
        self.out_proj = Linear(features, features)

    def __call__(self, x: mx.array) -> mx.array:
        joint = product(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = (split_heads(part, self.heads) for part in mx.split(joint, 3, axis=-1))
        return self.out_proj(merge_heads(attention(q, k, v)))


class AttentionBlock(nn.Module):
    def __init__(self, features: int, heads: int):
        super().__init__()
        self.n1 = LayerNorm(features, eps=_EPS)
        self.attn = SelfAttention(features, heads)
        self.n2 = LayerNorm(features, eps=_EPS)
        self.ffn = [
            Linear(features, 4 * features),
            Activation("gelu_pytorch_tanh"),
            Linear(4 * features, features),
        ]

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.attn(self.n1(x))
        y = self.n2(x)
        for layer in self.ffn:
            y = layer(y)
        return x + y


class AttentionMixer(nn.Module):
    def __init__(self, config: AdapterConfig):
        super().__init__()
        features = config.attention_features
        self.norm = LayerNorm(config.in_features, eps=_EPS)
        self.inp = Linear(config.in_features, features)
        self.pos = mx.zeros((1, config.max_length, features))
        self.blocks = [AttentionBlock(features, config.attention_heads) for _ in range(config.attention_blocks)]
        self.out = Linear(features, config.out_features)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.inp(self.norm(x)) + self.pos[:, : x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class SmallTextAdapter(nn.Module):
    """Six hidden states of Qwen3-0.6B (B, L, 6 · 1024) → what klein 4B's own encoder would give (B, L, 7680)."""

    config_class = AdapterConfig

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.config = config
        hidden = config.mlp_features
        self.mlp = [
            HiddenStateNorm(config),
            Linear(config.in_features, hidden),
            Activation("gelu_pytorch_tanh"),
            Linear(hidden, hidden),
            Activation("gelu_pytorch_tanh"),
            Linear(hidden, config.out_features),
        ]
        self.attn = AttentionMixer(config)

    def __call__(self, x: mx.array) -> mx.array:
        y = x
        for layer in self.mlp:
            y = layer(y)
        return y + self.attn(x)
