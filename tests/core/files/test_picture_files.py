"""Pictures of every depth and format, files that are none, names of all kinds, and settings that cost no picture."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from copy import copy
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageFile
import PIL.PngImagePlugin
import pytest

from mflux.backend import mx
from mflux.errors import ImageError, MfluxError, UsageError
from mflux.utils import picture_files
from mflux.utils.dimension_resolver import DimensionResolver
from mflux.utils.image_util import ImageUtil
from mflux.utils.metadata_reader import MetadataReader, read_settings
from mflux.utils.paths import recorded_file, recorded_source, user_path
from mflux.utils.picture_files import FORMATS, check_output, open_image, oriented_size, plain_settings, save_picture

SIXTEEN = np.array([[0, 1000, 32768, 65535]], np.uint16)
AS_EIGHT = [0, 4, 128, 255]


def shades(source, **options) -> list[int]:
    """The first row of a picture in RGB, whose channels are alike."""
    array = np.asarray(ImageUtil.load_image(source, **options))
    assert (array == array[..., :1]).all()
    return array[0, :, 0].tolist()


def png(bits: int, colours: int, data: bytes, *, width: int, transparent: bytes = b"") -> bytes:
    """One line of pixels as PNG, which Pillow writes with eight bits only."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, colours, 0, 0, 0))
    between = chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + header + between + chunk(b"IDAT", zlib.compress(b"\0" + data)) + chunk(b"IEND", b"")


# ---- pixel depth


def test_sixteen_bits_in_memory():
    for mode, dtype in (("I;16", "<u2"), ("I;16L", "<u2"), ("I;16B", ">u2"), ("I;16N", "=u2")):
        image = PIL.Image.frombytes(mode, (4, 1), SIXTEEN.astype(dtype).tobytes())
        assert image.mode == mode
        assert shades(image) == AS_EIGHT


def test_sixteen_bits_in_a_png(tmp_path):
    PIL.Image.fromarray(SIXTEEN).save(tmp_path / "x.png")
    assert shades(tmp_path / "x.png") == AS_EIGHT
    assert open_image(tmp_path / "x.png").mode == "L"
    # Older versions of Pillow call such pixels 32-bit integers.
    image = PIL.Image.fromarray(SIXTEEN.astype(np.int32))
    image.format = "PNG"
    assert shades(image) == AS_EIGHT
    dark = PIL.Image.fromarray(np.array([[0, 200]], np.int32))
    dark.format = "PNG"
    assert shades(dark) == [0, 1]


@pytest.mark.parametrize(("order", "photometric"), [("<", 1), (">", 1), ("<", 0)])
def test_sixteen_bits_in_a_tiff(tmp_path, order, photometric):
    """Either byte order, and with black or white as zero."""
    values = SIXTEEN if photometric else 65535 - SIXTEEN
    entries = [(256, 4, 4), (257, 4, 1), (258, 3, 16), (259, 3, 1), (262, 3, photometric), (273, 4, 8), (277, 3, 1)]
    entries += [(278, 4, 1), (279, 4, 8)]
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 16)
    content = head + values.astype(f"{order}u2").tobytes() + struct.pack(f"{order}H", len(entries))
    for tag, kind, value in entries:
        packed = struct.pack(f"{order}I", value) if kind == 4 else struct.pack(f"{order}HH", value, 0)
        content += struct.pack(f"{order}HHI", tag, kind, 1) + packed
    (tmp_path / "x.tif").write_bytes(content + bytes(4))
    assert shades(tmp_path / "x.tif") == AS_EIGHT


