"""The blocks of FLUX.1's kind of transformer, under the names of its published file; FIBO is built from the same.

Reference classes: diffusers' `FluxTransformerBlock` and `FluxSingleTransformerBlock`. Double blocks keep text and
picture in two streams that attend to each other (Esser et al. 2024, https://arxiv.org/abs/2403.03206, MM-DiT); single
blocks run one stream of both, with attention and feed-forward side by side.
"""

from __future__ import annotations

from mflux.backend import mx, nn
from mflux.models.common.layers import (
    FeedForward,
    Rotary,
    attention,
    gelu_approx,
    merge_heads,
    modulate,
    rotate_pairs,
    silu,
    split_heads,
)

_EPS = 1e-6


def latent_image_ids(height: int, width: int, plane: int = 0) -> mx.array:
    """Positions of a grid of picture tokens, row by row: (height · width, 3), each `plane`, row, column."""
    rows = mx.broadcast_to(mx.arange(height)[:, None], (height, width))
    columns = mx.broadcast_to(mx.arange(width)[None, :], (height, width))
    return mx.stack([mx.full(rows.shape, plane, dtype=rows.dtype), rows, columns], axis=-1).reshape(-1, 3)


class Modulation(nn.Module):
    """`parts` vectors per sample from the condition: shifts, scales and gates, each (B, 1, features)."""

    def __init__(self, features: int, parts: int):
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(features, parts * features)

    def __call__(self, condition: mx.array) -> list[mx.array]:
        return mx.split(self.linear(silu(condition))[:, None], self.parts, axis=-1)


class JointAttention(nn.Module):
    """Text and picture project on their own and attend as one sequence, text first."""

    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        width = heads * head_dim
        self.heads = heads
        self.norm_q = nn.RMSNorm(head_dim, eps=_EPS)
        self.norm_k = nn.RMSNorm(head_dim, eps=_EPS)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = [nn.Linear(width, width)]
        self.norm_added_q = nn.RMSNorm(head_dim, eps=_EPS)
        self.norm_added_k = nn.RMSNorm(head_dim, eps=_EPS)
        self.add_q_proj = nn.Linear(width, width)
        self.add_k_proj = nn.Linear(width, width)
        self.add_v_proj = nn.Linear(width, width)
        self.to_add_out = nn.Linear(width, width)

    def __call__(self, image: mx.array, text: mx.array, rotary: Rotary) -> tuple[mx.array, mx.array]:
        q = mx.concatenate(
            [
                self.norm_added_q(split_heads(self.add_q_proj(text), self.heads)),
                self.norm_q(split_heads(self.to_q(image), self.heads)),
            ],
            axis=2,
        )
        k = mx.concatenate(
            [
                self.norm_added_k(split_heads(self.add_k_proj(text), self.heads)),
                self.norm_k(split_heads(self.to_k(image), self.heads)),
            ],
            axis=2,
        )
        v = mx.concatenate(
            [split_heads(self.add_v_proj(text), self.heads), split_heads(self.to_v(image), self.heads)], 2
        )
        out = merge_heads(attention(rotate_pairs(q, rotary), rotate_pairs(k, rotary), v))
        length = text.shape[1]
        return self.to_out[0](out[:, length:]), self.to_add_out(out[:, :length])


class SingleAttention(nn.Module):
    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        width = heads * head_dim
        self.heads = heads
        self.norm_q = nn.RMSNorm(head_dim, eps=_EPS)
        self.norm_k = nn.RMSNorm(head_dim, eps=_EPS)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)

    def __call__(self, x: mx.array, rotary: Rotary) -> mx.array:
        q = rotate_pairs(self.norm_q(split_heads(self.to_q(x), self.heads)), rotary)
        k = rotate_pairs(self.norm_k(split_heads(self.to_k(x), self.heads)), rotary)
        return merge_heads(attention(q, k, split_heads(self.to_v(x), self.heads)))


class TransformerBlock(nn.Module):
    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        width = heads * head_dim
        self.norm1 = Modulation(width, 6)
        self.norm1_context = Modulation(width, 6)
        self.attn = JointAttention(heads, head_dim)
        self.ff = FeedForward(width)
        self.ff_context = FeedForward(width)

    def __call__(
        self, image: mx.array, text: mx.array, condition: mx.array, rotary: Rotary
    ) -> tuple[mx.array, mx.array]:
        shift, scale, gate, shift_ff, scale_ff, gate_ff = self.norm1(condition)
        shift_t, scale_t, gate_t, shift_ff_t, scale_ff_t, gate_ff_t = self.norm1_context(condition)
        image_out, text_out = self.attn(modulate(image, shift, scale), modulate(text, shift_t, scale_t), rotary)
        image = image + gate * image_out
        image = image + gate_ff * self.ff(modulate(image, shift_ff, scale_ff))
        text = text + gate_t * text_out
        text = text + gate_ff_t * self.ff_context(modulate(text, shift_ff_t, scale_ff_t))
        return image, text


class SingleTransformerBlock(nn.Module):
    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        width = heads * head_dim
        self.norm = Modulation(width, 3)
        self.proj_mlp = nn.Linear(width, 4 * width)
        self.proj_out = nn.Linear(5 * width, width)
        self.attn = SingleAttention(heads, head_dim)

    def __call__(self, x: mx.array, condition: mx.array, rotary: Rotary) -> mx.array:
        shift, scale, gate = self.norm(condition)
        y = modulate(x, shift, scale)
        y = mx.concatenate([self.attn(y, rotary), gelu_approx(self.proj_mlp(y))], axis=-1)
        return x + gate * self.proj_out(y)
