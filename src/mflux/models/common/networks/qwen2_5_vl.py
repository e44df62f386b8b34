"""Qwen2.5-VL (Qwen team 2025, https://arxiv.org/abs/2502.13923) as Qwen-Image's text encoder.

Reference class: transformers' `Qwen2_5_VLForConditionalGeneration`, whose published names the attributes carry; its
head is for writing, and not built. To draw from a prompt the language model is enough; to edit, the vision tower shows
it the pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np

from mflux.backend import mx, nn
from mflux.checkpoints.loading import FileDifferences
from mflux.checkpoints.quantization import UNQUANTIZED
from mflux.models.common.component_config import ComponentConfig
from mflux.models.common.networks.decoder import unused_patterns
from mflux.models.common.networks.layers import Activation, Linear, RMSNorm, Rotary, SwiGLU
from mflux.models.common.networks.qwen_vl import VLConfig, VLDecoder, VLModel, VLTextConfig
from mflux.models.common.networks.vision import (
    Grid,
    PatchEmbed,
    VisionAttention,
    VisionConfig,
    patch_places,
    vision_rotary,
)

_VISION_EPS = 1e-6
_VISION_ROPE_THETA = 10_000.0


# ---- configuration


@dataclass(frozen=True)
class Qwen25VLVisionConfig(VisionConfig):
    """`vision_config` of a config.json; defaults are the published 7B model's."""

    depth: int = 32
    hidden_size: int = 1280
    hidden_act: str = "silu"
    intermediate_size: int = 3420
    patch_size: int = 14
    out_hidden_size: int = 3584
    window_size: int = 112
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)

    @property
    def window(self) -> int:
        """A window's side in patches, all of whose merged squares are whole."""
        return self.window_size // self.patch_size // self.spatial_merge_size * self.spatial_merge_size

    def check(self) -> str | None:
        if problem := super().check():
            return problem
        if self.window < 1:
            return f"window_size {self.window_size} is smaller than a token of the vision tower"
        return None


@dataclass(frozen=True)
class Qwen25VLTextConfig(VLTextConfig):
    """The language model's part of a config.json; defaults are the published 7B model's."""

    model_type: str = "qwen2_5_vl_text"
    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int | None = 4
    head_dim: int | None = None
    attention_bias: bool = True
    rope_scaling: Mapping[str, Any] | None = field(
        default_factory=lambda: {"mrope_section": (16, 24, 24), "rope_type": "default", "type": "default"}
    )

    qk_norm = False
    output_bias = False

    @property
    def axes(self) -> list[int]:
        """The first frequencies turn with time, the next with the row, the last with the column."""
        return [axis for axis, count in enumerate(self.mrope_section) for _ in range(count)]

    def check(self) -> str | None:
        if problem := super().check():
            return problem
        if len(self.mrope_section) != 3 or sum(self.mrope_section) != self.head_size // 2:
            return f"mrope_section {list(self.mrope_section)} does not fit heads of {self.head_size}"
        return None


@dataclass(frozen=True)
class Qwen25VLConfig(VLConfig):
    """`config.json` of a Qwen2.5-VL; the language model's values stand in it, or in a `text_config` of their own."""

    model_type: str = "qwen2_5_vl"
    text_config: Qwen25VLTextConfig = field(default_factory=Qwen25VLTextConfig)
    vision_config: Qwen25VLVisionConfig = field(default_factory=Qwen25VLVisionConfig)

    kind = "qwen2_5_vl"
    reader = "Qwen-Image's text encoder"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: object = "config.json") -> Self:
        text = values.get("text_config") or values
        parts: dict[str, tuple[type[ComponentConfig], Mapping[str, Any]]] = {
            "text_config": (Qwen25VLTextConfig, text),
            "vision_config": (Qwen25VLVisionConfig, {}),
        }
        read = {
            name: kind.from_dict(values.get(name) or other, source=f"{name} of {source}")
            for name, (kind, other) in parts.items()
        }
        return super().from_dict(dict(values) | read, source=source)


# ---- vision tower


