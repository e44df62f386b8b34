"""FIBO's transformer (Bria 2025, https://arxiv.org/abs/2511.06876): FLUX.1's blocks, and in each one layer of the text
encoder.

Reference class: diffusers' `BriaFiboTransformer2DModel`. Before every block half of the text stream's channels are
replaced with what the language model thought at that depth (the paper's DimFusion); the other half goes from block to
block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
from mflux.models.common.networks.mmdit import MMDiTConfig, Modulation, SingleTransformerBlock, TransformerBlock
from mflux.models.common.networks.modulation import Condition, Known
from mflux.models.common.networks.once import Once, kept

_TIME_THETA = 10_000


@dataclass(frozen=True)
class FiboTransformerConfig(MMDiTConfig):
    """`config.json` of a FIBO transformer; defaults are the published one's."""

    patch_size: int = 1
    in_channels: int = 48
    num_layers: int = 8
    num_single_layers: int = 38
    joint_attention_dim: int = 4096
    text_encoder_dim: int = 2048
    guidance_embeds: bool = False
    rope_theta: float = 10_000
    time_theta: float = _TIME_THETA

    @property
    def blocks(self) -> int:
        return self.num_layers + self.num_single_layers

    def check(self) -> str | None:
        if problem := super().check():
            return problem
        if self.guidance_embeds:
            return "guidance_embeds is not built: no published FIBO has a guidance embedder"
        if self.patch_size != 1:
            return f"a patch_size of {self.patch_size} is not built, only 1"
        if self.time_theta != _TIME_THETA:
            return f"a time_theta of {self.time_theta} is not built, only {_TIME_THETA}"
        if not self.blocks:
            return "it has no blocks"
        return None


class TimeEmbedder(nn.Module):
    def __init__(self, features: int):
        super().__init__()
        self.timestep_embedder = MLPEmbedder(TIME_CHANNELS, features)

    def __call__(self, sigma: mx.array, dtype: mx.Dtype) -> mx.array:
        return self.timestep_embedder(waves(1000 * sigma).astype(dtype))


class CaptionProjection(nn.Module):
    def __init__(self, in_features: int, features: int):
        super().__init__()
        self.linear = Linear(in_features, features, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x)


class FiboTransformer(nn.Module):
    """Predicts the velocity noise - picture of latents, one token for each 16 x 16 pixels."""

    config_class = FiboTransformerConfig

    def __init__(self, config: FiboTransformerConfig):
        super().__init__()
        self.config = config
        width, heads, head_dim = config.inner_dim, config.num_attention_heads, config.attention_head_dim
        self.time_embed = TimeEmbedder(width)
        self.context_embedder = Linear(config.joint_attention_dim, width)
        self.x_embedder = Linear(config.in_channels, width)
        self.transformer_blocks = [TransformerBlock(heads, head_dim) for _ in range(config.num_layers)]
        self.single_transformer_blocks = [
            SingleTransformerBlock(heads, head_dim) for _ in range(config.num_single_layers)
        ]
        self.norm_out = Modulation(width, 2)
        self.proj_out = Linear(width, config.in_channels)
        self.caption_projection = [CaptionProjection(config.text_encoder_dim, width // 2) for _ in range(config.blocks)]

    def project_text(self, text_layers: Sequence[mx.array]) -> list[mx.array]:
        """What the blocks see of the prompt; the same in every step, so it is worked out once.

        Args:
            text_layers: all hidden states of the text encoder, embeddings first, each (B, T, text_encoder_dim). With
                more of them than blocks the first ones are left out; with fewer the last one serves all further blocks.

        Returns:
            What the text stream starts from, then each block's share of it, (B, T, inner_dim / 2) each.
        """
        blocks, half = self.config.blocks, self.config.inner_dim // 2
        prompt_embeds = mx.concatenate([text_layers[-1], text_layers[-2]], axis=-1)
        layers = [*text_layers, *[text_layers[-1]] * (blocks - len(text_layers))][-blocks:]
        projected = [project(layer) for project, layer in zip(self.caption_projection, layers, strict=True)]
        return [self.context_embedder(prompt_embeds)[..., :half], *projected]

    def rotary(self, length: int, image_ids: mx.array) -> Rotary:
        """Of text, all at position zero, and then the picture's tokens."""
        ids = mx.concatenate([mx.zeros((length, 3), dtype=image_ids.dtype), image_ids])
        return rotary_embedding(ids, self.config.axes_dims_rope, self.config.rope_theta)

    def condition(self, sigma: mx.array, dtype: mx.Dtype) -> mx.array:
        """The condition (B, width) at noise levels (B,), for latents of a dtype."""
        stream = self.x_embedder(mx.zeros((1, 1, self.config.in_channels), dtype)).dtype
        return self.time_embed(sigma, stream)

    def __call__(
        self,
        hidden_states: mx.array,
        *,
        sigma: mx.array,
        text: Sequence[mx.array],
        image_ids: mx.array,
        known: Known | None = None,
        once: Once | None = None,
    ) -> mx.array:
        """Predict the velocity.

        Nothing is masked: prompts of different lengths go through one by one, which is what a mask over their padding
        comes to, and cheaper.

        Args:
            hidden_states: latents (B, L, in_channels).
            sigma: (B,), how noisy they are: 1 is pure noise, 0 is a picture.
            text: from `project_text`.
            image_ids: (L, 3), see `latent_image_ids`.
            known: the condition that follows from the noise level, where it was known ahead.
            once: keeps what the image's other steps need as well.

        Returns:
            (B, L, in_channels).
        """
        image = self.x_embedder(hidden_states)
        condition: Condition = known or self.time_embed(sigma, image.dtype)
        going_on, *projected = text
        length, half = going_on.shape[1:]
        rotary = kept(once, "rotary", going_on, lambda: self.rotary(length, image_ids))

        of_block = iter(projected)
        for block in self.transformer_blocks:
            text_stream = mx.concatenate([going_on, next(of_block)], axis=-1)
            image, text_stream = block(image, text_stream, condition, rotary)
            going_on = text_stream[..., :half]
        for single in self.single_transformer_blocks:
            text_stream = mx.concatenate([going_on, next(of_block)], axis=-1)
            x = single(mx.concatenate([text_stream, image], axis=1), condition, rotary)
            going_on, image = x[:, :length, :half], x[:, length:]

        scale, shift = self.norm_out(condition)
        return self.proj_out(modulate(image, shift, scale))
