"""The source's colours for what the network drew.

A diffusion model shifts colours a little. What is coarse in the picture is taken from the source (wavelets, Mallat
1989), then the distribution of each of CIELAB's channels: a and b whole, lightness by a fifth, so that detail stays.
Reference: `lab_color_transfer` in numz/ComfyUI-SeedVR2_VideoUpscaler, src/utils/color_fix.py.
"""

from __future__ import annotations

import numpy as np

_LEVELS = 5
_KEPT_LIGHTNESS = 0.8

# sRGB (IEC 61966-2-1), linear, to CIE XYZ and back.
_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]],
    np.float32,
)
_FROM_XYZ = np.array(
    [[3.2404542, -1.5371385, -0.4985314], [-0.9692660, 1.8760108, 0.0415560], [0.0556434, -0.2040259, 1.0572252]],
    np.float32,
)
_D65 = np.array([0.95047, 1.0, 1.08883], np.float32)[:, None]
# CIELAB (CIE 15): below the knee the cube root goes over into a straight line.
_KNEE = 6 / 29
_SLOPE = (29 / 3) ** 3


def correct(drawn: np.ndarray, source: np.ndarray) -> np.ndarray:
    """What was drawn, in the source's colours.

    Args:
        drawn, source: pictures of one size, (3, height, width), float32, sRGB from -1 to 1.

    Returns:
        The same shape and range.
    """
    # The blur is linear, so that the two pictures' coarse parts need one pass instead of two.
    drawn = np.clip(drawn + coarse(source - drawn), -1, 1)
    lab, wanted = _to_lab(drawn / 2 + 0.5), _to_lab(source / 2 + 0.5)
    lightness = lab[0].copy()
    for channel, values in zip(lab, wanted, strict=True):
        match_ranks(channel, values)
    lab[0] += _KEPT_LIGHTNESS * (lightness - lab[0])
    return (_from_lab(lab) * 2 - 1).reshape(drawn.shape)


def coarse(picture: np.ndarray) -> np.ndarray:
    """What is left of a picture (…, height, width) after blurs of 1, 2, 4, 8 and 16 pixels, at most an eighth of it."""
    widest = max(1, min(picture.shape[-2:]) // 8)
    for level in range(_LEVELS):
        reach = min(2**level, widest)
        picture = _blur(_blur(picture, reach, axis=-1), reach, axis=-2)
    return picture


def _blur(picture: np.ndarray, reach: int, axis: int) -> np.ndarray:
    """A quarter, a half and a quarter of the pixels `reach` before, at, and behind; the border is repeated."""
    size = picture.shape[axis]
    places = np.arange(size)
    result = picture / 2
    for moved in (places - reach, places + reach):
        result += np.take(picture, moved.clip(0, size - 1), axis) / 4
    return result


def match_ranks(values: np.ndarray, wanted: np.ndarray) -> None:
    """Replace, in place, the smallest value by the smallest that is wanted, the next by the next, and so on; of equal
    ones the first counts as the smaller. Both are one row of the same length, float32 and finite."""
    # A float's bits as a whole number of the same order, and its place below: numpy sorts those in a third of the time
    # that a stable argsort takes. Adding zero makes one of the two zeros.
    bits = (values + 0).view(np.int32)
    keys = (bits ^ (bits >> 31 & 0x7FFFFFFF)).astype(np.int64) << 32 | np.arange(values.size)
    keys.sort()
    values[keys & 0xFFFFFFFF] = np.sort(wanted)


def _to_lab(rgb: np.ndarray) -> np.ndarray:
    """(3, …) from 0 to 1 → (3, pixels) of L, a, b."""
    rgb = rgb.reshape(3, -1).clip(0, 1)
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** np.float32(2.4), rgb / 12.92)
    xyz = _TO_XYZ @ linear / _D65
    root = np.where(xyz > _KNEE**3, np.cbrt(xyz), (_SLOPE * xyz + 16) / 116).astype(np.float32)
    x, y, z = root
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def _from_lab(lab: np.ndarray) -> np.ndarray:
    """(3, pixels) → (3, pixels) of red, green, blue from 0 to 1."""
    lightness, a, b = lab
    y = (lightness + 16) / 116
    root = np.stack([y + a / 500, y, y - b / 200])
    xyz = np.where(root > _KNEE, root**3, (116 * root - 16) / _SLOPE).astype(np.float32) * _D65
    linear = _FROM_XYZ @ xyz
    bright = 1.055 * linear.clip(0) ** np.float32(1 / 2.4) - 0.055
    return np.where(linear > 0.0031308, bright, 12.92 * linear).clip(0, 1).astype(np.float32)
