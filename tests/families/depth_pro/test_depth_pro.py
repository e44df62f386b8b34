"""Depth Pro without torch: the command from end to end on a tiny random checkpoint, and its parts."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from support.small_depth_pro import TINY, published, vit, write_model

from mflux.backend import mx, nn
from mflux.cpu import work
from mflux.errors import CheckpointError, ImageError, UsageError
from mflux.models.common.controls.depth_pro.depth_pro import DepthPro
from mflux.models.common.controls.depth_pro.network import (
    DepthProConfig,
    DepthProForDepthEstimation,
    Upsample,
    cut_patches,
    merge_patches,
    resize_bilinear,
)
from mflux.models.depth_pro.cli import save_depth


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("depth") / "model")


@pytest.fixture
def photo(tmp_path):
    rows, columns = np.mgrid[0:30, 0:46]
    pixels = np.stack([rows * 8, columns * 5, (rows * columns) % 256], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "my.photo.png")
    return tmp_path / "my.photo.png"


def run(*argv) -> int:
    return save_depth.main([str(argument) for argument in argv])


def test_command_writes_beside_the_photo_and_never_over_a_file(model, photo, capsys):
    for name in ("my.photo_depth.png", "my.photo_depth_1.png", "my.photo_depth_2.png"):
        assert run("--image-path", photo, "--model", model) == 0
        assert capsys.readouterr().out == f"{photo.parent / name}\n"
    first, second = (Image.open(photo.parent / name) for name in ("my.photo_depth.png", "my.photo_depth_1.png"))
    assert first.size == (46, 30) and first.mode == "L"
    assert np.asarray(first).std() > 5
    assert np.array_equal(first, second)


def test_formats_agree_with_the_class(model, photo, tmp_path, capsys):
    result = DepthPro(model_path=model).create_depth_map(photo)
    assert run("--image-path", photo, "--model", model, "--format", "png16", "--output", tmp_path / "a.png") == 0
    assert run("--image-path", photo, "--model", model, "--output", tmp_path / "b.npy") == 0
    assert run("--image-path", photo, "--model", model, "--colormap", "rainbow", "--output", tmp_path / "c") == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in ("a.png", "b.npy", "c.png")]

    deep = Image.open(tmp_path / "a.png")
    assert deep.mode == "I;16" and deep.size == (46, 30)
    assert np.abs(np.asarray(deep) / 257.0 - np.asarray(result.depth_image)).max() <= 0.51
    assert float(deep.text["min_depth"]) == result.min_depth and float(deep.text["max_depth"]) == result.max_depth
    assert float(deep.text["focal_length_px"]) == pytest.approx(result.focal_length_px)

    metres = np.load(tmp_path / "b.npy")
    assert metres.dtype == np.float32 and np.array_equal(metres, np.array(result.metric_depth))

    coloured = np.asarray(Image.open(tmp_path / "c.png"))
    assert np.array_equal(coloured, save_depth.colour(result.relative_depth(), "rainbow"))
    assert coloured.shape == (30, 46, 3)


@pytest.mark.parametrize("name", save_depth.COLORMAPS)
def test_colormaps_run_from_far_to_near(name):
    points = save_depth.COLORMAPS[name]
    ends = save_depth.colour(np.array([[0.0, 1.0]]), name)
    assert [bytes(colour).hex() for colour in ends[0]] == [points[0], points[-1]]
    ramp = save_depth.colour(np.linspace(0, 1, 256), name).astype(int)
    assert len(np.unique(ramp, axis=0)) > 200 and np.abs(np.diff(ramp, axis=0)).max() < 12


def test_near_is_bright_and_metres_follow_from_the_angle(model, photo, tmp_path):
    Image.open(photo).resize((345, 290)).save(tmp_path / "large.png")
    result = DepthPro(model_path=str(model)).create_depth_map(str(tmp_path / "large.png"))
    depth = np.array(result.depth_array)
    assert depth.shape == (1, 1, 256, 256) and depth.dtype == np.float32
    assert (result.min_depth, result.max_depth) == (depth.min(), depth.max()) and result.min_depth > 0
    assert 50 < np.degrees(2 * np.arctan(345 / 2 / result.focal_length_px)) < 60
    metres, shades = np.array(result.metric_depth), np.asarray(result.depth_image)
    assert metres.shape == shades.shape == (290, 345)
    assert np.corrcoef(1 / metres.ravel(), shades.ravel())[0, 1] > 0.95
    nearest, farthest = (result.focal_length_px / 345 / depth for depth in (result.max_depth, result.min_depth))
    assert nearest * 0.999 < metres.min() < metres.max() < farthest * 1.001


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_orientation_is_honoured(model, tmp_path, orientation):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
    upright = Image.fromarray(pixels)
    upright.save(tmp_path / "upright.png")
    # How a camera held another way would have stored the same view.
    back = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    stored = upright.transpose(back[orientation]) if orientation in back else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "stored.png", exif=exif)
    assert stored.size == ((24, 40) if orientation in (6, 8) else (40, 24))

    depth = DepthPro(model_path=model)
    expected, got = (depth.create_depth_map(tmp_path / name) for name in ("upright.png", "stored.png"))
    assert got.depth_image.size == (40, 24)
    assert np.array_equal(expected.depth_array, got.depth_array)


def test_sixteen_bit_gray_photo_is_not_cut_off(model, tmp_path):
    gray = np.linspace(0, 65535, 40 * 24).reshape(24, 40).astype(np.uint16)
    Image.fromarray(gray).save(tmp_path / "deep.png")
    Image.fromarray(np.rint(gray / 257).astype(np.uint8)).save(tmp_path / "plain.png")
    depth = DepthPro(model_path=model)
    deep, plain = (depth.create_depth_map(tmp_path / name).depth_array for name in ("deep.png", "plain.png"))
    assert np.array_equal(deep, plain)


def test_a_network_without_the_angle_gives_no_metres(tmp_path, photo, capsys):
    folder = write_model(tmp_path / "blind", use_fov_model=False)
    result = DepthPro(model_path=folder).create_depth_map(photo)
    assert result.metric_depth is None and result.focal_length_px is None
    assert run("--image-path", photo, "--model", folder, "--format", "npy") == 2
    assert "no field of view" in capsys.readouterr().err
    assert run("--image-path", photo, "--model", folder) == 0
    # It also takes a file that has that head.
    (write_model(tmp_path / "seeing") / "config.json").write_text(json.dumps({**TINY, "use_fov_model": False}))
    assert DepthPro(model_path=tmp_path / "seeing").create_depth_map(photo).metric_depth is None


def test_preprocessor_config_is_followed(tmp_path, photo):
    folder = write_model(tmp_path / "model")
    plain = DepthPro(model_path=folder)
    settings = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "size": {"height": 80, "width": 80}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    changed = DepthPro(model_path=folder)
    image = Image.open(photo)
    assert plain._pixels(image).shape == (1, 64, 64, 3) and changed._pixels(image).shape == (1, 80, 80, 3)
    corner = np.asarray(image)[0, 0] / 255
    assert np.allclose(changed._pixels(image)[0, 0, 0], (corner - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.4], atol=1e-6)
    assert np.allclose(plain._pixels(image)[0, 0, 0], (corner - 0.5) / 0.5, atol=1e-6)


def test_error_sentences(model, photo, tmp_path, capsys, monkeypatch):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not a picture")
    other = tmp_path / "other"
    other.mkdir()
    save_file({"transformer.weight": np.zeros(3, np.float32)}, other / "model.safetensors")
    incomplete = write_model(tmp_path / "incomplete")
    network = DepthProForDepthEstimation(DepthProConfig.from_dict(TINY))
    tensors = published(network, 0)
    tensors["head.layers.9.weight"] = tensors.pop("head.layers.2.weight")
    save_file(tensors, incomplete / "model.safetensors")

    cases = [
        (["--image-path", tmp_path / "none.png", "--model", model], 1, "does not exist"),
        (["--image-path", broken, "--model", model], 1, "is not a picture that can be read"),
        (["--image-path", photo, "--model", tmp_path / "none.pt"], 1, "there is no file"),
        (["--image-path", photo, "--model", other], 1, "does not hold Depth Pro"),
        (["--image-path", photo, "--model", incomplete], 1, "head.layers.2.weight"),
        (["--image-path", photo, "--model", incomplete], 1, "head.layers.9.weight"),
        (["--image-path", photo, "--model", model, "-q", "7"], 2, "invalid choice: 7"),
        (["--image-path", photo, "--model", model, "--output", broken / "a.png"], 1, "cannot write"),
        (["--image-path", photo, "--model", "org/name@bad..name"], 1, "is not a revision"),
        (["--image-path", photo, "--model", model, "--output", "a.jpg"], 2, "end it in .png"),
        (["--image-path", photo, "--model", model, "--format", "npy", "--output", "a.png"], 2, "end it in .npy"),
        (["--image-path", photo, "--model", model, "--format", "npy", "--colormap", "ember"], 2, "--format png only"),
    ]
    before = sorted(tmp_path.iterdir())
    for argv, code, sentence in cases:
        assert run(*argv) == code, argv
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1, argv
        assert sentence in captured.err, argv
    assert sorted(tmp_path.iterdir()) == before


def test_quantized(photo, tmp_path, capsys):
    """Of the encoder whose width 64 divides; the depth changes, but not by much."""
    model = write_model(tmp_path / "wide", patch_model_config=vit(64, 4))
    whole, eight = (DepthPro(quantize, model).create_depth_map(photo).relative_depth() for quantize in (None, 8))
    assert 0 < np.abs(whole - eight).mean() < 0.02
    assert run("--image-path", photo, "--model", model, "-q", "8", "--output", tmp_path / "eight.png") == 0
    # Wide enough are six layers in each of two blocks; the other two encoders are not, nor what projects one of them.
    assert "quantize 12 layers to 8 bits, keep 25 whose width 64 does not divide" in capsys.readouterr().err


def test_python_errors(model, tmp_path):
    with pytest.raises(UsageError, match="cannot quantize to 7 bits"):
        DepthPro(quantize=7, model_path=tmp_path / "nothing is fetched for this")
    with pytest.raises(ImageError):
        DepthPro(model_path=model).create_depth_map(tmp_path / "none.png")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"patch_size": 32}, "image_size"),
        ({"scaled_images_ratios": [0.25, 1]}, "one length"),
        ({"scaled_images_ratios": [1, 0.5, 0.25]}, "must grow"),
        ({"scaled_images_overlap_ratios": [0, 0.5, 1.0]}, "between 0 and 1"),
        ({"intermediate_hook_ids": [1]}, "one length"),
        ({"intermediate_hook_ids": [2, 0]}, "does not have"),
        ({"use_batch_norm_in_fusion_residual": True}, "batch normalisation"),
        ({"patch_model_config": {**vit(16, 4), "use_swiglu_ffn": True}}, "GELU"),
        ({"patch_model_config": {**vit(16, 4), "model_type": "vit"}}, "vit"),
        ({"patch_model_config": {**vit(16, 4), "num_attention_heads": 3}}, "attention heads"),
        ({"fusion_hidden_size": "wide"}, "not a whole number"),
    ],
)
def test_configurations_that_cannot_be_built_are_refused(changes, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        DepthProConfig.from_dict({**TINY, **changes})


def test_published_configuration_is_the_default():
    assert DepthProConfig() == DepthProConfig.from_dict({"model_type": "depth_pro"})
    assert DepthProConfig().image_size == 1536


@pytest.mark.parametrize(("side", "patch", "overlap", "margin"), [(32, 8, 0.0, 0), (26, 8, 0.25, 1), (24, 8, 0.5, 2)])
def test_patches_merge_to_the_picture_they_were_cut_from(side, patch, overlap, margin):
    picture = mx.random.normal((3, side, side, 5))
    patches, steps = cut_patches(picture, patch, overlap)
    assert len(patches) == 3 * steps**2 and steps > 1
    tokens = mx.concatenate([mx.zeros((len(patches), 1, 5)), patches.flatten(1, 2)], axis=1)
    assert np.array_equal(merge_patches(tokens, steps, margin), picture)


def test_bilinear_resize():
    row = mx.array([0.0, 10.0, 20.0, 30.0]).reshape(1, 1, 4, 1)
    # Half-pixel centres: the new samples lie a quarter of a pixel beside the old ones, and the ends repeat.
    wide = resize_bilinear(row, (1, 8)).flatten().tolist()
    assert wide == [0.0, 2.5, 7.5, 12.5, 17.5, 22.5, 27.5, 30.0]
    assert resize_bilinear(row, (1, 2)).flatten().tolist() == [5.0, 25.0]
    # Without antialiasing a far step looks at two samples only.
    spike = mx.zeros((1, 12, 1, 1)).at[0, 0].add(1.0)
    assert resize_bilinear(spike, (3, 1)).flatten().tolist() == [0.0, 0.0, 0.0]
    assert resize_bilinear(mx.zeros((1, 2, 2, 3), mx.uint8), (4, 4)).dtype == mx.float32


@pytest.mark.parametrize("bias", [True, False])
def test_upsample_is_the_transposed_convolution(bias):
    layer = Upsample(3, 5, bias=bias)
    x = mx.random.normal((2, 4, 6, 3))
    assert np.allclose(layer(x), nn.ConvTranspose2d.__call__(layer, x), atol=1e-5)


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom mflux.models.depth_pro.cli.save_depth import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('mlx', 'numpy', 'PIL', 'huggingface_hub', 'torch') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "[]"
    assert "--image-path" in output and "--colormap" in output


def test_verbose_says_what_was_found(model, photo, capsys):
    assert run("--image-path", photo, "--model", model, "-v") == 0
    said = capsys.readouterr().err
    assert "46x30" in said and "focal length" in said and " m to " in said
    assert run("--image-path", photo, "--model", model) == 0
    assert capsys.readouterr().err == ""


def test_published_network_fits_together(monkeypatch):
    # As on a GPU, nothing is evaluated: MLX works out the shapes alone, so the 3.8 GB network takes no memory.
    monkeypatch.setattr(work, "has_gpu", lambda: True)
    network = DepthProForDepthEstimation(DepthProConfig())
    depth, degrees = network(mx.zeros((1, 1536, 1536, 3)))
    assert depth.shape == (1, 1536, 1536) and degrees.shape == (1,)
