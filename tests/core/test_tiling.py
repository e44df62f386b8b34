"""Decoding in tiles: where an autoencoder works on each latent alone, tiles must not show at all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mflux.backend import mx
from mflux.errors import UsageError
from mflux.models.common.autoencoders.tiling import TilingConfig, decode


class Local:
    """Doubles the sides by repeating; every pixel depends on one latent. Remembers the sizes it was given."""

    spatial_scale = 2

    def __init__(self):
        self.sizes = []

    def decode(self, latents: mx.array) -> mx.array:
        self.sizes.append(latents.shape[2:])
        return mx.repeat(mx.repeat(latents, 2, axis=2), 2, axis=3)


def latents(height: int, width: int) -> mx.array:
    return mx.random.normal((1, 3, height, width), key=mx.random.key(height * 100 + width))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(3, 12), st.integers(0, 8))
def test_tiles_cover_the_picture_and_fade_into_each_other(height, width, tile, overlap):
    vae, values = Local(), latents(height, width)
    tiled = decode(vae, values, TilingConfig(2 * tile, 2 * overlap))
    np.testing.assert_allclose(np.array(tiled), np.array(Local().decode(values)), atol=1e-5)
    assert all(rows == min(height, tile) and columns == min(width, tile) for rows, columns in vae.sizes)


@pytest.mark.parametrize("tiling", [None, TilingConfig(32, 8)])
def test_what_one_tile_covers_is_decoded_at_once(tiling):
    vae, values = Local(), latents(16, 9)
    assert np.array_equal(np.array(decode(vae, values, tiling)), np.array(Local().decode(values)))
    assert vae.sizes == [(16, 9)]


@pytest.mark.parametrize("size, overlap", [(512, -8), (0, 8)])
def test_tiles_that_cannot_be_are_refused(size, overlap):
    with pytest.raises(UsageError, match="the size must be at least 1"):
        TilingConfig(size, overlap)


def test_two_tiles_meet_halfway():
    """Where two tiles disagree, the picture goes over from one to the other, half and half in the middle."""

    class Numbered(Local):
        def decode(self, latents):
            self.sizes.append(latents.shape[2:])
            return mx.full((1, 3, 2 * latents.shape[2], 2 * latents.shape[3]), float(len(self.sizes)))

    picture = np.array(decode(Numbered(), latents(4, 12), TilingConfig(16, 8)))[0, 0]
    assert (picture == picture[0]).all()
    row = picture[0]
    assert (row[:8] == 1).all() and (row[16:] == 2).all()
    assert (np.diff(row[8:16]) > 0).all()
    np.testing.assert_allclose(row[8:16] + row[8:16][::-1], 3, atol=1e-6)
