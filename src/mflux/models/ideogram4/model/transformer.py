"""Ideogram 4's transformer (Ideogram 2026): one stream of prompt and image, flow matching from noise to image.

Reference class: diffusers' `Ideogram4Transformer2DModel`. The model is two of these: one that sees the prompt, and one
that was taught without any, which guidance leads away from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mflux.backend import mx, nn
from mflux.models.common.component_config import ComponentConfig
from mflux.models.common.networks.layers import (
    Embedding,
    Linear,
    NumberedSwiGLU,
    RMSNorm,
    Rotary,
    Turns,
    added,
    attention,
    layer_norm,
    looked_up,
    merge_heads,
    normed_and_scaled,
    normed_heads,
    rotate_halves,
    silu,
    split_heads,
)
from mflux.models.common.networks.modulation import Condition, Known, Modulated, ModulationLinear, modulation
from mflux.models.common.networks.once import Once, kept

# Where an image's rows and columns begin, so that none is a place in a text.
OFFSET = 65_536
# A step's time, from 0 to 1, is told in so many turns at most.
_TIME_SCALE = 10_000
_HEAD_EPS = 1e-5
_TEXT_EPS = 1e-6
_FINAL_EPS = 1e-6
# Rows of the embedding that tells tokens of the text from the image's.
_TEXT, _IMAGE = 0, 1


@dataclass(frozen=True)
class Ideogram4TransformerConfig(ComponentConfig):
    """`config.json` of either transformer; defaults are the published ones'."""

    in_channels: int = 128
    num_layers: int = 34
    attention_head_dim: int = 256
    num_attention_heads: int = 18
    intermediate_size: int = 12288
    adaln_dim: int = 512
    llm_features_dim: int = 53248
    rope_theta: float = 5_000_000
    mrope_section: tuple[int, ...] = (24, 20, 20)
    norm_eps: float = 1e-5

    @property
    def inner_dim(self) -> int:
        return self.attention_head_dim * self.num_attention_heads

    def check(self) -> str | None:
        if self.attention_head_dim % 2 or self.inner_dim % 2 or self.inner_dim < 4:
            return f"{self.num_attention_heads} heads of {self.attention_head_dim} channels are not an even number"
        if self.rope_theta <= 0:
            return f"rope_theta {self.rope_theta} is not a positive number"
        if len(self.mrope_section) != 3 or any(size < 0 for size in self.mrope_section):
            return f"mrope_section {list(self.mrope_section)} is not three numbers"
        if 3 * max(self.mrope_section[1:]) > self.attention_head_dim // 2:
            return f"mrope_section {list(self.mrope_section)} has more turns than a head has pairs of channels"
        return None


# ---- positions


def text_ids(length: int) -> np.ndarray:
    """Positions of the prompt's tokens, (length, 3): the token's number on all three axes."""
    return np.repeat(np.arange(length)[:, None], 3, axis=1)


def image_ids(rows: int, columns: int) -> np.ndarray:
    """Positions of an image's tokens, row by row: (rows · columns, 3) by time, row and column."""
    places = np.indices((rows, columns)).reshape(2, -1)
    return OFFSET + np.stack([np.zeros_like(places[0]), *places], axis=1)


def rotary(ids: np.ndarray, config: Ideogram4TransformerConfig) -> Rotary:
    """Cosines and sines (L, head / 2) of positions (L, 3).

    All is rounded to float32 as it was when the model was taught: at 65,536 an angle's last digit is 0.004, and text
    and image turn against each other by it. Sines of such angles are not for MLX's own functions.
    """
    half = config.attention_head_dim // 2
    exponents = np.arange(0, 2 * half, 2, dtype=np.float32) / np.float32(2 * half)
    turns = np.float32(1) / (float(config.rope_theta) ** exponents.astype(np.float64)).astype(np.float32)
    axes = np.zeros(half, np.int64)
    for axis in (1, 2):
        axes[axis : 3 * config.mrope_section[axis] : 3] = axis
    angles = (ids.astype(np.float32)[:, axes] * turns).astype(np.float64)
    return Turns((mx.array(np.cos(angles).astype(np.float32)), mx.array(np.sin(angles).astype(np.float32))))


# ---- blocks


class Attention(nn.Module):
    def __init__(self, config: Ideogram4TransformerConfig):
        super().__init__()
        width, head = config.inner_dim, config.attention_head_dim
        self.heads = config.num_attention_heads
        self.to_q = Linear(width, width, bias=False)
        self.to_k = Linear(width, width, bias=False)
        self.to_v = Linear(width, width, bias=False)
        self.norm_q = RMSNorm(head, eps=_HEAD_EPS)
        self.norm_k = RMSNorm(head, eps=_HEAD_EPS)
        self.to_out = [Linear(width, width, bias=False)]

    def __call__(self, x: mx.array, rotary: Rotary) -> mx.array:
        q = rotate_halves(normed_heads(self.norm_q, self.to_q(x), self.heads), rotary)
        k = rotate_halves(normed_heads(self.norm_k, self.to_k(x), self.heads), rotary)
        return self.to_out[0](merge_heads(attention(q, k, split_heads(self.to_v(x), self.heads))))