def test_sixteen_bits_in_a_graymap(tmp_path):
    (tmp_path / "x.pgm").write_bytes(b"P5 4 1 65535\n" + SIXTEEN.astype(">u2").tobytes())
    assert shades(tmp_path / "x.pgm") == AS_EIGHT
    (tmp_path / "dark.pgm").write_bytes(b"P5 2 1 65535\n" + struct.pack(">2H", 0, 250))
    assert shades(tmp_path / "dark.pgm") == [0, 1]
    (tmp_path / "ten.pgm").write_bytes(b"P5 2 1 1023\n" + struct.pack(">2H", 0, 1023))
    assert shades(tmp_path / "ten.pgm") == [0, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 7, 255], [0, 7, 255]),  # bytes in a larger box
        ([0, 257, 65535], [0, 1, 255]),
        ([0, 500_000, 1_000_000], [0, 128, 255]),
        ([-1000, 0, 1000], [0, 128, 255]),
        ([0, 0, 0], [0, 0, 0]),
    ],
)
def test_32_bit_integers(tmp_path, values, expected):
    image = PIL.Image.fromarray(np.array([values], np.int32))
    assert image.mode == "I"
    image.save(tmp_path / "x.tif")
    for source in (image, tmp_path / "x.tif"):
        assert shades(source) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 0.5, 1], [0, 128, 255]),
        ([0.25, 0.25, 0.25], [64, 64, 64]),
        ([0, 20, 80.0], [0, 64, 255]),  # metres
        ([-1, 0, 1], [0, 128, 255]),
        ([255, 255, 255], [255, 255, 255]),
        ([float("nan"), 5, float("inf")], [0, 255, 255]),
    ],
)
def test_floats(tmp_path, values, expected):
    image = PIL.Image.fromarray(np.array([values], np.float32))
    image.save(tmp_path / "x.tif")
    (tmp_path / "x.pfm").write_bytes(b"Pf\n3 1\n-1\n" + np.array(values, "<f4").tobytes())
    for source in (image, tmp_path / "x.tif", tmp_path / "x.pfm"):
        assert shades(source) == expected


def test_floats_that_are_no_numbers(tmp_path):
    image = PIL.Image.fromarray(np.array([[np.nan, np.inf]], np.float32))
    image.save(tmp_path / "x.tif")
    for source in (image, tmp_path / "x.tif"):
        with pytest.raises(ImageError, match=r"the image .* cannot be read \(none of its pixels is a finite number\)"):
            ImageUtil.load_image(source)


def test_a_range_that_had_to_be_chosen_is_told(caplog):
    caplog.set_level("INFO", "mflux")
    ImageUtil.load_image(PIL.Image.fromarray(np.array([[2, 80]], np.float32)))
    assert caplog.messages == ["a picture's pixels go from 2 to 80: 0 is taken as black and 80 as white"]


def test_a_deep_picture_is_turned_too(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.fromarray(SIXTEEN).save(tmp_path / "x.png", exif=exif)
    image = open_image(tmp_path / "x.png")
    assert image.size == (1, 4) == oriented_size(tmp_path / "x.png")
    assert np.asarray(image)[:, 0].tolist() == AS_EIGHT


def test_a_depth_map_of_our_own(tmp_path):
    from mflux.models.common.controls.depth_pro.depth_pro import DepthResult, open_photo
    from mflux.models.depth_pro.cli.save_depth import encode

    depth = mx.array(np.linspace(0, 2, 64, dtype=np.float32).reshape(1, 1, 8, 8))
    plain = PIL.Image.fromarray(np.rint(np.array(depth)[0, 0] / 2 * 255).astype(np.uint8))
    result = DepthResult(plain, depth, 0.0, 2.0)
    for kind in ("png", "png16"):
        path = tmp_path / f"{kind}.png"
        path.write_bytes(encode(result, kind))
        for read in (ImageUtil.load_image, open_photo):
            assert np.abs(np.asarray(read(path))[..., 0].astype(int) - np.asarray(plain)).max() <= 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (png(16, 0, struct.pack(">3H", 0, 1000, 32768), width=3, transparent=struct.pack(">H", 1000)), [0, 255, 128]),
        (png(8, 0, bytes([0, 9, 7]), width=3, transparent=struct.pack(">H", 9)), [0, 255, 7]),
        (png(2, 0, bytes([0b00011000]), width=3, transparent=struct.pack(">H", 1)), [0, 255, 170]),
        (png(4, 0, bytes([0x03, 0x70]), width=3, transparent=struct.pack(">H", 3)), [0, 255, 119]),
        (png(1, 0, bytes([0b01000000]), width=3, transparent=struct.pack(">H", 0)), [255, 255, 255]),
        (png(16, 2, struct.pack(">9H", *[0] * 3, *[900] * 3, *[32768] * 3), width=3,
             transparent=struct.pack(">3H", 900, 900, 900)), [0, 255, 128]),
        (png(16, 4, struct.pack(">6H", 0, 65535, 0, 0, 32768, 65535), width=3), [0, 255, 128]),
        (png(16, 6, struct.pack(">12H", *[0] * 3, 65535, *[0] * 3, 0, *[32768] * 3, 65535), width=3), [0, 255, 128]),
    ],
)  # fmt: skip
def test_transparency_at_every_depth(tmp_path, content, expected):
    (tmp_path / "x.png").write_bytes(content)
    assert shades(tmp_path / "x.png") == expected
    with PIL.Image.open(tmp_path / "x.png") as image:
        before = dict(image.info)
        assert shades(image) == expected
        assert image.info == before


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa"])
def test_alpha_in_every_mode(mode):
    grey = PIL.Image.fromarray(np.array([[[40, 255], [0, 0]]], np.uint8))
    image = grey.convert("RGBA").convert(mode) if mode in ("RGBA", "RGBa") else grey.convert(mode)
    if mode == "PA":
        image.putalpha(grey.getchannel("A"))
    assert image.mode == mode
    assert shades(image) == [40, 255]
    assert shades(image, composite_alpha=False) == [40, 0]


