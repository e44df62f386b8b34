"""FLUX.1's transformer (Black Forest Labs 2024), a rectified-flow model over text and picture tokens.

Reference class: diffusers' `FluxTransformer2DModel`. Double blocks keep text and picture in two streams that attend to
each other; single blocks run one stream of both, with attention and feed-forward side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

from mflux.backend import mx, nn
from mflux.models.common.config.component_config import ComponentConfig
from mflux.models.common.layers import (
    TIME_CHANNELS,
    FeedForward,
    MLPEmbedder,
    attention,
    merge_heads,
    modulate,
    rotary_embedding,
    rotate_pairs,
    split_heads,
    waves,
)

_EPS = 1e-6


@dataclass(frozen=True)
class FluxTransformerConfig(ComponentConfig):
    """`config.json` of a FLUX.1 transformer; defaults are FLUX.1-dev's."""

    patch_size: int = 1
    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = True
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    @property
    def inner_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    def check(self) -> str | None:
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            return f"axes_dims_rope {list(self.axes_dims_rope)} does not add up to {self.attention_head_dim} per head"
        if len(self.axes_dims_rope) != 3 or any(size % 2 for size in self.axes_dims_rope):
            return f"axes_dims_rope {list(self.axes_dims_rope)} is not three even numbers"
        return None


# ---- embeddings


class ConditionEmbedder(nn.Module):
    """Time, guidance and the prompt's pooled embedding, added up to the vector that modulates every block."""

    def __init__(self, config: FluxTransformerConfig):
        super().__init__()
        self.timestep_embedder = MLPEmbedder(TIME_CHANNELS, config.inner_dim)
        if config.guidance_embeds:
            self.guidance_embedder = MLPEmbedder(TIME_CHANNELS, config.inner_dim)
        self.text_embedder = MLPEmbedder(config.pooled_projection_dim, config.inner_dim)

    def __call__(self, sigma: mx.array, guidance: mx.array | None, pooled: mx.array) -> mx.array:
        embedding = self.timestep_embedder(waves(1000 * sigma).astype(pooled.dtype))
        if "guidance_embedder" in self:
            embedding = embedding + self.guidance_embedder(waves(1000 * guidance).astype(pooled.dtype))
        return embedding + self.text_embedder(pooled)


def latent_image_ids(height: int, width: int) -> mx.array:
    """Positions of a grid of picture tokens, row by row: (height · width, 3)."""
    rows = mx.broadcast_to(mx.arange(height)[:, None], (height, width))
    columns = mx.broadcast_to(mx.arange(width)[None, :], (height, width))
    return mx.stack([mx.zeros_like(rows), rows, columns], axis=-1).reshape(-1, 3)


# ---- modulation


class Modulation(nn.Module):
    """`parts` vectors per sample from the condition: shifts, scales and gates, each (B, 1, inner_dim)."""

    def __init__(self, features: int, parts: int):
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(features, parts * features)

    def __call__(self, condition: mx.array) -> list[mx.array]:
        return mx.split(self.linear(nn.silu(condition))[:, None], self.parts, axis=-1)


# ---- blocks


class JointAttention(nn.Module):
    """Text and picture project on their own and attend as one sequence, text first."""

    def __init__(self, config: FluxTransformerConfig):
        super().__init__()
        width, head = config.inner_dim, config.attention_head_dim
        self.heads = config.num_attention_heads
        self.norm_q = nn.RMSNorm(head, eps=_EPS)
        self.norm_k = nn.RMSNorm(head, eps=_EPS)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = [nn.Linear(width, width)]
        self.norm_added_q = nn.RMSNorm(head, eps=_EPS)
        self.norm_added_k = nn.RMSNorm(head, eps=_EPS)
        self.add_q_proj = nn.Linear(width, width)
        self.add_k_proj = nn.Linear(width, width)
        self.add_v_proj = nn.Linear(width, width)
        self.to_add_out = nn.Linear(width, width)

    def __call__(self, image: mx.array, text: mx.array, rotary) -> tuple[mx.array, mx.array]:
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
    def __init__(self, config: FluxTransformerConfig):
        super().__init__()
        width, head = config.inner_dim, config.attention_head_dim
        self.heads = config.num_attention_heads
        self.norm_q = nn.RMSNorm(head, eps=_EPS)
        self.norm_k = nn.RMSNorm(head, eps=_EPS)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)

    def __call__(self, x: mx.array, rotary) -> mx.array:
        q = rotate_pairs(self.norm_q(split_heads(self.to_q(x), self.heads)), rotary)
        k = rotate_pairs(self.norm_k(split_heads(self.to_k(x), self.heads)), rotary)
        return merge_heads(attention(q, k, split_heads(self.to_v(x), self.heads)))


