"""FLUX.2's transformer (Black Forest Labs 2025), a rectified-flow model over text, picture and reference tokens.

Reference class: diffusers' `Flux2Transformer2DModel`. As in FLUX.1, double blocks keep text and picture in two streams
that attend to each other, and single blocks run one stream of both, with attention and feed-forward side by side. What
is new: no biases, feed-forwards with a gate, one modulation for all blocks of a kind, and positions on four axes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mflux.backend import mx, nn
from mflux.models.common.networks.gated import GatedConfig, GatedFeedForward
from mflux.models.common.networks.interiors import Interior
from mflux.models.common.networks.layers import (
    Linear,
    MLPEmbedder,
    RMSNorm,
    Rotary,
    attention,
    merge_heads,
    modulate,
    normed_heads,
    product_of_parts,
    residual,
    rotary_embedding,
    rotate_pairs,
    silu_times,
    split_heads,
    waves,
)
from mflux.models.common.networks.mmdit import Modulation
from mflux.models.common.networks.modulation import Condition, Known
from mflux.models.common.networks.once import Once, kept
from mflux.models.common.replaced import also_as_024, refuse_more

# Keys and values, (B, heads, L, head_dim) each.
KeysValues = tuple[mx.array, mx.array]


@dataclass(frozen=True)
class Flux2TransformerConfig(GatedConfig):
    """`config.json` of a FLUX.2 transformer; defaults are FLUX.2 klein 4B's."""

    patch_size: int = 1
    in_channels: int = 128
    out_channels: int | None = None
    num_layers: int = 5
    num_single_layers: int = 20
    joint_attention_dim: int = 7680
    timestep_guidance_channels: int = 256
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: float = 2000
    guidance_embeds: bool = False

    axes = 4

    def check(self) -> str | None:
        if problem := super().check():
            return problem
        if self.guidance_embeds:
            return "guidance_embeds is true as in FLUX.2-dev, which is not built, only FLUX.2 klein"
        return None


# ---- positions: (L, 4) each, by time, row, column and place in the text


def text_ids(length: int, start: int = 0) -> mx.array:
    """Positions of the prompt's tokens: 0, 0, 0 and the token's number, counted from `start`."""
    numbers = mx.arange(start, start + length)
    nothing = mx.zeros_like(numbers)
    return mx.stack([nothing, nothing, nothing, numbers], axis=-1)


def grid_ids(height: int, width: int, *, time: int = 0) -> mx.array:
    """Positions of a picture's tokens, row by row; its time tells a picture from the others."""
    rows = mx.broadcast_to(mx.arange(height)[:, None], (height, width))
    columns = mx.broadcast_to(mx.arange(width)[None, :], (height, width))
    times = mx.full((height, width), time, dtype=rows.dtype)
    return mx.stack([times, rows, columns, mx.zeros_like(rows)], axis=-1).reshape(-1, 4)


# ---- blocks


class TimeEmbedder(nn.Module):
    """The noise level as the vector that modulates every block."""

    def __init__(self, config: Flux2TransformerConfig):
        super().__init__()
        self.channels = config.timestep_guidance_channels
        self.timestep_embedder = MLPEmbedder(self.channels, config.inner_dim, bias=False)

    def __call__(self, sigma: mx.array, dtype: mx.Dtype) -> mx.array:
        return self.timestep_embedder(waves(1000 * sigma, self.channels).astype(dtype))


def gated(x: mx.array) -> mx.array:
    """SiLU of the first half of the channels times the second (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""
    gate, up = mx.split(x, 2, axis=-1)
    return silu_times(gate, up)


def attend(q: mx.array, own: KeysValues, cached: KeysValues | None) -> mx.array:
    """Attention over a stream's own keys and values and those that are kept of the references; (B, L, width)."""
    k, v = own
    if cached is not None:
        k, v = (mx.concatenate([ours, mx.broadcast_to(kept, (ours.shape[0], *kept.shape[1:]))], axis=2)
                for ours, kept in zip(own, cached, strict=True))  # fmt: skip
    return merge_heads(attention(q, k, v))


