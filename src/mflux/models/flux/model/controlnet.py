"""A ControlNet for FLUX.1: the first blocks of its transformer, which also see a control picture.

Reference class: diffusers' `FluxControlNetModel` (Zhang et al. 2023, https://arxiv.org/abs/2302.05543). What leaves
each block goes through a layer of its own, and is added to the picture's tokens in the transformer.
"""

from __future__ import annotations

from dataclasses import dataclass

from mflux.backend import mx
from mflux.models.common.networks.layers import Linear
from mflux.models.common.networks.modulation import Condition, Known
from mflux.models.common.networks.once import Once, kept
from mflux.models.flux.model.transformer import FluxTransformerConfig, FluxTrunk, Residuals


@dataclass(frozen=True)
class FluxControlNetConfig(FluxTransformerConfig):
    """`config.json` of a ControlNet; defaults are InstantX's Canny's.

    Attributes:
        num_mode: how many kinds of control picture a union of ControlNets takes.
        conditioning_embedding_channels: of convolutions that read the control picture itself instead of its latents.
    """

    num_layers: int = 5
    num_single_layers: int = 0
    num_mode: int | None = None
    conditioning_embedding_channels: int | None = None

    def check(self) -> str | None:
        if self.num_mode is not None:
            return f"num_mode {self.num_mode}: unions of ControlNets are not built in this version"
        if self.conditioning_embedding_channels is not None:
            return (
                f"conditioning_embedding_channels {self.conditioning_embedding_channels}: ControlNets that read pixels "
                "are not built in this version"
            )
        return super().check()


class FluxControlNet(FluxTrunk):
    """What to add to the transformer's picture tokens so that they follow a control picture."""

    config_class = FluxControlNetConfig

    def __init__(self, config: FluxControlNetConfig):
        super().__init__(config)
        width = config.inner_dim
        self.controlnet_x_embedder = Linear(config.in_channels, width)
        self.controlnet_blocks = [Linear(width, width) for _ in range(config.num_layers)]
        self.controlnet_single_blocks = [Linear(width, width) for _ in range(config.num_single_layers)]

    def __call__(
        self,
        hidden_states: mx.array,
        *,
        control: mx.array,
        strength: float,
        sigma: mx.array,
        prompt_embeds: mx.array,
        pooled_prompt_embeds: mx.array,
        image_ids: mx.array,
        guidance: mx.array | None = None,
        known: Known | None = None,
        once: Once | None = None,
    ) -> Residuals:
        """What the control picture adds.

        Args:
            control: the control picture's packed latents (B, L, in_channels).
            strength: how much of it.
            hidden_states, sigma, prompt_embeds, pooled_prompt_embeds, image_ids, guidance: as for `FluxTransformer`.
            known, once: likewise.
        """
        condition: Condition = known or self.time_text_embed(sigma, guidance, pooled_prompt_embeds)
        image = self.x_embedder(hidden_states) + self.controlnet_x_embedder(control)
        text = kept(once, "text", prompt_embeds, lambda: self.context_embedder(prompt_embeds))
        length = text.shape[1]
        rotary = kept(once, "rotary", image_ids, lambda: self.rotary(length, image_ids))

        double, single = [], []
        for block, out in zip(self.transformer_blocks, self.controlnet_blocks, strict=True):
            image, text = block(image, text, condition, rotary)
            double.append(strength * out(image))
        x = mx.concatenate([text, image], axis=1)
        for last, out in zip(self.single_transformer_blocks, self.controlnet_single_blocks, strict=True):
            x = last(x, condition, rotary)
            single.append(strength * out(x[:, length:]))
        return Residuals(double, single)
