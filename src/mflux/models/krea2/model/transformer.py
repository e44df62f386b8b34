"""Krea 2's transformer (Krea 2026, https://huggingface.co/krea/Krea-2-Raw): one stream of text and image.

Reference class: diffusers' `Krea2Transformer2DModel`. Twelve hidden states of the text encoder are fused to one before
the text enters the stream. One modulation serves all blocks, each of which adds a table of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mflux import cpu, fused
from mflux.backend import mx, nn
from mflux.models.common.component_config import ComponentConfig
from mflux.models.common.networks.layers import (
    Linear,
    Rotary,
    attention,
    gelu_approx,
    merge_heads,
    normed_heads,
    residual,
    rms_norm,
    rotary_embedding,
    rotate_pairs,
    silu_times,
    split_heads,
    waves,
)
from mflux.models.common.networks.modulation import Condition, Known, Modulated, ModulationLinear, modulation
from mflux.models.common.networks.once import Once, kept

# Rows and columns of the image's tokens.
Grid = tuple[int, int]


@dataclass(frozen=True)
class Krea2TransformerConfig(ComponentConfig):
    """`config.json` of a Krea 2 transformer; defaults are those of Raw and Turbo."""

    in_channels: int = 64
    num_layers: int = 28
    attention_head_dim: int = 128
    num_attention_heads: int = 48
    num_key_value_heads: int = 12
    intermediate_size: int = 16384
    timestep_embed_dim: int = 256
    text_hidden_dim: int = 2560
    num_text_layers: int = 12
    text_num_attention_heads: int = 20
    text_num_key_value_heads: int = 20
    text_intermediate_size: int = 6912
    num_layerwise_text_blocks: int = 2
    num_refiner_text_blocks: int = 2
    axes_dims_rope: tuple[int, ...] = (32, 48, 48)
    rope_theta: float = 1000.0
    norm_eps: float = 1e-5

    @property
    def inner_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    def layer_counts(self) -> Iterator[tuple[str, int]]:
        # Of the text encoder's hidden states there are so many, not of blocks.
        yield from (found for found in super().layer_counts() if found[0] != "num_text_layers")

    def check(self) -> str | None:
        if len(self.axes_dims_rope) != 3 or any(size % 2 for size in self.axes_dims_rope):
            return f"axes_dims_rope {list(self.axes_dims_rope)} is not three even numbers"
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            return f"axes_dims_rope {list(self.axes_dims_rope)} does not add up to {self.attention_head_dim} per head"
        for heads, shared in (
            (self.num_attention_heads, self.num_key_value_heads),
            (self.text_num_attention_heads, self.text_num_key_value_heads),
        ):
            if heads < 1 or shared < 1 or heads % shared:
                return f"{heads} heads cannot share {shared} keys and values"
        if self.text_hidden_dim % self.text_num_attention_heads:
            return f"{self.text_num_attention_heads} heads do not divide {self.text_hidden_dim} channels of text"
        if self.num_text_layers < 1:
            return "num_text_layers leaves no text"
        return None


# ---- blocks


class Norm(nn.Module):
    """A root mean square norm whose weights are counted from 1: in float32, as the reference has it, since most of what
    a small weight adds to 1 is lost in 16 bits."""

    def __init__(self, features: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = mx.zeros(features)

    def __call__(self, x: mx.array, scale: mx.array | None = None, shift: mx.array | None = None) -> mx.array:
        """Of (…, C); with a condition's scale and shift (B, 1, C), times 1 + scale, plus shift."""
        weight = 1 + self.weight.astype(mx.float32)
        if x.dtype == mx.float32:
            normed = cpu.rms_norm(x, weight, self.eps)
            return normed if scale is None or shift is None else fused.affine(normed, 1 + scale, shift)
        # Rounded twice, after the norm and here, which spares two passes in float32.
        factor = weight if scale is None else weight * (1 + scale)
        return fused.affine(rms_norm(x, self.eps), factor, mx.array(0.0) if shift is None else shift)


