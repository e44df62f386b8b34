"""Edges of a picture (Canny 1986), as OpenCV's `Canny` finds them with its usual 3 × 3 Sobel kernels and |dx| + |dy|.

ControlNets were trained on its result, so the same pixels have to come out; it needs no more than whole numbers.
"""

from __future__ import annotations

import numpy as np

# tan(22.5°) in units of 2^-15: between gradients that count as horizontal and diagonal ones.
_TANGENT = 13573
_ONE = 15


def canny(image: np.ndarray, low: int = 100, high: int = 200) -> np.ndarray:
    """Find edges.

    Args:
        image: (H, W) or (H, W, C), uint8. Of several channels, each pixel follows the one that changes most.
        low, high: an edge starts where the gradient's |dx| + |dy| is above `high`, and goes on while it is above `low`.

    Returns:
        (H, W), uint8: 255 on edges, 0 elsewhere.
    """
    if image.ndim == 2:
        image = image[..., None]
    dx, dy = _sobel(image.astype(np.int32))
    strongest = np.argmax(abs(dx) + abs(dy), axis=2)[..., None]
    dx, dy = (np.take_along_axis(values, strongest, axis=2)[..., 0] for values in (dx, dy))
    strength = abs(dx) + abs(dy)
    thin = (strength > low) & _is_ridge(dx, dy, strength)
    return np.where(_connected(thin, thin & (strength > high)), 255, 0).astype(np.uint8)


def _sobel(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Differences across columns and rows, smoothed along the other axis; the border repeats the outermost pixels."""
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    columns = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    return rows[:, 2:] - rows[:, :-2], columns[2:] - columns[:-2]


def _is_ridge(dx: np.ndarray, dy: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """Where the strength is largest along the gradient. Of two equal neighbours left and right, or above and below,
    the later one counts; on a diagonal neither."""
    padded = np.pad(strength, 1)

    def beside(row: int, column: int) -> np.ndarray:
        height, width = strength.shape
        return padded[1 + row : 1 + row + height, 1 + column : 1 + column + width]

    x, y = abs(dx).astype(np.int64), abs(dy).astype(np.int64) << _ONE
    flat = x * _TANGENT
    # tan(67.5°) = tan(22.5°) + 2.
    steep = flat + (x << (_ONE + 1))
    horizontal = (strength > beside(0, -1)) & (strength >= beside(0, 1))
    vertical = (strength > beside(-1, 0)) & (strength >= beside(1, 0))
    falling = (strength > beside(-1, -1)) & (strength > beside(1, 1))
    rising = (strength > beside(-1, 1)) & (strength > beside(1, -1))
    diagonal = np.where((dx < 0) == (dy < 0), falling, rising)
    return np.where(y < flat, horizontal, np.where(y > steep, vertical, diagonal))


def _connected(thin: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """What of `thin` hangs together with a seed, diagonals included."""
    height, width = thin.shape
    # One row and column more, so that neighbours of the border are found without asking.
    open_pixels = np.pad(thin, 1).ravel()
    found = np.pad(seeds, 1).ravel()
    stride = width + 2
    around = np.array([-stride - 1, -stride, -stride + 1, -1, 1, stride - 1, stride, stride + 1])
    front = np.flatnonzero(found)
    while front.size:
        reached = np.unique(front[:, None] + around)
        front = reached[open_pixels[reached] & ~found[reached]]
        found[front] = True
    return found.reshape(height + 2, stride)[1:-1, 1:-1]
