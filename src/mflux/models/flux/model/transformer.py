"""FLUX.1's transformer (Black Forest Labs 2024), a rectified-flow model over text and picture tokens.

Reference class: diffusers' `FluxTransformer2DModel`. Double blocks keep text and picture in two streams that attend to
each other; single blocks run one stream of both, with attention and feed-forward side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mflux.backend import mx, nn
from mflux.models.common.networks.layers import (
    TIME_CHANNELS,
    Linear,
    MLPEmbedder,
    Rotary,
    modulate,
    rotary_embedding,
    waves,
)
from mflux.models.common.networks.mmdit import (
    MMDiTConfig,
    Modulation,
    SingleTransformerBlock,
    TransformerBlock,
    latent_image_ids,
)
from mflux.models.common.networks.modulation import Condition, Known
from mflux.models.common.networks.once import Once, kept
from mflux.models.common.replaced import also_as_024, refuse_more, step_at

__all__ = ["FluxTransformer", "FluxTransformerConfig", "FluxTrunk", "Residuals", "latent_image_ids"]


@dataclass(frozen=True)
class FluxTransformerConfig(MMDiTConfig):
    """`config.json` of a FLUX.1 transformer; defaults are FLUX.1-dev's."""

    patch_size: int = 1
    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = True


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
        if "guidance_embedder" in self and guidance is not None:
            embedding = embedding + self.guidance_embedder(waves(1000 * guidance).astype(pooled.dtype))
        return embedding + self.text_embedder(pooled)


# ---- the model


@dataclass(frozen=True)
class Residuals:
    """What a ControlNet adds to a transformer's picture tokens, see `FluxControlNet`.

    Attributes:
        double: (B, L, inner_dim) each, spread evenly over the double blocks: added after a block.
        single: likewise for the single blocks.
    """

    double: Sequence[mx.array] = ()
    single: Sequence[mx.array] = ()


class FluxTrunk(nn.Module):
    """Embeddings and blocks, which the transformer and its ControlNets have in common."""

    def __init__(self, config: FluxTransformerConfig):
        super().__init__()
        self.config = config
        width = config.inner_dim
        self.time_text_embed = ConditionEmbedder(config)
        self.context_embedder = Linear(config.joint_attention_dim, width)
        self.x_embedder = Linear(config.in_channels, width)
        heads, head_dim = config.num_attention_heads, config.attention_head_dim
        self.transformer_blocks = [TransformerBlock(heads, head_dim) for _ in range(config.num_layers)]
        self.single_transformer_blocks = [
            SingleTransformerBlock(heads, head_dim) for _ in range(config.num_single_layers)
        ]

    def rotary(self, text_length: int, image_ids: mx.array) -> Rotary:
        """Of text, all at position zero, and then the picture's tokens."""
        ids = mx.concatenate([mx.zeros((text_length, 3), dtype=image_ids.dtype), image_ids])
        return rotary_embedding(ids, self.config.axes_dims_rope)


