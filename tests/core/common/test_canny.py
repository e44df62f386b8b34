"""Edges, pixel for pixel as OpenCV finds them.

tests/data/canny.npz holds pictures and what `cv2.Canny(picture, low, high)` of opencv-python-headless 5.0.0 made of
them, so that neither the package nor its tests need OpenCV.
"""

from pathlib import Path

import numpy as np
import pytest

from mflux.models.common.controls.canny import canny

DATA = np.load(Path(__file__).parents[2] / "data" / "canny.npz")
PICTURES = sorted({name.rsplit(": ", 1)[0] for name in DATA})


@pytest.mark.parametrize("name", PICTURES)
def test_edges_are_opencvs(name):
    picture, edges = DATA[f"{name}: picture"], DATA[f"{name}: edges"]
    low, high = DATA[f"{name}: thresholds"]
    ours = canny(picture, low, high)
    assert ours.dtype == np.uint8 and set(np.unique(ours)) <= {0, 255}
    assert np.array_equal(ours > 0, edges)


def test_the_pictures_show_edges():
    """A detector that finds nothing, or everything, must not pass."""
    shares = [DATA[f"{name}: edges"].mean() for name in PICTURES]
    assert sum(0.03 < share < 0.7 for share in shares) >= 6


def test_an_edge_goes_on_only_from_a_strong_pixel():
    picture = np.zeros((16, 16), np.uint8)
    picture[:, 8:] = 45  # |dx| is 180: between the thresholds
    assert not canny(picture, 100, 200).any()
    picture[0, 8:] = 90
    edge = canny(picture, 100, 200)
    assert (edge.any(axis=1)).sum() > 10


def test_a_flat_picture_has_no_edges():
    assert not canny(np.full((5, 7, 3), 128, np.uint8)).any()