class Attention(nn.Module):
    """Several heads of queries share one of keys and values, and a gate lets through what comes out."""

    def __init__(self, width: int, heads: int, shared: int, eps: float):
        super().__init__()
        head = width // heads
        self.heads, self.shared = heads, shared
        self.to_q = Linear(width, width, bias=False)
        self.to_k = Linear(width, shared * head, bias=False)
        self.to_v = Linear(width, shared * head, bias=False)
        self.to_gate = Linear(width, width, bias=False)
        self.norm_q = Norm(head, eps)
        self.norm_k = Norm(head, eps)
        self.to_out = [Linear(width, width, bias=False)]

    def __call__(self, x: mx.array, rotary: Rotary | None = None) -> mx.array:
        q = normed_heads(self.norm_q, self.to_q(x), self.heads)
        k = normed_heads(self.norm_k, self.to_k(x), self.shared)
        v = split_heads(self.to_v(x), self.shared)
        if rotary is not None:
            q, k = rotate_pairs(q, rotary), rotate_pairs(k, rotary)
        return self.to_out[0](fused.let_through(merge_heads(attention(q, k, v)), self.to_gate(x)))


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate = Linear(width, hidden, bias=False)
        self.up = Linear(width, hidden, bias=False)
        self.down = Linear(hidden, width, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down(silu_times(self.gate(x), self.up(x)))


class TextBlock(nn.Module):
    """Without positions and without a noise level."""

    def __init__(self, config: Krea2TransformerConfig):
        super().__init__()
        width, eps = config.text_hidden_dim, config.norm_eps
        self.norm1, self.norm2 = Norm(width, eps), Norm(width, eps)
        self.attn = Attention(width, config.text_num_attention_heads, config.text_num_key_value_heads, eps)
        self.ff = SwiGLU(width, config.text_intermediate_size)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.attn(self.norm1(x))
        return x + self.ff(self.norm2(x))


class TextFusion(nn.Module):
    """Each token's hidden states look at each other and become one; then tokens look at each other."""

    def __init__(self, config: Krea2TransformerConfig):
        super().__init__()
        self.layerwise_blocks = [TextBlock(config) for _ in range(config.num_layerwise_text_blocks)]
        self.projector = Linear(config.num_text_layers, 1, bias=False)
        self.refiner_blocks = [TextBlock(config) for _ in range(config.num_refiner_text_blocks)]

    def __call__(self, states: mx.array) -> mx.array:
        """(B, T, states, D) → (B, T, D)."""
        batch, length, count, width = states.shape
        x = states.reshape(batch * length, count, width)
        for block in self.layerwise_blocks:
            x = block(x)
        x = self.projector(x.swapaxes(-1, -2))[..., 0].reshape(batch, length, width)
        for block in self.refiner_blocks:
            x = block(x)
        return x


class TextProjection(nn.Module):
    def __init__(self, config: Krea2TransformerConfig):
        super().__init__()
        self.norm = Norm(config.text_hidden_dim, config.norm_eps)
        self.linear_1 = Linear(config.text_hidden_dim, config.inner_dim)
        self.linear_2 = Linear(config.inner_dim, config.inner_dim)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear_2(gelu_approx(self.linear_1(self.norm(x))))


class TimeEmbedding(nn.Module):
    def __init__(self, config: Krea2TransformerConfig):
        super().__init__()
        self.channels = config.timestep_embed_dim
        self.linear_1 = Linear(self.channels, config.inner_dim)
        self.linear_2 = Linear(config.inner_dim, config.inner_dim)

    def __call__(self, sigma: mx.array, dtype: mx.Dtype) -> mx.array:
        return self.linear_2(gelu_approx(self.linear_1(waves(1000 * sigma, self.channels).astype(dtype))))


class TransformerBlock(nn.Module):
    def __init__(self, config: Krea2TransformerConfig):
        super().__init__()
        width, eps = config.inner_dim, config.norm_eps
        self.scale_shift_table = mx.zeros((6, width))
        self.norm1, self.norm2 = Norm(width, eps), Norm(width, eps)
        self.attn = Attention(width, config.num_attention_heads, config.num_key_value_heads, eps)
        self.ff = SwiGLU(width, config.intermediate_size)

    def __call__(self, x: mx.array, mods: list[mx.array], rotary: Rotary) -> mx.array:
        """One block on tokens (B, L, width); `mods` is what modulates all blocks, (B, 1, width) each."""
        own = [part + row for part, row in zip(mods, self.scale_shift_table, strict=True)]
        scale, shift, gate, scale_ff, shift_ff, gate_ff = own
        x = residual(x, gate.astype(x.dtype), self.attn(self.norm1(x, scale, shift), rotary))
        return residual(x, gate_ff.astype(x.dtype), self.ff(self.norm2(x, scale_ff, shift_ff)))


class FinalLayer(nn.Module):
    def __init__(self, config: Krea2TransformerConfig):
        super().__init__()
        self.scale_shift_table = mx.zeros((2, config.inner_dim))
        self.norm = Norm(config.inner_dim, config.norm_eps)
        self.linear = Linear(config.inner_dim, config.in_channels)

    def __call__(self, x: mx.array, condition: mx.array) -> mx.array:
        """Scale and shift are the condition itself (B, width), and the table."""
        scale, shift = (condition[:, None] + row for row in self.scale_shift_table)
        return self.linear(self.norm(x, scale, shift))


def positions(length: int, grid: Grid) -> mx.array:
    """Time, row and column of text, all of it at the origin, and of the image's tokens: (length + tokens, 3)."""
    axes = mx.meshgrid(mx.array([0]), mx.arange(grid[0]), mx.arange(grid[1]), indexing="ij")
    image = mx.stack([axis.reshape(-1) for axis in axes], axis=-1)
    return mx.concatenate([mx.zeros((length, 3), image.dtype), image])


class Krea2Transformer(Modulated):
    """Predicts the velocity noise - image of packed latents."""

    config_class = Krea2TransformerConfig

    def __init__(self, config: Krea2TransformerConfig):
        super().__init__()
        self.config = config
        width = config.inner_dim
        self.img_in = Linear(config.in_channels, width)
        self.time_embed = TimeEmbedding(config)
        self.time_mod_proj = ModulationLinear(width, 6 * width)
        self.text_fusion = TextFusion(config)
        self.txt_in = TextProjection(config)
        self.transformer_blocks = [TransformerBlock(config) for _ in range(config.num_layers)]
        self.final_layer = FinalLayer(config)

    def modulation(self, condition: Condition) -> list[mx.array]:
        """Scale, shift and gate of all blocks' attention, then of their feed-forwards, before the blocks' tables."""
        return modulation(self.time_mod_proj, condition, 6, gelu_approx)

    def condition(self, sigma: mx.array, dtype: mx.Dtype) -> mx.array:
        """The condition (B, width) at noise levels (B,), for latents of a dtype."""
        return self.time_embed(sigma, dtype)

    def __call__(
        self,
        hidden_states: mx.array,
        *,
        sigma: mx.array,
        prompt_embeds: mx.array,
        grid: Grid,
        control: mx.array | None = None,
        known: Known | None = None,
        once: Once | None = None,
    ) -> mx.array:
        """Predict the velocity.

        Args:
            hidden_states: packed latents (B, L, in_channels).
            sigma: (B,), how noisy they are: 1 is pure noise, 0 is an image.
            prompt_embeds: (B, T, num_text_layers, text_hidden_dim), without padding.
            grid: rows and columns of the tokens.
            control: packed latents that stand beside those, for a transformer that takes them.
            known: the condition that follows from the noise level, where it was known ahead.
            once: keeps what the image's other steps need as well.

        Returns:
            (B, L, in_channels).
        """
        image = self.img_in(hidden_states)
        if control is not None:
            image = image + kept(once, "control", control, lambda: self.control_in(control))
        text = kept(once, "text", prompt_embeds, lambda: self.txt_in(self.text_fusion(prompt_embeds)))
        length = text.shape[1]
        rotary = kept(once, "rotary", prompt_embeds, lambda: self._rotary(length, grid))
        condition: Condition = known or self.condition(sigma, image.dtype)
        mods = self.modulation(condition)
        x = mx.concatenate([text, image], axis=1)
        for block in self.transformer_blocks:
            x = block(x, mods, rotary)
        return self.final_layer(x[:, length:], condition.vector if isinstance(condition, Known) else condition)

    def _rotary(self, length: int, grid: Grid) -> Rotary:
        return rotary_embedding(positions(length, grid), self.config.axes_dims_rope, self.config.rope_theta)
