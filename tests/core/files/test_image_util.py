"""Pictures in and out: orientation, transparency, conversions, names, settings, and files that are whole or absent."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mflux.backend import mx
from mflux.errors import ImageError, OutputError, UsageError
from mflux.utils import picture_files
from mflux.utils.box_values import AbsoluteBoxValues, BoxValues
from mflux.utils.dimension_resolver import DimensionResolver
from mflux.utils.image_util import ImageUtil, check_output, open_image, oriented_size, write_atomically
from mflux.utils.metadata_builder import MetadataBuilder
from mflux.utils.metadata_reader import MetadataReader
from mflux.utils.scale_factor import ScaleFactor


def picture(width: int = 5, height: int = 3) -> PIL.Image.Image:
    """Every pixel another colour."""
    values = np.arange(width * height).reshape(height, width)
    return PIL.Image.fromarray(np.stack([values * 7, 255 - values * 5, values * 3 % 256], axis=-1).astype(np.uint8))


# ---- reading


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a.transpose(1, 0, 2)[::-1, ::-1]),
        (8, lambda a: np.rot90(a)),
    ],
)
def test_a_picture_is_turned_as_it_is_to_be_seen(tmp_path, orientation, turned):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    picture().save(tmp_path / "x.png", exif=exif)
    expected = turned(np.asarray(picture()))
    assert np.array_equal(np.asarray(open_image(tmp_path / "x.png")), expected)
    assert np.array_equal(np.asarray(ImageUtil.load_image(str(tmp_path / "x.png"))), expected)
    with PIL.Image.open(tmp_path / "x.png") as image:
        assert np.array_equal(np.asarray(open_image(image)), expected)
    assert oriented_size(tmp_path / "x.png") == expected.shape[1::-1]


def test_what_is_transparent_is_white():
    colours = np.zeros((1, 4, 4), np.uint8)
    colours[0] = [(10, 20, 30, 255), (10, 20, 30, 0), (0, 0, 0, 128), (255, 0, 0, 51)]
    image = PIL.Image.fromarray(colours)
    expected = [[10, 20, 30], [255, 255, 255], [127, 127, 127], [255, 204, 204]]
    assert np.abs(np.asarray(ImageUtil.load_image(image))[0].astype(int) - expected).max() <= 1
    # For a mask white means something: the colours as they are.
    assert np.asarray(ImageUtil.load_image(image, composite_alpha=False))[0].tolist() == colours[0, :, :3].tolist()


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "I;16", "F", "HSV"]
)
def test_every_mode_becomes_rgb(mode):
    grey = PIL.Image.new("L", (4, 2), 255)
    if mode in ("La", "RGBa"):
        image = grey.convert(mode.upper()).convert(mode)
    else:
        image = PIL.Image.new(mode, (4, 2)) if mode == "I;16" else grey.convert("RGB" if mode == "HSV" else mode)
        image = image.convert("HSV") if mode == "HSV" else image
    assert image.mode == mode
    loaded = ImageUtil.load_image(image)
    assert (loaded.mode, loaded.size) == ("RGB", (4, 2))
    if mode not in ("I;16", "F"):
        assert np.asarray(loaded).min() == 255


def test_a_palette_with_a_transparent_colour(tmp_path):
    image = PIL.Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    image.save(tmp_path / "x.png", transparency=1)
    assert np.asarray(ImageUtil.load_image(tmp_path / "x.png")).tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_what_cannot_be_read(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    for read in (open_image, oriented_size, ImageUtil.load_image):
        with pytest.raises(ImageError, match=r"none\.png does not exist: check its path"):
            read(tmp_path / "none.png")
        with pytest.raises(ImageError, match=r"text\.png is not a picture that can be read: give a PNG, JPEG or WebP"):
            read(tmp_path / "text.png")
        with pytest.raises(ImageError, match=r"cannot be read \(Is a directory\)"):
            read(str(tmp_path))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(["x.png", "x.jpg", "x.webp"]))
def test_a_damaged_picture_is_told_or_harmless(tmp_path, data, name):
    path = tmp_path / name
    ImageUtil.save_image(picture(16, 16), path, {"prompt": "a circle", "seed": 1}, overwrite=True)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))]))
    try:
        ImageUtil.load_image(path)
    except ImageError as error:
        assert str(path) in str(error)
    try:
        found = MetadataReader.read_all_metadata(path)
    except ImageError as error:
        assert "exceeds limit" in str(error)
    else:
        assert all(part is None or isinstance(part, dict) for part in found.values())


# ---- arrays


def test_a_picture_as_an_array_and_back():
    image = picture()
    array = ImageUtil.to_array(image)
    assert (array.shape, array.dtype) == ((1, 3, 3, 5), mx.float32)
    assert np.allclose(array[0, :, 1, 2], np.asarray(image)[1, 2] / 127.5 - 1, atol=1e-6)
    assert np.array_equal(np.asarray(ImageUtil.to_pil(array)), np.asarray(image))
    # Video models decode pictures of one frame.
    assert np.array_equal(np.asarray(ImageUtil.to_pil(array[:, :, None])), np.asarray(image))


def test_what_lies_outside_is_clipped_and_the_rest_rounded():
    values = mx.array([-7.0, -1, 0, 1, 7, 100 / 127.5 - 1 + 0.0035]).reshape(1, 1, 1, 6)
    image = ImageUtil.to_pil(mx.broadcast_to(values, (1, 3, 1, 6)).astype(mx.float32))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 128, 255, 255, 100]


def test_a_mask_is_nothing_or_all():
    image = PIL.Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8))
    assert ImageUtil.to_array(image, is_mask=True).tolist() == [[[[0, 0, 1, 1]]]]


def test_normalised_for_a_model():
    image = PIL.Image.new("RGB", (10, 6), (0, 51, 255))
    array = ImageUtil.preprocess_for_model(image, target_size=(4, 2), mean=[0.5, 0.2, 0], std=[0.5, 0.1, 2])
    assert array.shape == (1, 3, 2, 4)
    assert np.allclose(array[0, :, 0, 0], [-1, 0, 0.5], atol=1e-6)
    assert ImageUtil.preprocess_for_depth_pro(image).shape == (3, 6, 10)


# ---- sizes and margins


def test_scaling_to_a_size():
    image = PIL.Image.new("RGB", (8, 4), "red")
    assert ImageUtil.scale_to_dimensions(image, 8, 4) is image
    scaled = ImageUtil.scale_to_dimensions(image, 4, 6)
    assert scaled.size == (4, 6)
    assert np.asarray(scaled)[3, 2].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("20", (20, 20, 20, 20)),
        ("10,20", (10, 20, 10, 20)),
        ("10, 20, 30", (10, 20, 30, 20)),
        ("1,2,3,40%", (1, 2, 3, "40%")),
        ("0,12.5%", (0, "12.5%", 0, "12.5%")),
    ],
)
def test_paddings_as_css_writes_them(text, values):
    assert BoxValues.parse(text) == BoxValues(*values)


@pytest.mark.parametrize("text", ["", "1,2,3,4,5", "a", "-1", "1.5", "10%%", "1,,2"])
def test_paddings_that_are_none(text):
    with pytest.raises(ValueError, match=r"has 5 values|is neither a number of pixels nor a percentage"):
        BoxValues.parse(text)


def test_percentages_are_of_the_side_they_are_added_to():
    box = BoxValues("25%", "10%", 3, "50%").normalize_to_dimensions(width=200, height=80)
    assert box == AbsoluteBoxValues(top=20, right=20, bottom=3, left=100)


def test_a_picture_with_a_margin():
    image = picture(4, 2)
    expanded = ImageUtil.expand_image(image, top=1, right="50%", bottom=2, left=3, fill_color=(1, 2, 3))
    assert expanded.size == (4 + 3 + 2, 2 + 1 + 2)
    array = np.asarray(expanded)
    assert np.array_equal(array[1:3, 3:7], np.asarray(image))
    assert (array[0] == (1, 2, 3)).all()
    assert (array[:, 7:] == (1, 2, 3)).all()
    same = ImageUtil.expand_image(image, AbsoluteBoxValues(1, 2, 2, 3), fill_color=(1, 2, 3))
    assert np.array_equal(np.asarray(same), array)


def test_a_mask_for_what_is_to_be_painted():
    mask = np.asarray(ImageUtil.create_outpaint_mask_image(4, 2, top=1, left="25%"))
    assert mask.shape == (3, 5, 3)
    assert (mask[1:, 1:] == 0).all()
    assert (mask[0] == 255).all()
    assert (mask[:, 0] == 255).all()


def test_factors():
    assert ScaleFactor.parse("2x") == ScaleFactor(2)
    assert ScaleFactor.parse(" 1.5X ") == ScaleFactor(1.5)
    assert [str(ScaleFactor(value)) for value in (2, 2.0, 1.5)] == ["2x", "2x", "1.5x"]
    assert ScaleFactor(1.5).get_scaled_value(100) == 144
    assert ScaleFactor(1.5).get_scaled_value(100, pixel_steps=1) == 150
    for text in ("2", "x", "-1x", "1,5x", "2x2", "1e3x"):
        with pytest.raises(ValueError, match="is not a scale factor"):
            ScaleFactor.parse(text)
    with pytest.raises(ValueError, match="leaves nothing"):
        ScaleFactor.parse("0x")


def test_sizes_from_numbers_factors_and_pictures(tmp_path):
    picture(50, 40).save(tmp_path / "x.png")
    resolve = DimensionResolver.resolve
    assert resolve(height=7, width=9) == (9, 7)
    assert resolve(height=7, width=9, reference_image_path=tmp_path / "none.png") == (9, 7)
    assert resolve(height=None, width=None) == (1024, 1024)
    assert resolve(height=ScaleFactor(2), width=64, default=128) == (64, 128)
    assert resolve(height=None, width=ScaleFactor(2), reference_image_path=tmp_path / "x.png") == (96, 32)
    with pytest.raises(ImageError, match="does not exist"):
        resolve(height=None, width=64, reference_image_path=tmp_path / "none.png")


# ---- writing


def test_the_next_free_name(tmp_path):
    path = tmp_path / "image.png"
    for name in ("image.png", "image_1.png", "image_2.png"):
        assert ImageUtil.resolve_output_path(path) == tmp_path / name
        assert ImageUtil.save_image(picture(), path) == tmp_path / name
    assert ImageUtil.resolve_output_path(path, overwrite=True) == path
    (tmp_path / "link.png").symlink_to("nowhere")
    assert ImageUtil.resolve_output_path(str(tmp_path / "link.png")) == tmp_path / "link_1.png"
    (tmp_path / "folder.png").mkdir()
    assert ImageUtil.save_image(picture(), tmp_path / "folder.png") == tmp_path / "folder_1.png"


def test_overwriting_if_asked(tmp_path):
    path = tmp_path / "image.png"
    ImageUtil.save_image(picture(5, 3), path, {"seed": 1}, export_json_metadata=True)
    assert ImageUtil.save_image(picture(6, 3), path, {"seed": 2}, export_json_metadata=True, overwrite=True) == path
    assert sorted(file.name for file in tmp_path.iterdir()) == ["image.metadata.json", "image.png"]
    assert oriented_size(path) == (6, 3)
    assert json.loads((tmp_path / "image.metadata.json").read_text()) == {"seed": 2}


def test_folders_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "image.png"
    assert ImageUtil.save_image(picture(), path) == path


def test_a_failure_leaves_nothing(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")

    def fail(error):
        def write(file):
            file.write(b"half")
            raise error

        return write

    for error in (KeyboardInterrupt(), ValueError("a bug"), OSError(28, "No space left on device")):
        for overwrite in (True, False):
            with pytest.raises(type(error) if not isinstance(error, OSError) else OutputError) as caught:
                write_atomically(path, fail(error), overwrite=overwrite)
    assert str(caught.value) == f"cannot write {path}: No space left on device"
    assert [file.name for file in tmp_path.iterdir()] == ["x.bin"]
    assert path.read_bytes() == b"old"


def test_a_name_that_another_takes_meanwhile(tmp_path):
    path = tmp_path / "x.bin"

    def write(file):
        file.write(b"mine")
        path.write_bytes(b"another's")

    assert write_atomically(path, write, overwrite=False) == tmp_path / "x_1.bin"
    assert path.read_bytes() == b"another's"
    assert (tmp_path / "x_1.bin").read_bytes() == b"mine"


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def link(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", link)
    path = tmp_path / "x.bin"
    for name in ("x.bin", "x_1.bin"):
        assert write_atomically(path, lambda file: file.write(b"x"), overwrite=False) == tmp_path / name


def test_a_new_file_may_be_read_by_those_who_may(tmp_path):
    path = write_atomically(tmp_path / "x.bin", lambda file: file.write(b"x"), overwrite=False)
    (tmp_path / "plain").write_text("")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_long_name(tmp_path):
    """The temporary name is not longer than the one that is asked for."""
    path = tmp_path / ("ä" * 120 + ".png")
    assert ImageUtil.save_image(picture(), path) == path


def test_what_goes_beside_must_be_free_too(tmp_path):
    (tmp_path / "x.json").write_text("")
    assert write_atomically(tmp_path / "x.bin", lambda file: None, overwrite=False, beside=".json").name == "x_1.bin"
    assert write_atomically(tmp_path / "x.bin", lambda file: None, overwrite=False).name == "x.bin"


@pytest.mark.parametrize("name", ["x.png", "x.PNG", "x.jpg", "x.jpeg", "x.webp", "x.tiff", "x.bmp", "x.gif", "x.pdf"])
def test_formats_that_can_be_written(tmp_path, name):
    check_output(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    # Settings where there is room for them, and the picture in any case.
    path = ImageUtil.save_image(picture(16, 16), tmp_path / name, {"seed": 1})
    assert path.stat().st_size > 0
    if name.lower().endswith(("png", "jpg", "jpeg", "webp", "tiff")):
        assert MetadataReader.read_exif_metadata(path) == {"seed": 1}


@pytest.mark.parametrize("name", ["x", "x.", "x.txt", "x.psd", "x.xbm", "x.svg", ".png"])
def test_formats_that_cannot(tmp_path, name):
    for write in (check_output, lambda path: ImageUtil.save_image(picture(), path)):
        with pytest.raises(UsageError, match=r"cannot write a picture to .*; use \.png, \.jpg or \.webp"):
            write(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_settings_that_do_not_fit(tmp_path, caplog):
    """EXIF in a JPEG ends at 64 KB; the picture is worth more than its settings."""
    path = ImageUtil.save_image(picture(), tmp_path / "x.jpg", {"prompt": "x" * 70_000})
    assert oriented_size(path) == (5, 3)
    assert MetadataReader.read_exif_metadata(path) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert re.search(r"the settings do not fit into .*x\.jpg \(.*\): it is written without them", caplog.text)
    path = ImageUtil.save_image(picture(), tmp_path / "x.png", {"prompt": "x" * 70_000})
    assert MetadataReader.read_exif_metadata(path) == {"prompt": "x" * 70_000}


# ---- settings


def test_settings_as_mflux_writes_them(tmp_path):
    """UserComment with its code for ASCII, then JSON."""
    path = ImageUtil.save_image(picture(), tmp_path / "x.png", {"prompt": "grün", "seed": 3})
    with PIL.Image.open(path) as image:
        comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment == b'ASCII\x00\x00\x00{"prompt": "gr\\u00fcn", "seed": 3}'


@pytest.mark.parametrize(
    ("comment", "found"),
    [
        (b'ASCII\x00\x00\x00{"seed": 1}', {"seed": 1}),
        (b'{"seed": 1}', {"seed": 1}),
        ('ASCII\x00\x00\x00{"prompt": "grün"}'.encode(), {"prompt": "grün"}),
        (b"ASCII\x00\x00\x00my holidays", None),
        (b"UNICODE\x00h\x00o\x00", None),
        (b"ASCII\x00\x00\x00[1]", None),
        (b"\x00\x00\x00\x00\x00\x00\x00\x00", None),
        (b"", None),
    ],
)
def test_comments_of_all_kinds(tmp_path, comment, found):
    exif = PIL.Image.Exif()
    exif[0x8769] = {0x9286: comment}
    picture().save(tmp_path / "x.jpg", exif=exif)
    assert MetadataReader.read_exif_metadata(tmp_path / "x.jpg") == found


def test_no_settings(tmp_path):
    picture().save(tmp_path / "x.png")
    (tmp_path / "text").write_text("")
    for name in ("x.png", "text", "none"):
        assert MetadataReader.read_all_metadata(tmp_path / name) == {"exif": None, "xmp": None}


def test_an_xmp_packet(tmp_path):
    metadata = {
        "prompt": "a <circle> & \"more\"\nlines\x00", "seed": 0, "steps": 4, "guidance": None, "model": "dev",
        "generation_time_seconds": 1.5, "mflux_version": "1.0", "lora_paths": ["a/b.safetensors", "C:\\c.safetensors"],
        "lora_scales": [0.5, 1.0],
    }  # fmt: skip
    path = ImageUtil.save_image(picture(), tmp_path / "x.png", metadata)
    assert MetadataReader.read_xmp_metadata(path) == {
        "description": 'a <circle> & "more"\nlines',
        "creator_tool": "mflux 1.0",
        "seed": "0",
        "steps": "4",
        "model": "dev",
        "generation_time": "1.5",
        "loras": "b.safetensors:0.5, c.safetensors:1.0",
    }


def test_an_xmp_packet_that_would_explode(tmp_path):
    packet = MetadataBuilder.build_xmp_packet({"prompt": "x"})
    info = PIL.PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", packet.replace("<x:xmpmeta", "<!DOCTYPE x [<!ENTITY a 'b'>]><x:xmpmeta"))
    picture().save(tmp_path / "x.png", pnginfo=info)
    assert MetadataReader.read_xmp_metadata(tmp_path / "x.png") is None


@settings(max_examples=50, deadline=None)
@given(prompt=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_prompt_survives(prompt):
    image = picture()
    file = io.BytesIO()
    image.save(file, format="PNG", **MetadataBuilder.save_arguments({"prompt": prompt}, "PNG"))
    assert MetadataReader.read_exif_metadata(file) == {"prompt": prompt}
    found = MetadataReader.read_xmp_metadata(file) or {}
    assert "".join(found.get("description", "").split()) == "".join(
        re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]", "", prompt).split()
    )


# ---- what a picture keeps of the one it was made from


def generated(**changes):
    from mflux.models.common.config import ModelConfig
    from mflux.utils.generated_image import GeneratedImage

    details = {
        "image": picture(6, 4), "model_config": ModelConfig.dev(), "seed": 1, "prompt": "a circle", "steps": 2,
        "guidance": 3.5, "precision": mx.float32, "quantization": None, "generation_time": 1.234, "width": 6,
        "height": 4,
    }  # fmt: skip
    return GeneratedImage(**details | changes)


def test_a_picture_made_from_another_one(tmp_path):
    source = {
        "seed": 9,
        "steps": 4,
        "model": "schnell",
        "prompt": "a square",
        "width": 3,
        "height": 4,
        "quantize": None,
    }
    image = generated(prompt="", init_metadata={"exif": source})
    found = MetadataReader.read_exif_metadata(image.save(tmp_path / "x.png"))
    kept = {name: value for name, value in found.items() if name.startswith("original_")}
    assert kept == {"original_seed": 9, "original_steps": 4, "original_model": "schnell", "original_width": 3}
    assert found["prompt"] == "a square"


def test_settings_of_one_s_own(tmp_path):
    image = generated(generation_parameters={"mine": 1})
    assert MetadataReader.read_exif_metadata(image.save(tmp_path / "x.png"))["mine"] == 1
    with pytest.raises(ValueError, match="generation_parameters may not replace seed"):
        generated(generation_parameters={"seed": 2}).save(tmp_path / "y.png")


def test_the_right_half():
    image = generated()
    half = image.get_right_half()
    assert np.array_equal(np.asarray(half.image), np.asarray(image.image)[:, 3:])
    assert half.prompt == "a circle"
    assert image.image.size == (6, 4)


def test_a_heatmap_beside_the_picture(tmp_path):
    class Heatmap:
        image = picture(2, 2)

        def get_metadata(self):
            return {"concept": "circle"}

    image = generated(concept_heatmap=Heatmap())
    assert image.save_with_heatmap(tmp_path / "x.png") == tmp_path / "x.png"
    assert oriented_size(tmp_path / "x_heatmap.png") == (2, 2)
    assert MetadataReader.read_exif_metadata(tmp_path / "x_heatmap.png") == {"concept": "circle"}
    with pytest.raises(ValueError, match="has no concept heatmap"):
        generated().save_concept_heatmap(tmp_path / "y.png")
    assert generated().save_with_heatmap(Path(tmp_path / "z.png")).name == "z.png"
    assert not (tmp_path / "z_heatmap.png").exists()


def test_pictures_side_by_side():
    strip = ImageUtil.to_composite_image([generated(), generated(image=picture(3, 5))])
    assert strip.size == (9, 5)
    assert np.array_equal(np.asarray(strip)[:4, :6], np.asarray(picture(6, 4)))
    assert np.array_equal(np.asarray(strip)[:, 6:], np.asarray(picture(3, 5)))


def test_the_module_s_own_check_runs_before_anything_is_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write to the folder .*file: it is a file; choose another folder"):
        check_output(tmp_path / "file" / "x.png")
    monkeypatch.setattr(picture_files, "Temporary", refuse)
    with pytest.raises(OutputError, match=r"cannot write to the folder .*: Permission denied; choose another folder"):
        check_output(tmp_path / "x.png")


def refuse(*args, **kwargs):
    raise PermissionError(13, "Permission denied")
