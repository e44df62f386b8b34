"""Qwen-Image's transformer (Qwen team 2025, arxiv.org/abs/2508.02324): text and pictures in two streams, to the end.

Reference class: diffusers' `QwenImageTransformer2DModel`. Several pictures may stand in the picture stream: the one
that is drawn, and after it those that an edit starts from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mflux.backend import mx, nn
from mflux.models.common.networks.layers import (
    TIME_CHANNELS,
    Activation,
    FeedForward,
    Linear,
    MLPEmbedder,
    RMSNorm,
    Rotary,
    modulate,
    residual,
    rotary_embedding,
    waves,
)
from mflux.models.common.networks.mmdit import JointAttention, MMDiTConfig, Modulation
from mflux.models.common.networks.modulation import Condition, Known, Modulated, ModulationLinear, modulation
from mflux.models.common.networks.once import Once, kept
from mflux.models.common.replaced import also_as_024, refuse_more, step_at

_EPS = 1e-6

# Rows and columns of a picture's tokens.
Grid = tuple[int, int]


@dataclass(frozen=True)
class QwenTransformerConfig(MMDiTConfig):
    """`config.json` of a Qwen-Image transformer; defaults are Qwen-Image's.

    `zero_cond_t` is Qwen-Image-Edit-2511's: the pictures that an edit starts from count as free of noise.
    """

    patch_size: int = 2
    in_channels: int = 64
    out_channels: int | None = 16
    num_layers: int = 60
    joint_attention_dim: int = 3584
    guidance_embeds: bool = False
    zero_cond_t: bool = False
    use_additional_t_cond: bool = False
    use_layer3d_rope: bool = False

    def check(self) -> str | None:
        if problem := super().check():
            return problem
        if self.guidance_embeds:
            return "guidance_embeds is not built: no Qwen-Image has them"
        if self.use_additional_t_cond or self.use_layer3d_rope:
            return "this is Qwen-Image-Layered (use_additional_t_cond, use_layer3d_rope), which is not built"
        return None


def positions(text_length: int, grids: Sequence[Grid]) -> mx.array:
    """Positions of text and picture tokens, text first: (text_length + all tokens, 3), each frame, row, column.

    A picture's rows and columns count from its middle, its frame is its number. Text continues on all three axes where
    the largest picture ends.
    """
    start = max(max(rows // 2, columns // 2) for rows, columns in grids)
    parts = [np.repeat(np.arange(start, start + text_length)[:, None], 3, axis=1)]
    for frame, (rows, columns) in enumerate(grids):
        row, column = np.arange(rows) - (rows - rows // 2), np.arange(columns) - (columns - columns // 2)
        grid = np.meshgrid([frame], row, column, indexing="ij")
        parts.append(np.stack(grid, axis=-1).reshape(-1, 3))
    return mx.array(np.concatenate(parts).astype(np.int32))


class TimeEmbedder(nn.Module):
    def __init__(self, config: QwenTransformerConfig):
        super().__init__()
        self.timestep_embedder = MLPEmbedder(TIME_CHANNELS, config.inner_dim)

    def __call__(self, sigma: mx.array, dtype: mx.Dtype) -> mx.array:
        return self.timestep_embedder(waves(sigma, scale=1000).astype(dtype))


class TransformerBlock(Modulated):
    """Each stream is modulated and fed forward on its own; attention joins them."""

    def __init__(self, config: QwenTransformerConfig):
        super().__init__()
        width = config.inner_dim
        # SiLU stands at 0 in the reference, and has no weights.
        self.img_mod = [Activation("silu"), ModulationLinear(width, 6 * width)]
        self.txt_mod = [Activation("silu"), ModulationLinear(width, 6 * width)]
        self.attn = JointAttention(config.num_attention_heads, config.attention_head_dim)
        self.img_mlp = FeedForward(width)
        self.txt_mlp = FeedForward(width)

    def __call__(
        self,
        image: mx.array,
        text: mx.array,
        condition: Condition,
        clean: Condition | None,
        drawn: mx.array,
        rotary: Any,
    ) -> tuple[mx.array, mx.array]:
        """One block on picture tokens (B, L, width) and text tokens (B, T, width).

        Args:
            condition: (B, width).
            clean: (B, width), the condition of tokens without noise, or None if all have the same.
            drawn: (L, 1), which picture tokens `condition` is for.
        """
        mods, mods_t = self.modulation(condition)
        if clean is not None:
            mods = [mx.where(drawn, *pair) for pair in zip(mods, self._of_image(clean), strict=True)]
        shift, scale, gate, shift_ff, scale_ff, gate_ff = mods
        shift_t, scale_t, gate_t, shift_ff_t, scale_ff_t, gate_ff_t = mods_t
        image_out, text_out = self.attn(modulate(image, shift, scale), modulate(text, shift_t, scale_t), rotary)
        image = residual(image, gate, image_out)
        image = residual(image, gate_ff, self.img_mlp(modulate(image, shift_ff, scale_ff)))
        text = residual(text, gate_t, text_out)
        text = residual(text, gate_ff_t, self.txt_mlp(modulate(text, shift_ff_t, scale_ff_t)))
        return image, text

    def modulation(self, condition: Condition) -> tuple[list[mx.array], list[mx.array]]:
        """Of the picture's stream and of the text's."""
        activation, linear = self.txt_mod
        return self._of_image(condition), modulation(linear, condition, 6, activation)

    def _of_image(self, condition: Condition) -> list[mx.array]:
        activation, linear = self.img_mod
        return modulation(linear, condition, 6, activation)


def called_as_024(
    transformer: QwenTransformer,
    *,
    t: int,
    config: Any,
    hidden_states: mx.array,
    encoder_hidden_states: mx.array,
    encoder_hidden_states_mask: mx.array | None = None,
    qwen_image_ids: mx.array | None = None,
    cond_image_grid: tuple[int, int, int] | Sequence[tuple[int, int, int]] | None = None,
) -> mx.array:
    """A prediction with mflux 0.24's keywords: the step's number, the configuration with the schedule, and (1, rows,
    columns) of each picture that an edit starts from. Nothing of a prompt is padding, so its mask says nothing."""
    beside = [cond_image_grid] if isinstance(cond_image_grid, tuple) else cond_image_grid or []
    return transformer(
        hidden_states.astype(encoder_hidden_states.dtype),
        sigma=config.scheduler.sigmas[t][None],
        prompt_embeds=encoder_hidden_states,
        grids=[(config.height // 16, config.width // 16), *((rows, columns) for _, rows, columns in beside)],
    )


class QwenTransformer(nn.Module):
    """Predicts the velocity noise - picture of packed latents."""

    config_class = QwenTransformerConfig

    def __init__(self, config: QwenTransformerConfig):
        super().__init__()
        self.config = config
        width = config.inner_dim
        self.time_text_embed = TimeEmbedder(config)
        self.txt_norm = RMSNorm(config.joint_attention_dim, eps=_EPS)
        self.img_in = Linear(config.in_channels, width)
        self.txt_in = Linear(config.joint_attention_dim, width)
        self.transformer_blocks = [TransformerBlock(config) for _ in range(config.num_layers)]
        self.norm_out = Modulation(width, 2)
        self.proj_out = Linear(width, config.patch_size**2 * (config.out_channels or config.in_channels))

    @also_as_024(called_as_024, known_by="config")
    def __call__(
        self,
        hidden_states: mx.array,
        *,
        sigma: mx.array,
        prompt_embeds: mx.array,
        grids: Sequence[Grid],
        known: Known | None = None,
        once: Once | None = None,
    ) -> mx.array:
        """Predict the velocity of all picture tokens; only that of the first picture's means something.

        Args:
            hidden_states: packed latents (B, L, in_channels), picture after picture.
            sigma: (B,), how noisy the first picture is: 1 is pure noise, 0 is a picture.
            prompt_embeds: (B, T, joint_attention_dim), without padding.
            grids: rows and columns of each picture's tokens, the one that is drawn first.
            known: the condition that follows from the noise level, where it was known ahead, and with it the one of
                pictures without noise, if there are such.
            once: keeps what the image's other steps need as well.

        Returns:
            (B, L, patch_size² · out_channels).
        """
        image = self.img_in(hidden_states)
        text = kept(once, "text", prompt_embeds, lambda: self.txt_in(self.txt_norm(prompt_embeds)))
        condition: Condition = known or self.time_text_embed(sigma, image.dtype)
        clean: Condition | None = None
        if self.config.zero_cond_t:
            clean = (known and known.at(0.0)) or self.time_text_embed(mx.zeros_like(sigma), image.dtype)
        drawn = (mx.arange(image.shape[1]) < grids[0][0] * grids[0][1])[:, None]
        length = text.shape[1]
        rotary = kept(once, "rotary", prompt_embeds, lambda: self.rotary(length, grids))
        for block in self.transformer_blocks:
            image, text = block(image, text, condition, clean, drawn, rotary)
        scale, shift = self.norm_out(condition)
        return self.proj_out(modulate(image, shift, scale))

    def rotary(self, length: int, grids: Sequence[Grid]) -> Rotary:
        return rotary_embedding(positions(length, grids), self.config.axes_dims_rope)

    def condition(self, sigma: mx.array, dtype: mx.Dtype) -> mx.array:
        """The condition (B, width) at noise levels (B,), for latents of a dtype."""
        stream = self.img_in(mx.zeros((1, 1, self.config.in_channels), dtype)).dtype
        return self.time_text_embed(sigma, stream)

    @staticmethod
    def asked_as_024(
        other: Callable[..., mx.array],
        config: Any,
        hidden_states: mx.array,
        *,
        sigma: mx.array,
        prompt_embeds: mx.array,
        grids: Sequence[Grid],
        once: Once | None = None,
        **more: Any,
    ) -> mx.array:
        """A prediction of what stands in this one's place; the other arguments are this one's."""
        refuse_more("Qwen-Image's transformer", **more)
        beside = [(1, rows, columns) for rows, columns in grids[1:]]
        return other(
            t=step_at(config, sigma),
            config=config,
            hidden_states=hidden_states,
            encoder_hidden_states=prompt_embeds,
            encoder_hidden_states_mask=mx.ones(prompt_embeds.shape[:2], mx.int32),
            **({"cond_image_grid": beside[0] if len(beside) == 1 else beside} if beside else {}),
        )