class TransformerBlock(Modulated):
    """Norms before and after attention and feed-forward; scales and gates from the time."""

    def __init__(self, config: Ideogram4TransformerConfig):
        super().__init__()
        width = config.inner_dim
        self.attention = Attention(config)
        self.feed_forward = NumberedSwiGLU(width, config.intermediate_size)
        self.attention_norm1 = RMSNorm(width, eps=config.norm_eps)
        self.ffn_norm1 = RMSNorm(width, eps=config.norm_eps)
        self.attention_norm2 = RMSNorm(width, eps=config.norm_eps)
        self.ffn_norm2 = RMSNorm(width, eps=config.norm_eps)
        self.adaln_modulation = ModulationLinear(config.adaln_dim, 4 * width)

    def modulation(self, condition: Condition) -> list[mx.array]:
        return modulation(self.adaln_modulation, condition, 4)

    def __call__(self, x: mx.array, rotary: Rotary, condition: Condition) -> mx.array:
        scale, gate, scale_ff, gate_ff = self.modulation(condition)
        y = self.attention(normed_and_scaled(self.attention_norm1, x, 1 + scale), rotary)
        x = added(x, self.attention_norm2, y, mx.tanh(gate))
        y = self.feed_forward(normed_and_scaled(self.ffn_norm1, x, 1 + scale_ff))
        return added(x, self.ffn_norm2, y, mx.tanh(gate_ff))


class TimeEmbedder(nn.Module):
    """The time, from 0 (noise) to 1 (image), as a vector (B, features)."""

    def __init__(self, features: int):
        super().__init__()
        self.mlp_in = Linear(features, features)
        self.mlp_out = Linear(features, features)
        half = features // 2
        # The last of them is 1/10000 itself; `waves` never gets there.
        step = np.float32(-math.log(_TIME_SCALE) / max(half - 1, 1))
        turns = np.exp((np.arange(half, dtype=np.float32) * step).astype(np.float64))
        self._turns = mx.array(turns.astype(np.float32))

    def __call__(self, time: mx.array, dtype: mx.Dtype) -> mx.array:
        angles = (_TIME_SCALE * time.astype(mx.float32))[:, None] * self._turns
        x = mx.concatenate([mx.sin(angles), mx.cos(angles)], axis=-1)
        return self.mlp_out(silu(self.mlp_in(x.astype(dtype))))


class FinalLayer(Modulated):
    def __init__(self, config: Ideogram4TransformerConfig):
        super().__init__()
        self.linear = Linear(config.inner_dim, config.in_channels)
        self.adaln_modulation = ModulationLinear(config.adaln_dim, config.inner_dim)

    def modulation(self, condition: Condition) -> mx.array:
        # A second SiLU: the condition has one already.
        return modulation(self.adaln_modulation, condition, 1, silu)[0]

    def __call__(self, x: mx.array, condition: Condition) -> mx.array:
        return self.linear(layer_norm(x, _FINAL_EPS) * (1 + self.modulation(condition)))


# ---- the model


class Ideogram4Transformer(nn.Module):
    """Predicts image - noise, the velocity backwards: a pipeline steps along its negative."""

    config_class = Ideogram4TransformerConfig

    def __init__(self, config: Ideogram4TransformerConfig):
        super().__init__()
        self.config = config
        width = config.inner_dim
        self.input_proj = Linear(config.in_channels, width)
        self.llm_cond_norm = RMSNorm(config.llm_features_dim, eps=_TEXT_EPS)
        self.llm_cond_proj = Linear(config.llm_features_dim, width)
        self.t_embedding = TimeEmbedder(width)
        self.adaln_proj = Linear(width, config.adaln_dim)
        self.embed_image_indicator = Embedding(2, width)
        self.layers = [TransformerBlock(config) for _ in range(config.num_layers)]
        self.final_layer = FinalLayer(config)

    def __call__(
        self,
        latents: mx.array,
        *,
        time: mx.array,
        rows: int,
        columns: int,
        prompt_embeds: mx.array | None = None,
        known: Known | None = None,
        once: Once | None = None,
    ) -> mx.array:
        """Predict image - noise.

        Args:
            latents: (B, rows · columns, in_channels), row by row. Their dtype is that of what is computed.
            time: (B,), 0 is noise and 1 an image: 1 - sigma.
            prompt_embeds: (B, T, llm_features_dim); None for the model that sees no prompt.
            known: the condition that follows from the time, where it was known ahead.
            once: keeps what the image's other steps need as well.

        Returns:
            (B, rows · columns, in_channels).
        """
        condition: Condition = known or self.condition(time, latents.dtype)
        # By the number of whatever is the same in all of an image's steps; the model itself would be kept with it.
        source = self.config if prompt_embeds is None else prompt_embeds
        length = 0 if prompt_embeds is None else prompt_embeds.shape[1]
        ids = np.concatenate([text_ids(length), image_ids(rows, columns)])
        turns = kept(once, "rotary", source, lambda: rotary(ids, self.config))
        x = self.input_proj(latents) + kept(once, "kind", source, lambda: self._kind(_IMAGE))
        if prompt_embeds is not None:
            embeds = prompt_embeds.astype(latents.dtype)
            text = kept(once, "text", source, lambda: self.embed_text(embeds))
            x = mx.concatenate([text, x], axis=1)
        for layer in self.layers:
            x = layer(x, turns, condition)
        return self.final_layer(x[:, length:], condition)

    def condition(self, time: mx.array, dtype: mx.Dtype) -> mx.array:
        """What modulates all layers at a time (B,): (B, adaln_dim)."""
        return silu(self.adaln_proj(self.t_embedding(time, dtype)))

    def embed_text(self, prompt_embeds: mx.array) -> mx.array:
        """(B, T, llm_features_dim) → tokens (B, T, inner_dim)."""
        return self.llm_cond_proj(self.llm_cond_norm(prompt_embeds)) + self._kind(_TEXT)

    def _kind(self, which: int) -> mx.array:
        return looked_up(self.embed_image_indicator, mx.array([which]), what="kinds of tokens")
