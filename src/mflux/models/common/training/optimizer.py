"""One step of an optimizer: the rate that is its turn, gradients that are clipped, and factors that change.

Adam and AdamW correct their first steps, as the papers (Kingma & Ba 2015, Loshchilov & Hutter 2019) and torch do; MLX's
do so only when told.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum
from typing import Any, cast

from mflux.backend import mx, optimizers
from mflux.errors import CheckpointError
from mflux.models.common.training.spec import OptimizerSpec
from mflux.text import some

# As torch has it: a norm of nothing divides nothing by nothing.
_LEAST_NORM = 1e-6


class Optimizers(Enum):
    """MLX's optimizers by the names that configurations have for them."""

    ADAM = ("Adam", optimizers.Adam)
    ADAMW = ("AdamW", optimizers.AdamW)
    ADAFACTOR = ("Adafactor", optimizers.Adafactor)
    LION = ("Lion", optimizers.Lion)

    def __init__(self, alias: str, optimizer: Any):
        self.alias = alias
        self.optimizer = optimizer

    @staticmethod
    def from_alias(alias: str) -> Any:
        return next(one.optimizer for one in Optimizers if one.alias == alias)


class Optimizer:
    """An optimizer of factors, and where it stands.

    Attributes:
        taken: steps up to now.
    """

    def __init__(self, spec: OptimizerSpec, weights: Mapping[str, mx.array]):
        self.spec = spec
        params: dict[str, Any] = {}
        if spec.name == "Adafactor":
            # A rate that is given is the one that is taken.
            params["relative_step"] = spec.learning_rate is None
        params |= {
            name: tuple(value) if name == "eps" and isinstance(value, list) else value
            for name, value in spec.optimizer_params.items()
            if name != "bias_correction"
        }
        self.optimizer = Optimizers.from_alias(spec.name)(learning_rate=spec.learning_rate, **params)
        self.optimizer.init(dict(weights))
        self.taken = 0
        # What correcting the first steps multiplies is restored after each.
        self._corrects = spec.name in ("Adam", "AdamW") and spec.optimizer_params.get("bias_correction", True)
        self._plain = {name: getattr(self.optimizer, name) for name in ("eps", "weight_decay") if self._corrects
                       and hasattr(self.optimizer, name)}  # fmt: skip

    def rate(self, step: int) -> float | None:
        """The rate of a step, counted from 0; None for Adafactor's own."""
        spec = self.spec
        if spec.learning_rate is None:
            return None
        warm = spec.lr_warmup_steps
        if step < warm:
            return spec.learning_rate * (step + 1) / warm
        if spec.lr_schedule == "cosine":
            assert spec.lr_total_steps is not None
            done = min(1.0, (step - warm) / max(1, spec.lr_total_steps - warm))
            return spec.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
        return spec.learning_rate

    def apply(self, weights: Mapping[str, mx.array], gradients: Mapping[str, mx.array]) -> dict[str, mx.array] | None:
        """The factors after a step, or None where the gradients are not finite: then nothing has changed."""
        norm = mx.sqrt(sum((mx.square(one.astype(mx.float32)).sum() for one in gradients.values()), mx.array(0.0)))
        if not math.isfinite(float(norm)):
            return None
        scaled = dict(gradients)
        if self.spec.max_grad_norm is not None:
            factor = mx.minimum(1.0, self.spec.max_grad_norm / (norm + _LEAST_NORM))
            scaled = {name: factor * one for name, one in gradients.items()}
        before = self.state()
        rate = self.rate(self.taken)
        if rate is not None:
            self.optimizer.learning_rate = rate * self._correction()
        changed: dict[str, mx.array] = self.optimizer.apply_gradients(scaled, dict(weights))
        if rate is not None:
            self.optimizer.learning_rate = rate
        finite = mx.stack([mx.isfinite(one).all() for one in changed.values()]).all()
        mx.eval(changed, self.optimizer.state, finite)
        if not finite.item():
            self.put(before)
            return None
        self.taken += 1
        return changed

    def _correction(self) -> float:
        """By what the rate is multiplied so that the moments count as if they had not begun at nothing.

        In double precision, and beside MLX's own step: in float32, one less 0.999 has lost five digits.
        """
        if not self._corrects:
            return 1.0
        first, second = (1 - beta ** (self.taken + 1) for beta in self.optimizer.betas)
        factor = math.sqrt(second) / first
        self.optimizer.eps = self._plain["eps"] * math.sqrt(second)
        if "weight_decay" in self._plain:
            # Decay has the rate alone.
            self.optimizer.weight_decay = self._plain["weight_decay"] / factor
        return factor

    # ---- where it stands

    def state(self) -> tuple[int, dict[str, Any]]:
        """All of it; arrays are never changed, so that nothing is copied but what holds them."""
        return self.taken, {name: _copied(value) for name, value in self.optimizer.state.items()}

    def put(self, state: tuple[int, dict[str, Any]]) -> None:
        """The way back."""
        self.taken, table = state
        self.optimizer.state = {name: _copied(value) for name, value in table.items()}

    def arrays(self) -> dict[str, mx.array]:
        """The same for a file: MLX's own state, flattened, with mflux 0.24's names and its orientation, in which a
        factor lies on its side."""
        found: dict[str, mx.array] = {}
        for name, value in self.optimizer.state.items():
            if isinstance(value, mx.array):
                found[name] = value
                continue
            path = f"transformer.{name.removesuffix('.weight')}"
            for part, array in value.items():
                found[f"{path}.{_SIDEWAYS.get(part, part)}"] = array.T if array.ndim == 2 else array
        return found

    def read(self, arrays: Mapping[str, mx.array], taken: int | None = None) -> None:
        """Go on from what a file has.

        Raises:
            CheckpointError: it is another optimizer's, or another adapter's.
        """
        own = self.arrays()
        if own.keys() != arrays.keys():
            differing = sorted(own.keys() ^ arrays.keys())
            raise CheckpointError(f"the checkpoint's optimizer is another one's: {some(differing, 3)}")
        for name, value in own.items():
            if tuple(arrays[name].shape) != tuple(value.shape):
                raise CheckpointError(f"the checkpoint's optimizer has {name} in another shape")
            if mx.issubdtype(value.dtype, mx.floating) and not mx.isfinite(arrays[name]).all().item():
                raise CheckpointError(f"the checkpoint's optimizer has numbers in {name} that are not finite")
        state: dict[str, Any] = {}
        for name, value in self.optimizer.state.items():
            if isinstance(value, mx.array):
                state[name] = arrays[name].astype(value.dtype)
                continue
            path = f"transformer.{name.removesuffix('.weight')}"
            state[name] = {}
            for part, array in value.items():
                given = arrays[f"{path}.{_SIDEWAYS.get(part, part)}"].astype(array.dtype)
                state[name][part] = mx.contiguous(given.T) if array.ndim == 2 else given
        self.optimizer.state = state
        self.taken = int(cast(int, arrays["step"].item())) if taken is None else taken


# What MLX's Adafactor has of rows is of columns where a factor lies on its side.
_SIDEWAYS = {"exp_avg_sq_row": "exp_avg_sq_col", "exp_avg_sq_col": "exp_avg_sq_row"}


def _copied(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value
