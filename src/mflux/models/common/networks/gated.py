"""The gated feed-forward of FLUX.2's kind of transformer; FLUX.3 is built from the same.

Reference class: diffusers' `Flux2FeedForward`.
"""

from __future__ import annotations

from dataclasses import dataclass

from mflux.backend import mx
from mflux.models.common.networks.interiors import Interior
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


class GatedFeedForward(Interior):
    """SiLU of the first half of the channels times the second (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: GatedConfig):
        super().__init__()
        self.linear_in = Linear(config.inner_dim, 2 * config.hidden_dim, bias=False)
        self.linear_out = Linear(config.hidden_dim, config.inner_dim, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = mx.split(self.linear_in(self.enter(x)), 2, axis=-1)
        return self.leave(self.linear_out(silu_times(gate, self.shrunk(up))), x)
