"""What a GPU would compute, without one: the operations of a function of arrays, and how much memory they move.

`traced` has MLX write down the graph of a function; nothing of it is computed. MLX's kernels for norms and attention,
and chains that are compiled into one (`mflux.fused`), are several operations on a CPU: a stand-in keeps each as one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import pytest

from mflux import fused
from mflux.backend import mx

# A stand-in is MLX's operation that does nothing but depend on arrays; one of them is this long, plus its number.
_CODE = 100_003
# Give another look at what lies in memory already.
VIEWS = {
    "Reshape", "Flatten", "Unflatten", "Transpose", "Slice", "Split", "Broadcast", "ExpandDims", "Squeeze", "AsStrided",
    "Full",
}  # fmt: skip
PRODUCTS = {"Matmul", "AddMM", "QuantizedMatmul", "scaled_dot_product_attention"}
NORMS = {"rms_norm", "layer_norm"}


@dataclass(frozen=True)
class Array:
    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.size


@dataclass(frozen=True)
class Operation:
    name: str
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    arguments: tuple[Any, ...] = ()

    @property
    def size(self) -> int:
        """Elements of its largest result."""
        return max(prod(array.shape) for array in self.outputs)


class Graph:
    """A function's operations, in their order, and the arrays that they begin with."""

    def __init__(self, operations: list[Operation], constants: dict[str, mx.array], inputs: list[str]):
        self.operations = operations
        self.inputs = inputs
        self.constants = constants
        self._maker = {array.name: operation for operation in operations for array in operation.outputs}

    def source(self, array: Array) -> Array:
        """What an array is a view of."""
        maker = self._maker.get(array.name)
        if maker is None or maker.name not in VIEWS or maker.name == "Full":
            return array
        return self.source(maker.inputs[0])

    def read(self, operation: Operation) -> int:
        """Bytes that an operation reads, of each array once, and of a broadcast one those that there are. What was
        there before, weights and the factors of turns, is left out."""
        least: dict[str, int] = {}
        for array in operation.inputs:
            source = self.source(array)
            if source.name not in self.constants:
                most = min(array.bytes, source.bytes)
                least[source.name] = max(least.get(source.name, 0), most)
        return sum(least.values())

    def is_transposed(self, array: Array) -> bool:
        """Whether its last axis but one does not lie in memory in order."""
        maker = self._maker.get(array.name)
        if maker is None or maker.name not in VIEWS or maker.name == "Full":
            return False
        if maker.name == "Transpose":
            return [axis for axis in maker.arguments[0]] != sorted(maker.arguments[0])
        return self.is_transposed(maker.inputs[0])

    def kernels(self, least: int) -> list[Operation]:
        """What gives at least so many elements and is no view."""
        return [one for one in self.operations if one.name not in VIEWS and one.size >= least]

    def bytes(self, least: int) -> int:
        """What these read and write, products left out."""
        return sum(
            self.read(one) + sum(array.bytes for array in one.outputs)
            for one in self.kernels(least)
            if one.name not in PRODUCTS
        )


@contextmanager
def way_of_a_gpu() -> Iterator[pytest.MonkeyPatch]:
    """Within the block mflux computes as where there is a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        for module in [module for name, module in sys.modules.items() if name.startswith("mflux")]:
            if "has_gpu" in vars(module):
                patch.setattr(module, "has_gpu", lambda: True)
        yield patch


@contextmanager
def as_one() -> Iterator[list[str]]:
    """Within the block what is one kernel on a GPU is one operation; their names, by the numbers of the stand-ins."""
    names: list[str] = []

    def stand_in(name: str) -> Callable[..., mx.array]:
        number = len(names)
        names.append(name)

        def call(*values: Any, **options: Any) -> mx.array:
            arrays = [value for value in [*values, *options.values()] if isinstance(value, mx.array)]
            first, *others = arrays
            return mx.depends([first], [*others, mx.zeros((_CODE + number,))])[0]

        return call

    with way_of_a_gpu() as patch:
        for name in ("rms_norm", "layer_norm", "scaled_dot_product_attention"):
            patch.setattr(mx.fast, name, stand_in(name))
        for chain in fused.Chain.all:
            patch.setattr(chain, "compiled", stand_in(chain.__name__))
        yield names


def traced(function: Callable[..., Any], *arrays: mx.array) -> Graph:
    """The graph of a function of arrays, as a GPU would compute it."""
    operations: list[Operation] = []
    constants: dict[str, mx.array] = {}
    given: list[str] = []

    def note(part: dict[str, Any]) -> None:
        if part["type"] == "constants":
            constants.update(part["constants"])
        elif part["type"] == "inputs":
            given.extend(name for name, *_ in part["inputs"])
        elif part["type"] == "primitive":
            inputs, outputs = ([Array(*array) for array in part[side]] for side in ("inputs", "outputs"))
            name = part["name"]
            if name == "Depends":
                name = names[inputs.pop().shape[0] - _CODE]
            if not any(array.shape and array.shape[0] >= _CODE for array in outputs):
                operations.append(Operation(name, tuple(inputs), tuple(outputs), tuple(part["arguments"])))

    with as_one() as names:
        mx.export_function(note, function, *arrays)
    return Graph(operations, constants, given)
