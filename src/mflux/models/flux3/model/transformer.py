"""FLUX.3 image klein's transformer (Black Forest Labs 2026), over image, reference and text tokens.

Reference class: diffusers' `Flux3Transformer2DModel`. Each kind of token first goes through blocks of its own, in which
it sees its own kind alone, and then all of them through blocks that they share; in every block attention and
feed-forward stand side by side. One layer for each kind modulates all blocks before, and another all that are shared.
Text and references are modulated as at noise level 0. A distilled model is told as well to which level its step goes.
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
    residual,
    rotary_embedding,
    rotate_pairs,
    silu,
    split_heads,
    waves,
)
from mflux.models.common.networks.modulation import Condition, Known, Modulated, ModulationLinear, modulation
from mflux.models.common.networks.once import Once, kept
from mflux.models.common.replaced import also_as_024, refuse_more

# Rows and columns count half.
_STEP = 0.5


@dataclass(frozen=True)
class Flux3TransformerConfig(GatedConfig):
    """`config.json` of a FLUX.3 transformer; defaults are FLUX.3 image klein's."""

    in_channels: int = 128
    cond_in_channels: int = 128
    num_layers: int = 5
    num_single_layers: int = 28
    joint_attention_dim: int = 20480
    timestep_channels: int = 256
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: float = 10000
    flow_map: bool = True

    axes = 4


# ---- positions: (L, 4) each, by time, row, column, and layer: the place in the text, or which reference


def text_ids(length: int) -> mx.array:
    """Positions of the prompt's tokens: 0, 0, 0 and the token's number."""
    numbers = mx.arange(length).astype(mx.float32)
    nothing = mx.zeros_like(numbers)
    return mx.stack([nothing, nothing, nothing, numbers], axis=-1)


def grid_ids(height: int, width: int, *, reference: int = 0) -> mx.array:
    """Positions of an image's tokens, row by row.

    Args:
        reference: 0 for the image that is generated, 1 for the first reference, and so on.
    """
    rows = mx.broadcast_to(_STEP * mx.arange(height)[:, None], (height, width))
    columns = mx.broadcast_to(_STEP * mx.arange(width)[None, :], (height, width))
    layers = mx.full(rows.shape, -float(reference))
    return mx.stack([mx.zeros_like(rows), rows, columns, layers], axis=-1).reshape(-1, 4)


# ---- modulation. A condition (B, 2 · width) has what modulates the image first, then what modulates all else.


def of_image(condition: mx.array) -> mx.array:
    return mx.split(condition, 2, axis=-1)[0]


def of_others(condition: mx.array) -> mx.array:
    return mx.split(condition, 2, axis=-1)[1]


class Modulation(Modulated):
    """Shifts, scales and gates, (B, 1, width) each, of one half of the condition."""

    def __init__(self, width: int, parts: int, half: Callable[[mx.array], mx.array]):
        super().__init__()
        self.parts = parts
        self.half = half
        self.linear = ModulationLinear(width, parts * width, bias=False)

    def modulation(self, condition: Condition) -> list[mx.array]:
        return modulation(self.linear, condition, self.parts, lambda both: silu(self.half(both)))

    def __call__(self, condition: Condition) -> list[mx.array]:
        return self.modulation(condition)


class Kinds(nn.Module):
    """What modulates each kind of token: shift, scale and gate for images, text and references."""

    def __init__(self, width: int):
        super().__init__()
        self.image = Modulation(width, 3, of_image)
        self.image_cond = Modulation(width, 3, of_others)
        self.txt = Modulation(width, 3, of_others)

    def __call__(self, condition: Condition) -> list[list[mx.array]]:
        return [self.image(condition), self.txt(condition), self.image_cond(condition)]


# ---- blocks


class Attention(Interior):
    # Attention puts out half of what float16 reaches, and values are added up.
    headroom = 4.0

    def __init__(self, config: Flux3TransformerConfig):
        super().__init__()
        width, head, eps = config.inner_dim, config.attention_head_dim, config.eps
        self.heads = config.num_attention_heads
        self.norm_q = RMSNorm(head, eps=eps)
        self.norm_k = RMSNorm(head, eps=eps)
        self.to_q = Linear(width, width, bias=False)
        self.to_k = Linear(width, width, bias=False)
        self.to_v = Linear(width, width, bias=False)
        self.to_out = [Linear(width, width, bias=False)]

    def __call__(self, x: mx.array, rotary: Rotary) -> mx.array:
        inside = self.enter(x)
        q = rotate_pairs(normed_heads(self.norm_q, self.to_q(inside), self.heads), rotary)
        k = rotate_pairs(normed_heads(self.norm_k, self.to_k(inside), self.heads), rotary)
        v = split_heads(self.shrunk(self.to_v(inside)), self.heads)
        return self.leave(self.to_out[0](merge_heads(attention(q, k, v))), x)


