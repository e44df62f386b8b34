"""Anima's transformer (CircleStone Labs 2026): NVIDIA's Cosmos-Predict2 with 2 billion parameters, for one frame.

Reference class: diffusers' `CosmosTransformer3DModel`. Every block attends to the image, then to the text, then feeds
forward; what modulates each of the three comes out of a layer of few channels, to which one vector is added that all
blocks share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mflux.backend import mx, nn
from mflux.checkpoints.quantization import UNQUANTIZED
from mflux.models.common.component_config import ComponentConfig
from mflux.models.common.networks.interiors import Interior
from mflux.models.common.networks.layers import (
    Linear,
    RMSNorm,
    Rotary,
    Turns,
    attention,
    gelu,
    inverse_frequencies,
    merge_heads,
    modulate,
    normed_heads,
    parts_of,
    residual,
    rotate_halves,
    silu,
    split_heads,
    waves,
)
from mflux.models.common.networks.modulation import (
    Condition,
    Known,
    Modulated,
    ModulationLinear,
    low_rank_modulation,
)
from mflux.models.common.networks.once import Once, kept
from mflux.models.common.replaced import also_as_024, refuse_more

_THETA = 10_000.0
_EPS = 1e-6
# Of the norms of queries and keys.
_HEAD_EPS = 1e-5


@dataclass(frozen=True)
class AnimaTransformerConfig(ComponentConfig):
    """`config.json` of a CosmosTransformer3DModel for images; defaults are Anima's."""

    in_channels: int = 16
    out_channels: int = 16
    num_attention_heads: int = 16
    attention_head_dim: int = 128
    num_layers: int = 28
    mlp_ratio: float = 4.0
    text_embed_dim: int = 1024
    adaln_lora_dim: int = 256
    patch_size: tuple[int, ...] = (1, 2, 2)
    rope_scale: tuple[float, ...] = (1.0, 4.0, 4.0)
    concat_padding_mask: bool = True
    extra_pos_embed_type: str | None = None
    use_crossattn_projection: bool = False
    img_context_dim_in: int | None = None

    @property
    def inner_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def side(self) -> int:
        """Rows and columns of latents in a token."""
        return self.patch_size[-1]

    @property
    def axes(self) -> tuple[int, int, int]:
        """How many channels of a head turn with time, row and column."""
        spatial = self.attention_head_dim // 6 * 2
        return self.attention_head_dim - 2 * spatial, spatial, spatial

    def check(self) -> str | None:
        if len(self.patch_size) != 3 or self.patch_size[0] != 1 or len(set(self.patch_size[1:])) != 1 or self.side < 1:
            return f"patch_size {list(self.patch_size)} is not that of squares in one frame"
        if self.extra_pos_embed_type or self.use_crossattn_projection or self.img_context_dim_in:
            return "learned positions, a projection of the text and image context are Cosmos', and not built"
        if not self.concat_padding_mask:
            return "concat_padding_mask is false, and only transformers that are told of padding are built"
        if self.attention_head_dim % 2 or min(self.axes) < 4:
            return f"attention_head_dim {self.attention_head_dim} is odd, or too small to turn on three axes"
        if len(self.rope_scale) != 3 or min(self.rope_scale) <= 0:
            return f"rope_scale {list(self.rope_scale)} is not three positive numbers"
        return None


# ---- modulation. A condition (B, 4 · width) has the noise level's waves first, then what all layers share.


class AdaptiveNorm(Modulated):
    """Shift, scale, and for a block a gate, (B, 1, width) each."""

    def __init__(self, config: AnimaTransformerConfig, parts: int):
        super().__init__()
        self.width, self.parts = config.inner_dim, parts
        self.linear_1 = ModulationLinear(self.width, config.adaln_lora_dim, bias=False)
        self.linear_2 = ModulationLinear(config.adaln_lora_dim, parts * self.width, bias=False)

    def modulation(self, condition: Condition) -> list[mx.array]:
        own = low_rank_modulation(
            self.linear_1, self.linear_2, condition, self.parts, lambda whole: silu(whole[:, : self.width])
        )
        whole = condition.value if isinstance(condition, Known) else condition
        shared = parts_of(whole[:, None, self.width :], 3)
        return [one + other for one, other in zip(own, shared, strict=False)]

    def __call__(self, condition: Condition) -> list[mx.array]:
        return self.modulation(condition)


class TimeMLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear_1 = Linear(width, width, bias=False)
        self.linear_2 = Linear(width, 3 * width, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear_2(silu(self.linear_1(x)))


class TimeEmbedder(nn.Module):
    """The noise level, from 0 to 1, as the condition (B, 4 · width)."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.t_embedder = TimeMLP(width)
        self.norm = RMSNorm(width, eps=_EPS)

    def __call__(self, sigma: mx.array, dtype: mx.Dtype) -> mx.array:
        x = waves(sigma, self.width).astype(dtype)
        return mx.concatenate([self.norm(x), self.t_embedder(x)], axis=-1)


# ---- blocks


class Attention(Interior):
    """Of the image to itself, or to the text, which has no positions."""

    def __init__(self, config: AnimaTransformerConfig, context: int):
        super().__init__()
        width, head = config.inner_dim, config.attention_head_dim
        self.heads = config.num_attention_heads
        self.norm_q = RMSNorm(head, eps=_HEAD_EPS)
        self.norm_k = RMSNorm(head, eps=_HEAD_EPS)
        self.to_q = Linear(width, width, bias=False)
        self.to_k = Linear(context, width, bias=False)
        self.to_v = Linear(context, width, bias=False)
        self.to_out = [Linear(width, width, bias=False)]

    def __call__(self, x: mx.array, context: mx.array, rotary: Rotary | None = None) -> mx.array:
        context = self.enter(context)
        q = normed_heads(self.norm_q, self.to_q(self.enter(x)), self.heads)
        k = normed_heads(self.norm_k, self.to_k(context), self.heads)
        if rotary is not None:
            q, k = rotate_halves(q, rotary), rotate_halves(k, rotary)
        out = merge_heads(attention(q, k, split_heads(self.to_v(context), self.heads)))
        return self.leave(self.to_out[0](out), x)


class FeedForward(Interior):
    class Proj(nn.Module):
        def __init__(self, width: int, hidden: int):
            super().__init__()
            self.proj = Linear(width, hidden, bias=False)

    def __init__(self, config: AnimaTransformerConfig):
        super().__init__()
        width, hidden = config.inner_dim, int(config.inner_dim * config.mlp_ratio)
        self.net: list[Any] = [FeedForward.Proj(width, hidden), nn.Identity(), Linear(hidden, width, bias=False)]

    def __call__(self, x: mx.array) -> mx.array:
        return self.leave(self.net[2](gelu(self.net[0].proj(self.enter(x)))), x)


class Block(nn.Module):
    def __init__(self, config: AnimaTransformerConfig):
        super().__init__()
        self.norm1 = AdaptiveNorm(config, 3)
        self.attn1 = Attention(config, config.inner_dim)
        self.norm2 = AdaptiveNorm(config, 3)
        self.attn2 = Attention(config, config.text_embed_dim)
        self.norm3 = AdaptiveNorm(config, 3)
        self.ff = FeedForward(config)

    def __call__(self, x: mx.array, text: mx.array, condition: Condition, rotary: Rotary) -> mx.array:
        shift, scale, gate = self.norm1(condition)
        y = modulate(x, shift, scale, _EPS)
        x = residual(x, gate, self.attn1(y, y, rotary))
        shift, scale, gate = self.norm2(condition)
        x = residual(x, gate, self.attn2(modulate(x, shift, scale, _EPS), text))
        shift, scale, gate = self.norm3(condition)
        return residual(x, gate, self.ff(modulate(x, shift, scale, _EPS)))


class PatchEmbed(nn.Module):
    def __init__(self, features: int, width: int):
        super().__init__()
        self.proj = Linear(features, width, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.proj(x)


def squares(latents: mx.array, side: int) -> mx.array:
    """(B, C, h · side, w · side) → (B, h · w, C · side²), row by row; each token's channels one after the other."""
    batch, channels, height, width = latents.shape
    x = latents.reshape(batch, channels, height // side, side, width // side, side).transpose(0, 2, 4, 1, 3, 5)
    return x.reshape(batch, -1, channels * side**2)


def from_squares(tokens: mx.array, height: int, width: int, side: int) -> mx.array:
    """The way back, to (B, C, height, width); a token's channels are here those of its pixels, one after the other."""
    batch = tokens.shape[0]
    x = tokens.reshape(batch, height // side, width // side, side, side, -1).transpose(0, 5, 1, 3, 2, 4)
    return x.reshape(batch, -1, height, width)


# ---- the model


def called_as_024(transformer: AnimaTransformer, *, latents: mx.array, sigma: mx.array, context: mx.array) -> mx.array:
    """A prediction with mflux 0.24's names of arguments."""
    return transformer(latents, sigma=mx.array(sigma, mx.float32).reshape(-1), prompt_embeds=context)


class AnimaTransformer(nn.Module):
    """Predicts the velocity noise - image of latents."""

    config_class = AnimaTransformerConfig
    # What the noise level goes through sets shift, scale and gate of every token.
    least_bits = {r"^time_embed\.": UNQUANTIZED}

    def __init__(self, config: AnimaTransformerConfig):
        super().__init__()
        self.config = config
        width, square = config.inner_dim, config.side**2
        self.patch_embed = PatchEmbed((config.in_channels + 1) * square, width)
        self.time_embed = TimeEmbedder(width)
        self.transformer_blocks = [Block(config) for _ in range(config.num_layers)]
        self.norm_out = AdaptiveNorm(config, 2)
        self.proj_out = Linear(width, square * config.out_channels, bias=False)

    @also_as_024(called_as_024, known_by="context")
    def __call__(
        self,
        latents: mx.array,
        *,
        sigma: mx.array,
        prompt_embeds: mx.array,
        known: Known | None = None,
        once: Once | None = None,
    ) -> mx.array:
        """Predict the velocity.

        Args:
            latents: (B, in_channels, h, w), h and w even.
            sigma: (B,), how noisy they are: 1 is pure noise, 0 is an image.
            prompt_embeds: (B, T, text_embed_dim).
            known: the condition that follows from the noise level, where it was known ahead.
            once: keeps what the image's other steps need as well.

        Returns:
            (B, out_channels, h, w).
        """
        side, (batch, _, height, width) = self.config.side, latents.shape
        dtype = prompt_embeds.dtype
        condition: Condition = known or self.time_embed(sigma, dtype)
        # Nothing of an image is padding.
        padding = mx.zeros((batch, 1, height, width), dtype)
        x = self.patch_embed(squares(mx.concatenate([latents.astype(dtype), padding], axis=1), side))
        rotary = kept(once, "rotary", prompt_embeds, lambda: self.rotary(height // side, width // side))
        for block in self.transformer_blocks:
            x = block(x, prompt_embeds, condition, rotary)
        shift, scale = self.norm_out(condition)
        return from_squares(self.proj_out(modulate(x, shift, scale, _EPS)), height, width, side)

    def rotary(self, height: int, width: int) -> Rotary:
        """Cosines and sines of so many rows and columns of tokens, (height · width, head / 2) each, float32."""
        time, rows, columns = self.config.axes
        angles = [mx.zeros((height, width, time // 2))]
        for channels, scale, places in (
            (rows, self.config.rope_scale[1], mx.arange(height)[:, None, None]),
            (columns, self.config.rope_scale[2], mx.arange(width)[None, :, None]),
        ):
            frequencies = inverse_frequencies(channels, _THETA * scale ** (channels / (channels - 2)))
            angles.append(mx.broadcast_to(places * frequencies, (height, width, channels // 2)))
        turned = mx.concatenate(angles, axis=-1).reshape(height * width, -1)
        return Turns((mx.cos(turned), mx.sin(turned)))

    @staticmethod
    def asked_as_024(
        other: Callable[..., mx.array],
        config: Any,
        latents: mx.array,
        *,
        sigma: mx.array,
        prompt_embeds: mx.array,
        once: Once | None = None,
        **more: Any,
    ) -> mx.array:
        """A prediction of what stands in this one's place; the other arguments are this one's."""
        refuse_more("Anima's transformer", **more)
        return other(latents=latents, sigma=sigma, context=prompt_embeds)
