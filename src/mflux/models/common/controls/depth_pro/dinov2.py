"""DINOv2, the vision transformer of each of Depth Pro's three encoders, in MLX.

Source: Oquab et al. 2023, https://arxiv.org/abs/2304.07193; reference: transformers' `Dinov2Model`. Attributes carry
the names of published files, which say `attention.attention.query` where today's class says `attention.q_proj`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from mflux.backend import mx, nn
from mflux.models.common.component_config import ComponentConfig
from mflux.models.common.networks.layers import Conv2d, LayerNorm, Linear, attention, gelu, merge_heads, split_heads


@dataclass(frozen=True)
class Dinov2Config(ComponentConfig):
    """Defaults are those of Depth Pro's encoders: ViT-L on patches of 16 pixels."""

    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    mlp_ratio: float = 4
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    image_size: int = 384
    patch_size: int = 16
    num_channels: int = 3
    qkv_bias: bool = True
    use_swiglu_ffn: bool = False
    model_type: str = "dinov2"

    @property
    def grid(self) -> int:
        """Patches along one side of the square picture."""
        return self.image_size // self.patch_size

    def check(self) -> str | None:
        if self.model_type != "dinov2":
            return f"an encoder of the type {self.model_type} is not built, only dinov2"
        if self.hidden_act != "gelu" or self.use_swiglu_ffn:
            return "only DINOv2 encoders with a plain GELU feed-forward are built"
        if min(self.hidden_size, self.num_hidden_layers, self.num_attention_heads, self.patch_size, self.grid) < 1:
            return "an encoder's sizes must be positive, and its image at least one patch wide"
        if self.hidden_size % self.num_attention_heads:
            return f"hidden_size {self.hidden_size} does not divide into {self.num_attention_heads} attention heads"
        return None


class PatchEmbeddings(nn.Module):
    def __init__(self, config: Dinov2Config):
        super().__init__()
        self.projection = Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )

    def __call__(self, pixels: mx.array) -> mx.array:
        return self.projection(pixels).flatten(1, 2)


class Embeddings(nn.Module):
    def __init__(self, config: Dinov2Config):
        super().__init__()
        self.cls_token = mx.zeros((1, 1, config.hidden_size))
        self.position_embeddings = mx.zeros((1, config.grid**2 + 1, config.hidden_size))
        self.patch_embeddings = PatchEmbeddings(config)

    def __call__(self, pixels: mx.array) -> mx.array:
        patches = self.patch_embeddings(pixels)
        cls = mx.broadcast_to(self.cls_token, (len(patches), 1, patches.shape[-1]))
        return mx.concatenate([cls, patches], axis=1) + self.position_embeddings


class SelfAttention(nn.Module):
    def __init__(self, config: Dinov2Config):
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.query = Linear(width, width, bias=config.qkv_bias)
        self.key = Linear(width, width, bias=config.qkv_bias)
        self.value = Linear(width, width, bias=config.qkv_bias)

    def __call__(self, x: mx.array) -> mx.array:
        q, k, v = (split_heads(projection(x), self.num_heads) for projection in (self.query, self.key, self.value))
        return merge_heads(attention(q, k, v))


class AttentionOutput(nn.Module):
    def __init__(self, config: Dinov2Config):
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)


class Attention(nn.Module):
    def __init__(self, config: Dinov2Config):
        super().__init__()
        self.attention = SelfAttention(config)
        self.output = AttentionOutput(config)

    def __call__(self, x: mx.array) -> mx.array:
        return self.output.dense(self.attention(x))


class LayerScale(nn.Module):
    def __init__(self, config: Dinov2Config):
        super().__init__()
        self.lambda1 = mx.ones((config.hidden_size,))

    def __call__(self, x: mx.array) -> mx.array:
        return x * self.lambda1


class MLP(nn.Module):
    def __init__(self, config: Dinov2Config):
        super().__init__()
        inner = int(config.hidden_size * config.mlp_ratio)
        self.fc1 = Linear(config.hidden_size, inner)
        self.fc2 = Linear(inner, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(gelu(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, config: Dinov2Config):
        super().__init__()
        self.norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config)
        self.layer_scale1 = LayerScale(config)
        self.norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.layer_scale2 = LayerScale(config)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.layer_scale1(self.attention(self.norm1(x)))
        return x + self.layer_scale2(self.mlp(self.norm2(x)))


class Encoder(nn.Module):
    def __init__(self, config: Dinov2Config):
        super().__init__()
        self.layer = [Layer(config) for _ in range(config.num_hidden_layers)]


class Dinov2Model(nn.Module):
    """Square pictures of exactly `image_size` pixels in, tokens out."""

    config_class = Dinov2Config

    def __init__(self, config: Dinov2Config):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, pixels: mx.array, hooks: Collection[int] = ()) -> tuple[mx.array, dict[int, mx.array]]:
        """Encode a batch.

        Args:
            pixels: (batch, image_size, image_size, channels).
            hooks: layers whose output is wanted as well, counted from 0.

        Returns:
            The normalised tokens (batch, 1 + grid², hidden_size), the class token first, and the output of each layer
            of `hooks`, before the last norm.
        """
        x = self.embeddings(pixels)
        hooked = {}
        for index, layer in enumerate(self.encoder.layer):
            x = layer(x)
            if index in hooks:
                hooked[index] = x
        return self.layernorm(x), hooked
