"""Z-Image's transformer (Alibaba Tongyi 2025, https://arxiv.org/abs/2511.22699): one stream of picture and caption.

Reference class: diffusers' `ZImageTransformer2DModel`. Picture and caption are first refined apart from each other;
then all layers run over both, one behind the other. Each is filled up to a multiple of 32 tokens with a learned token,
which is attended to like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mflux.backend import mx, nn
from mflux.models.common.component_config import ComponentConfig
from mflux.models.common.networks.interiors import Interior
from mflux.models.common.networks.layers import (
    TIME_CHANNELS,
    Activation,
    Linear,
    NumberedSwiGLU,
    RMSNorm,
    Rotary,
    Turns,
    added,
    attention,
    layer_norm,
    merge_heads,
    normed_and_scaled,
    normed_heads,
    rotary_embedding,
    rotate_pairs,
    silu_times,
    split_heads,
    waves,
)
from mflux.models.common.networks.modulation import Condition, Known, Modulated, ModulationLinear, modulation
from mflux.models.common.networks.once import Once, kept
from mflux.models.common.replaced import also_as_024, refuse_more

_CONDITION = 256
_TIME_HIDDEN = 1024
_TOKENS_MULTIPLE = 32
# Of queries and keys, whatever norm_eps says.
_HEAD_EPS = 1e-5
_FINAL_EPS = 1e-6


@dataclass(frozen=True)
class BlockConfig(ComponentConfig):
    """What the transformer and its ControlNets share; defaults are the published models'."""

    all_patch_size: tuple[int, ...] = (2,)
    all_f_patch_size: tuple[int, ...] = (1,)
    dim: int = 3840
    n_refiner_layers: int = 2
    n_heads: int = 30
    n_kv_heads: int = 30
    norm_eps: float = 1e-5
    qk_norm: bool = True

    @property
    def patch(self) -> int:
        return self.all_patch_size[0]

    @property
    def patch_name(self) -> str:
        """How the layers for this patch size are called in the file: "2-1"."""
        return f"{self.patch}-{self.all_f_patch_size[0]}"

    @property
    def inner_dim(self) -> int:
        return self.dim

    @property
    def num_attention_heads(self) -> int:
        return self.n_heads

    @property
    def condition_dim(self) -> int:
        return min(self.dim, _CONDITION)

    def check(self) -> str | None:
        if len(self.all_patch_size) != 1 or self.all_f_patch_size != (1,):
            return f"patches of {list(self.all_patch_size)} in {list(self.all_f_patch_size)} frames are not built"
        if self.n_kv_heads != self.n_heads:
            return f"{self.n_kv_heads} heads of keys for {self.n_heads} of queries are not built"
        if self.dim % self.n_heads:
            return f"{self.n_heads} heads do not divide {self.dim} channels"
        return None


@dataclass(frozen=True)
class ZImageTransformerConfig(BlockConfig):
    """`config.json` of a Z-Image transformer; defaults are those of Z-Image and Z-Image-Turbo."""

    in_channels: int = 16
    n_layers: int = 30
    cap_feat_dim: int = 2560
    siglip_feat_dim: int | None = None
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    axes_dims: tuple[int, ...] = (32, 48, 48)

    def check(self) -> str | None:
        if problem := super().check():
            return problem
        if len(self.axes_dims) != 3 or any(size % 2 for size in self.axes_dims):
            return f"axes_dims {list(self.axes_dims)} is not three even numbers"
        if sum(self.axes_dims) != self.dim // self.n_heads:
            return f"axes_dims {list(self.axes_dims)} does not add up to {self.dim // self.n_heads} per head"
        if self.siglip_feat_dim is not None:
            return "a transformer that reads SigLIP's features (Z-Image-Omni) is not built"
        return None


# ---- blocks


