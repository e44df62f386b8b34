"""ERNIE-Image's transformer (Baidu 2026, https://huggingface.co/baidu/ERNIE-Image): one stream, image before text.

Reference class: diffusers' `ErnieImageTransformer2DModel`. One modulation serves all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mflux.backend import mx, nn
from mflux.cpu import gelu_times
from mflux.models.common.component_config import ComponentConfig
from mflux.models.common.networks.layers import (
    Activation,
    Conv2d,
    Linear,
    MLPEmbedder,
    RMSNorm,
    Rotary,
    attention,
    inverse_frequencies,
    merge_heads,
    modulate,
    normed_and_scaled,
    normed_heads,
    residual,
    split_heads,
    turn_halves,
    waves,
)
from mflux.models.common.networks.modulation import Condition, Known, Modulated, ModulationLinear, modulation
from mflux.models.common.networks.once import Once, kept
from mflux.models.common.replaced import also_as_024, refuse_more


@dataclass(frozen=True)
class ErnieTransformerConfig(ComponentConfig):
    """`config.json` of an ERNIE-Image transformer; defaults are those of ERNIE-Image and Turbo."""

    hidden_size: int = 4096
    num_attention_heads: int = 32
    num_layers: int = 36
    ffn_hidden_size: int = 12288
    in_channels: int = 128
    out_channels: int = 128
    patch_size: int = 1
    text_in_dim: int = 3072
    rope_theta: float = 256.0
    rope_axes_dim: tuple[int, ...] = (32, 48, 48)
    eps: float = 1e-6
    qk_layernorm: bool = True

    @property
    def inner_dim(self) -> int:
        return self.hidden_size

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def check(self) -> str | None:
        if self.patch_size != 1:
            return f"a patch_size of {self.patch_size} is not built: ERNIE-Image has one token for each latent"
        if not self.qk_layernorm:
            return "attention without norms of queries and keys (qk_layernorm) is not built"
        if self.in_channels != self.out_channels:
            return f"{self.out_channels} channels cannot be the velocity of {self.in_channels}"
        if self.num_attention_heads < 1 or self.hidden_size % (2 * self.num_attention_heads):
            return f"{self.num_attention_heads} heads do not divide {self.hidden_size} channels into pairs"
        if len(self.rope_axes_dim) != 3 or any(size % 2 for size in self.rope_axes_dim):
            return f"rope_axes_dim {list(self.rope_axes_dim)} is not three even numbers"
        if sum(self.rope_axes_dim) != self.head_dim:
            return f"rope_axes_dim {list(self.rope_axes_dim)} does not add up to {self.head_dim} per head"
        return None


# ---- positions


def positions(rows: int, columns: int, length: int) -> mx.array:
    """Time, row and column of the image's tokens and then of the text's: (rows · columns + length, 3).

    Text advances in time alone, and the image stands where it ends.
    """
    grid = mx.meshgrid(mx.array([length]), mx.arange(rows), mx.arange(columns), indexing="ij")
    image = mx.stack([axis.reshape(-1) for axis in grid], axis=-1)
    text = mx.stack([mx.arange(length), mx.zeros(length, mx.int32), mx.zeros(length, mx.int32)], axis=-1)
    return mx.concatenate([image, text])


def rotary_factors(ids: mx.array, config: ErnieTransformerConfig) -> Rotary:
    """What `turn_halves` takes, (L, 2, head_dim / 2) each, float32.

    Each angle stands for two neighbouring channels, as if these were turned together; but channels are turned with
    those half a head away, which have other angles. So the model was trained, and half a table cannot say it.
    """
    angles = [
        ids[:, axis, None].astype(mx.float32) * inverse_frequencies(channels, config.rope_theta)
        for axis, channels in enumerate(config.rope_axes_dim)
    ]
    angle = mx.repeat(mx.concatenate(angles, axis=-1), 2, axis=-1)
    first, second = mx.split(mx.sin(angle), 2, axis=-1)
    return mx.cos(angle).reshape(len(ids), 2, -1), mx.stack([-first, second], axis=-2)


# ---- blocks


class Attention(nn.Module):
    def __init__(self, config: ErnieTransformerConfig):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.to_q = Linear(width, width, bias=False)
        self.to_k = Linear(width, width, bias=False)
        self.to_v = Linear(width, width, bias=False)
        self.to_out = [Linear(width, width, bias=False)]
        self.norm_q = RMSNorm(config.head_dim, eps=config.eps)
        self.norm_k = RMSNorm(config.head_dim, eps=config.eps)

    def __call__(self, x: mx.array, rotary: Rotary) -> mx.array:
        q, k = normed_heads(self.norm_q, self.to_q(x), self.heads), normed_heads(self.norm_k, self.to_k(x), self.heads)
        v = split_heads(self.to_v(x), self.heads)
        return self.to_out[0](merge_heads(attention(turn_halves(q, *rotary), turn_halves(k, *rotary), v)))


class FeedForward(nn.Module):
    def __init__(self, config: ErnieTransformerConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.ffn_hidden_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.ffn_hidden_size, bias=False)
        self.linear_fc2 = Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear_fc2(gelu_times(self.gate_proj(x), self.up_proj(x)))


class TransformerBlock(nn.Module):
    def __init__(self, config: ErnieTransformerConfig):
        super().__init__()
        self.adaLN_sa_ln = RMSNorm(config.hidden_size, eps=config.eps)
        self.self_attention = Attention(config)
        self.adaLN_mlp_ln = RMSNorm(config.hidden_size, eps=config.eps)
        self.mlp = FeedForward(config)

    def __call__(self, x: mx.array, mods: list[mx.array], rotary: Rotary) -> mx.array:
        """One block on tokens (B, L, hidden_size); `mods` is what modulates all blocks, (B, 1, hidden_size) each."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = mods
        y = normed_and_scaled(self.adaLN_sa_ln, x, 1 + scale) + shift
        x = residual(x, gate, self.self_attention(y, rotary))
        y = normed_and_scaled(self.adaLN_mlp_ln, x, 1 + scale_mlp) + shift_mlp
        return residual(x, gate_mlp, self.mlp(y))