class JointAttention(Interior):
    """Text and picture project on their own and attend as one sequence, text first."""

    def __init__(self, config: Flux2TransformerConfig):
        super().__init__()
        width, head, eps = config.inner_dim, config.attention_head_dim, config.eps
        self.heads = config.num_attention_heads
        self.norm_q = RMSNorm(head, eps=eps)
        self.norm_k = RMSNorm(head, eps=eps)
        self.to_q = Linear(width, width, bias=False)
        self.to_k = Linear(width, width, bias=False)
        self.to_v = Linear(width, width, bias=False)
        self.to_out = [Linear(width, width, bias=False)]
        self.norm_added_q = RMSNorm(head, eps=eps)
        self.norm_added_k = RMSNorm(head, eps=eps)
        self.add_q_proj = Linear(width, width, bias=False)
        self.add_k_proj = Linear(width, width, bias=False)
        self.add_v_proj = Linear(width, width, bias=False)
        self.to_add_out = Linear(width, width, bias=False)

    def __call__(
        self, image: mx.array, text: mx.array, rotary: Rotary, cached: KeysValues | None
    ) -> tuple[mx.array, mx.array]:
        parts = zip(self.of_text(self.enter(text)), self.of_image(self.enter(image)), strict=True)
        q, k, v = (mx.concatenate(list(pair), axis=2) for pair in parts)
        out = attend(rotate_pairs(q, rotary), (rotate_pairs(k, rotary), v), cached)
        length = text.shape[1]
        return self.leave(self.to_out[0](out[:, length:]), image), self.leave(self.to_add_out(out[:, :length]), text)

    def alone(self, image: mx.array, rotary: Rotary) -> tuple[mx.array, KeysValues]:
        """Reference tokens among themselves, and the keys and values to keep of them."""
        q, k, v = self.of_image(self.enter(image))
        own = rotate_pairs(k, rotary), v
        return self.leave(self.to_out[0](attend(rotate_pairs(q, rotary), own, None)), image), own

    def of_image(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        q = normed_heads(self.norm_q, self.to_q(x), self.heads)
        k = normed_heads(self.norm_k, self.to_k(x), self.heads)
        return q, k, split_heads(self.to_v(x), self.heads)

    def of_text(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        q = normed_heads(self.norm_added_q, self.add_q_proj(x), self.heads)
        k = normed_heads(self.norm_added_k, self.add_k_proj(x), self.heads)
        return q, k, split_heads(self.add_v_proj(x), self.heads)


class DoubleBlock(nn.Module):
    def __init__(self, config: Flux2TransformerConfig):
        super().__init__()
        self.eps = config.eps
        self.attn = JointAttention(config)
        self.ff = GatedFeedForward(config)
        self.ff_context = GatedFeedForward(config)

    def __call__(
        self,
        image: mx.array,
        text: mx.array,
        of_image: Sequence[mx.array],
        of_text: Sequence[mx.array],
        rotary: Rotary,
        cached: KeysValues | None,
    ) -> tuple[mx.array, mx.array]:
        shift, scale, gate, *image_ff = of_image
        shift_t, scale_t, gate_t, *text_ff = of_text
        image_out, text_out = self.attn(
            modulate(image, shift, scale, self.eps), modulate(text, shift_t, scale_t, self.eps), rotary, cached
        )
        return (
            self.feed(self.ff, residual(image, gate, image_out), image_ff),
            self.feed(self.ff_context, residual(text, gate_t, text_out), text_ff),
        )

    def alone(self, image: mx.array, modulation: Sequence[mx.array], rotary: Rotary) -> tuple[mx.array, KeysValues]:
        shift, scale, gate, *image_ff = modulation
        out, kept = self.attn.alone(modulate(image, shift, scale, self.eps), rotary)
        return self.feed(self.ff, residual(image, gate, out), image_ff), kept

    def feed(self, layer: GatedFeedForward, x: mx.array, modulation: Sequence[mx.array]) -> mx.array:
        shift, scale, gate = modulation
        return residual(x, gate, layer(modulate(x, shift, scale, self.eps)))


class ParallelAttention(Interior):
    """Attention and feed-forward at once: one layer before both, one after."""

    def __init__(self, config: Flux2TransformerConfig):
        super().__init__()
        width = config.inner_dim
        self.heads = config.num_attention_heads
        self.norm_q = RMSNorm(config.attention_head_dim, eps=config.eps)
        self.norm_k = RMSNorm(config.attention_head_dim, eps=config.eps)
        self.to_qkv_mlp_proj = Linear(width, 3 * width + 2 * config.hidden_dim, bias=False)
        self.to_out = Linear(width + config.hidden_dim, width, bias=False)

    def __call__(self, x: mx.array, rotary: Rotary, cached: KeysValues | None = None) -> tuple[mx.array, KeysValues]:
        width = x.shape[-1]
        q, k, v, hidden = mx.split(self.to_qkv_mlp_proj(self.enter(x)), [width, 2 * width, 3 * width], axis=-1)
        q = rotate_pairs(normed_heads(self.norm_q, q, self.heads), rotary)
        k = rotate_pairs(normed_heads(self.norm_k, k, self.heads), rotary)
        own = k, split_heads(v, self.heads)
        out = product_of_parts(self.to_out, attend(q, own, cached), gated(hidden))
        return self.leave(out, x), own


class SingleBlock(nn.Module):
    def __init__(self, config: Flux2TransformerConfig):
        super().__init__()
        self.eps = config.eps
        self.attn = ParallelAttention(config)

    def __call__(
        self, x: mx.array, modulation: Sequence[mx.array], rotary: Rotary, cached: KeysValues | None = None
    ) -> tuple[mx.array, KeysValues]:
        shift, scale, gate = modulation
        out, own = self.attn(modulate(x, shift, scale, self.eps), rotary, cached)
        return residual(x, gate, out), own


# ---- the model


def called_as_024(
    transformer: Flux2Transformer,
    *,
    hidden_states: mx.array,
    encoder_hidden_states: mx.array,
    timestep: mx.array | float,
    img_ids: mx.array,
    txt_ids: mx.array,
    guidance: mx.array | None = None,
    kv_cache: None = None,
) -> mx.array:
    """A prediction with mflux 0.24's keywords: a thousand times the noise level, and positions (1, L, 4)."""
    refuse_more("FLUX.2's transformer", guidance=guidance, kv_cache=kv_cache)
    return transformer(
        hidden_states.astype(encoder_hidden_states.dtype),
        sigma=mx.array(timestep, mx.float32).reshape(1) / 1000,
        prompt_embeds=encoder_hidden_states,
        image_ids=img_ids.reshape(-1, 4),
        text_ids=txt_ids.reshape(-1, 4),
    )


class Flux2Transformer(nn.Module):
    """Predicts the velocity noise - picture of latents."""

    config_class = Flux2TransformerConfig

    def __init__(self, config: Flux2TransformerConfig):
        super().__init__()
        self.config = config
        width = config.inner_dim
        self.time_guidance_embed = TimeEmbedder(config)
        self.double_stream_modulation_img = Modulation(width, 6, bias=False)
        self.double_stream_modulation_txt = Modulation(width, 6, bias=False)
        self.single_stream_modulation = Modulation(width, 3, bias=False)
        self.x_embedder = Linear(config.in_channels, width, bias=False)
        self.context_embedder = Linear(config.joint_attention_dim, width, bias=False)
        self.transformer_blocks = [DoubleBlock(config) for _ in range(config.num_layers)]
        self.single_transformer_blocks = [SingleBlock(config) for _ in range(config.num_single_layers)]
        self.norm_out = Modulation(width, 2, bias=False)
        self.proj_out = Linear(width, config.patch_size**2 * (config.out_channels or config.in_channels), bias=False)

    @also_as_024(called_as_024, known_by="encoder_hidden_states")
    def __call__(
        self,
        hidden_states: mx.array,
        *,
        sigma: mx.array,
        prompt_embeds: mx.array,
        image_ids: mx.array,
        text_ids: mx.array,
        references: list[KeysValues] | None = None,
        known: Known | None = None,
        once: Once | None = None,
    ) -> mx.array:
        """Predict the velocity.

        Args:
            hidden_states: latents, one token each (B, L, in_channels); tokens of references may follow.
            sigma: (B,), how noisy they are: 1 is pure noise, 0 is a picture.
            prompt_embeds: (B, T, joint_attention_dim).
            image_ids: (L, 4), see `grid_ids`.
            text_ids: (T, 4), see `text_ids`.
            references: what `keep` returned, for a model that was trained to find its references there.
            known: the condition that follows from the noise level, where it was known ahead.
            once: keeps what the image's other steps need as well.

        Returns:
            (B, L, out_channels).
        """
        condition: Condition = known or self.time_guidance_embed(sigma, prompt_embeds.dtype)
        of_image = self.double_stream_modulation_img(condition)
        of_text = self.double_stream_modulation_txt(condition)
        image = self.x_embedder(hidden_states)
        text = kept(once, "text", prompt_embeds, lambda: self.context_embedder(prompt_embeds))
        rotary = kept(once, "rotary", prompt_embeds, lambda: self.rotary(mx.concatenate([text_ids, image_ids])))
        of_references = iter(references or [])

        for block in self.transformer_blocks:
            image, text = block(image, text, of_image, of_text, rotary, next(of_references, None))
        length = text.shape[1]
        x = mx.concatenate([text, image], axis=1)
        modulation = self.single_stream_modulation(condition)
        for single in self.single_transformer_blocks:
            x, _ = single(x, modulation, rotary, next(of_references, None))

        scale, shift = self.norm_out(condition)
        return self.proj_out(modulate(x[:, length:], shift, scale, self.config.eps))

    @staticmethod
    def asked_as_024(
        other: Callable[..., mx.array],
        config: Any,
        hidden_states: mx.array,
        *,
        sigma: mx.array,
        prompt_embeds: mx.array,
        image_ids: mx.array,
        text_ids: mx.array,
        once: Once | None = None,
        **more: Any,
    ) -> mx.array:
        """A prediction of what stands in this one's place; the other arguments are this one's."""
        refuse_more("FLUX.2's transformer", **more)
        return other(
            hidden_states=hidden_states,
            encoder_hidden_states=prompt_embeds,
            timestep=1000 * sigma,
            img_ids=image_ids[None],
            txt_ids=text_ids[None],
            guidance=None,
        )

    def keep(
        self,
        hidden_states: mx.array,
        image_ids: mx.array,
        dtype: mx.Dtype = mx.float32,
        known: Known | None = None,
    ) -> list[KeysValues]:
        """What the blocks need of references that never change: the keys and values of each.

        Such references attend to themselves alone, and are pictures without noise at every step: neither the prompt nor
        the step reaches them, so one pass is enough for all steps.

        Args:
            hidden_states: the references' latents (B, R, in_channels).
            image_ids: (R, 4).
            dtype: to compute in.
            known: the condition without noise, where it was known ahead.
        """
        condition: Condition = known or self.time_guidance_embed(mx.zeros(1), dtype)
        rotary = self.rotary(image_ids)
        kept = []
        x = self.x_embedder(hidden_states)
        modulation = self.double_stream_modulation_img(condition)
        for block in self.transformer_blocks:
            x, own = block.alone(x, modulation, rotary)
            kept.append(own)
        modulation = self.single_stream_modulation(condition)
        for single in self.single_transformer_blocks:
            x, own = single(x, modulation, rotary)
            kept.append(own)
        return kept

    def rotary(self, ids: mx.array) -> Rotary:
        return rotary_embedding(ids, self.config.axes_dims_rope, self.config.rope_theta)
