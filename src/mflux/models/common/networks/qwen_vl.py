"""What Qwen2.5-VL and Qwen3-VL have in common, whether they encode a prompt or answer one.

Sources: Qwen team 2025, https://arxiv.org/abs/2502.13923 (Qwen2.5-VL) and https://arxiv.org/abs/2511.21631 (Qwen3-VL).
Positions have three axes, time, row and column, which text counts as one. How images become tokens is in `vision`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mflux.backend import mx, nn
from mflux.models.common.component_config import ComponentConfig
from mflux.models.common.networks.decoder import DecoderConfig, DecoderStack
from mflux.models.common.networks.layers import Rotary, embedded, inverse_frequencies
from mflux.models.common.networks.vision import Grid, VisionConfig, see
from mflux.text import shown

# ---- configuration


@dataclass(frozen=True)
class VLTextConfig(DecoderConfig):
    """The language model's part of a config.json."""

    rope_types = ("default", "mrope")
    # `mrope_section` where the file has none.
    sections: ClassVar[tuple[int, ...]] = ()

    @property
    def mrope_section(self) -> tuple[int, ...]:
        """How many frequencies belong to time, row and column."""
        return tuple(self.rope.get("mrope_section", self.sections))

    def check(self) -> str | None:
        if any(type(count) is not int or count < 0 for count in self.mrope_section):
            return f"mrope_section {shown(list(self.mrope_section), 60)} is not a list of counts"
        return super().check()

    @property
    @abstractmethod
    def axes(self) -> list[int]:
        """The axis that each of a head's frequencies turns with: 0 is time, 1 row, 2 column."""


@dataclass(frozen=True)
class VLConfig(ComponentConfig):
    """`config.json` of the whole model."""

    model_type: str
    text_config: VLTextConfig
    vision_config: VisionConfig
    image_token_id: int = 151655

    # Not in the files: the `model_type` to insist on, and who reads the model.
    kind: ClassVar[str]
    reader: ClassVar[str]

    def check(self) -> str | None:
        if self.model_type != self.kind:
            return f"this is a model of type {self.model_type!r}, and {self.reader} is of type {self.kind!r}"
        if self.vision_config.out_hidden_size != self.text_config.hidden_size:
            return "the vision tower's out_hidden_size is not the language model's hidden_size"
        if self.image_token_id >= self.text_config.vocab_size:
            return f"the image_token_id {self.image_token_id} is none of {self.text_config.vocab_size} tokens"
        return None


# ---- prompts


def prompt_positions(ids: Sequence[int], image_token: int | None, grids: Sequence[Grid]) -> tuple[list[list[int]], int]:
    """Time, row and column of each token, and the position after the last.

    Text advances all three together. The tokens of a picture share the time at which it begins, and spread over rows
    and columns from there; what follows continues after the longer side.

    Args:
        ids: the prompt's tokens; a picture stands in it as one `image_token` for each of its own.
        grids: rows and columns of each picture in tokens, in order.

    Raises:
        ValueError: tokens and pictures do not match.
    """
    axes: list[list[int]] = [[], [], []]
    position, index, pictures = 0, 0, iter(grids)
    while index < len(ids):
        if ids[index] != image_token:
            for axis in axes:
                axis.append(position)
            position, index = position + 1, index + 1
            continue
        rows, columns = next(pictures, (0, 0))
        count = rows * columns
        if not count or any(token != image_token for token in ids[index : index + count]) or index + count > len(ids):
            raise ValueError("the prompt's picture tokens do not match its pictures")
        axes[0] += [position] * count
        axes[1] += [position + row for row in range(rows) for _ in range(columns)]
        axes[2] += [position + column for _ in range(rows) for column in range(columns)]
        position, index = position + max(rows, columns), index + count
    if next(pictures, None) is not None:
        raise ValueError("the prompt has fewer places than pictures")
    return axes, position


def spread_image_tokens(ids: Sequence[int], image_token: int, grids: Sequence[Grid], merge: int) -> list[int]:
    """A prompt with one image token for each token that an image becomes, instead of one for each image.

    Args:
        grids: rows and columns of patches of each image, as many as there are image tokens.
        merge: the side of the square of patches that becomes a token.
    """
    counts = iter([rows * columns // merge**2 for rows, columns in grids])
    return [token for token in ids for _ in range(next(counts) if token == image_token else 1)]


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


# ---- language model


class VLDecoder(DecoderStack):
    """The language model."""

    config: VLTextConfig

    def __call__(
        self,
        embeddings: mx.array,
        positions: mx.array,
        cache: Sequence[Any] | None = None,
        deepstack: Sequence[mx.array] = (),
    ) -> mx.array:
        """Hidden states after the last norm, (1, L, hidden_size).

        Args:
            embeddings: (1, L, hidden_size); with a cache, those that follow what it holds.
            positions: (3, L).
            cache: one for each layer, see `DecoderLayer`.
            deepstack: what to add after the first layers, each (1, L, hidden_size).
        """
        # A single token may look at everything before it.
        mask = "causal" if embeddings.shape[1] > 1 else None
        last = (self.config.num_hidden_layers,)
        return self.hidden_states(embeddings, self.rotary(positions), mask, last, cache=cache, deepstack=deepstack)[0]

    def rotary(self, positions: mx.array) -> Rotary:
        """Cosines and sines of positions (3, L): (L, head_size / 2) each, float32."""
        frequencies = inverse_frequencies(self.config.head_size, self.config.rope["rope_theta"])
        angles = positions.T[:, mx.array(self.config.axes)].astype(mx.float32) * frequencies
        return mx.cos(angles), mx.sin(angles)


# ---- the whole


class VLModel(nn.Module):
    """Base of the whole models; a subclass says in `parts` where its files have the language model and the tower."""

    config: VLConfig

    @property
    @abstractmethod
    def parts(self) -> tuple[VLDecoder, Callable[[mx.array, Grid], Sequence[mx.array]] | None]:
        """The language model, and the vision tower, which makes of an image's patches and grid its tokens, and as many
        for each deepstack layer; None where no image is ever shown."""

    def prompt(
        self,
        ids: Sequence[int],
        patches: mx.array | None = None,
        grids: Sequence[Grid] = (),
        *,
        image_token: int | None = None,
    ) -> Prompt:
        """Prepare a prompt.

        Args:
            ids: its tokens, with one image token for each token that an image becomes.
            patches: the patches of all images, (N, channels · time · height · width), or None.
            grids: rows and columns of patches of each image.
            image_token: the token that stands for an image, where the tokenizer has another than the configuration.

        Raises:
            ValueError: tokens and images do not match.
        """
        language, tower = self.parts
        merge = self.config.vision_config.spatial_merge_size
        image_token = self.config.image_token_id if image_token is None else image_token
        token_grids = [(rows // merge, columns // merge) for rows, columns in grids]
        # To a model without a tower, an image token is text.
        positions, next_position = prompt_positions(ids, None if tower is None else image_token, token_grids)
        embeddings = embedded(language.embed_tokens, mx.array(list(ids)))
        deepstack: list[mx.array] = []
        if tower is not None and grids and patches is not None:
            tokens, *features = see(tower, patches, grids)
            places = mx.array([place for place, token in enumerate(ids) if token == image_token])
            embeddings[places] = tokens.astype(embeddings.dtype)
            for feature in features:
                spread = mx.zeros_like(embeddings)
                spread[places] = feature.astype(embeddings.dtype)
                deepstack.append(spread[None])
        return Prompt(embeddings[None], mx.array(positions), tuple(deepstack), next_position)
