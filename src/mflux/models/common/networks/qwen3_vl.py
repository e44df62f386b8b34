"""Qwen3-VL, a language model that sees pictures; FIBO-VLM is a fine-tune of its 4B size.

Source: Qwen team 2025, https://arxiv.org/abs/2511.21631; reference class: transformers'
`Qwen3VLForConditionalGeneration`, whose published names the attributes carry. A picture is cut into patches; the
vision tower turns each square of merged patches into one token of the language model, and hands on what its middle
layers saw as well (deepstack, Meng et al. 2024, https://arxiv.org/abs/2406.04334). Positions have three axes, time,
row and column, which text counts as one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isqrt
from typing import Any

from mflux.backend import mx, nn
from mflux.checkpoints.loading import FileDifferences
from mflux.models.common.component_config import ComponentConfig
from mflux.models.common.networks.decoder import DecoderConfig, DecoderLayer
from mflux.models.common.networks.layers import (
    ACTIVATIONS,
    LayerNorm,
    RMSNorm,
    Rotary,
    embedded,
    gelu,
    inverse_frequencies,
)
from mflux.models.common.networks.vision import (
    Grid,
    PatchEmbed,
    VisionAttention,
    patch_places,
    prompt_positions,
    see,
    vision_rotary,
)

_VISION_EPS = 1e-6
_VISION_ROPE_THETA = 10_000.0

# ---- configuration


@dataclass(frozen=True)
class Qwen3VLVisionConfig(ComponentConfig):
    """`vision_config` of a config.json; defaults are the published 4B model's."""

    depth: int = 24
    hidden_size: int = 1024
    hidden_act: str = "gelu_pytorch_tanh"
    intermediate_size: int = 4096
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    out_hidden_size: int = 2560
    num_position_embeddings: int = 2304
    deepstack_visual_indexes: tuple[int, ...] = (5, 11, 17)
    rope_parameters: Mapping[str, Any] | None = None

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def rope_theta(self) -> float:
        return (self.rope_parameters or {}).get("rope_theta", _VISION_ROPE_THETA)

    @property
    def positions_per_side(self) -> int:
        return isqrt(self.num_position_embeddings)

    def check(self) -> str | None:
        if self.hidden_act not in ACTIVATIONS:
            return f"the vision tower's hidden_act {self.hidden_act!r} is not known"
        if self.hidden_size % self.num_heads or self.head_dim % 4:
            return f"{self.hidden_size} features do not divide into {self.num_heads} heads of a multiple of four"
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
class Qwen3VLTextConfig(DecoderConfig):
    """`text_config` of a config.json; defaults are the published 4B model's."""

    model_type: str = "qwen3_vl_text"
    max_position_embeddings: int = 262144
    rope_theta: float = 5_000_000.0

    rope_types = ("default", "mrope")

    @property
    def mrope_section(self) -> tuple[int, ...]:
        """How many frequencies belong to time, row and column."""
        return tuple(self.rope.get("mrope_section", (24, 20, 20)))

    def check(self) -> str | None:
        if problem := super().check():
            return problem
        if not self.rope.get("mrope_interleaved", True):
            return "only interleaved multimodal positions are built, and mrope_interleaved is false"
        if len(self.mrope_section) != 3 or sum(self.mrope_section) > self.head_size // 2:
            return f"mrope_section {list(self.mrope_section)} does not fit a head_dim of {self.head_size}"
        return None


@dataclass(frozen=True)
class Qwen3VLConfig(ComponentConfig):
    """`config.json` of a Qwen3-VL model; defaults are the published 4B model's."""

    model_type: str = "qwen3_vl"
    text_config: Qwen3VLTextConfig = field(default_factory=Qwen3VLTextConfig)
    vision_config: Qwen3VLVisionConfig = field(default_factory=Qwen3VLVisionConfig)
    image_token_id: int = 151655
    tie_word_embeddings: bool = True

    def __post_init__(self):
        for name, kind in (("text_config", Qwen3VLTextConfig), ("vision_config", Qwen3VLVisionConfig)):
            values = getattr(self, name)
            if isinstance(values, Mapping):
                object.__setattr__(self, name, kind.from_dict(values, source=f"{name} of config.json"))
            elif not isinstance(values, kind):
                raise TypeError(f"{name} is not a table")

    def check(self) -> str | None:
        if self.model_type != "qwen3_vl":
            return f"this is a model of type {self.model_type!r}, and FIBO-VLM is of type 'qwen3_vl'"
        if self.vision_config.out_hidden_size != self.text_config.hidden_size:
            return "the vision tower's out_hidden_size is not the language model's hidden_size"
        if len(self.vision_config.deepstack_visual_indexes) > self.text_config.num_hidden_layers:
            return "deepstack_visual_indexes has more layers than the language model"
        return None


# ---- vision tower


