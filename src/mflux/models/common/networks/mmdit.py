"""The blocks of FLUX.1's kind of transformer, under the names of its published file; FIBO is built from the same.

Reference classes: diffusers' `FluxTransformerBlock` and `FluxSingleTransformerBlock`. Double blocks keep text and
picture in two streams that attend to each other (Esser et al. 2024, https://arxiv.org/abs/2403.03206, MM-DiT); single
blocks run one stream of both, with attention and feed-forward side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from mflux.backend import mx, nn
from mflux.models.common.component_config import ComponentConfig
from mflux.models.common.networks.divided import Divisible
from mflux.models.common.networks.interiors import Interior
from mflux.models.common.networks.layers import (
    FeedForward,
    Linear,
    RMSNorm,
    Rotary,
    attention,
    gelu_approx,
    merge_heads,
    modulate,
    normed_heads,
    product_of_parts,
    residual,
    rotate_pairs,
    silu,
    split_heads,
)
from mflux.models.common.networks.modulation import Condition, Modulated, ModulationLinear, modulation

_EPS = 1e-6
# Attention gives sums of values, and its last layer sums of those.
_HEADROOM = 8.0


@dataclass(frozen=True)
class MMDiTConfig(ComponentConfig):
    """What the `config.json` of every transformer of this kind says of its heads."""

    attention_head_dim: int = 128
    num_attention_heads: int = 24
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    # Not in the files: how many axes positions have.
    axes: ClassVar[int] = 3

    @property
    def inner_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    def check(self) -> str | None:
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            return f"axes_dims_rope {list(self.axes_dims_rope)} does not add up to {self.attention_head_dim} per head"
        if len(self.axes_dims_rope) != self.axes or any(size % 2 for size in self.axes_dims_rope):
            number = {3: "three", 4: "four"}[self.axes]
            return f"axes_dims_rope {list(self.axes_dims_rope)} is not {number} even numbers"
        return None


def latent_image_ids(height: int, width: int, plane: int = 0) -> mx.array:
    """Positions of a grid of picture tokens, row by row: (height · width, 3), each `plane`, row, column."""
    rows = mx.broadcast_to(mx.arange(height)[:, None], (height, width))
    columns = mx.broadcast_to(mx.arange(width)[None, :], (height, width))
    return mx.stack([mx.full(rows.shape, plane, dtype=rows.dtype), rows, columns], axis=-1).reshape(-1, 3)


class Modulation(Modulated):
    """`parts` vectors per sample from the condition: shifts, scales and gates, each (B, 1, features)."""

    def __init__(self, features: int, parts: int, *, bias: bool = True):
        super().__init__()
        self.parts = parts
        self.linear = ModulationLinear(features, parts * features, bias=bias)

    def modulation(self, condition: Condition) -> list[mx.array]:
        return modulation(self.linear, condition, self.parts, silu)

    def __call__(self, condition: Condition) -> list[mx.array]:
        return self.modulation(condition)


class JointAttention(Divisible, Interior):
    """Text and picture project on their own and attend as one sequence, text first."""

    rows = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
    columns: ClassVar[Mapping[str, tuple[int, ...]]] = {"to_out.0": (1,), "to_add_out": (1,)}
    headroom = _HEADROOM

    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        width = heads * head_dim
        self.heads = heads
        self.norm_q = RMSNorm(head_dim, eps=_EPS)
        self.norm_k = RMSNorm(head_dim, eps=_EPS)
        self.to_q = Linear(width, width)
        self.to_k = Linear(width, width)
        self.to_v = Linear(width, width)
        self.to_out = [Linear(width, width)]
        self.norm_added_q = RMSNorm(head_dim, eps=_EPS)
        self.norm_added_k = RMSNorm(head_dim, eps=_EPS)
        self.add_q_proj = Linear(width, width)
        self.add_k_proj = Linear(width, width)
        self.add_v_proj = Linear(width, width)
        self.to_add_out = Linear(width, width)

    def image_heads(self, image: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Queries, keys and values of picture tokens, (B, heads, L, D) each, before their positions turn them."""
        q = normed_heads(self.norm_q, self.to_q(image), self.heads)
        k = normed_heads(self.norm_k, self.to_k(image), self.heads)
        return q, k, split_heads(self.shrunk(self.to_v(image)), self.heads)

    def text_heads(self, text: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """The same of text tokens."""
        q = normed_heads(self.norm_added_q, self.add_q_proj(text), self.heads)
        k = normed_heads(self.norm_added_k, self.add_k_proj(text), self.heads)
        return q, k, split_heads(self.shrunk(self.add_v_proj(text)), self.heads)

    def __call__(
        self, image: mx.array, text: mx.array, rotary: Rotary, watch: Callable[..., None] | None = None
    ) -> tuple[mx.array, mx.array]:
        pairs = zip(self.text_heads(self.enter(text)), self.image_heads(self.enter(image)), strict=True)
        q, k, v = (mx.concatenate(list(pair), axis=2) for pair in pairs)
        q, k = rotate_pairs(q, rotary), rotate_pairs(k, rotary)
        out = merge_heads(attention(q, k, v))
        length = text.shape[1]
        if watch is not None:
            watch(k[:, :, length:], v[:, :, length:], self.grown(out[:, length:]))
        return self.to_image(out[:, length:], image), self.to_text(out[:, :length], text)

    def to_image(self, attended: mx.array, image: mx.array) -> mx.array:
        """What attention gave picture tokens, projected, for their stream."""
        return self.summed(self.leave(self.to_out[0](attended), image))

    def to_text(self, attended: mx.array, text: mx.array) -> mx.array:
        """The same of text tokens."""
        return self.summed(self.leave(self.to_add_out(attended), text))

    def last(self) -> list[nn.Module]:
        return [self.to_out[0], self.to_add_out]


class SingleAttention(Divisible):
    rows = ("to_q", "to_k", "to_v")

    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        width = heads * head_dim
        self.heads = heads
        self.norm_q = RMSNorm(head_dim, eps=_EPS)
        self.norm_k = RMSNorm(head_dim, eps=_EPS)
        self.to_q = Linear(width, width)
        self.to_k = Linear(width, width)
        self.to_v = Linear(width, width)

    def __call__(self, x: mx.array, rotary: Rotary, shrunk: Callable[[mx.array], mx.array]) -> mx.array:
        q = rotate_pairs(normed_heads(self.norm_q, self.to_q(x), self.heads), rotary)
        k = rotate_pairs(normed_heads(self.norm_k, self.to_k(x), self.heads), rotary)
        return merge_heads(attention(q, k, split_heads(shrunk(self.to_v(x)), self.heads)))


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
        self,
        image: mx.array,
        text: mx.array,
        condition: Condition,
        rotary: Rotary,
        watch: Callable[..., None] | None = None,
    ) -> tuple[mx.array, mx.array]:
        """Picture and text after the block.

        Args:
            image, text: (B, L, width) and (B, T, width).
            condition: (B, width), what modulates both.
            rotary: of text and picture, one behind the other.
            watch: called with the picture's keys, turned, and values, (B, heads, L, D) each, and with what the
                attention gives its tokens, (B, L, width), before it is projected.
        """
        shift, scale, *image_rest = self.norm1(condition)
        shift_t, scale_t, *text_rest = self.norm1_context(condition)
        image_out, text_out = self.attn(modulate(image, shift, scale), modulate(text, shift_t, scale_t), rotary, watch)
        return _rest(image, image_out, self.ff, *image_rest), _rest(text, text_out, self.ff_context, *text_rest)

    def read_along(
        self, text: mx.array, condition: Condition, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Another text, which sees the picture and itself, and which neither the picture nor the prompt sees.

        Args:
            text: (B, T, width), all at position zero, where nothing is turned.
            condition: (B, width), what modulates it.
            keys, values: the picture's, as `watch` is told them.

        Returns:
            The text after the block, and what the attention gave its tokens, before it is projected.
        """
        shift, scale, *rest = self.norm1_context(condition)
        q, k, v = self.attn.text_heads(self.attn.enter(modulate(text, shift, scale)))
        k, v = mx.concatenate([k, keys], axis=2), mx.concatenate([v, values], axis=2)
        out = merge_heads(attention(q, k, v))
        return _rest(text, self.attn.to_text(out, text), self.ff_context, *rest), self.attn.grown(out)


def _rest(
    x: mx.array,
    attended: mx.array,
    feed_forward: nn.Module,
    gate: mx.array,
    shift: mx.array,
    scale: mx.array,
    gate_ff: mx.array,
) -> mx.array:
    """Gated residual, then modulated feed-forward: what follows attention in each stream."""
    x = residual(x, gate, attended)
    return residual(x, gate_ff, feed_forward(modulate(x, shift, scale)))


class SingleTransformerBlock(Divisible, Interior):
    rows = ("proj_mlp",)
    # Attention's and the feed-forward's channels.
    columns: ClassVar[Mapping[str, tuple[int, ...]]] = {"proj_out": (1, 4)}
    headroom = _HEADROOM

    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        width = heads * head_dim
        self.norm = Modulation(width, 3)
        self.proj_mlp = Linear(width, 4 * width)
        self.proj_out = Linear(5 * width, width)
        self.attn = SingleAttention(heads, head_dim)

    def __call__(self, x: mx.array, condition: Condition, rotary: Rotary) -> mx.array:
        shift, scale, gate = self.norm(condition)
        y = self.enter(modulate(x, shift, scale))
        hidden = self.shrunk(gelu_approx(self.proj_mlp(y)))
        out = product_of_parts(self.proj_out, self.attn(y, rotary, self.shrunk), hidden)
        return residual(x, gate, self.summed(self.leave(out, x)))

    def inside(self) -> list[nn.Module]:
        return [self.proj_mlp, self.proj_out, self.attn]

    def last(self) -> list[nn.Module]:
        return [self.proj_out]
