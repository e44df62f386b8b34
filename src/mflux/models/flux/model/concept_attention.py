"""Where a picture shows a concept, as FLUX.1's transformer sees it.

Source: Helbling et al. 2025, https://arxiv.org/abs/2502.04320 (ConceptAttention). The concept goes through the double
blocks as a second text, which sees the picture's tokens and is seen by nobody. How alike what the attention gives a
token of the picture and a token of the concept are says how much of the concept is there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection

from mflux.backend import mx
from mflux.models.common.networks.layers import product
from mflux.models.common.networks.mmdit import TransformerBlock
from mflux.models.common.networks.modulation import Ahead, Condition
from mflux.models.flux.model.transformer import FluxTransformer


class ConceptStream:
    """A concept beside what a transformer draws; keeps one sum over all steps and blocks that are looked at.

    Args:
        transformer: what draws.
        embeds: the concept as T5 encodes it, (1, T, joint_attention_dim).
        pooled: as CLIP does, (1, pooled_projection_dim).
        layers: the numbers of the double blocks to look at.
        sigmas: the noise levels that are known ahead.
        guidance: as the transformer is told it.
    """

    def __init__(
        self,
        transformer: FluxTransformer,
        embeds: mx.array,
        pooled: mx.array,
        layers: Collection[int],
        sigmas: Collection[mx.array] = (),
        guidance: mx.array | None = None,
    ):
        # What is drawn is decoded without it, while the sum is still asked for.
        self._transformer = weakref.ref(transformer)
        self._embeds, self._pooled = embeds, pooled
        self._layers = frozenset(layers)
        self._guidance = guidance
        # Only what the concept goes through is worked out, when it first does.
        self._ahead = Ahead({float(sigma): self._condition(sigma[None]) for sigma in sigmas})
        self._sum: mx.array = mx.array(0.0)
        self._looks = 0

    @property
    def _drawing(self) -> FluxTransformer:
        transformer = self._transformer()
        assert transformer is not None
        return transformer

    def _condition(self, sigma: mx.array) -> mx.array:
        condition: mx.array = self._drawing.time_text_embed(sigma, self._guidance, self._pooled)
        return condition

    def watch(self, sigma: mx.array) -> Callable[..., None]:
        """What `FluxTransformer` is to call during one step, at the noise level (1,) that it is told."""
        condition: Condition = self._ahead.at(sigma[0]) or self._condition(sigma)
        concept = self._drawing.context_embedder(self._embeds)

        def look(number: int, block: TransformerBlock, keys: mx.array, values: mx.array, picture: mx.array) -> None:
            nonlocal concept
            if number > max(self._layers):
                return
            concept, seen = block.read_along(concept, condition, keys, values)
            if number in self._layers:
                alike = product(seen[0].astype(mx.float32), picture[0].astype(mx.float32))
                self._sum = self._sum + mx.softmax(alike, axis=0)
                self._looks += 1

        return look

    @property
    def heat(self) -> mx.array:
        """How much of each of the concept's tokens there is in each of the picture's: (T, L), float32, 0 to 1; the mean
        over the steps and blocks so far."""
        return self._sum / self._looks
