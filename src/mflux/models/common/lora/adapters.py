"""What a LoRA adds to one linear layer: added to its weights once, or computed beside it in each step.

Sources: Hu et al. 2021 (arxiv.org/abs/2106.09685) for the low-rank product; Yeh et al. 2023 (arxiv.org/abs/2309.14859)
for the Kronecker product (LoKr); Liu et al. 2024 (arxiv.org/abs/2402.09353) for the magnitudes (DoRA) that may come
with either in LyCORIS' files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

from mflux.backend import mx, nn
from mflux.checkpoints.late import LateLinear
from mflux.errors import CheckpointError
from mflux.models.common.networks.layers import product

# No weights are as large; from here on products leave float32.
_LARGE = 1e30

Rows = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Adapter:
    """One file's change to one layer. The arrays stay in the file until they are needed.

    Attributes:
        scale: how much of the change is wanted: 0 is nothing, 1 is all of it.
        strength: what the file itself multiplies its product by: alpha / rank.
        read: gives the product's factors, and the magnitudes of the changed weights' rows (out, 1) or columns (1, in),
            or None; where the whole change is no matrix, because the weights are none (a norm's), a `Difference`. None
            for nothing.
        read_bias: gives what is added to the layer's bias (out,), as it is but for the scale; None for nothing.
        source: the file, for messages.
    """

    scale: float
    strength: float
    read: Callable[[], tuple[LowRank | Kronecker | Difference, mx.array | None]] | None
    read_bias: Callable[[], mx.array] | None = None
    source: object = "the LoRA"

    def check(self, after: mx.array, before: mx.array | None = None) -> None:
        """
        Args:
            after: what the adapter leaves, or its own numbers.
            before: what it was added to, which may be at fault itself.

        Raises:
            CheckpointError: it leads to numbers that are not finite.
        """
        if not _usable(after) and (before is None or _usable(before)):
            raise CheckpointError(
                f"the LoRA {self.source} at the scale {self.scale:g} leads to numbers that are not finite, which "
                "would make every picture black: lower its scale, or take another one"
            )


class LowRank(nn.Module):
    """up · down; `down` is (rank, in), `up` (out, rank)."""

    def __init__(self, down: mx.array, up: mx.array, rows: Rows | None = None):
        super().__init__()
        self.down = down
        self.up = up if rows is None else chosen(up, rows)

    def matrix(self) -> mx.array:
        return product(self.up.astype(mx.float32), self.down.astype(mx.float32).T)

    def __call__(self, x: mx.array) -> mx.array:
        return product(product(x, self.down), self.up)


class Kronecker(nn.Module):
    """w1 ⊗ w2: every element of `w1` times all of `w2`; of the product's rows those that belong to the layer."""

    def __init__(self, w1: mx.array, w2: mx.array, rows: Rows | None = None):
        super().__init__()
        self.w1 = w1
        self.w2 = w2
        self._rows = rows

    def matrix(self) -> mx.array:
        product = mx.kron(self.w1.astype(mx.float32), self.w2.astype(mx.float32))
        return product if self._rows is None else chosen(product, self._rows)

    def __call__(self, x: mx.array) -> mx.array:
        # (w1 ⊗ w2) x = w1 X w2ᵀ with x written as a matrix X: the large product is never formed.
        grid = x.reshape(*x.shape[:-1], self.w1.shape[1], self.w2.shape[1])
        out = product(product(grid, self.w2).swapaxes(-1, -2), self.w1).swapaxes(-1, -2)
        out = out.reshape(*x.shape[:-1], -1)
        if self._rows is None:
            return out
        return mx.concatenate([out[..., start:stop] for start, stop in self._rows], axis=-1)


class Difference(nn.Module):
    """The whole change of the weights, as it is: (out, in), or (n,) of a norm."""

    def __init__(self, up: mx.array, rows: Rows | None = None):
        super().__init__()
        self.up = up if rows is None else chosen(up, rows)

    def matrix(self) -> mx.array:
        return self.up.astype(mx.float32)

    def __call__(self, x: mx.array) -> mx.array:
        return product(x, self.up)


def _usable(value: mx.array) -> bool:
    """Whether no number is NaN, infinite, or so large that the first product is."""
    return bool((mx.abs(value.astype(mx.float32)) < _LARGE).all().item())


def chosen(matrix: mx.array, rows: Rows) -> mx.array:
    """The named ranges of rows, one below the other."""
    return mx.concatenate([matrix[start:stop] for start, stop in rows])


# ---- added to the weights


def merged(weight: mx.array, adapters: Iterable[Adapter]) -> mx.array:
    """A layer's weights (out, in) with the adapters added one after the other, in float32."""
    weight = weight.astype(mx.float32)
    for adapter in adapters:
        if adapter.scale and adapter.read is not None:
            lora, magnitude = adapter.read()
            change = adapter.strength * lora.matrix()
            if magnitude is not None:
                change = (weight + change) * _factors(weight + change, magnitude) - weight
            before, weight = weight, weight + adapter.scale * change
            adapter.check(weight, before)
    return weight


def merged_bias(bias: mx.array, adapters: Iterable[Adapter]) -> mx.array:
    """A layer's bias (out,) with what the adapters add to it, in float32."""
    bias = bias.astype(mx.float32)
    for adapter in adapters:
        if adapter.scale and adapter.read_bias is not None:
            before, bias = bias, bias + adapter.scale * adapter.read_bias()
            adapter.check(bias, before)
    return bias


def _factors(weight: mx.array, magnitude: mx.array) -> mx.array:
    """By what rows (or columns) are multiplied so that their lengths are the magnitudes."""
    axis = 1 if magnitude.shape[1] == 1 else 0
    lengths = mx.sqrt(mx.sum(weight * weight, axis=axis, keepdims=True))
    return magnitude.astype(mx.float32) / (lengths + mx.finfo(mx.float32).eps)


# ---- computed beside them


class LoraLinear(nn.Module):
    """A linear layer, quantized or not, and the adapters that act on it, in their order.

    Args:
        linear: stays as it is, but for its bias, which is added last.
        adapters: of these those with a scale of 0 are left out.
    """

    def __init__(self, linear: nn.Linear | nn.QuantizedLinear, adapters: Sequence[Adapter]):
        super().__init__()
        dtype = (linear.scales if isinstance(linear, nn.QuantizedLinear) else linear.weight).dtype
        self.linear = linear
        if "bias" in linear:
            self.bias = linear.pop("bias")
        self.loras = []
        self.factors = []
        self._scales = []
        weight = None
        acting = [(adapter, *adapter.read()) for adapter in adapters if adapter.scale and adapter.read is not None]
        if any(magnitude is not None for _, _, magnitude in acting):
            weight = dense(linear)
        for adapter, lora, magnitude in acting:
            # The strength goes into one of the factors in float32; the scale as well, where the change is linear.
            gain = adapter.strength * (1 if magnitude is not None else adapter.scale)
            name = "w1" if isinstance(lora, Kronecker) else "up"
            lora[name] = gain * lora[name].astype(mx.float32)
            factors = mx.array(1.0)
            if weight is not None:
                change = lora.matrix()
                if magnitude is not None:
                    factors = _factors(weight + change, magnitude)
                    change = adapter.scale * ((weight + change) * factors - weight)
                weight = weight + change
            lora.apply(lambda value: value.astype(dtype))
            # Two factors may be finite whose product is not: that is computed where it may be so.
            sizes = [cast(float, mx.abs(value).max().item()) for value in lora.parameters().values()]
            if not math.prod(sizes) < _LARGE:
                adapter.check(lora.matrix())
            self.loras.append(lora)
            self.factors.append(factors.astype(dtype))
            self._scales.append(None if magnitude is None else adapter.scale)
            mx.eval(lora.parameters(), self.factors[-1])

    def __call__(self, x: mx.array) -> mx.array:
        out = self._product(x, len(self.loras))
        return out + self.bias if "bias" in self else out

    def _product(self, x: mx.array, count: int) -> mx.array:
        """x through the weights as the first `count` adapters leave them."""
        if count == 0:
            return self.linear(x)
        before = self._product(x, count - 1)
        lora, factors, scale = self.loras[count - 1], self.factors[count - 1], self._scales[count - 1]
        if scale is None:
            return before + lora(x)
        if factors.shape[1] == 1:
            after = (before + lora(x)) * factors[:, 0]
        else:
            scaled = x * factors[0]
            after = self._product(scaled, count - 1) + lora(scaled)
        return before + scale * (after - before)


def dense(linear: nn.Linear | nn.QuantizedLinear) -> mx.array:
    """A layer's weights (out, in) in float32, whatever they are stored as."""
    weight = linear.weight
    if isinstance(linear, nn.QuantizedLinear):
        # In float32 from the start: a product in sixteen bits would cost digits.
        biases = None if linear.biases is None else linear.biases.astype(mx.float32)
        scales = linear.scales if biases is None else linear.scales.astype(mx.float32)
        form: dict[str, Any] = {"group_size": linear.group_size, "bits": linear.bits, "mode": linear.mode}
        weight = mx.dequantize(weight, scales, biases, dtype=mx.float32, **form)
    return weight.astype(mx.float32)


def linear_layers(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The linear layers of a module that is not quantized: path → (out, in)."""
    return {path: layer.weight.shape for path, layer in module.named_modules() if isinstance(layer, nn.Linear)}


def norm_layers(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The norms of a module that have weights: path → (n,)."""
    kinds = nn.RMSNorm, nn.LayerNorm, nn.GroupNorm
    norms = {path: layer for path, layer in module.named_modules() if isinstance(layer, kinds) and "weight" in layer}
    return {path: layer.weight.shape for path, layer in norms.items()}


def wrap(module: nn.Module, path: str, adapters: Sequence[Adapter], *, bias: bool = True) -> None:
    """Exchange a linear layer for one with adapters. Where all scales are 0 it stays as it is.

    Args:
        module: holds the layer.
        path: where, from the module on.
        adapters: in their order.
        bias: whether they change the layer's bias as well; not if that is done already.
    """
    if not any(adapter.scale and (adapter.read or adapter.read_bias) for adapter in adapters):
        return
    parent, place = _place(module, path)
    linear = parent[place]
    if isinstance(linear, LateLinear):
        # Its bias is changed when it is read, as all are that are not stored quantized.
        if any(adapter.scale and adapter.read for adapter in adapters):
            linear.change(lambda layer: LoraLinear(cast(nn.Linear, layer), adapters))
        return
    parent[place] = _beside(linear, adapters, bias=bias)


def _beside(linear: Any, adapters: Sequence[Adapter], *, bias: bool = True) -> nn.Module:
    """A linear layer with adapters: itself where they change its bias alone."""
    if bias and any(adapter.read_bias is not None for adapter in adapters):
        # As an interior has it: see `networks.interiors`.
        shrunk = getattr(linear, "bias_shrunk", 1.0)
        linear.bias = (merged_bias(shrunk * linear.bias, adapters) / shrunk).astype(linear.bias.dtype)
    return LoraLinear(linear, adapters) if any(adapter.scale and adapter.read for adapter in adapters) else linear


# ---- put on and taken off


def put_on(module: nn.Module, adapters: Mapping[str, Sequence[Adapter]]) -> None:
    """Have adapters computed beside the layers of a module that has none, whose weights stay as they are. What has no
    place beside it, a norm or a bias, is changed, and kept as it was.

    Args:
        adapters: by the layers' paths.

    Raises:
        CheckpointError: one leads to numbers that are not finite, or its file is damaged; the module is as before.
    """
    with ExitStack() as undone:
        for path, acting in adapters.items():
            if any(adapter.scale and (adapter.read or adapter.read_bias) for adapter in acting):
                parent, place = _place(module, path)
                undone.callback(_put_on(parent, place, acting))
        # Not as an attribute of MLX's, which would take what is kept for parameters.
        module.__dict__["_taken_off"] = undone.pop_all().close


def take_off(module: nn.Module) -> None:
    """Undo `put_on`, if there was any."""
    module.__dict__.pop("_taken_off", lambda: None)()


def _put_on(parent: Any, place: Any, adapters: Sequence[Adapter]) -> Callable[[], None]:
    """Returns what undoes it."""
    layer = parent[place]
    if isinstance(layer, LateLinear):
        layer.change(lambda read: _beside(read, adapters))
        return lambda: layer.change(None)
    before = {name: layer[name] for name in ("weight", "bias") if name in layer}

    def undo() -> None:
        # A bias that is given out with the adapters is no parameter of the layer's meanwhile.
        dict.update(layer, before)
        parent[place] = layer

    try:
        if isinstance(layer, (nn.Linear, nn.QuantizedLinear)):
            parent[place] = _beside(layer, adapters)
            return undo
        for name, change in (("weight", merged), ("bias", merged_bias)):
            if name in before:
                layer[name] = change(before[name], adapters).astype(before[name].dtype)
    except BaseException:
        undo()
        raise
    return undo


def _place(module: nn.Module, path: str) -> tuple[Any, Any]:
    """What holds a layer, and under which name or number."""
    *steps, leaf = path.split(".")
    parent: Any = module
    for step in steps:
        parent = parent[int(step)] if isinstance(parent, list) else parent[step]
    return parent, int(leaf) if isinstance(parent, list) else leaf
