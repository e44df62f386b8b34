"""Shifts, scales and gates of a transformer's blocks, worked out for all steps before the first one.

They follow from the noise level alone, in FLUX.1 also from guidance and the prompt as a whole; so all that a modulation
layer will see is known once the schedule is. What it makes of that is a few megabytes a step for all layers together,
which are a quarter of FLUX.1's weights and a third of Qwen-Image's: these are read for it, one after the other, and let
go (`checkpoints.late`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from mflux.backend import has_gpu, mx, nn
from mflux.checkpoints.late import LateLinear
from mflux.models.common.networks.layers import Linear, parts_of

Activation = Callable[[mx.array], mx.array]


class ModulationLinear(Linear):
    """A linear layer from the condition to what modulates. `-q` leaves it as it is stored."""

    read_late = True


class Modulated(nn.Module):
    """A part of a model with modulation layers of its own."""

    def modulation(self, condition: Condition) -> Any:
        """What they make of the condition."""
        raise AssertionError(f"{type(self).__name__} says nothing of its modulation")


class Ahead:
    """What modulation layers make of every condition of an image.

    Args:
        conditions: by the noise level that each belongs to, (1, features).
    """

    def __init__(self, conditions: dict[float, mx.array]):
        self._rows = {level: row for row, level in enumerate(conditions)}
        self._conditions = list(conditions.values())
        # By layer, which is kept so that no other one gets its number: its version, what it was given, what it made.
        self._made: dict[int, tuple[nn.Module, int, mx.array | None, mx.array]] = {}

    def at(self, sigma: mx.array | float) -> Known | None:
        """The condition at a noise level; None if nobody knew that it would come."""
        row = self._rows.get(float(sigma))
        return None if row is None else Known(self, row)

    def condition(self, row: int) -> mx.array:
        """One of the conditions, (1, features)."""
        return self._conditions[row]

    def work_out(self, *modules: nn.Module) -> None:
        """Have all modulation layers of these do their work."""
        if self._rows:
            known = Known(self, 0)
            for module in modules:
                for part in module.modules():
                    if isinstance(part, Modulated):
                        part.modulation(known)

    def of(self, layer: nn.Module, activation: Activation | None, before: mx.array | None = None) -> mx.array:
        """What a layer makes of all conditions, (steps, out); its weights are read and let go the first time.

        Args:
            before: what another layer made of them, which this one takes instead.
        """
        version = layer.version if isinstance(layer, LateLinear) else 0
        known = self._made.get(id(layer))
        if known is None or known[1] != version or known[2] is not before:
            weights: Any = layer.read() if isinstance(layer, LateLinear) else layer
            given = self._conditions if before is None else list(mx.split(before, len(before)))
            rows = [row if activation is None else activation(row) for row in given]
            # A GPU reads the weights once for all of them. BLAS adds up a single row in another order than several, and
            # a step is to get the same bits whoever worked out its vectors.
            made = weights(mx.concatenate(rows)) if has_gpu() else mx.concatenate([weights(row) for row in rows])
            mx.eval(made)
            known = self._made[id(layer)] = layer, version, before, made
        return known[3]

    def layers_changed(self, conditions: dict[float, mx.array]) -> bool:
        """Some layers are others than before.

        Args:
            conditions: what they are now.

        Returns:
            Whether the conditions are the same as before; if not, nothing here is right any more.
        """
        before, now = self._conditions, list(conditions.values())
        if not all(bool(mx.array_equal(*pair).item()) for pair in zip(before, now, strict=True)):
            return False
        # The others know for themselves.
        self._made = {key: made for key, made in self._made.items() if isinstance(made[0], LateLinear)}
        return True


@dataclass(frozen=True)
class Known:
    """One of the conditions that were known ahead; stands where a condition (1, features) may stand."""

    ahead: Ahead
    row: int

    @property
    def vector(self) -> mx.array:
        """The condition itself, (1, features), for what takes it without a layer between."""
        return self.ahead.condition(self.row)

    def at(self, sigma: mx.array | float) -> Known | None:
        """The condition at another noise level."""
        return self.ahead.at(sigma)

    @property
    def value(self) -> mx.array:
        """The condition itself, (1, features)."""
        return self.ahead.condition(self.row)


# What modulates: (B, features), or one that is known.
Condition = mx.array | Known


def modulation(
    layer: nn.Module, condition: Condition, parts: int, activation: Activation | None = None
) -> list[mx.array]:
    """A layer's shifts, scales and gates, (B, 1, features) each, of the condition after an activation."""
    if isinstance(condition, Known):
        made = condition.ahead.of(layer, activation)[condition.row : condition.row + 1]
    else:
        linear: Any = layer
        made = linear(condition if activation is None else activation(condition))
    return parts_of(made[:, None], parts)


def low_rank_modulation(
    first: nn.Module, second: nn.Module, condition: Condition, parts: int, activation: Activation
) -> list[mx.array]:
    """The same of two layers, one behind the other, of which the first has few outputs."""
    if isinstance(condition, Known):
        few = condition.ahead.of(first, activation)
        made = condition.ahead.of(second, None, few)[condition.row : condition.row + 1]
    else:
        made = second(first(activation(condition)))
    return parts_of(made[:, None], parts)


def ahead_of(
    module: nn.Module,
    sigmas: Sequence[mx.array],
    condition: Callable[[mx.array], mx.array],
    *beside: nn.Module,
    of: Hashable = (),
) -> Ahead:
    """The modulation of all steps, worked out unless it is that of the image before.

    Args:
        module: keeps it for the next image.
        sigmas: the noise levels of the steps.
        condition: gives the condition (1, features) at one of them.
        beside: further modules with the same condition.
        of: what the condition follows from besides the noise level.
    """
    levels = {float(sigma): sigma for sigma in sigmas}
    key = tuple(levels), of, tuple(map(id, beside))
    kept: tuple[Any, Ahead] | None = module.__dict__.get("_ahead")
    changed = module.__dict__.pop("_layers_changed", False)
    if kept is not None and kept[0] == key and not changed:
        return kept[1]
    # One by one, as a step would have it.
    conditions = {level: condition(sigma) for level, sigma in levels.items()}
    if kept is None or kept[0] != key or not kept[1].layers_changed(conditions):
        # Before the next ones are made.
        kept = None
        module.__dict__.pop("_ahead", None)
        # Not as an attribute of MLX's, which would take it for parameters.
        kept = module.__dict__["_ahead"] = (key, Ahead(conditions))
    kept[1].work_out(module, *beside)
    return kept[1]


def layers_changed(module: nn.Module) -> None:
    """Some of a module's layers are others than when its modulation was worked out; what follows from them alone is
    worked out anew, once it is needed."""
    module.__dict__["_layers_changed"] = True
