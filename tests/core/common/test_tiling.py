"""Decoding and encoding in tiles: where an autoencoder works on each latent alone, tiles must not show at all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mflux.backend import mx
from mflux.errors import UsageError
from mflux.models.common.networks.autoencoders.tiling import TilingConfig, decode, encode


class Local:
    """Doubles the sides by repeating; every pixel depends on one latent. Remembers the sizes it was given."""

    spatial_scale = 2

    def __init__(self, dtype: mx.Dtype | None = None):
        self.sizes = []
        self.dtype = dtype

    def parameters(self) -> dict:
        """Integers that some have beside their weights tell nothing."""
        return {"counted": mx.zeros(1, mx.int64)} | ({"weight": mx.zeros(1, self.dtype)} if self.dtype else {})

    def decode(self, latents: mx.array) -> mx.array:
        self.sizes.append(latents.shape[2:])
        return mx.repeat(mx.repeat(latents, 2, axis=2), 2, axis=3)

    def encode(self, image: mx.array) -> mx.array:
        """The inverse, over all four pixels of a latent."""
        self.sizes.append(image.shape[2:])
        squares = image.reshape(*image.shape[:2], image.shape[2] // 2, 2, image.shape[3] // 2, 2)
        return squares.mean(axis=(3, 5))


def tiles(pixels: int, overlap: int) -> TilingConfig:
    """Tiles of so many pixels that overlap by so many latents."""
    return TilingConfig(vae_decode_tile_size=pixels, vae_decode_overlap=overlap)


def latents(height: int, width: int) -> mx.array:
    return mx.random.normal((1, 3, height, width), key=mx.random.key(height * 100 + width))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(3, 12), st.integers(0, 8))
def test_tiles_cover_the_picture_and_fade_into_each_other(height, width, tile, overlap):
    vae, values = Local(), latents(height, width)
    tiled = decode(vae, values, tiles(2 * tile, overlap))
    np.testing.assert_allclose(np.array(tiled), np.array(Local().decode(values)), atol=1e-5)
    assert all(rows == min(height, tile) and columns == min(width, tile) for rows, columns in vae.sizes)


@pytest.mark.parametrize("tiling", [None, tiles(32, 4)])
def test_what_one_tile_covers_is_decoded_at_once(tiling):
    vae, values = Local(), latents(16, 9)
    assert np.array_equal(np.array(decode(vae, values, tiling)), np.array(Local().decode(values)))
    assert vae.sizes == [(16, 9)]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(3, 12), st.integers(0, 8))
def test_a_picture_is_encoded_in_tiles_as_well(height, width, tile, overlap):
    vae, picture = Local(), latents(2 * height, 2 * width)
    tiling = TilingConfig(vae_encode_tile_size=2 * tile, vae_encode_tile_overlap=2 * overlap)
    np.testing.assert_allclose(np.array(encode(vae, picture, tiling)), np.array(Local().encode(picture)), atol=1e-5)
    assert all(rows == 2 * min(height, tile) and columns == 2 * min(width, tile) for rows, columns in vae.sizes)


def test_tiles_are_taken_only_where_they_are_asked_for():
    vae, values = Local(), latents(32, 32)
    for none in (None, TilingConfig(None, 16), TilingConfig(1, 16)):
        decode(vae, values, none)
    for none in (None, TilingConfig(vae_encode_tiled=False, vae_encode_tile_size=16)):
        encode(vae, values, none)
    assert vae.sizes == [(32, 32)] * 5


@pytest.mark.parametrize("size, overlap", [(512, -8), (0, 8)])
def test_tiles_that_cannot_be_are_refused(size, overlap):
    for kind in ("decode_tile_size", "decode_overlap"), ("encode_tile_size", "encode_tile_overlap"):
        with pytest.raises(UsageError, match="the size must be at least 1"):
            TilingConfig(**dict(zip((f"vae_{name}" for name in kind), (size, overlap), strict=True)))


def test_two_tiles_meet_halfway():
    """Where two tiles disagree, the picture goes over from one to the other, half and half in the middle."""

    class Numbered(Local):
        def decode(self, latents):
            self.sizes.append(latents.shape[2:])
            return mx.full((1, 3, 2 * latents.shape[2], 2 * latents.shape[3]), float(len(self.sizes)))

    picture = np.array(decode(Numbered(), latents(4, 12), tiles(16, 4)))[0, 0]
    assert (picture == picture[0]).all()
    row = picture[0]
    assert (row[:8] == 1).all() and (row[16:] == 2).all()
    assert (np.diff(row[8:16]) > 0).all()
    np.testing.assert_allclose(row[8:16] + row[8:16][::-1], 3, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "computed"), [(mx.bfloat16, mx.bfloat16), (mx.float32, mx.float32), (mx.float16, mx.float32)]
)
@pytest.mark.parametrize("tiling", [None, tiles(8, 1)])
@pytest.mark.parametrize("run", [decode, encode])
def test_it_computes_in_its_weights_dtype(run, tiling, dtype, computed, monkeypatch):
    seen = set()
    vae = Local(dtype)
    method = getattr(vae, run.__name__)
    monkeypatch.setattr(vae, run.__name__, lambda x: seen.add(x.dtype) or method(x))
    assert run(vae, latents(16, 16), tiling).dtype == mx.float32
    assert seen == {computed}
