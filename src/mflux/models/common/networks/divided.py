"""A transformer in parts: of several processes each has some of the heads and of a feed-forward's channels, and what
they make of a stream is added up, twice in every block (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053).

Each process reads its own rows and columns of the weights and no others, so a model may be larger than any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

from mflux.backend import mx, nn
from mflux.checkpoints.stored.tensors import spec
from mflux.errors import UsageError

Cut = Callable[[mx.array], mx.array]


class Divisible(nn.Module):
    """A part of a block that processes can divide among them.

    Attributes:
        rows: its linear layers of whose outputs each process makes a part.
        columns: those of whose inputs each has a part, with the proportions of what stands side by side there; their
            results are added up by `summed`.
    """

    rows: ClassVar[tuple[str, ...]] = ()
    columns: ClassVar[Mapping[str, tuple[int, ...]]] = {}
    # Not as an attribute of MLX's: it is no parameter.
    group: Any = None

    def summed(self, x: mx.array) -> mx.array:
        """What all processes have, added up."""
        return x if self.group is None else mx.distributed.all_sum(x, group=self.group)


class Parts(Mapping[str, mx.array]):
    """Tensors, of some of which only a part is taken.

    Args:
        cuts: what gives it, by the tensor's name.
    """

    def __init__(self, tensors: Mapping[str, mx.array], cuts: Mapping[str, Cut]):
        self._tensors, self._cuts = tensors, cuts

    def __getitem__(self, name: str) -> mx.array:
        value = self._tensors[name]
        # A part is only a view until it is computed with, and would keep the whole in memory.
        return self._cuts[name](value) * mx.array(1, value.dtype) if name in self._cuts else value

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def spec(self, name: str) -> mx.array:
        whole = spec(self._tensors, name)
        return self._cuts[name](mx.zeros(whole.shape, whole.dtype)) if name in self._cuts else whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def divide(module: nn.Module, tensors: Mapping[str, mx.array], group: Any) -> Parts:
    """Make a module that is not filled yet this process's part of itself.

    Args:
        tensors: the whole module's.
        group: the processes.

    Returns:
        The part's.

    Raises:
        UsageError: it cannot be divided by so many, or is stored quantized.
    """
    rank, size = group.rank(), group.size()
    cuts: dict[str, Cut] = {}
    for path, part in module.named_modules():
        if not isinstance(part, Divisible):
            continue
        part.group = group
        heads = getattr(part, "heads", None)
        if heads is not None:
            _check(heads, size, "heads")
            vars(part)["heads"] = heads // size
        layers: dict[str, Any] = dict(part.named_modules())
        for name in (*part.rows, *part.columns):
            stem, layer = f"{path}.{name}" if path else name, layers[name]
            if f"{stem}.scales" in tensors:
                raise UsageError(
                    "a model that is stored quantized is not divided: take it in full precision, -q packs each part"
                )
            if name in part.rows:
                cuts |= {f"{stem}.{leaf}": partial(_rows, rank=rank, size=size) for leaf in ("weight", "bias")}
            else:
                cuts[f"{stem}.weight"] = partial(_columns, shares=part.columns[name], rank=rank, size=size)
                if rank:
                    # Added once, by the first.
                    cuts[f"{stem}.bias"] = mx.zeros_like
            for leaf in ("weight", "bias"):
                if leaf in layer and f"{stem}.{leaf}" in cuts:
                    layer[leaf] = cuts[f"{stem}.{leaf}"](layer[leaf])
    return Parts(tensors, cuts)


def _rows(value: mx.array, *, rank: int, size: int) -> mx.array:
    _check(len(value), size, "channels")
    return mx.split(value, size)[rank]


def _columns(value: mx.array, *, shares: tuple[int, ...], rank: int, size: int) -> mx.array:
    one = value.shape[1] // sum(shares)
    _check(one, size, "channels")
    starts = [one * sum(shares[:number]) for number in range(1, len(shares))]
    return mx.concatenate([mx.split(part, size, axis=1)[rank] for part in mx.split(value, starts, axis=1)], axis=1)


def _check(number: int, size: int, what: str) -> None:
    if number % size:
        raise UsageError(
            f"a transformer with {number} {what} cannot be divided among {size} processes: start another number"
        )