class VisionMLP(nn.Module):
    def __init__(self, config: Qwen3VLVisionConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.linear_fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

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
        self.linear_fc1 = nn.Linear(self.width, self.width)
        self.linear_fc2 = nn.Linear(self.width, config.out_hidden_size)

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
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = [VisionBlock(config) for _ in range(config.depth)]
        self.merger = PatchMerger(config, norm_after_merging=False)
        self.deepstack_merger_list = [
            PatchMerger(config, norm_after_merging=True) for _ in config.deepstack_visual_indexes
        ]

    def __call__(self, patches: mx.array, grid: Grid) -> tuple[mx.array, list[mx.array]]:
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
        return self.merger(x), deepstack

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
                embedding = self.pos_embed(row[:, 0] * (last + 1) + column[:, 1])
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


class Qwen3VLTextModel(nn.Module):
    def __init__(self, config: Qwen3VLTextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config) for _ in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(
        self,
        embeddings: mx.array,
        positions: mx.array,
        cache: Sequence[KeyValueCache] | None = None,
        deepstack: Sequence[mx.array] = (),
    ) -> mx.array:
        """Hidden states after the last norm, (1, L, hidden_size).

        Args:
            embeddings: (1, L, hidden_size); with a cache, those that follow what it holds.
            positions: (3, L).
            cache: one for each layer.
            deepstack: what to add after the first layers, each (1, L, hidden_size).
        """
        rotary = self.rotary(positions)
        # A single token may look at everything before it.
        mask = "causal" if embeddings.shape[1] > 1 else None
        x = embeddings
        for number, layer in enumerate(self.layers):
            x = layer(x, rotary, mask, None if cache is None else cache[number])
            if number < len(deepstack):
                x = x + deepstack[number]
        return self.norm(x)

    def rotary(self, positions: mx.array) -> Rotary:
        """Cosines and sines, (L, head_size / 2) each. Frequencies take turns: time, row, column, time, row, …

        When row or column have used up theirs, time takes their turns as well.
        """
        frequencies = inverse_frequencies(self.config.head_size, self.config.rope["rope_theta"])
        section = self.config.mrope_section
        axes = [turn % 3 if turn < 3 * section[turn % 3] else 0 for turn in range(len(frequencies))]
        angles = positions.T[:, mx.array(axes)].astype(mx.float32) * frequencies
        return mx.cos(angles), mx.sin(angles)


# ---- the whole


@dataclass(frozen=True)
class Prompt:
    """A prompt, ready for the language model's layers.

    Attributes:
        embeddings: (1, L, hidden_size), pictures in their places.
        positions: (3, L).
        deepstack: what to add after the first layers, (1, L, hidden_size) each; nothing for text alone.
        next_position: where the answer's first token stands, on all three axes.
    """

    embeddings: mx.array
    positions: mx.array
    deepstack: tuple[mx.array, ...]
    next_position: int

    def __len__(self) -> int:
        return self.embeddings.shape[1]

    def parts(self, length: int) -> Iterator[tuple[mx.array, mx.array, list[mx.array]]]:
        """Embeddings, positions and deepstack features, so many tokens at a time."""
        for start in range(0, len(self), length):
            these = slice(start, start + length)
            yield self.embeddings[:, these], self.positions[:, these], [add[:, these] for add in self.deepstack]


class Qwen3VLModel(nn.Module):
    def __init__(self, config: Qwen3VLConfig):
        super().__init__()
        self.visual = Qwen3VLVisionModel(config.vision_config)
        self.language_model = Qwen3VLTextModel(config.text_config)


class Qwen3VLForConditionalGeneration(nn.Module):
    """Token ids and pictures → what may come next."""

    config_class = Qwen3VLConfig

    def __init__(self, config: Qwen3VLConfig):
        super().__init__()
        self.config = config
        self.model = Qwen3VLModel(config)
        if config.tie_word_embeddings:
            # Some files hold the embedding a second time under the head's name; see `weights.check_head`.
            self.differences = FileDifferences(ignored=(r"^lm_head\.weight$",))
        else:
            self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)

    def __call__(self, ids: Sequence[int], patches: mx.array | None = None, grids: Sequence[Grid] = ()) -> mx.array:
        """Logits after each token of a prompt, (1, L, vocab_size); arguments as for `prompt`."""
        prompt = self.prompt(ids, patches, grids)
        return self.head(self.model.language_model(prompt.embeddings, prompt.positions, deepstack=prompt.deepstack))

    def see(self, patches: mx.array, grids: Sequence[Grid]) -> tuple[mx.array, list[mx.array]]:
        """The vision tower's tokens and deepstack features of several pictures, one picture after the other.

        Args:
            patches: of all pictures, (N, channels · time · height · width).
            grids: rows and columns of patches of each picture.
        """
        pictures = see(self.model.visual, patches, grids)
        seen = [(tokens, *deepstack) for tokens, deepstack in pictures]
        tokens, *deepstack = (mx.concatenate(list(features)) for features in zip(*seen, strict=True))
        return tokens, deepstack

    def prompt(self, ids: Sequence[int], patches: mx.array | None = None, grids: Sequence[Grid] = ()) -> Prompt:
        """Prepare a prompt.

        Args:
            ids: its tokens, with one image token for each token that a picture becomes.
            patches: the patches of all pictures, (N, channels · time · height · width), or None.
            grids: rows and columns of patches of each picture.

        Raises:
            ValueError: tokens and pictures do not match.
        """
        merge = self.config.vision_config.spatial_merge_size
        image_token = self.config.image_token_id
        token_grids = [(rows // merge, columns // merge) for rows, columns in grids]
        positions, next_position = prompt_positions(ids, image_token, token_grids)
        embeddings = embedded(self.model.language_model.embed_tokens, mx.array(list(ids)))
        deepstack: list[mx.array] = []
        if grids and patches is not None:
            tokens, features = self.see(patches, grids)
            places = mx.array([place for place, token in enumerate(ids) if token == image_token])
            embeddings[places] = tokens.astype(embeddings.dtype)
            for feature in features:
                spread = mx.zeros_like(embeddings)
                spread[places] = feature.astype(embeddings.dtype)
                deepstack.append(spread[None])
        return Prompt(embeddings[None], mx.array(positions), tuple(deepstack), next_position)

    def head(self, hidden: mx.array) -> mx.array:
        """Hidden states (…, hidden_size) to logits (…, vocab_size)."""
        if "lm_head" in self:
            return self.lm_head(hidden)
        return self.model.language_model.embed_tokens.as_linear(hidden)

    def new_cache(self) -> list[KeyValueCache]:
        return [KeyValueCache() for _ in self.model.language_model.layers]
