"""Large pictures in overlapping tiles, so that an autoencoder's memory depends on the tile and not on the picture.

An autoencoder computes in its weights' dtype: latents and pictures are float32 here, and would make float32 of all that
it computes.

Group norms see one tile at a time, so tiles differ a little from the whole; they overlap and fade into each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mflux.backend import mx, named_arrays
from mflux.errors import UsageError


@dataclass(frozen=True, slots=True)
class TilingConfig:
    """How large tiles are and how far they overlap; an overlap of more than half a tile counts as half.

    Attributes:
        vae_decode_tiles_per_dim: None or 1 to decode at once; any other number allows tiles, whose number follows from
            their size.
        vae_decode_tile_size: pixels of the picture along a side.
        vae_decode_overlap: latents, as in mflux 0.24: 8 are 64 pixels of FLUX.1.
        vae_encode_tiled: whether pictures to start from are encoded in tiles as well.
        vae_encode_tile_size, vae_encode_tile_overlap: pixels.

    Raises:
        UsageError: a size below 1 or an overlap below 0.
    """

    vae_decode_tiles_per_dim: int | None = 8
    vae_decode_tile_size: int = 512
    vae_decode_overlap: int = 8
    vae_encode_tiled: bool = True
    vae_encode_tile_size: int = 512
    vae_encode_tile_overlap: int = 64

    def __post_init__(self):
        for size, overlap, unit in (
            (self.vae_decode_tile_size, self.vae_decode_overlap, "latents"),
            (self.vae_encode_tile_size, self.vae_encode_tile_overlap, "pixels"),
        ):
            if size < 1 or overlap < 0:
                raise UsageError(
                    f"tiles of {size} pixels that overlap by {overlap} {unit} make no sense: "
                    "the size must be at least 1 and the overlap at least 0"
                )

    @staticmethod
    def may_tile_implicitly(model: object) -> bool:
        """Whether a setting that saves memory may tile by itself: not where the autoencoder says no."""
        return bool(getattr(getattr(model, "vae", None), "supports_implicit_tiling", True))


def decode(vae: Any, latents: mx.array, tiling: TilingConfig | None) -> mx.array:
    """Decode (1, C, h, w) to (1, 3, H, W); at once if `tiling` is None or one tile covers it."""
    run = _in_its_dtype(vae, vae.decode)
    if tiling is None or (tiling.vae_decode_tiles_per_dim or 1) <= 1:
        return run(latents)
    scale = vae.spatial_scale
    tile = tiling.vae_decode_tile_size // scale
    return in_tiles(run, latents, tile, tiling.vae_decode_overlap, into=1, out=scale)


def encode(vae: Any, image: mx.array, tiling: TilingConfig | None) -> mx.array:
    """Encode (1, 3, H, W) to (1, C, h, w); at once if `tiling` does not ask for tiles or one covers it."""
    run = _in_its_dtype(vae, vae.encode)
    if tiling is None or not tiling.vae_encode_tiled:
        return run(image)
    scale = vae.spatial_scale
    tile, overlap = tiling.vae_encode_tile_size // scale, tiling.vae_encode_tile_overlap // scale
    return in_tiles(run, image, tile, overlap, into=scale, out=1)


def _in_its_dtype(vae: Any, run: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
    """`run` in the dtype of the autoencoder's weights; what comes out has that of what goes in.

    Not in float16, whose range an autoencoder's sums of squares leave.
    """
    floats = (value.dtype for _, value in named_arrays(vae.parameters()) if mx.issubdtype(value.dtype, mx.floating))
    dtype = next(floats, None)
    if dtype is None or dtype == mx.float16:
        return run
    return lambda x: run(x.astype(dtype)).astype(x.dtype)


def in_tiles(
    run: Callable[[mx.array], mx.array], x: mx.array, tile: int, overlap: int, *, into: int, out: int
) -> mx.array:
    """Tile by tile; sizes are in latents, each of which is `into` entries of a side of `x` and `out` of the result."""
    height, width = (side // into for side in x.shape[2:])
    tile = max(tile, 1)
    if height <= tile and width <= tile:
        return run(x)
    overlap = min(overlap, tile // 2)
    result: np.ndarray | None = None
    weights = np.zeros((height * out, width * out), np.float32)
    for top in _starts(height, tile, overlap):
        for left in _starts(width, tile, overlap):
            part = x[:, :, top * into : (top + tile) * into, left * into : (left + tile) * into]
            done = np.array(run(part)[0].astype(mx.float32))
            if result is None:
                result = np.zeros((done.shape[0], *weights.shape), np.float32)
            rows, columns = done.shape[1] // out, done.shape[2] // out
            fade = np.outer(_fade(top, rows, height, overlap, out), _fade(left, columns, width, overlap, out))
            window = np.s_[top * out : top * out + fade.shape[0], left * out : left * out + fade.shape[1]]
            result[:, *window] += done * fade
            weights[window] += fade
            mx.clear_cache()
    if result is None:
        raise ValueError(f"there is nothing to go through in tiles: {x.shape}")
    return mx.array(result / weights)[None]


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin: the fewest that cover `length` with at least `overlap` in common, evenly spread."""
    if length <= tile:
        return [0]
    count = 1 + -(-(length - tile) // (tile - overlap))
    return [round(index * (length - tile) / (count - 1)) for index in range(count)]


def _fade(start: int, size: int, length: int, overlap: int, scale: int) -> np.ndarray:
    """Weights along one side of a tile, rising over the overlap unless the tile touches the picture's border."""
    weights = np.ones(size * scale, np.float32)
    if not overlap:
        return weights
    ramp = (np.arange(overlap * scale, dtype=np.float32) + 0.5) / (overlap * scale)
    if start > 0:
        weights[: ramp.size] *= ramp
    if start + size < length:
        weights[-ramp.size :] *= ramp[::-1]
    return weights
