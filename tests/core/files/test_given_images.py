"""Images that a program hands over itself: opened, as an open file, or as a file's contents."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from mflux.errors import ImageError, UsageError
from mflux.models.common.config import ModelConfig
from mflux.models.common.config.config import Config
from mflux.models.flux.cli.flux_generate import COMMAND
from mflux.models.flux.variants.txt2img.flux import Flux1
from mflux.utils.given_image import GivenImage, given
from mflux.utils.image_util import ImageUtil
from mflux.utils.masks import read_mask
from mflux.utils.metadata_reader import MetadataReader
from mflux.utils.picture_files import open_image, oriented_size, picture_bytes

PROMPT = "a large red circle on a white background"


def gradient(width: int = 128, height: int = 96) -> PIL.Image.Image:
    ramp = np.linspace(0, 255, width * height * 3).reshape(height, width, 3)
    return PIL.Image.fromarray(ramp.astype(np.uint8))


def contents(image: PIL.Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_contents_are_told_from_paths(kind):
    found = given(contents(gradient(), kind))
    assert found is not None
    assert oriented_size(found) == open_image(found).size == (128, 96)
    assert given(b"photo.png") is None
    assert given("photo.png") is None
    assert given(None) is None


def test_they_are_turned_as_a_file_is():
    image = gradient()
    image.getexif()[0x0112] = 6
    file = io.BytesIO()
    image.save(file, "JPEG", exif=image.getexif())
    for one in (file, file.getvalue(), PIL.Image.open(io.BytesIO(file.getvalue()))):
        found = given(one)
        assert found is not None
        assert oriented_size(found) == open_image(found).size == (96, 128)


def test_a_model_takes_what_it_takes_as_a_path(in_folder):
    gradient().save("photo.png")
    model = Flux1(model_config=ModelConfig.from_name("demo"))

    def generated(source):
        return model.generate_image(seed=4, prompt=PROMPT, num_inference_steps=2, image_path=source, image_strength=0.5)

    expected = generated("photo.png")
    data = (in_folder / "photo.png").read_bytes()
    opened = PIL.Image.open("photo.png")
    for source in (opened, gradient(), data, bytearray(data), io.BytesIO(data), GivenImage(data, "upload.png")):
        found = generated(source)
        assert np.array_equal(np.asarray(found.image), np.asarray(expected.image))
        name = "upload.png" if isinstance(source, GivenImage) else "photo.png" if source is opened else "image.png"
        found.save("out.png", overwrite=True)
        settings = MetadataReader.read_exif_metadata("out.png")
        # The name, and nothing of it is looked up.
        assert settings["image_path"] == name.rpartition("/")[2]
    assert expected.image_path == Path("photo.png")


def test_a_plan_takes_them():
    plan = COMMAND.plan({"model": "demo", "prompt": PROMPT, "seed": [4], "image_path": gradient()})
    assert (plan.images[0]["width"], plan.images[0]["height"]) == (128, 96)
    assert isinstance(plan.images[0]["image_path"], GivenImage)
    with pytest.raises(UsageError, match="prompt_file: an image is no value for it"):
        COMMAND.plan({"model": "demo", "prompt_file": gradient(), "seed": [4]})
    with pytest.raises(UsageError, match="prompt"):
        COMMAND.plan({"model": "demo", "prompt": gradient(), "seed": [4]})


@pytest.mark.parametrize("data", [b"\0" * 10, b"<html>\0</html>", contents(gradient())[:300], b"x" * 5000])
def test_contents_that_are_no_image(data):
    source = GivenImage(data, "upload.png")
    for read in (open_image, read_mask, ImageUtil.load_image):
        with pytest.raises(ImageError, match=r"the image upload\.png (is|cannot be read)"):
            read(source)
    with pytest.raises(ImageError, match="the image image.png (is|cannot be read)"):
        COMMAND.plan({"model": "demo", "prompt": PROMPT, "image_path": data})


def test_what_is_neither_is_refused():
    for wrong in (5, object(), [1], io.StringIO("text")):
        with pytest.raises(UsageError, match="image_path is .*, which is not a path"):
            Config(ModelConfig.schnell(), 4, image_path=wrong)


def test_bytes_of_an_image_are_what_a_file_gets(in_folder):
    image = gradient()
    settings = {"prompt": PROMPT, "seed": 3}
    for kind, name in (("PNG", "a.png"), ("JPEG", "a.jpg"), ("WEBP", "a.webp")):
        saved = ImageUtil.save_image(image, name, settings)
        assert saved.read_bytes() == picture_bytes(image, settings, picture_format=kind)
        assert MetadataReader.read_exif_metadata(saved) == settings
    small, large = (len(picture_bytes(image, picture_format="JPEG", quality=quality)) for quality in (10, 95))
    assert small < large
