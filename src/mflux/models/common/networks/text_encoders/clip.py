"""CLIP's text encoder (Radford et al. 2021, arxiv.org/abs/2103.00020).

Reference class: transformers' `CLIPTextModel`. Published files put every name under `text_model.`; files saved by
transformers 5 leave that out, and both load.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from mflux.backend import mx, nn
from mflux.checkpoints.loading import FileDifferences
from mflux.models.common.component_config import ComponentConfig
from mflux.models.common.networks.layers import (
    ACTIVATIONS,
    Embedding,
    LayerNorm,
    Linear,
    attention,
    embedded,
    looked_up,
    merge_heads,
    split_heads,
)


@dataclass(frozen=True)
class CLIPTextConfig(ComponentConfig):
    """`config.json` of a CLIP text encoder; defaults are FLUX.1's."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 2

    def check(self) -> str | None:
        if self.hidden_act not in ACTIVATIONS:
            return f"hidden_act {self.hidden_act!r} is not known; there are {', '.join(ACTIVATIONS)}"
        if self.hidden_size % self.num_attention_heads:
            return f"hidden_size {self.hidden_size} does not divide into {self.num_attention_heads} heads"
        return None


class LayerConfig(Protocol):
    """What a layer is built from; CLIP's configuration and SigLIP's say it in the same words."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def intermediate_size(self) -> int: ...

    @property
    def num_hidden_layers(self) -> int: ...

    @property
    def num_attention_heads(self) -> int: ...

    @property
    def hidden_act(self) -> str: ...

    @property
    def layer_norm_eps(self) -> float: ...


class CLIPAttention(nn.Module):
    def __init__(self, config: LayerConfig, mask: str | None):
        super().__init__()
        self.mask = mask
        self.heads = config.num_attention_heads
        width = config.hidden_size
        self.q_proj = Linear(width, width)
        self.k_proj = Linear(width, width)
        self.v_proj = Linear(width, width)
        self.out_proj = Linear(width, width)

    def __call__(self, x: mx.array) -> mx.array:
        q, k, v = (split_heads(project(x), self.heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(merge_heads(attention(q, k, v, mask=self.mask)))


class CLIPMLP(nn.Module):
    def __init__(self, config: LayerConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(self.activation(self.fc1(x)))


class CLIPLayer(nn.Module):
    def __init__(self, config: LayerConfig, mask: str | None):
        super().__init__()
        self.self_attn = CLIPAttention(config, mask)
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEmbeddings(nn.Module):
    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = Embedding(config.max_position_embeddings, config.hidden_size)

    def __call__(self, input_ids: mx.array) -> mx.array:
        places = mx.arange(input_ids.shape[1])
        return embedded(self.token_embedding, input_ids) + looked_up(self.position_embedding, places, what="positions")


class CLIPEncoder(nn.Module):
    """Layers whose tokens see those before them, or with `mask=None` all; SigLIP's are the same."""

    def __init__(self, config: LayerConfig, mask: str | None = "causal"):
        super().__init__()
        self.layers = [CLIPLayer(config, mask) for _ in range(config.num_hidden_layers)]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
        return x


class CLIPTextTransformer(nn.Module):
    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.embeddings = CLIPEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, input_ids: mx.array) -> mx.array:
        return self.final_layer_norm(self.encoder(self.embeddings(input_ids)))


class CLIPTextEncoder(nn.Module):
    """Token ids → hidden states and the pooled embedding that guides a whole picture."""

    config_class = CLIPTextConfig
    differences = FileDifferences(ignored=(r"(^|\.)position_ids$",), optional_prefix="text_model.")

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.config = config
        self.text_model = CLIPTextTransformer(config)

    def __call__(self, input_ids: mx.array) -> tuple[mx.array, mx.array]:
        """Encode token ids.

        Args:
            input_ids: (B, L), L at most `max_position_embeddings`, ended and padded by the tokenizer.

        Returns:
            Hidden states (B, L, hidden_size) and the pooled embedding (B, hidden_size): the state at the first end
            token. Where the configuration says 2, as the first published files wrongly did, that is the highest id.
        """
        states = self.text_model(input_ids)
        if self.config.eos_token_id == 2:
            ends = mx.argmax(input_ids, axis=1)
        else:
            ends = mx.argmax(input_ids == self.config.eos_token_id, axis=1)
        return states, states[mx.arange(states.shape[0]), ends]