def test_colours_of_other_kinds(tmp_path):
    """What is no RGB comes out as the same colour, near enough."""
    red = PIL.Image.new("RGB", (8, 8), (200, 30, 40))
    for mode in ("CMYK", "YCbCr", "HSV"):
        found = np.asarray(ImageUtil.load_image(red.convert(mode)))[0, 0].astype(int)
        assert np.abs(found - (200, 30, 40)).max() <= 3, mode
    red.convert("CMYK").save(tmp_path / "x.jpg", quality=95)
    assert np.abs(np.asarray(ImageUtil.load_image(tmp_path / "x.jpg"))[0, 0].astype(int) - (200, 30, 40)).max() <= 8
    lab = PIL.Image.frombytes("LAB", (1, 1), bytes([135, 67, 40]))  # L* 53, a* 67, b* 40
    found = np.asarray(ImageUtil.load_image(lab))[0, 0].astype(int)
    assert found[0] > 200 and found[1:].max() < 100
    assert shades(PIL.Image.fromarray(np.array([[False, True]]))) == [0, 255]


# ---- formats


def test_frames_after_the_first_are_left_out(tmp_path):
    frames = [PIL.Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for name in ("x.gif", "x.webp", "x.tiff", "x.png"):
        lossless = {"lossless": True} if name == "x.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **lossless)
        assert np.asarray(ImageUtil.load_image(tmp_path / name))[0, 0].tolist() == [255, 0, 0]
    frames[0].save(tmp_path / "x.mpo", "MPO", save_all=True, append_images=frames[1:])
    assert np.asarray(ImageUtil.load_image(tmp_path / "x.mpo"))[0, 0, 0] > 250


@pytest.mark.parametrize("kind", ["EPS", "PDF", "TGA", "ICO", "PCX", "SGI", "DDS", "SPIDER", "MSP", "XBM"])
def test_formats_that_are_not_taken(tmp_path, kind):
    image = PIL.Image.new("1" if kind in ("MSP", "XBM") else "F" if kind == "SPIDER" else "RGB", (16, 16))
    image.save(tmp_path / "x", format=kind)
    (tmp_path / "x").rename(tmp_path / "x.png")
    for read in (open_image, oriented_size, ImageUtil.load_image, read_settings):
        with pytest.raises(ImageError, match=r"x\.png is not a picture that can be read: give a PNG, JPEG or WebP"):
            read(tmp_path / "x.png")
    assert MetadataReader.read_all_metadata(tmp_path / "x.png") == {"exif": None, "xmp": None}


def test_no_other_program_is_started(tmp_path, monkeypatch):
    """Ghostscript would be, for PostScript in a file that is called PNG."""
    from PIL import EpsImagePlugin

    def start(*args, **kwargs):
        raise AssertionError("a program was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", start)
    monkeypatch.setattr("subprocess.Popen.__init__", start)
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "x.png", format="EPS")
    with pytest.raises(ImageError, match="is not a picture"):
        open_image(tmp_path / "x.png")


def test_only_one_place_opens_pictures():
    """Whatever opens a file with all of Pillow's readers has forgotten FORMATS."""
    source = Path(picture_files.__file__).parents[1]
    found = {
        path.name
        for path in source.rglob("*.py")
        for line in path.read_text().splitlines()
        if "Image.open(" in line and "formats=" not in line
    }
    assert found == set()
    assert not set(FORMATS) & {"EPS", "PDF", "WMF", "FITS", "HDF5", "GRIB", "BUFR", "XVTHUMB"}


