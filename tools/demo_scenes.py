"""The little world of the embedded model: captions, the pictures they describe, and a judge for pictures.

Only numpy is needed. `train_demo.py` draws its training pairs from here and `score_demo.py` marks pictures with
`judge`, which looks at pixels only and knows nothing of how a picture was made.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 70),
    "blue": (40, 80, 210),
    "yellow": (240, 210, 50),
    "orange": (240, 140, 40),
    "purple": (140, 70, 180),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle")
# How tall each shape is, in radii. No caption asks for a star; a LoRA may be taught it.
HEIGHTS = {"circle": 2.0, "square": 1.8, "triangle": 1.95, "star": 2.26}
# Radius as a fraction of the shorter side, and the centre as fractions of width and height.
RADII = {"small": 0.12, None: 0.18, "large": 0.26}
PLACES = {
    "left": (0.28, 0.5),
    "right": (0.72, 0.5),
    "top": (0.5, 0.28),
    "bottom": (0.5, 0.72),
    "center": (0.5, 0.5),
    None: (0.5, 0.5),
}


@dataclass(frozen=True)
class Scene:
    """What one caption says. `size` and `place` are None where the caption leaves them out."""

    shape: str
    colour: str
    background: str
    size: str | None = None
    place: str | None = None

    @property
    def caption(self) -> str:
        size = f"{self.size} " if self.size else ""
        place = f", at the {self.place}" if self.place else ""
        return f"a {size}{self.colour} {self.shape} on a {self.background} background{place}"

    @property
    def held_out(self) -> bool:
        """One caption in ten is never trained on: the choice hangs on the caption alone."""
        return hashlib.sha256(self.caption.encode()).digest()[0] % 10 == 0


def every_scene() -> list[Scene]:
    return [
        Scene(shape, colour, background, size, place)
        for shape in SHAPES
        for colour in COLOURS
        for background in COLOURS
        if background != colour
        for size in RADII
        for place in PLACES
    ]


def render(
    scene: Scene,
    height: int,
    width: int,
    rng: np.random.Generator | None = None,
    colours: dict[str, tuple[int, int, int]] = COLOURS,
) -> np.ndarray:
    """Draw a scene with smooth edges.

    With a generator, place and radius vary a little (±0.5 % of the side, ±2 %), so that seeds have something to
    choose; without one the picture is the caption's exact centre. Three times as much was too much for the embedded
    model: each part of an outline chose its own place.

    Returns:
        uint8 array (height, width, 3).
    """
    side = min(height, width)
    centre_x, centre_y = PLACES[scene.place]
    radius = RADII[scene.size] * side
    x0, y0 = centre_x * width, centre_y * height
    if rng is not None:
        x0 += rng.uniform(-0.005, 0.005) * side
        y0 += rng.uniform(-0.005, 0.005) * side
        radius *= rng.uniform(0.98, 1.02)
    coverage = shape_coverage(scene.shape, height, width, x0, y0, radius)[..., None]
    ink = np.array(colours[scene.colour], np.float32)
    paper = np.array(colours[scene.background], np.float32)
    return np.round(paper + (ink - paper) * coverage).astype(np.uint8)


def shape_coverage(shape: str, height: int, width: int, x0: float, y0: float, radius: float) -> np.ndarray:
    """How much of each pixel the shape covers, 0 to 1, from its signed distance: (height, width) float32."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
    x, y = x - x0, y - y0
    if shape == "circle":
        distance = np.hypot(x, y) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - 0.9 * radius
    elif shape == "star":
        # Five points, one up; the bounding box centred on (x0, y0). In each tenth of a turn the outline is one line,
        # from a point at `outer` to a notch at `inner`.
        outer, inner, tenth = 1.25 * radius, 0.55 * radius, np.pi / 5
        y = y - 0.0955 * outer
        angle = np.abs((np.arctan2(x, -y) + tenth) % (2 * tenth) - tenth)
        reach = np.hypot(x, y)
        edge = np.array([inner * np.cos(tenth) - outer, inner * np.sin(tenth)])
        normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
        distance = (reach * np.cos(angle) - outer) * normal[0] + reach * np.sin(angle) * normal[1]
    else:
        # Equilateral, pointing up, its bounding box centred on (x0, y0).
        circumradius = 1.3 * radius
        y = y - 0.25 * circumradius
        distance = np.maximum(y, 0.8660254 * np.abs(x) - 0.5 * y) - 0.5 * circumradius
    return np.clip(0.5 - distance, 0.0, 1.0)


