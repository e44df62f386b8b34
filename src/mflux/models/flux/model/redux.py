"""How FLUX.1 Redux reads pictures: SigLIP's vision tower, and two layers that make prompt embeds of what it sees.

Reference classes: transformers' `SiglipVisionModel` (Zhai et al. 2023, https://arxiv.org/abs/2303.15343) and diffusers'
`ReduxImageEncoder`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import PIL.Image

from mflux.backend import mx, nn
from mflux.checkpoints.loading import FileDifferences
from mflux.models.common.component_config import ComponentConfig
from mflux.models.common.networks.image_processors import ImageProcessor
from mflux.models.common.networks.layers import ACTIVATIONS, Conv2d, Embedding, LayerNorm, Linear, looked_up, silu
from mflux.models.common.networks.text_encoders.clip import CLIPEncoder


@dataclass(frozen=True)
class SiglipConfig(ComponentConfig):
    """`config.json` of a SigLIP vision tower; defaults are Redux's."""

    hidden_size: int = 1152
    image_size: int = 384
    intermediate_size: int = 4304
    num_attention_heads: int = 16
    num_hidden_layers: int = 27
    num_channels: int = 3
    patch_size: int = 14
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6

    def check(self) -> str | None:
        if self.hidden_act not in ACTIVATIONS:
            return f"hidden_act {self.hidden_act!r} is not known; there are {', '.join(ACTIVATIONS)}"
        if self.hidden_size % self.num_attention_heads:
            return f"hidden_size {self.hidden_size} does not divide into {self.num_attention_heads} heads"
        return None


class SiglipEmbeddings(nn.Module):
    def __init__(self, config: SiglipConfig):
        super().__init__()
        patch = config.patch_size
        self.patch_embedding = Conv2d(config.num_channels, config.hidden_size, patch, stride=patch)
        self.position_embedding = Embedding((config.image_size // patch) ** 2, config.hidden_size)

    def __call__(self, pixels: mx.array) -> mx.array:
        patches = self.patch_embedding(pixels.transpose(0, 2, 3, 1).astype(self.patch_embedding.weight.dtype))
        x = patches.flatten(1, 2)
        return x + looked_up(self.position_embedding, mx.arange(x.shape[1]), what="positions")


class SiglipTransformer(nn.Module):
    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.embeddings = SiglipEmbeddings(config)
        self.encoder = CLIPEncoder(config, mask=None)
        self.post_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class SiglipVision(nn.Module):
    """A picture → the state of each of its patches, (B, patches, hidden_size)."""

    config_class = SiglipConfig
    # The head would pool all patches into one; Redux reads each.
    differences = FileDifferences(ignored=(r"(^|\.)head\.", r"(^|\.)position_ids$"), optional_prefix="vision_model.")

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.config = config
        self.vision_model = SiglipTransformer(config)

    def __call__(self, pixels: mx.array) -> mx.array:
        """
        Args:
            pixels: (B, 3, image_size, image_size), -1 to 1.
        """
        tower = self.vision_model
        return tower.post_layernorm(tower.encoder(tower.embeddings(pixels)))


@dataclass(frozen=True)
class SiglipProcessor(ImageProcessor):
    """`preprocessor_config.json` of SigLIP's pictures; defaults are Redux's.

    Attributes:
        size: height and width of what the tower takes; None for the tower's own.
        resample: how a picture is resized, as Pillow numbers it; 3 is bicubic.
    """

    size: Mapping[str, int] | None = None
    resample: int = field(default=3, metadata={"least": 0, "most": 5})
    rescale_factor: float = 1 / 255

    def fits(self, config: SiglipConfig) -> str | None:
        """Why the tower cannot take such pictures, as the rest of a sentence, or None."""
        side = config.image_size
        if self.size is not None and dict(self.size) != {"height": side, "width": side}:
            return f"size is {dict(self.size)}, and the image encoder takes {side} x {side}"
        return None

    def __call__(self, picture: PIL.Image.Image, config: SiglipConfig) -> mx.array:
        """A picture in RGB as the tower takes it, (1, 3, H, W); squeezed to a square, as it was trained."""
        side = config.image_size
        pixels = np.asarray(picture.resize((side, side), PIL.Image.Resampling(self.resample)), np.float32)
        # Qwen-VL's reference divides by 255, which rounds apart.
        pixels = self.normalized(pixels * np.float32(self.rescale_factor))
        return mx.array(pixels.transpose(2, 0, 1)[None])


@dataclass(frozen=True)
class ReduxConfig(ComponentConfig):
    """`config.json` of Redux's image embedder; defaults are those published.

    Attributes:
        redux_dim: how wide the vision tower's states are.
        txt_in_features: how wide T5's are.
    """

    redux_dim: int = 1152
    txt_in_features: int = 4096


class ReduxEmbedder(nn.Module):
    """States of patches (B, N, redux_dim) → prompt embeds (B, N, txt_in_features)."""

    config_class = ReduxConfig

    def __init__(self, config: ReduxConfig):
        super().__init__()
        self.config = config
        self.redux_up = Linear(config.redux_dim, 3 * config.txt_in_features)
        self.redux_down = Linear(3 * config.txt_in_features, config.txt_in_features)

    def __call__(self, states: mx.array) -> mx.array:
        return self.redux_down(silu(self.redux_up(states)))
