"""Feature maps that are computed in strips of rows, so that an autoencoder's memory is not that of its widest layers.

A `Map` says how its rows follow from those of others; nothing is computed until it is stored or asked for as an array.
Then rows run through all layers in between, from top to bottom; a convolution remembers the two rows that it needs
again. So results are those of the whole picture, without seams. What a map costs is decided in two places:

- A group norm needs the whole picture's mean and variance, hence one pass over its input before the one that uses it.
  If there is room the input is stored in that pass, else only its moments are kept and its rows are made a second time.
- `store` uses up what a map is made of, row by row, while it fills.

A model's blocks take and give maps:

    def __call__(self, x: Map) -> Map:
        y = x.group_norm(self.norm1, silu=True).conv(self.conv1)
        y = y.group_norm(self.norm2, silu=True).conv(self.conv2)
        return (x + y).store()
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Self

import numpy as np

from mflux.backend import mx, nn
from mflux.models.common.networks.autoencoders.budget import UnderWay, room
from mflux.models.common.networks.autoencoders.kernels import kernels

Strip = Any  # mx.array or np.ndarray, as `kernels` has it
Read = Callable[[int], Strip]


class Map:
    """A feature map (batch, rows, columns, channels), made from top to bottom.

    Args:
        shape: its shape.
        dtype: its dtype.
        make: opens the maps that it depends on, in a pass, and returns a function that gives the next so many rows.
        sources: the maps that it depends on.
        multiple: it can be read this many rows at a time, or a multiple of that.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: mx.Dtype,
        make: Callable[[_Pass], Read] | None,
        sources: tuple[Map, ...] = (),
        multiple: int = 1,
    ):
        self.shape = shape
        self.dtype = dtype
        self.multiple = multiple
        self._make = make
        self._sources = sources
        # What takes a strip is the one of the two that made it.
        self._kernels: Any = kernels(dtype)
        self._strips: deque[Strip] | None = None
        self._moments: tuple[np.ndarray, np.ndarray] | None = None

    @classmethod
    def of(cls, x: mx.array) -> Self:
        """A map that is there already: (B, H, W, C)."""
        made = cls(x.shape, x.dtype, None)
        made._strips = deque([made._kernels.strip(x)])
        return made

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.size

    # ---- layers

    def conv(self, layer: nn.Conv2d) -> Map:
        """A convolution, 1 × 1 or 3 × 3, that leaves the sides as they are."""
        size = layer.weight.shape[1]
        return self._convolved(self._kernels.convolution, layer, size=size, above=size // 2)

    def halve(self, layer: nn.Conv2d) -> Map:
        """A convolution 3 × 3 at every second position, after a row and a column of zeros at the bottom and right."""
        return self._convolved(self._kernels.halving, layer, above=0, step=2)

    def double(self, layer: nn.Conv2d) -> Map:
        """Each pixel repeated twice along both sides, then a convolution 3 × 3."""
        return self._convolved(self._kernels.doubling, layer, times=2)

    def group_norm(self, layer: nn.GroupNorm, *, silu: bool = False) -> Map:
        """Group norm with the whole picture's statistics, and then SiLU if asked for."""
        factor, offset = self._statistics(layer)
        return self._each(lambda x: self._kernels.affine(x, factor, offset, silu))

    def rms_norm(self, weight: mx.array, eps: float, *, silu: bool = False) -> Map:
        """RMS norm of each position's channels, and then SiLU if asked for."""
        return self._each(lambda x: self._kernels.rms_norm(x, weight, eps, silu))

    def __add__(self, other: Map) -> Map:
        if other.shape != self.shape:
            raise ValueError(f"maps of {self.shape} and {other.shape} cannot be added")

        def make(run: _Pass) -> Read:
            one, two = run.open(self), run.open(other)
            return lambda rows: self._kernels.add(one(rows), two(rows))

        return Map(self.shape, self.dtype, make, (self, other))

    def rearranged(self, function: Callable[[mx.array], mx.array], *, taken: int = 1, given: int = 1) -> Map:
        """Something that looks at `taken` rows to make `given` others, such as moving pixels to channels.

        Args:
            function: of a strip of a multiple of `taken` rows, as an MLX array.
        """
        batch, rows, columns, channels = self.shape
        probe = function(mx.zeros((batch, taken, columns, channels), self.dtype))
        shape = (batch, rows // taken * given, *probe.shape[2:])
        kernels = self._kernels

        def make(run: _Pass) -> Read:
            read = run.open(self)
            return lambda rows: kernels.strip(function(kernels.array(read(rows // given * taken))))

        return Map(shape, self.dtype, make, (self,), multiple=given)

    # ---- results

    def store(self, *, keep: bool = False) -> Self:
        """Compute the map and hold it. What it is made of is used up on the way and can serve nothing else.

        Args:
            keep: leave what it is made of as it is.
        """
        if self._make is not None:
            self._strips = deque(self._run(drain=not keep))
            self._make, self._sources = None, ()
        return self

    def array(self, *, keep: bool = False) -> mx.array:
        """The whole map, (B, H, W, C); as with `store`, what it is made of is used up unless it is to be kept."""
        strips = list(self._run(drain=not keep))
        return self._kernels.array(strips[0] if len(strips) == 1 else self._kernels.concatenate(strips, axis=1))

    # ---- inside

    def _each(self, function: Callable[[Strip], Strip]) -> Map:
        def make(run: _Pass) -> Read:
            read = run.open(self)
            return lambda rows: function(read(rows))

        return Map(self.shape, self.dtype, make, (self,))

    def _convolved(
        self, kernel: Callable, layer: nn.Conv2d, *, size: int = 3, above: int = 1, step: int = 1, times: int = 1
    ) -> Map:
        """A layer that needs `size` rows for one, the first of them so far above; zeros where the picture ends."""
        batch, rows, columns, _ = self.shape
        shape = (batch, rows // step * times, columns // step * times, layer.weight.shape[0])

        def make(run: _Pass) -> Read:
            compute = kernel(layer)
            windows = _windows(run.open(self), self, size, above, step)
            return lambda wanted: compute(windows(wanted // times))

        return Map(shape, self.dtype, make, (self,), multiple=times)

    def _statistics(self, layer: nn.GroupNorm) -> tuple[np.ndarray, np.ndarray]:
        """What a group norm multiplies each channel with and adds to it, (B, C) each."""
        if self._moments is None:
            if self.nbytes + sum(source.nbytes for source in self._graph() if source._strips is not None) <= room():
                self.store(keep=True)
            self._moments = self._count_moments()
        batch, rows, columns, channels = self.shape
        mean, squares = (values.reshape(batch, layer.num_groups, -1) for values in self._moments)
        middle = mean.mean(axis=-1, keepdims=True)
        # The spread within each channel, and that of the channels about their group's mean.
        spread = (squares / (rows * columns) + (mean - middle) ** 2).mean(axis=-1, keepdims=True)
        factor = np.broadcast_to(1 / np.sqrt(spread + layer.eps), mean.shape).reshape(batch, channels)
        offset = -np.broadcast_to(middle, mean.shape).reshape(batch, channels) * factor
        if "weight" in layer:
            weight, bias = (np.array(values.astype(mx.float32)) for values in (layer.weight, layer.bias))
            factor, offset = factor * weight, offset * weight + bias
        return factor.astype(np.float32), offset.astype(np.float32)

    def _count_moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Each channel's mean and sum of squared distances from it, (B, C), added up as in Chan et al. (1979)."""
        mean = squares = np.zeros((self.shape[0], self.shape[3]))
        count = 0
        # A GPU's are looked at when all are counted.
        found = [(strip.shape[1] * strip.shape[2], *self._kernels.moments(strip)) for strip in self._run(drain=False)]
        for more, *values in found:
            its_mean, its_squares = (np.array(value).astype(np.float64) for value in values)
            distance = its_mean - mean
            mean = mean + distance * more / (count + more)
            squares = squares + its_squares + distance**2 * count * more / (count + more)
            count += more
        return mean, squares

    def _graph(self) -> set[Map]:
        """This map and those that it is made of, down to stored ones."""
        found, waiting = {self}, [self]
        while waiting:
            new = set(waiting.pop()._sources) - found
            found |= new
            waiting += new
        return found

    def _run(self, *, drain: bool) -> Iterator[Strip]:
        """The map's strips, computed one after the other."""
        widest = max(source.nbytes for source in self._graph())
        wanted = max(1, self._kernels.strip_bytes * self.shape[1] // widest)
        wanted = -(-wanted // self.multiple) * self.multiple
        read = _Pass(drain).open(self)
        under_way = UnderWay(self._kernels.strip_bytes, self._kernels.evaluate)
        for top in range(0, self.shape[1], wanted):
            strip = read(min(wanted, self.shape[1] - top))
            # A GPU computes it while the next ones are made ready.
            under_way.add(self._kernels.begun(strip))
            yield strip

    def _open(self, run: _Pass) -> Read:
        if self._make is not None:
            return self._make(run)
        strips = self._strips
        if strips is None:
            raise RuntimeError("this map has been used up: what is stored or made an array uses up what it is made of")
        if run.drain:
            self._strips = None
        else:
            strips = deque(strips)
        return lambda _: strips.popleft()


class _Pass:
    """One way from top to bottom: each map in it is made once, for all that read it."""

    def __init__(self, drain: bool):
        self.drain = drain
        self._shared: dict[Map, _Shared] = {}

    def open(self, source: Map) -> Read:
        if source not in self._shared:
            self._shared[source] = _Shared(source._open(self), source)
        return self._shared[source].reader()


class _Shared:
    """A map's rows for several readers, each held until the last of them has read it."""

    def __init__(self, read: Read, source: Map):
        self._read = read
        self._multiple = source.multiple
        self._concatenate = source._kernels.concatenate
        self._held: deque[tuple[int, Strip]] = deque()
        self._bottom = 0
        self._places: list[int] = []

    def reader(self) -> Read:
        index = len(self._places)
        self._places.append(0)
        return lambda rows: self._take(index, rows)

    def _take(self, index: int, rows: int) -> Strip:
        start = self._places[index]
        stop = self._places[index] = start + rows
        while self._bottom < stop:
            wanted = -(-(stop - self._bottom) // self._multiple) * self._multiple
            strip = self._read(wanted)
            self._held.append((self._bottom, strip))
            self._bottom += strip.shape[1]
        parts = [
            strip[:, max(start - top, 0) : stop - top]
            for top, strip in self._held
            if top < stop and top + strip.shape[1] > start
        ]
        passed = min(self._places)
        while self._held and self._held[0][0] + self._held[0][1].shape[1] <= passed:
            self._held.popleft()
        return parts[0] if len(parts) == 1 else self._concatenate(parts, axis=1)


def _windows(read: Read, source: Map, size: int, above: int, step: int) -> Read:
    """From rows to what a convolution needs for the next so many of its own, zeros outside of the picture included."""
    batch, height, columns, channels = source.shape
    kernels = source._kernels
    done = got = 0
    held: Strip | None = None

    def window(rows: int) -> Strip:
        nonlocal done, got, held
        top = done * step - above
        bottom = top + (rows - 1) * step + size
        parts = [] if held is None else [held]
        if top < 0:
            parts.append(kernels.zeros((batch, -top, columns, channels), source.dtype))
        if (end := min(bottom, height)) > got:
            parts.append(read(end - got))
            got = end
        if bottom > height:
            parts.append(kernels.zeros((batch, bottom - height, columns, channels), source.dtype))
        whole = parts[0] if len(parts) == 1 else kernels.concatenate(parts, axis=1)
        done += rows
        held = kernels.own(whole[:, step - size :]) if size > step else None
        return whole

    return window