class Windows:
    """A picture's patches by windows; those at its right and lower edge may hold fewer, which `mask` tells."""

    def __init__(self, places: mx.array, side: int, rotary: Rotary):
        rows, columns = (np.array(places) // side).T
        number = np.unique(rows * (columns.max() + 1) + columns, return_inverse=True)[1]
        order = np.argsort(number, kind="stable")
        counts = np.bincount(number)
        # Where in its window, and in all windows, each patch stands.
        within = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        self.size = int(counts.max())
        slots = number[order] * self.size + within
        taken, home = np.zeros(len(counts) * self.size, int), np.zeros(len(order), int)
        taken[slots], home[order] = order, slots
        self.taken, self.home = mx.array(taken), mx.array(home)
        self.mask = mx.array(np.arange(self.size) < counts[:, None])[:, None, None, :]
        cos, sin = (part[self.taken].reshape(len(counts), 1, self.size, -1) for part in rotary)
        self.rotary = cos, sin

    def cut(self, x: mx.array) -> mx.array:
        """(1, patches, features) → (windows, size, features)."""
        return x[0, self.taken].reshape(-1, self.size, x.shape[-1])

    def gathered(self, x: mx.array) -> mx.array:
        """The way back."""
        return x.reshape(-1, x.shape[-1])[self.home][None]


class VisionBlock(nn.Module):
    def __init__(self, config: Qwen25VLVisionConfig):
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, eps=_VISION_EPS)
        self.norm2 = RMSNorm(config.hidden_size, eps=_VISION_EPS)
        self.attn = VisionAttention(config.hidden_size, config.num_heads)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, activation=config.hidden_act, bias=True)

    def __call__(self, x: mx.array, rotary: Rotary, windows: Windows | None) -> mx.array:
        y = self.norm1(x)
        if windows is None:
            y = self.attn(y, rotary)
        else:
            y = windows.gathered(self.attn(windows.cut(y), windows.rotary, windows.mask))
        x = x + y
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """Squares of neighbouring patches to tokens of the language model's width."""

    def __init__(self, config: Qwen25VLVisionConfig):
        super().__init__()
        width = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = RMSNorm(config.hidden_size, eps=_VISION_EPS)
        self.mlp = [Linear(width, width), Activation("gelu"), Linear(width, config.out_hidden_size)]

    def __call__(self, x: mx.array) -> mx.array:
        """(1, patches, hidden_size) to (tokens, out_hidden_size)."""
        first, activation, last = self.mlp
        return last(activation(first(self.ln_q(x).reshape(-1, first.weight.shape[0]))))


class Qwen25VLVisionModel(nn.Module):
    def __init__(self, config: Qwen25VLVisionConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config, bias=False)
        self.blocks = [VisionBlock(config) for _ in range(config.depth)]
        self.merger = PatchMerger(config)

    def __call__(self, patches: mx.array, grid: Grid) -> list[mx.array]:
        """See one picture.

        Args:
            patches: (rows · columns, channels · time · height · width), in the order of `patch_places`.
            grid: rows and columns of patches.

        Returns:
            The picture's tokens, (rows · columns / merge², out_hidden_size).
        """
        places = patch_places(grid, self.config.spatial_merge_size)
        rotary = vision_rotary(places, self.config.head_dim, _VISION_ROPE_THETA)
        windows = Windows(places, self.config.window, rotary)
        x = self.patch_embed(patches)[None]
        for number, block in enumerate(self.blocks):
            x = block(x, rotary, None if number in self.config.fullatt_block_indexes else windows)
        return [self.merger(x)]


# ---- language model


class Qwen25VLTextEncoder(VLModel):
    """Token ids → what the language model makes of them, after its last norm."""

    config_class = Qwen25VLConfig
    # Who reads a saved folder may want to edit with it.
    saved_class: ClassVar[type[nn.Module]]
    # mflux 0.24 found that quantizing it costs meaning.
    least_bits = {"": UNQUANTIZED}

    def __init__(self, config: Qwen25VLConfig):
        super().__init__()
        self.config = config
        text = config.text_config
        self.model = VLDecoder(text, text.num_hidden_layers, norm=True)
        unused = unused_patterns("model.", text.num_hidden_layers, text.num_hidden_layers, norm=True)
        self.differences = FileDifferences(ignored=(*unused, r"^visual\."))

    @property
    def parts(self) -> tuple[VLDecoder, Qwen25VLVisionModel | None]:
        return self.model, None

    def __call__(
        self,
        ids: Sequence[int],
        patches: mx.array | None = None,
        grids: Sequence[Grid] = (),
        *,
        image_token: int | None = None,
    ) -> mx.array:
        """Hidden states of one prompt's tokens, (1, L, hidden_size); arguments as for `prompt`."""
        prompt = self.prompt(ids, patches, grids, image_token=image_token)
        return self.model(prompt.embeddings, prompt.positions)


class Qwen25VLEncoder(Qwen25VLTextEncoder):
    """Token ids and pictures → what the language model makes of them."""

    def __init__(self, config: Qwen25VLConfig):
        super().__init__(config)
        self.visual = Qwen25VLVisionModel(config.vision_config)
        self.differences = FileDifferences(ignored=self.differences.ignored[:-1])

    @property
    def parts(self) -> tuple[VLDecoder, Qwen25VLVisionModel]:
        return self.model, self.visual


Qwen25VLTextEncoder.saved_class = Qwen25VLEncoder