class Attention(Interior):
    headroom = 4.0

    def __init__(self, config: BlockConfig):
        super().__init__()
        width = config.dim
        self.heads = config.n_heads
        if config.qk_norm:
            self.norm_q = RMSNorm(width // config.n_heads, eps=_HEAD_EPS)
            self.norm_k = RMSNorm(width // config.n_heads, eps=_HEAD_EPS)
        self.to_q = Linear(width, width, bias=False)
        self.to_k = Linear(width, width, bias=False)
        self.to_v = Linear(width, width, bias=False)
        self.to_out = [Linear(width, width, bias=False)]

    def __call__(self, x: mx.array, rotary: Rotary) -> mx.array:
        stream, x = x, self.enter(x)
        q, k = self.to_q(x), self.to_k(x)
        if "norm_q" in self:
            q, k = normed_heads(self.norm_q, q, self.heads), normed_heads(self.norm_k, k, self.heads)
        else:
            q, k = split_heads(q, self.heads), split_heads(k, self.heads)
        v = split_heads(self.to_v(self.shrunk(x)), self.heads)
        x = merge_heads(attention(rotate_pairs(q, rotary), rotate_pairs(k, rotary), v))
        return self.leave(self.to_out[0](x), stream)


class FeedForward(Interior, NumberedSwiGLU):
    headroom = 32.0

    def __init__(self, features: int):
        super().__init__(features, int(features / 3 * 8))

    def __call__(self, x: mx.array) -> mx.array:
        inside = self.enter(x)
        return self.leave(self.w2(silu_times(self.w1(inside), self.w3(self.shrunk(inside)))), x)


class TransformerBlock(Modulated):
    """Norms before and after attention and feed-forward; scales and gates from the time where it is `modulated`."""

    def __init__(self, config: BlockConfig, *, modulated: bool = True):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config.dim)
        self.attention_norm1 = RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn_norm1 = RMSNorm(config.dim, eps=config.norm_eps)
        self.attention_norm2 = RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn_norm2 = RMSNorm(config.dim, eps=config.norm_eps)
        if modulated:
            self.adaLN_modulation = [ModulationLinear(config.condition_dim, 4 * config.dim)]

    def modulation(self, condition: Condition) -> list[mx.array]:
        return modulation(self.adaLN_modulation[0], condition, 4) if "adaLN_modulation" in self else []

    def __call__(self, x: mx.array, rotary: Rotary, condition: Condition | None = None) -> mx.array:
        scale: mx.array | int = 1
        gate: mx.array | int = 1
        scale_ff: mx.array | int = 1
        gate_ff: mx.array | int = 1
        if condition is not None and (parts := self.modulation(condition)):
            scale, gate, scale_ff, gate_ff = 1 + parts[0], mx.tanh(parts[1]), 1 + parts[2], mx.tanh(parts[3])
        y = self.attention(normed_and_scaled(self.attention_norm1, x, scale), rotary)
        x = added(x, self.attention_norm2, y, gate)
        y = self.feed_forward(normed_and_scaled(self.ffn_norm1, x, scale_ff))
        return added(x, self.ffn_norm2, y, gate_ff)


class TimeEmbedder(nn.Module):
    def __init__(self, features: int):
        super().__init__()
        self.mlp = [Linear(TIME_CHANNELS, _TIME_HIDDEN), Activation("silu"), Linear(_TIME_HIDDEN, features)]

    def __call__(self, values: mx.array, dtype: mx.Dtype) -> mx.array:
        x = waves(values).astype(dtype)
        for layer in self.mlp:
            x = layer(x)
        return x


class FinalLayer(Modulated):
    def __init__(self, config: ZImageTransformerConfig):
        super().__init__()
        self.linear = Linear(config.dim, config.patch**2 * config.in_channels)
        self.adaLN_modulation = [Activation("silu"), ModulationLinear(config.condition_dim, config.dim)]

    def modulation(self, condition: Condition) -> mx.array:
        silu, scale = self.adaLN_modulation
        return modulation(scale, condition, 1, silu)[0]

    def __call__(self, x: mx.array, condition: Condition) -> mx.array:
        return self.linear(layer_norm(x, _FINAL_EPS) * (1 + self.modulation(condition)))


# ---- from pictures to tokens and back


def patchify(latents: mx.array, patch: int) -> mx.array:
    """(B, C, H, W) → (B, H/p · W/p, p · p · C): a token's values are ordered row, column, channel."""
    batch, channels, height, width = latents.shape
    x = latents.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return x.transpose(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)


def unpatchify(tokens: mx.array, height: int, width: int, patch: int) -> mx.array:
    """The way back: (B, L, p · p · C) → (B, C, height, width)."""
    batch, _, features = tokens.shape
    x = tokens.reshape(batch, height // patch, width // patch, patch, patch, features // patch**2)
    return x.transpose(0, 5, 1, 3, 2, 4).reshape(batch, -1, height, width)


def fill_up(tokens: mx.array, pad: mx.array) -> mx.array:
    """Append the token `pad` (1, D) to (B, L, D) until L is a multiple of 32."""
    batch, length, width = tokens.shape
    missing = -length % _TOKENS_MULTIPLE
    return mx.concatenate([tokens, mx.broadcast_to(pad.astype(tokens.dtype), (batch, missing, width))], axis=1)


def caption_ids(length: int) -> mx.array:
    """Positions of caption tokens, the filling included: (length, 3), counted from 1 on the first axis."""
    counted = mx.arange(1, length + 1)
    return mx.stack([counted, mx.zeros_like(counted), mx.zeros_like(counted)], axis=-1)


def picture_ids(start: int, rows: int, columns: int, length: int) -> mx.array:
    """Positions of picture tokens: `start`, row, column; what fills up to `length` stands at 0, 0, 0."""
    row = mx.broadcast_to(mx.arange(rows)[:, None], (rows, columns))
    column = mx.broadcast_to(mx.arange(columns)[None], (rows, columns))
    ids = mx.stack([mx.full((rows, columns), start, dtype=row.dtype), row, column], axis=-1).reshape(-1, 3)
    return mx.concatenate([ids, mx.zeros((length - rows * columns, 3), dtype=ids.dtype)])


# ---- the model


def called_as_024(
    transformer: ZImageTransformer, *, x: mx.array, timestep: mx.array | float, sigmas: mx.array, cap_feats: mx.array
) -> mx.array:
    """A prediction with mflux 0.24's keywords, of noise - picture: latents (C, 1, H, W), time or a step's number, the
    schedule, and one encoded prompt (T, D)."""
    if isinstance(timestep, int):
        timestep = 1 - sigmas[timestep]
    time = mx.array(timestep, mx.float32).reshape(1)
    towards = transformer(x.transpose(1, 0, 2, 3), timestep=time, prompt_embeds=cap_feats[None])
    return -towards.transpose(1, 0, 2, 3)


class ZImageTransformer(nn.Module):
    """Predicts picture - noise, the velocity backwards: a pipeline steps along its negative."""

    config_class = ZImageTransformerConfig

    def __init__(self, config: ZImageTransformerConfig):
        super().__init__()
        self.config = config
        width = config.dim
        self.all_x_embedder = {config.patch_name: Linear(config.patch**2 * config.in_channels, width)}
        self.all_final_layer = {config.patch_name: FinalLayer(config)}
        self.noise_refiner = [TransformerBlock(config) for _ in range(config.n_refiner_layers)]
        self.context_refiner = [TransformerBlock(config, modulated=False) for _ in range(config.n_refiner_layers)]
        self.t_embedder = TimeEmbedder(config.condition_dim)
        self.cap_embedder = [
            RMSNorm(config.cap_feat_dim, eps=config.norm_eps),
            Linear(config.cap_feat_dim, width),
        ]
        self.x_pad_token = mx.zeros((1, width))
        self.cap_pad_token = mx.zeros((1, width))
        self.layers = [TransformerBlock(config) for _ in range(config.n_layers)]

    @also_as_024(called_as_024, known_by="cap_feats")
    def __call__(
        self,
        latents: mx.array,
        *,
        timestep: mx.array,
        prompt_embeds: mx.array,
        hints: Mapping[int, mx.array] | None = None,
        known: Known | None = None,
        once: Once | None = None,
    ) -> mx.array:
        """Predict picture - noise.

        Args:
            latents: (B, in_channels, H, W), H and W multiples of the patch size. Their dtype is that of all that is
                computed between the weights.
            timestep: (B,), from 0 for noise to 1 for a picture: 1 - sigma.
            prompt_embeds: (B, T, cap_feat_dim).
            hints: what a ControlNet adds after layers, by their numbers.
            known: the condition that follows from the time, where it was known ahead.
            once: keeps what the image's other steps need as well: the refined caption is one of them.

        Returns:
            (B, in_channels, H, W).
        """
        condition: Condition = known or self.embed_time(timestep, latents.dtype)
        refined = kept(once, "caption", prompt_embeds, lambda: self.embed_caption(prompt_embeds.astype(latents.dtype)))
        caption, caption_rotary = refined
        picture = self.embed_picture(latents)
        where = latents.shape[2:], picture.shape[1], caption.shape[1]
        picture_rotary = kept(once, "picture", prompt_embeds, lambda: self.picture_rotary(*where))
        for layer in self.noise_refiner:
            picture = layer(picture, picture_rotary, condition)

        x = mx.concatenate([picture, caption], axis=1)
        rotary = kept(once, "rotary", prompt_embeds, lambda: joined_rotary(picture_rotary, caption_rotary))
        for number, layer in enumerate(self.layers):
            x = layer(x, rotary, condition)
            if hints and number in hints:
                x = x + hints[number]
        height, width = latents.shape[2:]
        tokens = height * width // self.config.patch**2
        x = self.all_final_layer[self.config.patch_name](x[:, :tokens], condition)
        return unpatchify(x, height, width, self.config.patch)

    @staticmethod
    def asked_as_024(
        other: Callable[..., mx.array],
        config: Any,
        latents: mx.array,
        *,
        timestep: mx.array,
        prompt_embeds: mx.array,
        once: Once | None = None,
        **more: Any,
    ) -> mx.array:
        """A prediction of what stands in this one's place; the other arguments are this one's."""
        refuse_more("Z-Image's transformer", **more)
        x = latents.transpose(1, 0, 2, 3)
        velocity = other(x=x, timestep=timestep, sigmas=config.scheduler.sigmas, cap_feats=prompt_embeds[0])
        return -velocity.transpose(1, 0, 2, 3)

    # Also for ControlNets, which have none of these layers of their own.

    def embed_time(self, timestep: mx.array, dtype: mx.Dtype) -> mx.array:
        """(B,) → (B, condition_dim)."""
        return self.t_embedder(self.config.t_scale * timestep, dtype)

    def embed_caption(self, prompt_embeds: mx.array) -> tuple[mx.array, Rotary]:
        """The refined caption, filled up: (B, T, dim) with T a multiple of 32, and its positions."""
        norm, project = self.cap_embedder
        x = fill_up(project(norm(prompt_embeds)), self.cap_pad_token)
        rotary = self.rotary(caption_ids(x.shape[1]))
        for layer in self.context_refiner:
            x = layer(x, rotary)
        return x, rotary

    def embed_picture(self, latents: mx.array) -> mx.array:
        """The picture's tokens, filled up, before refinement: (B, L, dim)."""
        x = self.all_x_embedder[self.config.patch_name](patchify(latents, self.config.patch))
        return fill_up(x, self.x_pad_token)

    def picture_rotary(self, size: tuple[int, ...], length: int, caption_length: int) -> Rotary:
        """Where the picture's tokens are.

        Args:
            size: rows and columns of the latents.
            length: so many tokens, with those that fill up.
            caption_length: of the caption's.
        """
        rows, columns = (side // self.config.patch for side in size)
        return self.rotary(picture_ids(caption_length + 1, rows, columns, length))

    def rotary(self, ids: mx.array) -> Rotary:
        return rotary_embedding(ids, self.config.axes_dims, self.config.rope_theta)


def joined_rotary(first: Rotary, second: Rotary) -> Rotary:
    """Of two runs of tokens, one behind the other."""
    (cos, sin), (other_cos, other_sin) = first, second
    return Turns((mx.concatenate([cos, other_cos]), mx.concatenate([sin, other_sin])))