class TransformerBlock(nn.Module):
    def __init__(self, config: FluxTransformerConfig):
        super().__init__()
        width = config.inner_dim
        self.norm1 = Modulation(width, 6)
        self.norm1_context = Modulation(width, 6)
        self.attn = JointAttention(config)
        self.ff = FeedForward(width)
        self.ff_context = FeedForward(width)

    def __call__(self, image: mx.array, text: mx.array, condition: mx.array, rotary) -> tuple[mx.array, mx.array]:
        shift, scale, gate, shift_ff, scale_ff, gate_ff = self.norm1(condition)
        shift_t, scale_t, gate_t, shift_ff_t, scale_ff_t, gate_ff_t = self.norm1_context(condition)
        image_out, text_out = self.attn(modulate(image, shift, scale), modulate(text, shift_t, scale_t), rotary)
        image = image + gate * image_out
        image = image + gate_ff * self.ff(modulate(image, shift_ff, scale_ff))
        text = text + gate_t * text_out
        text = text + gate_ff_t * self.ff_context(modulate(text, shift_ff_t, scale_ff_t))
        return image, text


class SingleTransformerBlock(nn.Module):
    def __init__(self, config: FluxTransformerConfig):
        super().__init__()
        width = config.inner_dim
        self.norm = Modulation(width, 3)
        self.proj_mlp = nn.Linear(width, 4 * width)
        self.proj_out = nn.Linear(5 * width, width)
        self.attn = SingleAttention(config)

    def __call__(self, x: mx.array, condition: mx.array, rotary) -> mx.array:
        shift, scale, gate = self.norm(condition)
        y = modulate(x, shift, scale)
        y = mx.concatenate([self.attn(y, rotary), nn.gelu_approx(self.proj_mlp(y))], axis=-1)
        return x + gate * self.proj_out(y)


# ---- the model


class FluxTransformer(nn.Module):
    """Predicts the velocity noise - picture of packed latents."""

    config_class = FluxTransformerConfig

    def __init__(self, config: FluxTransformerConfig):
        super().__init__()
        self.config = config
        width = config.inner_dim
        self.time_text_embed = ConditionEmbedder(config)
        self.context_embedder = nn.Linear(config.joint_attention_dim, width)
        self.x_embedder = nn.Linear(config.in_channels, width)
        self.transformer_blocks = [TransformerBlock(config) for _ in range(config.num_layers)]
        self.single_transformer_blocks = [SingleTransformerBlock(config) for _ in range(config.num_single_layers)]
        self.norm_out = Modulation(width, 2)
        self.proj_out = nn.Linear(width, config.patch_size**2 * (config.out_channels or config.in_channels))

    def __call__(
        self,
        hidden_states: mx.array,
        *,
        sigma: mx.array,
        prompt_embeds: mx.array,
        pooled_prompt_embeds: mx.array,
        image_ids: mx.array,
        guidance: mx.array | None = None,
    ) -> mx.array:
        """Predict the velocity.

        Args:
            hidden_states: packed latents (B, L, in_channels).
            sigma: (B,), how noisy they are: 1 is pure noise, 0 is a picture.
            prompt_embeds: T5's (B, T, joint_attention_dim).
            pooled_prompt_embeds: CLIP's (B, pooled_projection_dim).
            image_ids: (L, 3), see `latent_image_ids`.
            guidance: (B,); needed by guidance-distilled models (`guidance_embeds`), unused by others.

        Returns:
            (B, L, out_channels).
        """
        condition = self.time_text_embed(sigma, guidance, pooled_prompt_embeds)
        image = self.x_embedder(hidden_states)
        text = self.context_embedder(prompt_embeds)
        length = text.shape[1]
        ids = mx.concatenate([mx.zeros((length, 3), dtype=image_ids.dtype), image_ids])
        rotary = rotary_embedding(ids, self.config.axes_dims_rope)

        for block in self.transformer_blocks:
            image, text = block(image, text, condition, rotary)
        x = mx.concatenate([text, image], axis=1)
        for block in self.single_transformer_blocks:
            x = block(x, condition, rotary)

        scale, shift = self.norm_out(condition)
        return self.proj_out(modulate(x[:, length:], shift, scale))
