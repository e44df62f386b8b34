"""Chains of operations element by element, which a GPU computes as one kernel.

Apart from each other every operation reads its arrays from memory and writes its result there: for x + gate · y, five
passes over the picture's tokens where three do. Traced once for all shapes; where MLX's compiler is off (a CPU) a chain
is what it says.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from mflux.backend import mx, nn


class Chain:
    """A function of arrays as one kernel.

    Args:
        plain: what it computes, of operations that broadcast at most.
        compiled: the same, where MLX has it compiled already.
    """

    all: list[Chain] = []

    def __init__(self, plain: Callable[..., mx.array], compiled: Callable[..., mx.array] | None = None):
        self.plain = plain
        self.compiled: Callable[..., mx.array] = compiled or mx.compile(plain, shapeless=True)
        self.__name__, self.__doc__ = plain.__name__, plain.__doc__
        Chain.all.append(self)

    def __call__(self, *arrays: mx.array) -> mx.array:
        return self.compiled(*arrays)


# MLX's own are compiled.
silu = Chain(nn.silu, nn.silu)
gelu = Chain(nn.gelu, nn.gelu)
gelu_approx = Chain(nn.gelu_approx, nn.gelu_approx)


@Chain
def silu_times(x: mx.array, other: mx.array) -> mx.array:
    """silu(x) · other, as in SwiGLU."""
    return x * mx.sigmoid(x) * other


@Chain
def gelu_times(x: mx.array, other: mx.array) -> mx.array:
    """gelu(x) · other, with the exact GELU."""
    return x * (1 + mx.erf(x / math.sqrt(2))) / 2 * other


@Chain
def let_through(x: mx.array, gate: mx.array) -> mx.array:
    """x · sigmoid(gate)."""
    return x * mx.sigmoid(gate)


@Chain
def quick_gelu(x: mx.array) -> mx.array:
    """x · sigmoid(1.702 x), as OpenAI's CLIP was trained."""
    return x * mx.sigmoid(1.702 * x)


@Chain
def add_gated(x: mx.array, gate: mx.array, y: mx.array) -> mx.array:
    """x + gate · y."""
    return x + gate * y


@Chain
def summed(*arrays: mx.array) -> mx.array:
    """Their sum."""
    total, *others = arrays
    for other in others:
        total = total + other
    return total


@Chain
def scaled(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    """x · scale + shift."""
    return x * scale + shift


@Chain
def affine(x: mx.array, factor: mx.array, offset: mx.array) -> mx.array:
    """factor · x + offset, in float32 but for the result."""
    return (factor * x.astype(mx.float32) + offset).astype(x.dtype)


@Chain
def affine_silu(x: mx.array, factor: mx.array, offset: mx.array) -> mx.array:
    """The same, then SiLU."""
    y = (factor * x.astype(mx.float32) + offset).astype(x.dtype)
    return y * mx.sigmoid(y)


@Chain
def squared_distance(x: mx.array, middle: mx.array) -> mx.array:
    """(x - middle)², in float32."""
    return (x.astype(mx.float32) - middle).square()


@Chain
def turn(pairs: mx.array, swapped: mx.array, along: mx.array, across: mx.array) -> mx.array:
    """Pairs of channels times `along`, plus the same with both of each exchanged times `across`, in float32."""
    return (pairs.astype(mx.float32) * along + swapped.astype(mx.float32) * across).astype(pairs.dtype)