@dataclass(frozen=True)
class Verdict:
    """What the judge sees in a picture. `size` is "small", "medium" or "large"; None where nothing was found."""

    shape: str | None
    colour: str | None
    background: str | None
    size: str | None
    place: str | None


def judge(
    picture: np.ndarray, shapes: tuple[str, ...] = SHAPES, colours: dict[str, tuple[int, int, int]] = COLOURS
) -> Verdict:
    """Say what a picture shows, from its pixels alone.

    A pixel belongs to the nearest of `colours` if it is nearer than 60 (Euclidean, 0-255 RGB). The
    background is what most of the border is; the object is the most frequent other colour; its shape is the one of
    `shapes` whose outline, drawn into the object's bounding box, overlaps it best, at 0.8 or more.
    """
    pixels = np.asarray(picture)[..., :3].astype(np.float32)
    height, width, _ = pixels.shape
    names = list(colours)
    palette = np.array([colours[name] for name in names], np.float32)
    distances = np.linalg.norm(pixels[:, :, None] - palette, axis=-1)
    labels = np.where(distances.min(-1) < 60, distances.argmin(-1), -1)

    border = np.concatenate([labels[:3].ravel(), labels[-3:].ravel(), labels[:, :3].ravel(), labels[:, -3:].ravel()])
    border = border[border >= 0]
    if border.size == 0:
        return Verdict(None, None, None, None, None)
    background = np.bincount(border).argmax()
    inside = labels[(labels >= 0) & (labels != background)]
    if inside.size < 0.004 * height * width:
        return Verdict(None, None, names[background], None, None)
    colour = np.bincount(inside).argmax()

    rows, columns = np.nonzero(labels == colour)
    # One stray pixel must not stretch the box.
    top, bottom = np.quantile(rows, [0.002, 0.998])
    left, right = np.quantile(columns, [0.002, 0.998])
    tall, wide = bottom - top + 1, right - left + 1
    middle_x, middle_y = (left + right + 1) / 2, (top + bottom + 1) / 2

    mask = labels == colour
    scores = {}
    for shape in shapes:
        drawn = shape_coverage(shape, height, width, middle_x, middle_y, tall / HEIGHTS[shape]) > 0.5
        scores[shape] = (mask & drawn).sum() / (mask | drawn).sum()
    shape = max(scores, key=scores.get)
    radius = tall / HEIGHTS[shape] / min(height, width)
    if scores[shape] < 0.8 or not 0.75 < wide / tall < 1.35:
        shape = None

    size = "small" if radius < 0.15 else "large" if radius > 0.22 else "medium"
    x, y = middle_x / width, middle_y / height
    place = None
    if abs(x - 0.5) < 0.1 and abs(y - 0.5) < 0.1:
        place = "center"
    elif abs(y - 0.5) < 0.1:
        place = "left" if x < 0.4 else "right"
    elif abs(x - 0.5) < 0.1:
        place = "top" if y < 0.4 else "bottom"
    return Verdict(shape, names[colour], names[background], size, place)


def agrees(scene: Scene, verdict: Verdict) -> dict[str, bool]:
    """Which claims of the caption the picture keeps; a size or place that the caption leaves out is not asked."""
    kept = {
        "colour": verdict.colour == scene.colour,
        "shape": verdict.shape == scene.shape,
        "background": verdict.background == scene.background,
    }
    if scene.size:
        kept["size"] = verdict.size == scene.size
    if scene.place:
        kept["place"] = verdict.place == scene.place
    return kept