def in_scans(path, number):
    """A progressive JPEG whose last scan comes so often."""
    image = PIL.Image.effect_noise((64, 64), 90).convert("RGB")
    image.save(path, progressive=True)
    content = path.read_bytes()
    start, end = content.rindex(b"\xff\xda"), content.rindex(b"\xff\xd9")
    path.write_bytes(content[:start] + content[start:end] * number + content[end:])
    return path


def test_scans_are_counted_before_a_picture_is_decoded(tmp_path, monkeypatch):
    few = in_scans(tmp_path / "few.jpg", 20)
    assert open_image(few).size == (64, 64)
    # What stands behind the picture, or inside its settings, is none of its scans.
    exif = PIL.Image.Exif()
    exif[0x9286] = b"\xff\xda" * 300
    PIL.Image.new("RGB", (9, 9)).save(tmp_path / "told.jpg", exif=exif)
    (tmp_path / "told.jpg").write_bytes((tmp_path / "told.jpg").read_bytes() + b"\xff\xda\0\2" * 300)
    assert open_image(tmp_path / "told.jpg").size == (9, 9)
    many = in_scans(tmp_path / "many.jpg", 2000)
    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    with PIL.Image.open(many) as image, many.open("rb") as file:
        for source in (many, file, image):
            with pytest.raises(ImageError, match=r"comes in more than 100 scans"):
                open_image(source)
    with pytest.raises(ImageError, match=r"comes in more than 100 scans"):
        oriented_size(many)


DEEP = {
    "floats": (lambda size: PIL.Image.new("F", size, 0.5), ".tif", 4),
    "integers": (lambda size: PIL.Image.new("I", size, 70_000), ".tif", 4),
    "sixteen bits": (lambda size: PIL.Image.new("I;16", size, 7), ".png", 2),
    "transparent": (lambda size: PIL.Image.new("RGBA", size, (1, 2, 3, 100)), ".png", 4),
    "transparent grey": (lambda size: PIL.Image.new("LA", size, (1, 100)), ".png", 4),
    "plain": (lambda size: PIL.Image.new("RGB", size, (1, 2, 3)), ".png", 4),
}


