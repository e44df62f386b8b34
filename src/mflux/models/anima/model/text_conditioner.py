"""What Anima's transformer reads of a prompt: T5's words, asked of Qwen3's hidden states.

Reference class: diffusers' `AnimaTextConditioner`; in the authors' file it stands in the transformer, as `llm_adapter`.
Each of T5's tokens is looked up in a table, and blocks of attention to its neighbours and to the language model's
states make of it a token of the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

from mflux.backend import mx, nn
from mflux.checkpoints.quantization import UNQUANTIZED
from mflux.models.common.component_config import ComponentConfig
from mflux.models.common.networks.layers import (
    Activation,
    Embedding,
    Linear,
    RMSNorm,
    Rotary,
    attention,
    embedded,
    inverse_frequencies,
    merge_heads,
    normed_heads,
    rotate_halves,
    split_heads,
)

_EPS, _THETA = 1e-6, 10_000.0


@dataclass(frozen=True)
class AnimaTextConditionerConfig(ComponentConfig):
    """`config.json` of an AnimaTextConditioner; defaults are Anima's."""

    source_dim: int = 1024
    target_dim: int = 1024
    model_dim: int = 1024
    num_layers: int = 6
    num_attention_heads: int = 16
    mlp_ratio: float = 4.0
    target_vocab_size: int = 32128
    use_self_attention: bool = True
    use_layer_norm: bool = False
    min_sequence_length: int = 512

    def check(self) -> str | None:
        if self.use_layer_norm:
            return "use_layer_norm is true, and only norms by the mean square are built"
        if self.model_dim % self.num_attention_heads or self.model_dim // self.num_attention_heads % 2:
            return f"{self.model_dim} channels do not divide into {self.num_attention_heads} heads of an even width"
        return None


class Attention(nn.Module):
    def __init__(self, width: int, context: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = Linear(width, width, bias=False)
        self.q_norm = RMSNorm(width // heads, eps=_EPS)
        self.k_proj = Linear(context, width, bias=False)
        self.k_norm = RMSNorm(width // heads, eps=_EPS)
        self.v_proj = Linear(context, width, bias=False)
        self.o_proj = Linear(width, width, bias=False)

    def __call__(self, x: mx.array, context: mx.array, rotary: Rotary, of_context: Rotary) -> mx.array:
        q = rotate_halves(normed_heads(self.q_norm, self.q_proj(x), self.heads), rotary)
        k = rotate_halves(normed_heads(self.k_norm, self.k_proj(context), self.heads), of_context)
        return self.o_proj(merge_heads(attention(q, k, split_heads(self.v_proj(context), self.heads))))


class Block(nn.Module):
    def __init__(self, config: AnimaTextConditionerConfig):
        super().__init__()
        width, heads, hidden = config.model_dim, config.num_attention_heads, int(config.model_dim * config.mlp_ratio)
        if config.use_self_attention:
            self.norm_self_attn = RMSNorm(width, eps=_EPS)
            self.self_attn = Attention(width, width, heads)
        self.norm_cross_attn = RMSNorm(width, eps=_EPS)
        self.cross_attn = Attention(width, config.source_dim, heads)
        self.norm_mlp = RMSNorm(width, eps=_EPS)
        self.mlp = [Linear(width, hidden), Activation("gelu"), Linear(hidden, width)]

    def __call__(self, x: mx.array, source: mx.array, rotary: Rotary, of_source: Rotary) -> mx.array:
        if "self_attn" in self:
            y = self.norm_self_attn(x)
            x = x + self.self_attn(y, y, rotary, rotary)
        x = x + self.cross_attn(self.norm_cross_attn(x), source, rotary, of_source)
        y = self.norm_mlp(x)
        for layer in self.mlp:
            y = layer(y)
        return x + y


class AnimaTextConditioner(nn.Module):
    """Qwen3's hidden states and T5's token ids → prompt embeds."""

    config_class = AnimaTextConditionerConfig
    # mflux 0.24 found that quantizing it costs words.
    least_bits = {"": UNQUANTIZED}

    def __init__(self, config: AnimaTextConditionerConfig):
        super().__init__()
        self.config = config
        self.embed = Embedding(config.target_vocab_size, config.target_dim)
        if config.model_dim != config.target_dim:
            self.in_proj = Linear(config.target_dim, config.model_dim)
        self.blocks = [Block(config) for _ in range(config.num_layers)]
        self.out_proj = Linear(config.model_dim, config.target_dim)
        self.norm = RMSNorm(config.target_dim, eps=_EPS)

    def __call__(self, states: mx.array, ids: mx.array) -> mx.array:
        """
        Args:
            states: of the language model, (1, S, source_dim).
            ids: T5's, with the token that ends a text, (1, T).

        Returns:
            (1, L, target_dim), L at least `min_sequence_length`: what is beyond the text is zero, and counts as text.
        """
        x = embedded(self.embed, ids).astype(states.dtype)
        if "in_proj" in self:
            x = self.in_proj(x)
        rotary, of_states = self.rotary(ids.shape[1]), self.rotary(states.shape[1])
        for block in self.blocks:
            x = block(x, states, rotary, of_states)
        x = self.norm(self.out_proj(x))
        return mx.pad(x, [(0, 0), (0, max(0, self.config.min_sequence_length - x.shape[1])), (0, 0)])

    def rotary(self, length: int) -> Rotary:
        head = self.config.model_dim // self.config.num_attention_heads
        angles = mx.arange(length)[:, None] * inverse_frequencies(head, _THETA)
        return mx.cos(angles), mx.sin(angles)
