"""T5's encoder (Raffel et al. 2020, arxiv.org/abs/1910.10683, version 1.1 with gated feed-forward).

Reference class: transformers' `T5EncoderModel`. Attention is not scaled and knows position only through a learned
bias on the distance between two tokens, which the first block holds for all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mflux.backend import mx, nn
from mflux.checkpoints.loading import FileDifferences
from mflux.models.common.component_config import ComponentConfig
from mflux.models.common.networks.layers import (
    ACTIVATIONS,
    Embedding,
    Linear,
    RMSNorm,
    attention,
    embedded,
    looked_up,
    merge_heads,
    split_heads,
)


@dataclass(frozen=True)
class T5Config(ComponentConfig):
    """`config.json` of a T5 encoder; defaults are T5 v1.1 XXL's, which FLUX.1 uses."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"

    @property
    def is_gated(self) -> bool:
        return self.feed_forward_proj.startswith("gated-")

    @property
    def activation(self) -> str:
        """T5 means GELU's tanh form when its gated feed-forward says "gelu"."""
        name = self.feed_forward_proj.removeprefix("gated-")
        return "gelu_new" if self.is_gated and name == "gelu" else name

    def check(self) -> str | None:
        if self.activation not in ACTIVATIONS:
            return f"feed_forward_proj {self.feed_forward_proj!r} is not known"
        one_by_one = self.relative_attention_num_buckets // 4
        if one_by_one < 1:
            return f"relative_attention_num_buckets {self.relative_attention_num_buckets} is less than 4"
        if self.relative_attention_max_distance <= one_by_one:
            return (
                f"relative_attention_max_distance {self.relative_attention_max_distance} is none of more than the "
                f"{one_by_one} that {self.relative_attention_num_buckets} buckets count one by one"
            )
        return None


class T5Attention(nn.Module):
    def __init__(self, config: T5Config, has_relative_attention_bias: bool):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.heads = config.num_heads
        self.buckets = config.relative_attention_num_buckets
        self.max_distance = config.relative_attention_max_distance
        self.q = Linear(config.d_model, inner, bias=False)
        self.k = Linear(config.d_model, inner, bias=False)
        self.v = Linear(config.d_model, inner, bias=False)
        self.o = Linear(inner, config.d_model, bias=False)
        if has_relative_attention_bias:
            self.relative_attention_bias = Embedding(self.buckets, config.num_heads)

    def __call__(self, x: mx.array, position_bias: mx.array) -> mx.array:
        q, k, v = (split_heads(project(x), self.heads) for project in (self.q, self.k, self.v))
        return self.o(merge_heads(attention(q, k, v, scale=1.0, mask=position_bias)))

    def position_bias(self, length: int) -> mx.array:
        """The learned bias for every pair of positions: (1, heads, L, L)."""
        positions = np.arange(length)
        buckets = relative_position_buckets(positions[None, :] - positions[:, None], self.buckets, self.max_distance)
        bias = looked_up(self.relative_attention_bias, mx.array(buckets), what="bias on distances")
        return bias.transpose(2, 0, 1)[None]


def relative_position_buckets(distance: np.ndarray, buckets: int, max_distance: int) -> np.ndarray:
    """Which bucket a signed distance (key minus query) falls into.

    Half of the buckets are for keys that come later. Of each half, the first half counts distances one by one, the
    rest grows logarithmically up to `max_distance`, beyond which all share the last.

    With numpy and not on the GPU: powers of two lie exactly on a border, and the last bit of a logarithm decides.
    """
    half = buckets // 2
    exact = half // 2
    later = np.where(distance > 0, half, 0)
    distance = np.abs(distance)
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    far = ratio / np.float32(math.log(max_distance / exact)) * (half - exact)
    # Cut before it becomes a whole number, which has an end.
    far = exact + np.minimum(far, half).astype(np.int32)
    return later + np.where(distance < exact, distance, np.minimum(far, half - 1))


class T5Norm(RMSNorm):
    """Gives the dtype of its weights, whatever the stream has."""

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x).astype(self.weight.dtype)


class T5LayerSelfAttention(nn.Module):
    def __init__(self, config: T5Config, has_relative_attention_bias: bool):
        super().__init__()
        self.SelfAttention = T5Attention(config, has_relative_attention_bias)
        self.layer_norm = T5Norm(config.d_model, eps=config.layer_norm_epsilon)

    def __call__(self, x: mx.array, position_bias: mx.array) -> mx.array:
        return x + self.SelfAttention(self.layer_norm(x), position_bias)


class T5DenseGated(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.wi_0 = Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = Linear(config.d_model, config.d_ff, bias=False)
        self.wo = Linear(config.d_ff, config.d_model, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return projected(self.wo, self.activation(self.wi_0(x)) * self.wi_1(x))


class T5Dense(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.wi = Linear(config.d_model, config.d_ff, bias=False)
        self.wo = Linear(config.d_ff, config.d_model, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return projected(self.wo, self.activation(self.wi(x)))


def projected(layer: nn.Module, x: mx.array) -> mx.array:
    """A feed-forward's last product, which in T5 is beyond float16's numbers: as in the reference it is float32 then,
    and so is the stream that it is added to."""
    return layer(x.astype(mx.float32) if x.dtype == mx.float16 else x)


class T5LayerFF(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.DenseReluDense = (T5DenseGated if config.is_gated else T5Dense)(config)
        self.layer_norm = T5Norm(config.d_model, eps=config.layer_norm_epsilon)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.DenseReluDense(self.layer_norm(x))


class T5Block(nn.Module):
    def __init__(self, config: T5Config, has_relative_attention_bias: bool):
        super().__init__()
        self.layer = [T5LayerSelfAttention(config, has_relative_attention_bias), T5LayerFF(config)]

    def __call__(self, x: mx.array, position_bias: mx.array) -> mx.array:
        attend, feed_forward = self.layer
        return feed_forward(attend(x, position_bias))


class T5Stack(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.block = [T5Block(config, has_relative_attention_bias=index == 0) for index in range(config.num_layers)]
        self.final_layer_norm = T5Norm(config.d_model, eps=config.layer_norm_epsilon)

    def __call__(self, x: mx.array) -> mx.array:
        position_bias = self.block[0].layer[0].SelfAttention.position_bias(x.shape[1]).astype(x.dtype)
        for block in self.block:
            x = block(x, position_bias)
        return self.final_layer_norm(x)


class T5Encoder(nn.Module):
    """Token ids → one embedding per token."""

    config_class = T5Config
    # Files hold the embedding as shared.weight, as encoder.embed_tokens.weight, or as both.
    differences = FileDifferences(
        ignored=(r"^encoder\.embed_tokens\.weight$",), tied={"shared.weight": "encoder.embed_tokens.weight"}
    )

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.shared = Embedding(config.vocab_size, config.d_model)
        self.encoder = T5Stack(config)

    def __call__(self, input_ids: mx.array) -> mx.array:
        """Encode token ids (B, L) to hidden states (B, L, d_model). Padding is attended to, as FLUX.1 was trained."""
        return self.encoder(embedded(self.shared, input_ids))