class FeedForward(GatedFeedForward):
    # It puts out five times what float16 reaches.
    headroom = 8.0


class Block(nn.Module):
    def __init__(self, config: Flux3TransformerConfig):
        super().__init__()
        self.eps = config.eps
        self.attn = Attention(config)
        self.ff = FeedForward(config)

    def __call__(
        self, parts: Sequence[mx.array], modulations: Sequence[Sequence[mx.array]], rotary: Rotary
    ) -> list[mx.array]:
        """Tokens after the block, which see each other.

        Args:
            parts: of each kind of token those that there are, (B, L, width).
            modulations: shift, scale and gate of each kind.
            rotary: of all of them, one behind the other.
        """
        normed = [
            modulate(part, shift, scale, self.eps) for part, (shift, scale, _) in zip(parts, modulations, strict=True)
        ]
        x = normed[0] if len(normed) == 1 else mx.concatenate(normed, axis=1)
        out, start, after = self.attn(x, rotary) + self.ff(x), 0, []
        for part, (*_, gate) in zip(parts, modulations, strict=True):
            after.append(residual(part, gate, out[:, start : start + part.shape[1]]))
            start += part.shape[1]
        return after


def through(blocks: Sequence[Block], x: mx.array, modulation: Sequence[mx.array], rotary: Rotary) -> mx.array:
    """Tokens of one kind after the blocks that they go through on their own."""
    for block in blocks:
        (x,) = block([x], [modulation], rotary)
    return x


class ModeBlocks(nn.Module):
    """Those that images and references go through on their own."""

    def __init__(self, config: Flux3TransformerConfig):
        super().__init__()
        self.image = [Block(config) for _ in range(config.num_layers)]
        self.image_cond = [Block(config) for _ in range(config.num_layers)]


class Embedders(nn.Module):
    def __init__(self, config: Flux3TransformerConfig):
        super().__init__()
        self.image = Linear(config.in_channels, config.inner_dim, bias=False)
        self.image_cond = Linear(config.cond_in_channels, config.inner_dim, bias=False)


# ---- the model


def called_as_024(
    transformer: Flux3Transformer,
    *,
    hidden_states: mx.array,
    img_ids: mx.array,
    encoder_hidden_states: mx.array,
    txt_ids: mx.array,
    timestep: mx.array,
    target_timestep: mx.array | None = None,
    cond_hidden_states: mx.array | None = None,
    cond_ids: mx.array | None = None,
) -> mx.array:
    """A prediction with mflux 0.24's keywords; noise levels are from 0 to 1."""
    return transformer(
        hidden_states.astype(encoder_hidden_states.dtype),
        sigma=mx.array(timestep, mx.float32).reshape(-1),
        next_sigma=None if target_timestep is None else mx.array(target_timestep, mx.float32).reshape(-1),
        prompt_embeds=encoder_hidden_states,
        image_ids=img_ids,
        text_ids=txt_ids,
        references=cond_hidden_states,
        reference_ids=cond_ids,
    )


