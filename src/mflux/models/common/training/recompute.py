"""Gradient checkpointing (Chen et al. 2016, arxiv.org/abs/1604.06174): a block forgets what it computed, and computes
it again for its gradient.

MLX's own does so when its graph is evaluated, and `mflux.cpu` computes at once: then nothing would be forgotten. Here a
block is evaluated as it is called, only its inputs are kept, and on the way back it is computed again, differentiated
and let go before the one in front of it begins. So memory holds the inputs of all blocks and the inside of one,
whatever computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mflux.backend import mx, nn
from mflux.models.common.training.lora import TrainedLinear


class Recomputed:
    """Stands in the place of a block, and is called like it."""

    def __init__(self, block: nn.Module):
        self.block = block
        self._trained = [layer for _, layer in block.named_modules() if isinstance(layer, TrainedLinear)]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = (list(args), kwargs)
        places, arrays = _arrays(call)
        factors = [layer[leaf] for layer in self._trained for leaf in layer.leaves]
        shape: list[Any] = []

        def compute(*values: mx.array) -> list[mx.array]:
            """The block's arrays, of its own and its factors'."""
            inner = iter(values[len(arrays) :])
            before = [(layer, leaf, layer[leaf]) for layer in self._trained for leaf in layer.leaves]
            try:
                for layer, leaf, _ in before:
                    layer[leaf] = next(inner)
                filled, keywords = _filled(call, dict(zip(places, values, strict=False)))
                result = self.block(*filled, **keywords)
            finally:
                for layer, leaf, value in before:
                    layer[leaf] = value
            out_places, out = _arrays(result)
            shape[:] = [result, out_places]
            return out

        @mx.custom_function
        def run(*values: mx.array) -> Any:
            out = [_apart(value) for value in _computed(compute(*map(_apart, _computed(values))))]
            return out[0] if len(out) == 1 else tuple(out)

        @run.vjp
        def backward(primals: Any, cotangents: Any, _: Any) -> Any:
            values = list(primals) if isinstance(primals, (list, tuple)) else [primals]
            wanted = list(cotangents) if isinstance(cotangents, (list, tuple)) else [cotangents]
            values, wanted = ([_apart(one) for one in _computed(some)] for some in (values, wanted))
            # Whole numbers, such as positions, have no gradient.
            moving = [number for number, value in enumerate(values) if mx.issubdtype(value.dtype, mx.floating)]

            def of_moving(*some: mx.array) -> list[mx.array]:
                whole = list(values)
                for number, value in zip(moving, some, strict=True):
                    whole[number] = value
                return compute(*whole)

            found = mx.vjp(of_moving, [values[number] for number in moving], wanted)[1]
            gradients = dict(zip(moving, map(_apart, _computed(found)), strict=True))
            result = [gradients.get(number) for number in range(len(values))]
            filled = [mx.zeros_like(value) if one is None else one for one, value in zip(result, values, strict=True)]
            return filled[0] if len(filled) == 1 else tuple(filled)

        out = run(*arrays, *factors)
        found = list(out) if isinstance(out, (list, tuple)) else [out]
        result, out_places = shape
        return _filled(result, dict(zip(out_places, found, strict=True)))


def forget(transformer: Any, names: Sequence[str]) -> dict[str, list[Any]]:
    """Have the blocks of these lists forget what they compute; returns the lists as they were."""
    before = {name: list(transformer[name]) for name in names if transformer.get(name)}
    for name, blocks in before.items():
        transformer[name] = [Recomputed(block) for block in blocks]
    return before


def remember(transformer: Any, before: Mapping[str, list[Any]]) -> None:
    """Undo `forget`."""
    for name, blocks in before.items():
        transformer[name] = blocks


# ---- arrays in whatever a block is called with


def _arrays(tree: Any) -> tuple[list[str], list[mx.array]]:
    """The arrays of nested lists, tuples and tables, and their places."""
    found = [(place, value) for place, value in _leaves(tree) if isinstance(value, mx.array)]
    return [place for place, _ in found], [value for _, value in found]


def _leaves(tree: Any, at: str = "") -> list[tuple[str, Any]]:
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in _leaves(value, f"{at}.{key}")]
    if isinstance(tree, (list, tuple)):
        return [leaf for number, value in enumerate(tree) for leaf in _leaves(value, f"{at}.{number}")]
    return [(at, tree)]


def _filled(tree: Any, values: Mapping[str, mx.array], at: str = "") -> Any:
    """The same with other arrays in their places."""
    if isinstance(tree, dict):
        return {key: _filled(value, values, f"{at}.{key}") for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)([_filled(value, values, f"{at}.{number}") for number, value in enumerate(tree)])
    return values.get(at, tree)


def _computed(values: Any) -> list[mx.array]:
    values = list(values)
    mx.eval(values)
    return values


def _apart(value: mx.array) -> mx.array:
    """A copy that knows nothing of what it was computed from: while a gradient is prepared, MLX lets nothing go that an
    array of its own leads back to."""
    wide = value.view(mx.uint16) if value.dtype == mx.bfloat16 else value
    copy = mx.array(np.array(wide))
    return copy.view(mx.bfloat16) if value.dtype == mx.bfloat16 else copy