def called_as_024(
    transformer: FluxTransformer,
    *,
    t: int,
    config: Any,
    hidden_states: mx.array,
    prompt_embeds: mx.array,
    pooled_prompt_embeds: mx.array,
    kontext_image_ids: mx.array | None = None,
) -> mx.array:
    """A prediction with mflux 0.24's keywords: the step's number, and the configuration with schedule and guidance."""
    ids = latent_image_ids(config.height // 16, config.width // 16)
    if kontext_image_ids is not None:
        ids = mx.concatenate([ids, kontext_image_ids.reshape(-1, 3)])
    return transformer(
        hidden_states.astype(prompt_embeds.dtype),
        sigma=config.scheduler.sigmas[t][None],
        prompt_embeds=prompt_embeds,
        pooled_prompt_embeds=pooled_prompt_embeds,
        image_ids=ids,
        guidance=mx.array([config.guidance]) if transformer.config.guidance_embeds else None,
    )


class FluxTransformer(FluxTrunk):
    """Predicts the velocity noise - picture of packed latents."""

    config_class = FluxTransformerConfig

    def __init__(self, config: FluxTransformerConfig):
        super().__init__(config)
        width = config.inner_dim
        self.norm_out = Modulation(width, 2)
        self.proj_out = Linear(width, config.patch_size**2 * (config.out_channels or config.in_channels))

    @also_as_024(called_as_024, known_by="config")
    def __call__(
        self,
        hidden_states: mx.array,
        *,
        sigma: mx.array,
        prompt_embeds: mx.array,
        pooled_prompt_embeds: mx.array,
        image_ids: mx.array,
        guidance: mx.array | None = None,
        residuals: Residuals | None = None,
        watch: Callable[..., None] | None = None,
        known: Known | None = None,
        once: Once | None = None,
    ) -> mx.array:
        """Predict the velocity.

        Args:
            hidden_states: packed latents (B, L, in_channels). What a variant draws from beside them is further
                channels, or further tokens, whose velocity means nothing.
            sigma: (B,), how noisy they are: 1 is pure noise, 0 is a picture.
            prompt_embeds: T5's (B, T, joint_attention_dim).
            pooled_prompt_embeds: CLIP's (B, pooled_projection_dim).
            image_ids: (L, 3), see `latent_image_ids`.
            guidance: (B,); needed by guidance-distilled models (`guidance_embeds`), unused by others.
            residuals: what a ControlNet adds.
            watch: called in each double block with its number, the block, and what `TransformerBlock` tells.
            known: the condition that follows from noise level, guidance and prompt, where it was known ahead.
            once: keeps what the image's other steps need as well.

        Returns:
            (B, L, out_channels).
        """
        condition: Condition = known or self.time_text_embed(sigma, guidance, pooled_prompt_embeds)
        image = self.x_embedder(hidden_states)
        text = kept(once, "text", prompt_embeds, lambda: self.context_embedder(prompt_embeds))
        length = text.shape[1]
        rotary = kept(once, "rotary", image_ids, lambda: self.rotary(length, image_ids))
        residuals = residuals or Residuals()

        for number, block in enumerate(self.transformer_blocks):
            told = None if watch is None else partial(watch, number, block)
            image, text = block(image, text, condition, rotary, told)
            if residuals.double:
                image = image + _share(residuals.double, number, len(self.transformer_blocks))
        x = mx.concatenate([text, image], axis=1)
        for number, single in enumerate(self.single_transformer_blocks):
            x = single(x, condition, rotary)
            if residuals.single:
                added = _share(residuals.single, number, len(self.single_transformer_blocks))
                x = mx.concatenate([x[:, :length], x[:, length:] + added], axis=1)

        scale, shift = self.norm_out(condition)
        return self.proj_out(modulate(x[:, length:], shift, scale))

    @staticmethod
    def asked_as_024(
        other: Callable[..., mx.array],
        config: Any,
        hidden_states: mx.array,
        *,
        sigma: mx.array,
        prompt_embeds: mx.array,
        pooled_prompt_embeds: mx.array,
        image_ids: mx.array,
        guidance: mx.array | None = None,
        once: Once | None = None,
        **more: Any,
    ) -> mx.array:
        """A prediction of what stands in this one's place; the other arguments are this one's."""
        refuse_more("FLUX.1's transformer", **more)
        own = (config.height // 16) * (config.width // 16)
        beside = {"kontext_image_ids": image_ids[None, own:]} if len(image_ids) > own else {}
        return other(
            t=step_at(config, sigma),
            config=config,
            hidden_states=hidden_states,
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            **beside,
        )


def _share(residuals: Sequence[mx.array], number: int, blocks: int) -> mx.array:
    """The residual of a block, where there are fewer of them than blocks."""
    return residuals[number // -(-blocks // len(residuals))]