class Flux3Transformer(nn.Module):
    """Predicts the velocity noise - image of latents."""

    config_class = Flux3TransformerConfig

    def __init__(self, config: Flux3TransformerConfig):
        super().__init__()
        self.config = config
        width = config.inner_dim
        self.timestep_embedder = MLPEmbedder(config.timestep_channels, width, bias=False)
        if config.flow_map:
            self.target_timestep_embedder = MLPEmbedder(config.timestep_channels, width, bias=False)
        self.early_stream_modulations = Kinds(width)
        self.single_stream_modulations = Kinds(width)
        self.x_embedders = Embedders(config)
        self.context_embedder = Linear(config.joint_attention_dim, width, bias=False)
        self.mode_blocks = ModeBlocks(config)
        self.txt_mode_blocks = [Block(config) for _ in range(config.num_layers)]
        self.single_transformer_blocks = [Block(config) for _ in range(config.num_single_layers)]
        self.norm_out = Modulation(width, 2, of_image)
        self.proj_out = Linear(width, config.in_channels, bias=False)

    @also_as_024(called_as_024, known_by="encoder_hidden_states")
    def __call__(
        self,
        hidden_states: mx.array,
        *,
        sigma: mx.array,
        next_sigma: mx.array | None = None,
        prompt_embeds: mx.array,
        image_ids: mx.array,
        text_ids: mx.array,
        references: mx.array | None = None,
        reference_ids: mx.array | None = None,
        known: Known | None = None,
        once: Once | None = None,
    ) -> mx.array:
        """Predict the velocity.

        Args:
            hidden_states: latents, one token each (B, L, in_channels).
            sigma: (B,), how noisy they are: 1 is pure noise, 0 is an image.
            next_sigma: (B,), the same after the step; for a distilled model, and only for it.
            prompt_embeds: (B, T, joint_attention_dim).
            image_ids: (L, 4), see `grid_ids`.
            text_ids: (T, 4), see `text_ids`.
            references: latents of reference images (B, R, cond_in_channels), one behind the other.
            reference_ids: (R, 4), see `grid_ids`.
            known: the condition that follows from the noise levels, where it was known ahead.
            once: keeps what the image's other steps need as well.

        Returns:
            (B, L, in_channels).
        """
        condition: Condition = known or self.condition(sigma, next_sigma, prompt_embeds.dtype)
        early, joint = self.early_stream_modulations(condition), self.single_stream_modulations(condition)
        text_rotary = kept(once, "text rotary", prompt_embeds, lambda: self.rotary(text_ids))
        image_rotary = kept(once, "image rotary", image_ids, lambda: self.rotary(image_ids))
        text = kept(once, "text", prompt_embeds, lambda: self.context_embedder(prompt_embeds))
        # A distilled model modulates by where its step goes, so that text and references are others in each.
        still = None if self.config.flow_map else once
        tokens = [
            through(self.mode_blocks.image, self.x_embedders.image(hidden_states), early[0], image_rotary),
            kept(
                still, "text through", prompt_embeds,
                lambda: through(self.txt_mode_blocks, text, early[1], text_rotary),
            ),
        ]  # fmt: skip
        ids = [image_ids, text_ids]
        if references is not None and reference_ids is not None:
            rotary = kept(once, "reference rotary", references, lambda: self.rotary(reference_ids))
            x = kept(once, "references", references, lambda: self.x_embedders.image_cond(references))
            tokens.append(
                kept(
                    still, "references through", references,
                    lambda: through(self.mode_blocks.image_cond, x, early[2], rotary),
                )
            )  # fmt: skip
            ids.append(reference_ids)

        together = kept(once, "rotary", prompt_embeds, lambda: self.rotary(mx.concatenate(ids)))
        for block in self.single_transformer_blocks:
            tokens = block(tokens, joint[: len(tokens)], together)

        scale, shift = self.norm_out(condition)
        return self.proj_out(modulate(tokens[0], shift, scale, self.config.eps))

    @staticmethod
    def asked_as_024(
        other: Callable[..., mx.array],
        config: Any,
        hidden_states: mx.array,
        *,
        sigma: mx.array,
        next_sigma: mx.array | None = None,
        prompt_embeds: mx.array,
        image_ids: mx.array,
        text_ids: mx.array,
        references: mx.array | None = None,
        reference_ids: mx.array | None = None,
        once: Once | None = None,
        **more: Any,
    ) -> mx.array:
        """A prediction of what stands in this one's place; the other arguments are this one's."""
        refuse_more("FLUX.3's transformer", **more)
        return other(
            hidden_states=hidden_states,
            img_ids=image_ids,
            encoder_hidden_states=prompt_embeds,
            txt_ids=text_ids,
            timestep=sigma,
            target_timestep=next_sigma,
            cond_hidden_states=references,
            cond_ids=reference_ids,
        )

    def condition(self, sigma: mx.array, next_sigma: mx.array | None, dtype: mx.Dtype) -> mx.array:
        """What modulates the image, and what modulates all else, (B, 2 · width), from noise levels (B,)."""
        channels = self.config.timestep_channels
        image, others = (
            self.timestep_embedder(waves(1000 * level, channels).astype(dtype)) for level in (sigma, 0 * sigma)
        )
        if self.config.flow_map:
            assert next_sigma is not None, "a distilled model is told where its step goes"
            target = self.target_timestep_embedder(waves(1000 * next_sigma, channels).astype(dtype))
            image, others = image + target, others + target
        return mx.concatenate([image, others], axis=-1)

    def rotary(self, ids: mx.array) -> Rotary:
        return rotary_embedding(ids, self.config.axes_dims_rope, self.config.rope_theta)