@pytest.mark.parametrize("name", DEEP)
def test_what_is_read_is_three_times_as_large_at_most(tmp_path, name):
    """In memory while it is turned, over what it is decoded."""
    make, ending, bytes_a_pixel = DEEP[name]
    size = (3000, 2000)
    make(size).save(tmp_path / f"x{ending}")
    program = """
import resource, sys
from mflux.utils.picture_files import alpha_of, as_rgb, open_image
small, large = sys.argv[1:]
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
as_rgb(open_image(small), on_white=True)
before = peak()
image = open_image(large)
as_rgb(image, on_white=True)
alpha_of(image)
print(peak() - before)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("there is no /proc here")
    make((40, 20)).save(tmp_path / f"small{ending}")
    call = [sys.executable, "-c", program, str(tmp_path / f"small{ending}"), str(tmp_path / f"x{ending}")]
    grown = int(subprocess.run(call, capture_output=True, text=True, check=True).stdout)
    decoded = size[0] * size[1] * bytes_a_pixel
    assert grown < 3 * decoded + 25e6, f"{grown / decoded:.1f} times"


def test_settings_in_xmp_without_end(tmp_path):
    """Nested descriptions, each of which has the text of all within it; and ordinary ones."""
    for depth, found in ((20, True), (200_000, False)):
        body = "<description>" * depth + "a" + "</description>" * depth
        packet = f'<?xpacket begin=""?><x:xmpmeta xmlns:x="adobe:ns:meta/">{body}</x:xmpmeta><?xpacket end="w"?>'
        info = PIL.PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", packet)
        PIL.Image.new("L", (4, 4)).save(tmp_path / "x.png", pnginfo=info)
        assert (MetadataReader.read_xmp_metadata(tmp_path / "x.png") is not None) == found


def test_bombs_are_told_by_every_reader(tmp_path):
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 1, 0, 0, 0, 0)
    content = bytearray(png(1, 0, b"\0", width=8))
    content[16:29] = header
    content[29:33] = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (tmp_path / "x.png").write_bytes(content)
    resolve = lambda path: DimensionResolver.resolve(None, None, path)  # noqa: E731
    readers = (open_image, oriented_size, read_settings, resolve, MetadataReader.read_exif_metadata)
    for read in (*readers, MetadataReader.read_xmp_metadata):
        with pytest.raises(ImageError, match=r"x\.png cannot be read \(Image size \(2500000000 pixels\) exceeds limit"):
            read(tmp_path / "x.png")


# ---- files that are no pictures


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "is only Git LFS's pointer to a picture",
        ),
        (b"\n<!DOCTYPE html><html>", "is a web page and not a picture"),
        (b"<HTML>", "is a web page and not a picture"),
        (b"", "is empty: fetch it again"),
        (b"{}", "is not a picture that can be read"),
        (b"\x89PNG\r\n\x1a\n", "is not a picture that can be read"),
    ],
)
def test_what_a_file_is_instead(tmp_path, content, told):
    (tmp_path / "x.png").write_bytes(content)
    for read in (open_image, oriented_size, read_settings):
        with pytest.raises(ImageError, match=told):
            read(tmp_path / "x.png")


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path, "Is a directory"),
        (tmp_path / "pipe", "it is a pipe, a socket or a device"),
        ("/dev/zero", "it is a pipe, a socket or a device"),
        ("x" * 300 + ".png", "File name too long"),
    ):
        for read in (open_image, oriented_size, read_settings):
            with pytest.raises(ImageError, match=reason):
                read(path)


# ---- names


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("", "a path is empty"),
        (" ", "a path is empty"),
        ("a\0b.png", r"a\\x00b.png is no name that a file can have: it holds a NUL character"),
        ("a\ud800b.png", r"a\\ud800b.png is no name that a file can have: it holds half a character"),
        ("~nobody-at-all/x.png", "there is no user nobody-at-all here; write ./~nobody-at-all/x.png"),
    ],
)
def test_names_that_no_file_has(name, told):
    write = lambda path: save_picture(PIL.Image.new("RGB", (1, 1)), path)  # noqa: E731
    for use in (
        user_path,
        open_image,
        oriented_size,
        read_settings,
        check_output,
        write,
        ImageUtil.resolve_output_path,
    ):
        with pytest.raises(UsageError, match=told):
            use(name)
    # These tell nothing, as of any name.
    assert MetadataReader.read_exif_metadata(name) is None


def test_the_home_folder_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    image = PIL.Image.new("RGB", (4, 2), "red")
    assert ImageUtil.save_image(image, "~/a/x.png", {"seed": 1}) == tmp_path / "a" / "x.png"
    assert open_image("~/a/x.png").size == (4, 2) == oriented_size(Path("~/a/x.png"))
    assert ImageUtil.load_image(b"~/a/x.png").size == (4, 2)
    assert MetadataReader.read_exif_metadata("~/a/x.png") == {"seed": 1} == read_settings("~/a/x.png")
    assert ImageUtil.resolve_output_path("~/a/x.png") == tmp_path / "a" / "x_1.png"
    assert DimensionResolver.resolve(None, None, "~/a/x.png")[1] == 0
    assert check_output("~/b/x.png").parent.is_dir()


def test_a_name_that_begins_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ImageUtil.save_image(PIL.Image.new("RGB", (4, 2)), "~tmp.png")
    assert (tmp_path / "~tmp.png").is_file()
    assert oriented_size("~tmp.png") == (4, 2)


def test_a_name_that_is_not_unicode(tmp_path):
    path = os.fsencode(tmp_path) + b"/gr\xfcn.png"
    saved = ImageUtil.save_image(
        PIL.Image.new("RGB", (4, 2)), os.fsdecode(path), {"seed": 1}, export_json_metadata=True
    )
    assert oriented_size(path) == (4, 2) == oriented_size(saved)


# ---- what a picture tells of this machine


@pytest.mark.parametrize(
    ("name", "recorded"),
    [
        ("org/name", "org/name"),
        ("org/name:file.safetensors", "org/name:file.safetensors"),
        ("style", "style"),
        ("/home/me/models/mine", "mine"),
        ("/home/me/models/mine/", "mine"),
        ("~/models/mine", "mine"),
        ("./mine", "mine"),
        ("../a/mine", "mine"),
        ("C:\\Users\\me\\mine", "mine"),
        (Path("a/b"), "b"),
        ("/home/someone/.cache/hub/models--org--a-name/snapshots/0123abc", "org/a-name"),
        ("~/hub/models--org--a-name/snapshots/0123abc/x/y.safetensors", "org/a-name:x/y.safetensors"),
    ],
)
def test_what_models_and_loras_are_called(name, recorded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recorded_source(name) == recorded
    # What is there is of this machine.
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").mkdir()
    assert recorded_source("org/name") == "name"


def test_what_files_are_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("x.png", "a/x.png", "/a/b/x.png", "~/x.png", Path("/a/x.png"), b"a/x.png", "C:\\a\\x.png"):
        assert recorded_file(path) == "x.png"
    assert recorded_file(".") == tmp_path.name


def generated(**changes):
    from mflux.models.common.config import ModelConfig
    from mflux.utils.generated_image import GeneratedImage

    details = {
        "image": PIL.Image.new("RGB", (4, 4)), "model_config": copy(ModelConfig.dev()), "seed": 1, "prompt": "a circle",
        "steps": 2, "guidance": 3.5, "precision": mx.float32, "quantization": None, "generation_time": 1.2,
        "width": 4, "height": 4,
    }  # fmt: skip
    return GeneratedImage(**details | changes)


def test_no_folder_of_this_machine_is_in_a_picture(tmp_path):
    lora = tmp_path / "secret" / "a.safetensors"
    source = tmp_path / "secret" / "x.png"
    old = {"model": str(tmp_path / "secret" / "m"), "lora_paths": [str(lora), "org/name"], "prompt": "", "seed": 5}
    image = generated(
        lora_paths=[str(lora), "org/name:b.safetensors"], lora_scales=[1, 0.5], image_path=source, image_strength=0.5,
        image_paths=[str(source), source], controlnet_image_path=source, masked_image_path=str(source),
        depth_image_path=source, redux_image_paths=[source], redux_image_strengths=[1.0],
        init_metadata={"exif": old}, generation_parameters={"edited": source},
    )  # fmt: skip
    image.model_path = str(tmp_path / "secret" / "model")
    image.model_config.model_name = str(tmp_path / "secret" / "model")
    for name in ("x.png", "x.jpg"):
        path = image.save(tmp_path / name, export_json_metadata=True)
        for file in (path, path.with_suffix(".metadata.json")):
            assert b"secret" not in file.read_bytes()
            assert str(tmp_path).encode() not in file.read_bytes()
    settings = read_settings(path)
    assert (settings["model"], settings["model_path"]) == ("model", "model")
    assert settings["lora_paths"] == ["a.safetensors", "org/name:b.safetensors"]
    assert settings["image_paths"] == ["x.png", "x.png"]
    assert settings["edited"] == settings["depth_image_path"] == settings["image_path"] == "x.png"
    assert settings["original_lora_paths"] == ["a.safetensors", "org/name"]
    assert (settings["original_model"], settings["original_seed"]) == ("m", 5)


# ---- settings that never cost a picture


def test_numbers_of_numpy_and_mlx(tmp_path):
    image = generated(seed=np.int64(7), steps=np.int32(4), guidance=np.float32(2.5), height=np.uint16(4))
    image.generation_parameters = {"array": np.arange(3), "of_mlx": mx.array(2), "flag": np.bool_(True), 3: {1}}
    path = image.save(tmp_path / "x.png", export_json_metadata=True)
    found = read_settings(path)
    assert found == json.loads(path.with_suffix(".metadata.json").read_text())
    assert (found["seed"], found["steps"], found["guidance"], found["height"]) == (7, 4, 2.5, 4)
    assert (found["array"], found["of_mlx"], found["flag"], found["3"]) == ([0, 1, 2], 2, True, [1])


def test_values_of_every_kind(tmp_path, caplog):
    class Silent:
        def __str__(self):
            raise RuntimeError("nothing to say")

    endless: list = []
    endless.append(endless)
    settings = {
        "path": Path("/a/b.png"), "nan": float("nan"), "inf": [float("inf")], "object": {1j: 2j}, "bytes": b"x",
        "silent": Silent(), "endless": endless, "long": 10**5000, "half": "\ud800", "ok": 1, "text": np.str_("x"),
    }  # fmt: skip
    assert plain_settings(settings) == {
        "path": "b.png", "nan": "nan", "inf": ["inf"], "object": {"1j": "2j"}, "bytes": "b'x'", "half": "\ud800",
        "ok": 1, "text": "x",
    }  # fmt: skip
    left_out = [record.message.partition(" cannot")[0] for record in caplog.records]
    assert left_out == ["the setting silent", "the setting endless", "the setting long"]
    path = ImageUtil.save_image(PIL.Image.new("RGB", (4, 4)), tmp_path / "x.png", settings, export_json_metadata=True)
    assert read_settings(path)["half"] == "\ud800" == read_settings(path.with_suffix(".metadata.json"))["half"]


def test_pictures_without_settings(tmp_path):
    path = generated().save(tmp_path / "x.png", embed_metadata=False)
    assert MetadataReader.read_all_metadata(path) == {"exif": None, "xmp": None}
    path = generated().save(tmp_path / "y.png", False, False, False)
    with pytest.raises(MfluxError, match=r"y\.png carries no settings"):
        read_settings(path)
    # A program's own setting; no command changes it.
    assert ImageUtil.embed_metadata_enabled


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_decoded_picture_that_is_no_picture(value):
    decoded = mx.zeros((1, 3, 4, 4))
    decoded[0, 1, 2, 3] = value
    with pytest.raises(MfluxError, match="the decoded picture holds 1 numbers of 48 that are not finite"):
        ImageUtil.to_pil(decoded)


# ---- mflux-info


def test_info_of_a_sidecar(cli, tmp_path):
    path = generated().save(tmp_path / "x.png", export_json_metadata=True)
    result = cli("info", path)
    assert result.status == 0
    assert cli("info", path.with_suffix(".metadata.json")).out == result.out
    for content, told in (("[1]", "is not a picture"), ("{", "it is truncated"), ('{"a": ' * 3000, "it is damaged")):
        (tmp_path / "bad.json").write_text(content)
        result = cli("info", tmp_path / "bad.json")
        assert result.status == 1 and told in result.errors[0]
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + b'{"seed": 3}')
    assert cli("info", tmp_path / "bom.json").out == "Seed: 3\n"


def test_info_shows_nothing_raw(cli, tmp_path):
    hostile = {"prompt": "\x1b[2J\ud800\u202e\r\nx", "\x1b]0;title\x07": "y", "large": "z" * 10**6}
    path = ImageUtil.save_image(
        PIL.Image.new("RGB", (4, 4)), tmp_path / "x.png", hostile | {f"a{n}": n for n in range(999)}
    )
    result = cli("info", path)
    assert result.status == 0
    assert result.out.splitlines()[:2] == ["Prompt: \\x1b[2J\\ud800\\u202e\\r\\nx", "\\x1b]0;title\\x07: y"]
    assert all(line.isprintable() for line in result.out.splitlines())
    assert len(result.out) < 50_000 and len(result.out.splitlines()) < 300


# ---- stepwise pictures


def test_steps_are_decoded_in_tiles_as_the_last_picture_is(tiny_schnell, tmp_path, monkeypatch):
    from mflux.callbacks.instances.stepwise_handler import StepwiseHandler
    from mflux.models.common.networks.autoencoders.tiling import TilingConfig
    from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator
    from mflux.models.flux.variants.txt2img.flux import Flux1

    monkeypatch.setenv("HOME", str(tmp_path))
    flux = Flux1(model_path=str(tiny_schnell))
    flux.tiling_config = TilingConfig(vae_decode_tile_size=32)
    sizes = []
    decode = type(flux.vae).decode

    def watch(self, latents):
        sizes.append(latents.shape[2:])
        return decode(self, latents)

    monkeypatch.setattr(type(flux.vae), "decode", watch)
    flux.callbacks.register(StepwiseHandler(flux, "~/steps", FluxLatentCreator))
    last = flux.generate_image(3, "x", 1, 64, 64)
    tile = 32 // flux.vae.spatial_scale
    assert len(sizes) > 3 and max(max(size) for size in sizes) <= tile
    written = sorted(path.name for path in (tmp_path / "steps").iterdir())
    assert written == ["seed_3_composite.png", "seed_3_step0of1.png", "seed_3_step1of1.png"]
    assert np.array_equal(open_image("~/steps/seed_3_step1of1.png"), last.image)
