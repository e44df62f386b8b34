"""Parts of a block that may compute in another dtype than the streams around them: FLUX.2's and FLUX.3's.

Reference class: diffusers' `Flux2FeedForward`, which FLUX.3 has as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mflux.backend import mx, nn
from mflux.models.common.networks.layers import Linear, silu_times
from mflux.models.common.networks.mmdit import MMDiTConfig


@dataclass(frozen=True)
class GatedConfig(MMDiTConfig):
    """What the `config.json` of a transformer with such feed-forwards says of them."""

    mlp_ratio: float = 3.0
    eps: float = 1e-6

    @property
    def hidden_dim(self) -> int:
        """Between a feed-forward's two layers."""
        return int(self.inner_dim * self.mlp_ratio)


class Interior(nn.Module):
    """A part of a block that may compute in another dtype than the streams around it, see `compute_in`.

    Attributes:
        headroom: how many times smaller `shrunk` makes values in the other dtype, which may not reach as far.
    """

    dtype: mx.Dtype | None = None
    headroom = 1.0

    def enter(self, x: mx.array) -> mx.array:
        return x if self.dtype is None else x.astype(self.dtype)

    def shrunk(self, x: mx.array) -> mx.array:
        return x if self.dtype is None or self.headroom == 1 else x * (1 / self.headroom)

    def leave(self, x: mx.array, stream: mx.array) -> mx.array:
        """Back to the stream's dtype and size; what was too large for the other becomes its largest number."""
        if self.dtype is None:
            return x
        largest = mx.finfo(self.dtype).max
        x = mx.clip(x, -largest, largest).astype(stream.dtype)
        return x if self.headroom == 1 else self.headroom * x


def compute_in(parts: Iterable[nn.Module], dtype: mx.Dtype) -> None:
    """Let interiors compute in another dtype; streams, norms and modulation stay as they are.

    Their weights are cast for good, quantized ones' scales included.
    """
    for part in parts:
        if isinstance(part, Interior):
            part.set_dtype(dtype)
            part.dtype = dtype


class GatedFeedForward(Interior):
    """SiLU of the first half of the channels times the second (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: GatedConfig):
        super().__init__()
        self.linear_in = Linear(config.inner_dim, 2 * config.hidden_dim, bias=False)
        self.linear_out = Linear(config.hidden_dim, config.inner_dim, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = mx.split(self.linear_in(self.enter(x)), 2, axis=-1)
        return self.leave(self.linear_out(silu_times(gate, self.shrunk(up))), x)
