"""Decoding a large picture in overlapping tiles, so that memory depends on the tile and not on the picture.

Group norms see one tile at a time, so tiles differ a little from the whole; they overlap and fade into each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mflux.backend import mx
from mflux.errors import UsageError


@dataclass(frozen=True, slots=True)
class TilingConfig:
    """Tile size and overlap in pixels of the picture; an overlap of more than half a tile counts as half.

    Raises:
        UsageError: a size below 1 or an overlap below 0.
    """

    vae_decode_tile_size: int = 512
    vae_decode_tile_overlap: int = 64

    def __post_init__(self):
        if self.vae_decode_tile_size < 1 or self.vae_decode_tile_overlap < 0:
            size, overlap = self.vae_decode_tile_size, self.vae_decode_tile_overlap
            raise UsageError(
                f"tiles of {size} pixels that overlap by {overlap} make no sense: "
                "the size must be at least 1 and the overlap at least 0"
            )


def decode(vae, latents: mx.array, tiling: TilingConfig | None) -> mx.array:
    """Decode (1, C, h, w) to (1, 3, H, W); at once if `tiling` is None or one tile covers it."""
    scale = vae.spatial_scale
    height, width = latents.shape[2:]
    tile = 0 if tiling is None else max(tiling.vae_decode_tile_size // scale, 1)
    if tiling is None or (height <= tile and width <= tile):
        return vae.decode(latents)
    overlap = min(tiling.vae_decode_tile_overlap // scale, tile // 2)
    picture = np.zeros((3, height * scale, width * scale), np.float32)
    weights = np.zeros((height * scale, width * scale), np.float32)
    for y in _starts(height, tile, overlap):
        for x in _starts(width, tile, overlap):
            part = latents[:, :, y : y + tile, x : x + tile]
            decoded = np.array(vae.decode(part)[0].astype(mx.float32))
            fade = np.outer(
                _fade(y, part.shape[2], height, overlap, scale), _fade(x, part.shape[3], width, overlap, scale)
            )
            window = np.s_[y * scale : y * scale + fade.shape[0], x * scale : x * scale + fade.shape[1]]
            picture[:, *window] += decoded * fade
            weights[window] += fade
            mx.clear_cache()
    return mx.array(picture / weights)[None]


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
