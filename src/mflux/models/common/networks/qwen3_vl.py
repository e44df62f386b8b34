"""Qwen3-VL, a language model that sees pictures; FIBO-VLM is a fine-tune of its 4B size.

Source: Qwen team 2025, https://arxiv.org/abs/2511.21631; reference class: transformers'
`Qwen3VLForConditionalGeneration`, whose published names the attributes carry. A picture is cut into patches; the
vision tower turns each square of merged patches into one token of the language model, and hands on what its middle
layers saw as well (deepstack, Meng et al. 2024, https://arxiv.org/abs/2406.04334). A text encoder of it is a `VLModel`
that asks its language model for hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isqrt
from typing import Any

from mflux.backend import mx, nn
from mflux.checkpoints.loading import FileDifferences
from mflux.models.common.networks.layers import ACTIVATIONS, Embedding, LayerNorm, Linear, Rotary, gelu, looked_up
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
class Qwen3VLVisionConfig(VisionConfig):
    """`vision_config` of a config.json; defaults are the published 4B model's."""

    depth: int = 24
    hidden_size: int = 1024
    hidden_act: str = "gelu_pytorch_tanh"
    intermediate_size: int = 4096
    patch_size: int = 16
    out_hidden_size: int = 2560
    num_position_embeddings: int = 2304
    deepstack_visual_indexes: tuple[int, ...] = (5, 11, 17)
    rope_parameters: Mapping[str, Any] | None = None

    @property
    def rope_theta(self) -> float:
        return (self.rope_parameters or {}).get("rope_theta", _VISION_ROPE_THETA)

    @property
    def positions_per_side(self) -> int:
        return isqrt(self.num_position_embeddings)

    def check(self) -> str | None:
        if problem := super().check():
            return problem
        if self.positions_per_side**2 != self.num_position_embeddings:
            return f"{self.num_position_embeddings} position embeddings do not fill a square"
        if any(not 0 <= index < self.depth for index in self.deepstack_visual_indexes):
            return "deepstack_visual_indexes names a layer that the vision tower does not have"
        if len(set(self.deepstack_visual_indexes)) != len(self.deepstack_visual_indexes):
            return "deepstack_visual_indexes names a layer twice"
        kind = (self.rope_parameters or {}).get("rope_type", "axial")
        if kind not in ("axial", "default"):
            return f"rotary positions of type {kind!r} are not built for the vision tower"
        return None


