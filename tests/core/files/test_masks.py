"""Masks of every kind that paint programs write: each selects the same, one reader for all, and what selects nothing or
everything is told."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mflux.models.flux.sources import mask
from mflux.utils.masks import read_mask

SIZE = (64, 48)
# What is to be painted: somewhere inside, and lopsided, so that neither turning nor inverting it gives it again.
CHOSEN = np.zeros((48, 64), bool)
CHOSEN[8:30, 20:52] = True
CHOSEN[8:12, 20:30] = False

# A photo, of which no pixel is as its neighbour.
Y, X = np.mgrid[0:48, 0:64]
PHOTO = np.stack([X * 4, Y * 5, (X + Y) * 2], axis=-1).astype(np.uint8)


def grey(white: int, black: int = 0, dtype: type = np.uint8) -> Image.Image:
    return Image.fromarray(np.where(CHOSEN, white, black).astype(dtype))


def colour(chosen: tuple, rest: tuple) -> Image.Image:
    return Image.fromarray(np.where(CHOSEN[..., None], np.uint8(chosen), np.uint8(rest)))


def layer(colours: object, opaque: np.ndarray, full: int = 255, empty: int = 0) -> Image.Image:
    pixels = np.empty((48, 64, 4), np.uint8)
    pixels[..., :3] = colours
    pixels[..., 3] = np.where(opaque, full, empty)
    return Image.fromarray(pixels)


def palette(chosen: tuple, rest: tuple, *, transparent: int | None = None) -> Image.Image:
    image = Image.new("P", SIZE)
    image.putdata([int(value) for value in CHOSEN.reshape(-1)])
    image.putpalette([*rest, *chosen])
    if transparent is not None:
        image.info["transparency"] = transparent
    return image


def two(grey: np.ndarray, opaque: np.ndarray) -> Image.Image:
    return Image.merge(
        "LA", [Image.fromarray(np.uint8(grey)), Image.fromarray(np.where(opaque, 255, 0).astype(np.uint8))]
    )


ALL = np.ones_like(CHOSEN)
MASKS = {
    "grey": grey(255),
    "grey, not quite white": grey(200, 30),
    "RGB": colour((255, 255, 255), (0, 0, 0)),
    "one bit": grey(255).convert("1"),
    "0 and 1": grey(1),
    "0 and 1 in RGB": colour((1, 1, 1), (0, 0, 0)),
    "labels": grey(3),
    "faint": grey(100, 10),
    "16 bits": grey(65535, dtype=np.uint16),
    "16 bits, 0 and 255": grey(255, dtype=np.uint16),
    "16 bits, 0 and 1": grey(1, dtype=np.uint16),
    "32 bits, 0 and 1": grey(1, dtype=np.int32),
    "floats": grey(1, dtype=np.float32),
    "palette": palette((255, 255, 255), (0, 0, 0)),
    "palette of labels": palette((128, 0, 0), (0, 0, 0)),
    "palette, 0 and 1": palette((1, 1, 1), (0, 0, 0)),
    "palette, transparent ground": palette((0, 0, 0), (0, 0, 0), transparent=0),
    "black strokes": layer((0, 0, 0), CHOSEN),
    "white strokes": layer((255, 255, 255), CHOSEN),
    "red strokes": layer((255, 0, 0), CHOSEN),
    "grey strokes": layer((120, 120, 120), CHOSEN),
    "many-coloured strokes": layer(PHOTO, CHOSEN),
    "half-transparent strokes": layer((0, 0, 255), CHOSEN, full=100),
    "white strokes, black where transparent": layer(np.where(CHOSEN[..., None], 255, 0), CHOSEN),
    "black and white, wholly opaque": layer(np.where(CHOSEN[..., None], 255, 0), ALL),
    "black and white on nothing": layer(np.where(CHOSEN[..., None], 255, 0), ALL & (X < 60)),
    "a hole in a photo": layer(PHOTO, ~CHOSEN),
    "a hole in a black layer": layer((0, 0, 0), ~CHOSEN),
    "alpha that says nothing": layer(np.where(CHOSEN[..., None], 255, 0), ALL, full=200),
    "alpha of nothing at all": layer(np.where(CHOSEN[..., None], 255, 0), ~ALL),
    "grey with alpha": two(np.where(CHOSEN, 255, 0), ALL),
    "black strokes in grey with alpha": two(np.zeros((48, 64)), CHOSEN),
    "red on white": colour((255, 0, 0), (255, 255, 255)),
    "red on black": colour((255, 0, 0), (0, 0, 0)),
    "blue on black": colour((0, 0, 255), (0, 0, 0)),
    "green on grey": colour((0, 255, 0), (128, 128, 128)),
}


@pytest.mark.parametrize("kind", MASKS)
def test_every_kind_selects_the_same(kind, tmp_path):
    image = MASKS[kind]
    ending = "tif" if image.mode in ("F", "I") else "png"
    image.save(tmp_path / f"mask.{ending}")
    for source in (tmp_path / f"mask.{ending}", image):
        selected = np.array(mask(source, *SIZE))[0, 0]
        assert selected.shape == CHOSEN.shape and np.array_equal(selected == 1, CHOSEN)


def test_soft_edges_stay_soft(tmp_path):
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (8, 1)))
    assert read_mask(ramp).tobytes() == ramp.tobytes()


def test_a_large_mask_is_scaled(tmp_path):
    large = MASKS["black strokes"].resize((64 * 20, 48 * 20), Image.Resampling.NEAREST)
    assert np.array_equal(np.array(mask(large, *SIZE))[0, 0] == 1, CHOSEN)


@pytest.mark.parametrize(
    ("image", "what"),
    [
        (Image.new("L", SIZE, 0), "nothing"),
        (Image.new("RGBA", SIZE, (0, 0, 0, 0)), "nothing"),
        (Image.new("L", SIZE, 255), "everything"),
        (Image.new("RGB", SIZE, "white"), "everything"),
        (Image.new("RGBA", SIZE, (255, 255, 255, 255)), "everything"),
    ],
)
def test_what_selects_nothing_or_everything_is_told(image, what, tmp_path, caplog):
    image.save(tmp_path / "mask.png")
    with caplog.at_level(logging.WARNING):
        mask(tmp_path / "mask.png", *SIZE)
    assert [record.message.partition(",")[0] for record in caplog.records] == [
        f"the mask {tmp_path / 'mask.png'} selects {what}"
    ]


@pytest.mark.parametrize("kind", ["grey", "black strokes", "red strokes", "a hole in a photo", "0 and 1", "16 bits"])
def test_fibo_s_editing_reads_them_so(kind, tmp_path, caplog):
    from mflux.models.fibo.sources import source_picture

    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    MASKS[kind].save(tmp_path / "mask.png")
    picture = np.asarray(source_picture(tmp_path / "photo.png", tmp_path / "mask.png"))
    assert np.array_equal(picture, np.where(CHOSEN[..., None], np.uint8(128), PHOTO)) and not caplog.messages
    Image.new("L", SIZE).save(tmp_path / "mask.png")
    source_picture(tmp_path / "photo.png", tmp_path / "mask.png")
    assert "selects nothing" in caplog.text


@pytest.mark.parametrize(
    ("size", "is_other"),
    [((64, 48), False), ((128, 96), False), ((65, 48), False), ((63, 47), False), ((48, 64), True), ((64, 64), True),
     ((640, 360), True)],
)  # fmt: skip
def test_a_mask_of_another_shape(size, is_other, tmp_path, caplog):
    MASKS["grey"].resize(size).save(tmp_path / "mask.png")
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    for photo in (tmp_path / "photo.png", Image.fromarray(PHOTO)):
        caplog.clear()
        mask(tmp_path / "mask.png", *SIZE, photo)
        told = (
            f"the mask {tmp_path / 'mask.png'} has {size[0]} x {size[1]} pixels and the image 64 x 48, which is another"
        )
        assert [message.startswith(told) for message in caplog.messages] == [True] * is_other


def test_there_is_one_reader():
    """Whoever reads a mask of a user's reads it so."""
    sources = Path(__file__).parents[3] / "src" / "mflux"
    others = []
    for path in sources.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "mask_path" in text or "masked_image_path" in text:
            ways = ("open_image(mask", "load_image(mask", "composite_alpha=False")
            others += [path.name for way in ways if way in text]
    assert others == []