class PatchEmbed(nn.Module):
    def __init__(self, config: ErnieTransformerConfig):
        super().__init__()
        self.proj = Conv2d(config.in_channels, config.hidden_size, 1)

    def __call__(self, latents: mx.array) -> mx.array:
        """(B, in_channels, h, w) → (B, h · w, hidden_size)."""
        return self.proj(latents.transpose(0, 2, 3, 1)).flatten(1, 2)


class FinalNorm(Modulated):
    """Scale and shift follow from the condition as it is, without an activation."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = ModulationLinear(width, 2 * width)

    def modulation(self, condition: Condition) -> list[mx.array]:
        return modulation(self.linear, condition, 2)


def called_as_024(
    transformer: ErnieTransformer,
    *,
    hidden_states: mx.array,
    timestep: mx.array,
    text_bth: mx.array,
    text_lens: mx.array,
    cos: mx.array | None = None,
    sin: mx.array | None = None,
    attn_mask: mx.array | None = None,
) -> mx.array:
    """A prediction with mflux 0.24's keywords: prompts padded at the end, and how long each is. Positions follow from
    that, and padding is left out."""
    rows = [
        transformer(
            hidden_states[row : row + 1].astype(text_bth.dtype),
            sigma=timestep[row : row + 1] / 1000,
            prompt_embeds=text_bth[row : row + 1, : int(text_lens[row])],
        )
        for row in range(text_bth.shape[0])
    ]
    return mx.concatenate(rows)


class ErnieTransformer(Modulated):
    """Predicts the velocity noise - image of latents."""

    config_class = ErnieTransformerConfig

    def __init__(self, config: ErnieTransformerConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.x_embedder = PatchEmbed(config)
        if config.text_in_dim != width:
            self.text_proj = Linear(config.text_in_dim, width, bias=False)
        self.time_embedding = MLPEmbedder(width, width)
        # SiLU stands at 0 in the reference, and has no weights.
        self.adaLN_modulation = [Activation("silu"), ModulationLinear(width, 6 * width)]
        self.layers = [TransformerBlock(config) for _ in range(config.num_layers)]
        self.final_norm = FinalNorm(width)
        self.final_linear = Linear(width, config.out_channels)

    def modulation(self, condition: Condition) -> list[mx.array]:
        """Shift, scale and gate of all blocks' attention, then of their feed-forwards."""
        activation, linear = self.adaLN_modulation
        return modulation(linear, condition, 6, activation)

    def condition(self, sigma: mx.array, dtype: mx.Dtype) -> mx.array:
        """The condition (B, hidden_size) at noise levels (B,), for latents of a dtype."""
        return self.time_embedding(waves(1000 * sigma, self.config.hidden_size, sin_first=True).astype(dtype))

    @also_as_024(called_as_024, known_by="text_bth")
    def __call__(
        self,
        hidden_states: mx.array,
        *,
        sigma: mx.array,
        prompt_embeds: mx.array,
        known: Known | None = None,
        once: Once | None = None,
    ) -> mx.array:
        """Predict the velocity.

        Args:
            hidden_states: latents (B, in_channels, h, w).
            sigma: (B,), how noisy they are: 1 is pure noise, 0 is an image.
            prompt_embeds: (B, T, text_in_dim), without padding.
            known: the condition that follows from the noise level, where it was known ahead.
            once: keeps what the image's other steps need as well.

        Returns:
            As `hidden_states`.
        """
        batch, _, height, width = hidden_states.shape
        image = self.x_embedder(hidden_states)
        text = kept(once, "text", prompt_embeds, lambda: self._text(prompt_embeds))
        rotary = kept(
            once,
            "rotary",
            prompt_embeds,
            lambda: rotary_factors(positions(height, width, text.shape[1]), self.config),
        )
        condition: Condition = known or self.condition(sigma, image.dtype)
        mods = self.modulation(condition)
        x = mx.concatenate([image, text], axis=1)
        for layer in self.layers:
            x = layer(x, mods, rotary)
        scale, shift = self.final_norm.modulation(condition)
        x = self.final_linear(modulate(x[:, : image.shape[1]], shift, scale, self.config.eps))
        return x.transpose(0, 2, 1).reshape(batch, -1, height, width)

    def _text(self, prompt_embeds: mx.array) -> mx.array:
        return self.text_proj(prompt_embeds) if "text_proj" in self else prompt_embeds

    @staticmethod
    def asked_as_024(
        other: Callable[..., mx.array],
        config: Any,
        hidden_states: mx.array,
        *,
        sigma: mx.array,
        prompt_embeds: mx.array,
        once: Once | None = None,
        **more: Any,
    ) -> mx.array:
        """A prediction of what stands in this one's place; the other arguments are this one's."""
        refuse_more("ERNIE-Image's transformer", **more)
        return other(
            hidden_states=hidden_states,
            timestep=1000 * sigma,
            text_bth=prompt_embeds,
            text_lens=mx.array([prompt_embeds.shape[1]] * prompt_embeds.shape[0]),
        )