@dataclass(frozen=True)
class Qwen3VLTextConfig(VLTextConfig):
    """`text_config` of a config.json; defaults are the published 4B model's."""

    model_type: str = "qwen3_vl_text"
    max_position_embeddings: int = 262144
    rope_theta: float = 5_000_000.0

    sections = (24, 20, 20)

    @property
    def axes(self) -> list[int]:
        """Frequencies take turns: time, row, column, time, row, … When row or column have used up theirs, time takes
        their turns as well."""
        section = self.mrope_section
        return [turn % 3 if turn < 3 * section[turn % 3] else 0 for turn in range(self.head_size // 2)]

    def check(self) -> str | None:
        if problem := super().check():
            return problem
        if not self.rope.get("mrope_interleaved", True):
            return "only interleaved multimodal positions are built, and mrope_interleaved is false"
        if len(self.mrope_section) != 3 or sum(self.mrope_section) > self.head_size // 2:
            return f"mrope_section {list(self.mrope_section)} does not fit a head_dim of {self.head_size}"
        return None


@dataclass(frozen=True)
class Qwen3VLConfig(VLConfig):
    """`config.json` of a Qwen3-VL model; defaults are the published 4B model's."""

    model_type: str = "qwen3_vl"
    text_config: Qwen3VLTextConfig = field(default_factory=Qwen3VLTextConfig)
    vision_config: Qwen3VLVisionConfig = field(default_factory=Qwen3VLVisionConfig)
    tie_word_embeddings: bool = True

    kind = "qwen3_vl"
    reader = "FIBO-VLM"

    def __post_init__(self):
        for name, kind in (("text_config", Qwen3VLTextConfig), ("vision_config", Qwen3VLVisionConfig)):
            values = getattr(self, name)
            if isinstance(values, Mapping):
                object.__setattr__(self, name, kind.from_dict(values, source=f"{name} of config.json"))
            elif not isinstance(values, kind):
                raise TypeError(f"{name} is not a table")

    def check(self) -> str | None:
        if problem := super().check():
            return problem
        if len(self.vision_config.deepstack_visual_indexes) > self.text_config.num_hidden_layers:
            return "deepstack_visual_indexes has more layers than the language model"
        return None


# ---- vision tower


class VisionMLP(nn.Module):
    def __init__(self, config: Qwen3VLVisionConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.linear_fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear_fc2(self.activation(self.linear_fc1(x)))


class VisionBlock(nn.Module):
    def __init__(self, config: Qwen3VLVisionConfig):
        super().__init__()
        self.norm1 = LayerNorm(config.hidden_size, eps=_VISION_EPS)
        self.norm2 = LayerNorm(config.hidden_size, eps=_VISION_EPS)
        self.attn = VisionAttention(config.hidden_size, config.num_heads)
        self.mlp = VisionMLP(config)

    def __call__(self, x: mx.array, rotary: Rotary) -> mx.array:
        x = x + self.attn(self.norm1(x), rotary)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """Squares of neighbouring patches to tokens of the language model's width."""

    def __init__(self, config: Qwen3VLVisionConfig, *, norm_after_merging: bool):
        super().__init__()
        self.width = config.hidden_size * config.spatial_merge_size**2
        self.norm_after_merging = norm_after_merging
        self.norm = LayerNorm(self.width if norm_after_merging else config.hidden_size, eps=_VISION_EPS)
        self.linear_fc1 = Linear(self.width, self.width)
        self.linear_fc2 = Linear(self.width, config.out_hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        """(1, patches, hidden_size) to (tokens, out_hidden_size)."""
        if self.norm_after_merging:
            x = self.norm(x.reshape(-1, self.width))
        else:
            x = self.norm(x).reshape(-1, self.width)
        return self.linear_fc2(gelu(self.linear_fc1(x)))


class Qwen3VLVisionModel(nn.Module):
    def __init__(self, config: Qwen3VLVisionConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config, bias=True)
        self.pos_embed = Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = [VisionBlock(config) for _ in range(config.depth)]
        self.merger = PatchMerger(config, norm_after_merging=False)
        self.deepstack_merger_list = [
            PatchMerger(config, norm_after_merging=True) for _ in config.deepstack_visual_indexes
        ]

    def __call__(self, patches: mx.array, grid: Grid) -> list[mx.array]:
        """See one picture.

        Args:
            patches: (rows · columns, channels · time · height · width), in the order of `patch_places`.
            grid: rows and columns of patches.

        Returns:
            The picture's tokens (rows · columns / merge², out_hidden_size), and as many for each deepstack layer.
        """
        places = patch_places(grid, self.config.spatial_merge_size)
        x = self.patch_embed(patches)
        x = (x + self.positions(places, grid).astype(x.dtype))[None]
        rotary = vision_rotary(places, self.config.head_dim, self.config.rope_theta)
        deepstack, indexes = [], self.config.deepstack_visual_indexes
        for number, block in enumerate(self.blocks):
            x = block(x, rotary)
            if number in indexes:
                deepstack.append(self.deepstack_merger_list[indexes.index(number)](x))
        return [self.merger(x), *deepstack]

    def positions(self, places: mx.array, grid: Grid) -> mx.array:
        """The learned square of position embeddings stretched over the grid, corners on corners: (N, hidden_size)."""
        last = self.config.positions_per_side - 1
        steps = mx.array([max(length - 1, 1) for length in grid], dtype=mx.float32)
        at = places.astype(mx.float32) * last / steps
        before = mx.floor(at)
        share = at - before
        before = before.astype(mx.int32)
        after = mx.minimum(before + 1, last)
        result = mx.array(0)
        for row, row_share in ((before, 1 - share), (after, share)):
            for column, column_share in ((before, 1 - share), (after, share)):
                places = row[:, 0] * (last + 1) + column[:, 1]
                embedding = looked_up(self.pos_embed, places, what="vision tower's positions")
                result = result + embedding * (row_share[:, :1] * column_share[:, 1:])
        return result


# ---- language model


class KeyValueCache:
    """What one layer has seen: keys and values (1, heads, length, D), in room that grows by steps."""

    step = 256

    def __init__(self):
        self.length = 0
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def extend(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Add what comes next, and return all there is."""
        start, self.length = self.length, self.length + keys.shape[2]
        seen, told = self.keys, self.values
        if seen is None or told is None or self.length > seen.shape[2]:
            seen, told = self._grown(seen, keys, start), self._grown(told, values, start)
        seen[:, :, start : self.length] = keys
        told[:, :, start : self.length] = values
        self.keys, self.values = seen, told
        return seen[:, :, : self.length], told[:, :, : self.length]

    def _grown(self, old: mx.array | None, new: mx.array, start: int) -> mx.array:
        room = -(-self.length // self.step) * self.step
        if old is None:
            return mx.zeros((*new.shape[:2], room, new.shape[3]), dtype=new.dtype)
        more = mx.zeros((*new.shape[:2], room - start, new.shape[3]), dtype=new.dtype)
        return mx.concatenate([old[:, :, :start], more], axis=2)

    @property
    def arrays(self) -> tuple[mx.array | None, mx.array | None]:
        return self.keys, self.values


# ---- the whole


class Qwen3VLModel(nn.Module):
    def __init__(self, config: Qwen3VLConfig):
        super().__init__()
        self.visual = Qwen3VLVisionModel(config.vision_config)
        text = config.text_config
        self.language_model = VLDecoder(text, text.num_hidden_layers, norm=True)


class Qwen3VLForConditionalGeneration(VLModel):
    """Token ids and pictures → what may come next."""

    config_class = Qwen3VLConfig
    config: Qwen3VLConfig

    def __init__(self, config: Qwen3VLConfig):
        super().__init__()
        self.config = config
        self.model = Qwen3VLModel(config)
        if config.tie_word_embeddings:
            # Some files hold the embedding a second time under the head's name; see `weights.check_head`.
            self.differences = FileDifferences(ignored=(r"^lm_head\.weight$",))
        else:
            self.lm_head = Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)

    @property
    def parts(self) -> tuple[VLDecoder, Qwen3VLVisionModel]:
        return self.model.language_model, self.model.visual

    def __call__(self, ids: Sequence[int], patches: mx.array | None = None, grids: Sequence[Grid] = ()) -> mx.array:
        """Logits after each token of a prompt, (1, L, vocab_size); arguments as for `prompt`."""
        prompt = self.prompt(ids, patches, grids)
        return self.head(self.model.language_model(prompt.embeddings, prompt.positions, deepstack=prompt.deepstack))

    def head(self, hidden: mx.array) -> mx.array:
        """Hidden states (…, hidden_size) to logits (…, vocab_size)."""
        if "lm_head" in self:
            return self.lm_head(hidden)
        return self.model.language_model.embed_tokens.as_linear(hidden)

    def new_cache(self) -> list[KeyValueCache]:
        return [KeyValueCache() for _ in self.model.language_model.layers]
