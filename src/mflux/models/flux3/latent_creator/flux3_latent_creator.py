"""FLUX.3's latents as tokens: (1, h · w, 128) for an image of 16 h × 16 w pixels."""

from __future__ import annotations

from mflux.backend import mx
from mflux.models.common.latent_creator.tokens import TokenLatentCreator

CHANNELS = 128


class Flux3LatentCreator(TokenLatentCreator):
    channels = CHANNELS

    @staticmethod
    def prepare_ids(h: int, w: int, layer: int = 0) -> mx.array:
        """Where the tokens of h rows and w columns are, (h · w, 4), for programs; `layer` is 0, or of a reference -1,
        -2, …"""
        from mflux.models.flux3.model.transformer import grid_ids

        return grid_ids(h, w, reference=-layer)
