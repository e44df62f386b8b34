"""Parts of a block that may compute in float16 while the streams around them stay in bfloat16 or float32.

GPUs that have no bfloat16 of their own are slow with it; float16 has more digits and reaches less far, 65,504. So what
goes into such a part's last layer is made smaller and what comes out larger again, and what is too large all the same
is seen (`watched`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from mflux.backend import mx, nn

_SEEN: ContextVar[list[mx.array] | None] = ContextVar("too large", default=None)


@contextmanager
def watched() -> Iterator[list[mx.array]]:
    """Within the block every interior tells whether something was too large for it: one boolean array () each."""
    seen: list[mx.array] = []
    token = _SEEN.set(seen)
    try:
        yield seen
    finally:
        _SEEN.reset(token)


class Interior(nn.Module):
    """A part of a block that may compute in another dtype than the streams around it.

    Attributes:
        dtype: what it computes in; None is the streams'.
        headroom: how many times smaller `shrunk` makes values in that dtype.
    """

    dtype: mx.Dtype | None = None
    headroom = 1.0

    def compute_in(self, dtype: mx.Dtype) -> None:
        """Compute in a dtype from now on. The weights are cast for good, quantized ones' scales included."""
        self.dtype = dtype
        for part in self.inside():
            part.set_dtype(dtype)
        for layer in self.last():
            if "bias" in layer:
                layer.bias, layer.bias_shrunk = layer.bias / self.headroom, self.headroom

    def inside(self) -> list[nn.Module]:
        """What computes in it: by default all that there is."""
        return [self]

    def last(self) -> list[nn.Module]:
        """The layers that `shrunk` values go through last; where they have a bias, it is made smaller as well."""
        return []

    def enter(self, x: mx.array) -> mx.array:
        return x if self.dtype is None else x.astype(self.dtype)

    def shrunk(self, x: mx.array) -> mx.array:
        return x if self.dtype is None or self.headroom == 1 else x * (1 / self.headroom)

    def grown(self, x: mx.array) -> mx.array:
        """What `shrunk` made smaller, as it would be outside."""
        return x if self.dtype is None else self.headroom * x.astype(mx.float32)

    def leave(self, x: mx.array, stream: mx.array) -> mx.array:
        """Back to the stream's dtype and size; what was too large for the other becomes its largest number."""
        if self.dtype is None:
            return x
        largest = mx.finfo(self.dtype).max
        if (seen := _SEEN.get()) is not None:
            # Not a number is not smaller either.
            seen.append(mx.logical_not((mx.abs(x) < largest).all()))
        x = mx.clip(x, -largest, largest).astype(stream.dtype)
        return x if self.headroom == 1 else self.headroom * x


def compute_in(module: nn.Module, dtype: mx.Dtype) -> None:
    """Let a model's interiors compute in another dtype; streams, norms and modulation stay as they are."""
    for part in module.modules():
        if isinstance(part, Interior):
            part.compute_in(dtype)
