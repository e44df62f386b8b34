"""SeedVR2 from a picture file to a picture file: colours, odd files, whole pictures, and the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageCms

from families.seedvr2.cases import DATA, whole_model, write_folder, write_tiny
from mflux.backend import mx
from mflux.checkpoints.readers.safetensors import SafetensorsFile
from mflux.errors import ImageError, MfluxError, NotBuiltError, UsageError
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.memory import Keep
from mflux.models.common.networks.autoencoders.tiling import TilingConfig
from mflux.models.seedvr2 import SeedVR2, colour
from mflux.models.seedvr2.latent_creator.seedvr2_latent_creator import SeedVR2LatentCreator
from mflux.models.seedvr2.sources import read_source, target_size
from mflux.utils.metadata_reader import MetadataReader
from mflux.utils.scale_factor import ScaleFactor

RNG = np.random.default_rng(0)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A folder with a tiny SeedVR2 of random weights; not to be written to."""
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny", wide=True)


@pytest.fixture(scope="session")
def model(folder) -> SeedVR2:
    return SeedVR2(model_path=str(folder))


def photo(width: int = 40, height: int = 24, mode: str = "RGB") -> PIL.Image.Image:
    """Slow waves of colour, some noise; the upper left corner is darkest."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    waves = np.stack([x, y, (x + y) / 2], axis=-1) * 200 + RNG.uniform(0, 40, (height, width, 3))
    return PIL.Image.fromarray(waves.astype(np.uint8)).convert(mode)


def array(image: PIL.Image.Image | Path) -> np.ndarray:
    if isinstance(image, Path):
        with PIL.Image.open(image) as opened:
            return np.asarray(opened).astype(int)
    return np.asarray(image).astype(int)


# ---- colours


@pytest.mark.parametrize("name", ["narrow", "wide", "large"])
def test_colours_are_the_references(name):
    file = SafetensorsFile(DATA / "colours.safetensors")
    content, style, wavelet, lab = (
        np.array(file[f"{name}.{what}"].astype(mx.float32)).transpose(2, 0, 1)
        for what in ("content", "style", "wavelet", "lab")
    )
    every = np.s_[:, ::4, ::4] if name == "large" else np.s_[:]
    ours = np.clip(content + colour.coarse(style - content), -1, 1)
    assert np.abs(ours[every] - wavelet).max() < 1e-6
    error = np.abs(colour.correct(content, style)[every] - lab)
    # Rounding swaps pixels whose values are next to each other.
    assert error.mean() < 2e-6
    assert error.max() < 1e-3
    assert np.abs(content[every] - lab).mean() > 0.1


def test_a_picture_in_its_own_colours_stays_as_it_is():
    picture = RNG.uniform(-1, 1, (3, 20, 33)).astype(np.float32)
    assert np.abs(colour.correct(picture, picture) - picture).max() < 1e-4


def test_what_is_drawn_in_other_colours_gets_the_sources():
    source = np.asarray(photo(60, 50), np.float32).transpose(2, 0, 1) / 127.5 - 1
    drawn = np.clip(0.6 * source[::-1] + 0.3 + RNG.normal(0, 0.05, source.shape), -1, 1).astype(np.float32)
    corrected = colour.correct(drawn, source)
    assert np.abs(drawn - source).mean() > 0.2
    assert np.abs(corrected - source).mean() < 0.12
    assert np.abs(corrected.mean(axis=(1, 2)) - source.mean(axis=(1, 2))).max() < 0.02


@given(
    st.lists(st.sampled_from([-1e30, -2.5, -0.0, 0.0, 1e-30, 0.5, 128.0]) | st.floats(-99, 99, width=32), min_size=1)
)
def test_ranks_of_equal_values_follow_their_places(listed):
    values = np.array(listed, np.float32)
    wanted = RNG.permutation(values.size).astype(np.float32)
    matched = values.copy()
    colour.match_ranks(matched, wanted)
    expected = np.empty_like(values)
    expected[np.argsort(values, kind="stable")] = np.arange(values.size)
    assert np.array_equal(matched, expected)


@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 1, 9), (3, 8, 2)])
def test_pictures_that_are_smaller_than_a_blur(shape):
    one, other = (RNG.uniform(-1, 1, shape).astype(np.float32) for _ in range(2))
    corrected = colour.correct(one, other)
    assert corrected.shape == shape
    assert np.isfinite(corrected).all()
    assert np.abs(corrected).max() <= 1


# ---- sizes


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(16, 3000))
def test_the_shorter_side_is_what_was_asked_for(width, height, wanted):
    shorter, longer = sorted((width, height))
    if longer * wanted // shorter > 16384:
        with pytest.raises(UsageError, match="16384 is the most"):
            target_size((width, height), wanted)
        return
    size = target_size((width, height), wanted)
    assert min(size) == wanted - wanted % 2
    assert max(size) == longer * wanted // shorter // 2 * 2
    assert (size[0] < size[1]) <= (width < height)


@pytest.mark.parametrize(
    "size, factor, expected",
    [
        ((100, 60), 2, (186, 112)),
        ((64, 48), 1, (64, 48)),
        ((333, 501), 1.5, (496, 746)),
        ((4000, 3000), 0.5, (1984, 1488)),
    ],
)
def test_factors_go_down_to_a_multiple_of_16(size, factor, expected):
    assert target_size(size, ScaleFactor(factor)) == expected


@pytest.mark.parametrize(
    "size, resolution, told",
    [
        ((5, 9), ScaleFactor(3), "3x of 5 pixels, its shorter side, is less than 16"),
        ((5, 9), 15, "resolution is 15"),
        ((5, 9), 2.5, "resolution is 2.5"),
        ((5, 9), None, "resolution is None"),
        ((5, 9), "2x", "resolution is '2x'"),
        ((10, 9000), 384, "would become 384x345600"),
    ],
)
def test_sizes_that_cannot_be(size, resolution, told):
    with pytest.raises(UsageError, match=told):
        target_size(size, resolution)


# ---- files


def sixteen_bits(folder: Path) -> Path:
    values = np.linspace(0, 65535, 24 * 40).reshape(24, 40).astype(np.uint16)
    PIL.Image.fromarray(values).save(folder / "deep.png")
    return folder / "deep.png"


def palette(folder: Path) -> Path:
    image = photo().quantize(16)
    image.info["transparency"] = bytes([0, 128] + [255] * 14)
    image.save(folder / "palette.png", transparency=image.info["transparency"])
    return folder / "palette.png"


def saved(image: PIL.Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


FILES = {
    "sixteen bits": sixteen_bits,
    "palette": palette,
    "grey": lambda folder: saved(photo(mode="L"), folder / "grey.png"),
    "grey with alpha": lambda folder: saved(photo(mode="LA"), folder / "la.png"),
    "one bit": lambda folder: saved(photo(mode="1"), folder / "bit.png"),
    "cmyk": lambda folder: saved(photo(mode="CMYK"), folder / "cmyk.jpg", quality=95),
    "lab": lambda folder: saved(
        ImageCms.profileToProfile(
            photo(), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        ),
        folder / "lab.tif",
    ),
    "gif": lambda folder: saved(photo(), folder / "a.gif"),
    "moving": lambda folder: saved(photo(), folder / "m.webp", save_all=True, append_images=[photo()], lossless=True),
    "alpha": lambda folder: saved(photo(mode="RGBA"), folder / "rgba.webp", lossless=True),
    "bmp": lambda folder: saved(photo(), folder / "a.bmp"),
    "tiff": lambda folder: saved(photo(), folder / "a.tiff"),
    "jpeg": lambda folder: saved(photo(), folder / "a.jpeg", quality=95),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", FILES)
def test_odd_files(tmp_path, kind):
    """Upright, RGB, in the right order from dark to bright, about as bright as the picture that was written."""
    path = FILES[kind](tmp_path)
    source = read_source(path, 48)
    assert (source.width, source.height) == (80, 48)
    assert source.colour.mode == "RGB"
    grey = array(source.colour.convert("L"))
    assert grey[:12, :20].mean() < grey[-12:, -20:].mean() - 80
    assert 90 < grey.mean() < 150
    pixels = source.pixels()
    assert pixels.shape == (3, 48, 80)
    assert pixels.dtype == np.float32
    assert np.array_equal(pixels, array(source.colour).transpose(2, 0, 1).astype(np.float32) / 255 * 2 - 1)
    # What is wholly opaque has no alpha.
    assert (source.alpha is not None) == (kind == "palette")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_says_which_way_up(tmp_path, orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    path = saved(photo(), tmp_path / "turned.jpg", exif=exif, quality=100, subsampling=0)
    source = read_source(path, 24)
    upright = photo()
    turned = {
        2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
        8: "ROTATE_90",
    }.get(orientation)  # fmt: skip
    if turned:
        upright = upright.transpose(PIL.Image.Transpose[turned])
    assert (source.width, source.height) == upright.size
    assert np.abs(array(source.colour) - array(upright)).mean() < 25


def test_one_pixel(tmp_path):
    path = saved(PIL.Image.new("RGB", (1, 1), (200, 30, 40)), tmp_path / "one.png")
    source = read_source(path, 16)
    assert (source.width, source.height) == (16, 16)
    assert (array(source.colour) == (200, 30, 40)).all()


def test_alpha_is_scaled_beside_the_colour(tmp_path):
    image = photo(mode="RGBA")
    image.putalpha(PIL.Image.linear_gradient("L").resize(image.size))
    source = read_source(saved(image, tmp_path / "a.png"), 48)
    assert np.abs(array(source.alpha) - array(PIL.Image.linear_gradient("L").resize((80, 48)))).max() < 8
    plain = read_source(saved(image.convert("RGB"), tmp_path / "b.png"), 48)
    assert np.array_equal(array(source.colour), array(plain.colour)), "the colour of what is transparent counts"
    dressed = source.dressed(photo(80, 48))
    assert dressed.mode == "RGBA"
    assert np.array_equal(array(dressed.getchannel("A")), array(source.alpha))
    assert dressed.convert("RGB").size == (80, 48)


def test_sides_are_filled_up_with_black(tmp_path):
    source = read_source(saved(photo(27, 20), tmp_path / "a.png"), 20)
    assert (source.width, source.height) == (26, 20)
    pixels = source.pixels()
    assert pixels.shape == (3, 32, 32)
    assert (pixels[:, 20:] == -1).all()
    assert (pixels[:, :, 26:] == -1).all()
    assert pixels[:, :20, :26].max() > 0.5


@pytest.mark.parametrize("softness", [0.25, 1.0])
def test_softness_takes_detail_away(tmp_path, softness):
    path = saved(photo(), tmp_path / "a.png")
    soft, plain = read_source(path, 48, softness), read_source(path, 48)
    factor = 1 + 7 * softness
    small = photo_of(path).resize((max(2, int(80 / factor)), max(2, int(48 / factor))), PIL.Image.Resampling.BICUBIC)
    assert np.array_equal(array(soft.colour), array(small.resize((80, 48), PIL.Image.Resampling.BICUBIC)))
    assert np.abs(np.diff(array(soft.colour), axis=0)).mean() < np.abs(np.diff(array(plain.colour), axis=0)).mean()


def photo_of(path: Path) -> PIL.Image.Image:
    with PIL.Image.open(path) as image:
        return image.convert("RGB")


@pytest.mark.parametrize("softness", [-0.1, 1.1, float("nan"), "0.5", None])
def test_softness_that_makes_no_sense(tmp_path, softness):
    with pytest.raises(UsageError, match="softness is"):
        read_source(saved(photo(), tmp_path / "a.png"), 48, softness)


# ---- ICC profiles


def rgb_profile() -> bytes:
    """sRGB's profile with red and blue exchanged: it shows at once whether anybody looks at it."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = profile.index(b"rXYZ"), profile.index(b"bXYZ")
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(profile)


def grey_profile(gamma: float) -> bytes:
    """The least that is a profile of grey: white, and one exponent."""
    white = b"XYZ \0\0\0\0" + b"".join(round(value * 65536).to_bytes(4, "big") for value in (0.9642, 1.0, 0.8249))
    curve = b"curv\0\0\0\0\0\0\0\x01" + round(gamma * 256).to_bytes(2, "big") + b"\0\0"
    tags = (2).to_bytes(4, "big")
    tags += b"wtpt" + (156).to_bytes(4, "big") + len(white).to_bytes(4, "big")
    tags += b"kTRC" + (156 + len(white)).to_bytes(4, "big") + (14).to_bytes(4, "big")
    body = tags + white + curve
    header = bytearray(128)
    header[:4] = (128 + len(body)).to_bytes(4, "big")
    header[8:12] = bytes([2, 0x40, 0, 0])
    header[12:24] = b"mntrGRAYXYZ "
    header[36:40] = b"acsp"
    header[68:80] = white[8:]
    return bytes(header) + body


def in_srgb(path: Path) -> np.ndarray:
    with PIL.Image.open(path) as image:
        if profile := image.info.get("icc_profile"):
            import io

            opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            image = ImageCms.profileToProfile(image, opened, ImageCms.createProfile("sRGB"), outputMode="RGB")
        return array(image.convert("RGB"))


def test_a_profile_of_red_green_and_blue_stays_with_its_numbers(tmp_path):
    path = saved(photo(), tmp_path / "a.png", icc_profile=rgb_profile())
    source = read_source(path, 24)
    assert np.array_equal(array(source.colour), array(path))
    assert source.profile == rgb_profile()
    assert source.dressed(photo()).info["icc_profile"] == rgb_profile()


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".tiff", ".bmp"])
def test_what_is_written_shows_the_colours_of_what_was_read(tmp_path, model, ending):
    path = saved(PIL.Image.new("RGB", (16, 16), (220, 60, 40)), tmp_path / "a.png", icc_profile=rgb_profile())
    written = model.generate_image(1, path, 16).save(tmp_path / f"b{ending}")
    assert in_srgb(path).mean(axis=(0, 1)).argmax() == 2, "the profile makes it blue"
    assert np.abs(in_srgb(written).mean(axis=(0, 1)) - in_srgb(path).mean(axis=(0, 1))).max() < 12


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_grey_with_a_profile_becomes_srgb(tmp_path, mode):
    image = PIL.Image.new(mode, (16, 16), 128 if mode == "L" else (128, 90))
    path = saved(image, tmp_path / "a.png", icc_profile=grey_profile(1.0))
    source = read_source(path, 16)
    assert source.profile is None
    # A linear half is 188 in sRGB.
    assert np.abs(array(source.colour) - 188).max() <= 1
    assert (source.alpha is not None) == (mode == "LA")


def test_cmyk_with_a_profile_is_not_taken_for_red_green_and_blue(tmp_path):
    """Of another kind than the pixels, or no profile at all: as if there were none."""
    for name, profile in {"rgb": rgb_profile(), "none": b"nothing of the kind" * 10}.items():
        path = saved(photo(mode="CMYK"), tmp_path / f"{name}.jpg", quality=95, icc_profile=profile)
        source = read_source(path, 24)
        assert source.profile is None
        assert np.abs(array(source.colour) - array(photo_of(path))).max() == 0


def test_a_damaged_profile_costs_a_warning(tmp_path, caplog):
    damaged = rgb_profile()[:200].ljust(400, b"\0")
    source = read_source(saved(photo(), tmp_path / "a.png", icc_profile=damaged), 24)
    assert source.profile is None
    assert "ICC profile cannot be used" in caplog.text


# ---- whole pictures


@pytest.mark.parametrize("name", ["uneven", "even"])
def test_a_whole_picture_is_the_references(tmp_path, monkeypatch, name):
    file = SafetensorsFile(DATA / "whole.safetensors")
    pixels, noise, result = (np.array(file[f"{name}.{what}"]) for what in ("pixels", "noise", "result"))
    path = saved(PIL.Image.fromarray(pixels), tmp_path / "a.png")
    monkeypatch.setattr(
        SeedVR2LatentCreator,
        "create_noise_latents",
        lambda *_, **__: mx.array(noise.astype(np.float32)).transpose(2, 0, 1)[None, :, None],
    )
    model = SeedVR2(model_path=str(write_folder(tmp_path / "model", whole_model())))
    image = model.generate_image(1, path, min(pixels.shape[:2]))
    error = np.abs(array(image.image) - (result + 1) * 127.5)
    # A half is what rounding to bytes costs; few pixels of nearly the same colour have swapped ranks.
    assert error.mean() < 0.27
    assert (error > 0.51).mean() < 0.002
    assert error.max() < 3
    assert np.abs(array(image.image) - pixels).mean() > 5


def test_noise_is_the_same_as_in_mflux_024():
    ours = SeedVR2LatentCreator.create_noise(7, 48, 80)
    theirs = mx.random.normal((1, 16, 1, 6, 10), key=mx.random.key(7))
    assert mx.array_equal(ours, theirs).item()
    packed = SeedVR2LatentCreator.pack_latents(theirs[:, :, 0], 48, 80)
    assert mx.array_equal(packed, ours).item()
    assert mx.array_equal(SeedVR2LatentCreator.unpack_latents(packed, 48, 80), theirs[:, :, 0]).item()


def test_latents_in_callbacks_have_0_24_s_shape(tmp_path, model):
    seen = {}

    class Watch:
        def __getattr__(self, name):
            if name not in ("call_before_loop", "call_after_loop"):
                raise AttributeError(name)
            return lambda latents, **_: seen.setdefault(name, latents.shape)

        def call_in_loop(self, t, seed, prompt, latents, config, time_steps, denoised):
            seen["call_in_loop"], seen["denoised"] = latents.shape, denoised.shape
            seen["size"] = (1, model.vae.config.latent_channels, 1, config.height // 8, config.width // 8)

    model.callbacks.register(Watch())
    model.generate_image(1, saved(photo(), tmp_path / "a.png"), 48)
    assert set(seen) == {"call_before_loop", "call_in_loop", "call_after_loop", "denoised", "size"}
    assert len(set(seen.values())) == 1
    condition = SeedVR2LatentCreator.create_condition(mx.zeros((1, 16, 3, 4)))
    assert condition.shape == (1, 17, 1, 3, 4) and condition[:, -1].min().item() == 1


def test_colours_follow_the_source_and_seeds_change_the_rest(tmp_path, model):
    path = saved(photo(), tmp_path / "a.png")
    first, again, other = (model.generate_image(seed, path, 48) for seed in (1, 1, 2))
    assert first.image.size == (80, 48)
    assert np.array_equal(array(first.image), array(again.image))
    assert np.abs(array(first.image) - array(other.image)).mean() > 1
    source = array(read_source(path, 48).colour)
    assert np.abs(array(first.image).mean(axis=(0, 1)) - source.mean(axis=(0, 1))).max() < 10


@pytest.mark.parametrize("seed", [-1, 1.5, None, 2**64])
def test_seeds_that_are_none(tmp_path, model, seed):
    with pytest.raises(UsageError, match="seed"):
        model.generate_image(seed, saved(photo(), tmp_path / "a.png"), 48)


def test_pictures_are_encoded_and_decoded_in_tiles(tmp_path, folder):
    """With an autoencoder that sees each latent alone, so that tiles must not show at all."""
    model = SeedVR2(model_path=str(folder))
    assert model.tiling_config == TilingConfig(), "also where nothing is said"
    sizes = []

    class Local:
        spatial_scale = 8

        def parameters(self):
            return {}

        def encode(self, pixels):
            sizes.append(pixels.shape[2:])
            squares = pixels.reshape(1, 3, pixels.shape[2] // 8, 8, pixels.shape[3] // 8, 8)
            return squares.mean(axis=(3, 5))

        def decode(self, latents):
            sizes.append(latents.shape[2:])
            return mx.repeat(mx.repeat(latents, 8, axis=2), 8, axis=3)

    model.vae = Local()
    pixels = mx.array(read_source(saved(photo(), tmp_path / "a.png"), 160).pixels())[None]
    config = model.settings(seed=1, prompt="", height=pixels.shape[2], width=pixels.shape[3])
    found = []
    for tiling in (None, TilingConfig(vae_decode_tile_size=96, vae_encode_tile_size=96, vae_encode_tile_overlap=32)):
        model.tiling_config = tiling
        latents = model.encode_pixels(pixels)
        found.append((latents, model.decode(latents, config)))
    (latents, whole), (latents_in_tiles, in_tiles) = found
    assert (latents.shape, whole.shape) == ((1, 3, 1, 20, 34), pixels.shape)
    assert sizes[:2] == [(160, 272), (20, 34)]
    assert set(sizes[2:]) == {(96, 96), (12, 12)}
    assert mx.abs(latents - latents_in_tiles).max().item() < 1e-5
    assert mx.abs(whole - in_tiles).max().item() < 1e-5


def test_before_the_last_picture_is_decoded_the_transformer_goes(tmp_path, folder):
    model = SeedVR2(model_path=str(folder))
    held = []
    decode = model.decode
    model.decode = lambda *args: held.append(sorted(model.loaded())) or decode(*args)
    path = saved(photo(), tmp_path / "a.png")
    for last in (False, True):
        model.keep = Keep(for_next_image=not last)
        model.generate_image(1, path, 32)
    assert held == [["transformer", "vae"], ["vae"]]


def test_a_folder_of_the_other_kind_is_what_it_is(tmp_path):
    folder = write_tiny(tmp_path / "seedvr2-3b", kind="7b")
    model = SeedVR2(model_path=str(folder), model_config=ModelConfig.seedvr2_3b())
    assert model.key == "seedvr2-7b"
    image = model.generate_image(1, saved(photo(), tmp_path / "a.png"), 32)
    assert image.image.size == (52, 32)


@pytest.mark.parametrize("name", ["x" * 300, "", "a\0b", "nowhere/at/all"])
def test_folders_that_cannot_be(name):
    with pytest.raises(MfluxError) as failure:
        SeedVR2(model_path=name)
    assert not isinstance(failure.value, NotBuiltError)


def test_the_sharp_kind_is_refused(tmp_path, cli, in_folder):
    sentence = "is SeedVR2 7B sharp, which is not built: use --model seedvr2-7b"
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "seedvr2_ema_7b_sharp_fp16.safetensors").write_bytes(b"")
    for name in ("seedvr2-7b-sharp", "someone/SeedVR2-7B-Sharp", str(tmp_path / "weights")):
        with pytest.raises(NotBuiltError, match=sentence):
            SeedVR2(model_path=name)
    result = cli("upscale-seedvr2", "-m", "seedvr2-7b-sharp", "-i", saved(photo(), in_folder / "a.png"))
    assert (result.status, result.errors) == (2, [f"error: seedvr2-7b-sharp {sentence}"])


# ---- the command


@pytest.fixture
def upscale(cli, in_folder, folder):
    def run(*words: object, model: Path = folder):
        return cli("upscale-seedvr2", "--model", model, "--base-model", "seedvr2-3b", "-r", 16, *words)

    return run


def test_one_picture(upscale, cli, in_folder, folder):
    path = saved(photo(), in_folder / "photo.png")
    result = upscale("-i", path, "--metadata", "-r", "1.4x", "--softness", 0.5)
    assert (result.status, result.errors, result.out) == (0, [], "image.png\n")
    assert "1 of 1: photo.png, 40x24 to 52x32" in result.err
    with PIL.Image.open("image.png") as image:
        assert (image.size, image.mode) == ((52, 32), "RGB")
    settings = MetadataReader.read_exif_metadata("image.png")
    assert settings == json.loads(Path("image.metadata.json").read_text())
    expected = {
        "seed": 42, "width": 52, "height": 32, "resolution": "1.4x", "softness": 0.5, "image_path": "photo.png",
        "model_path": folder.name, "steps": 1,
    }  # fmt: skip
    assert {name: settings[name] for name in expected} == expected
    told = cli("info", "image.png").out
    assert "Resolution: 1.4x\nSoftness: 0.5\n" in told
    # What command and class make is the same, and nothing is replaced.
    again = upscale("-i", path, "-r", "1.4x", "--softness", 0.5, "--low-ram")
    assert (again.status, again.out) == (0, "image_1.png\n")
    of_class = SeedVR2(model_path=str(folder)).generate_image(42, path, ScaleFactor(1.4), 0.5)
    for other in (array(Path("image_1.png")), array(of_class.image)):
        assert np.array_equal(array(Path("image.png")), other)


def test_several_pictures_and_seeds_each_have_a_name(upscale, in_folder):
    for name in ("a.png", "b.jpg"):
        saved(photo(), in_folder / name)
    result = upscale("-i", "a.png", "b.jpg", "a.png", "-s", 1, 2, "--output", "out/big.webp")
    assert result.status == 0
    expected = [f"out/big_{name}_seed_{seed}.webp" for name in "ab" for seed in (1, 2)]
    assert result.out.split() == expected
    result = upscale("-i", "a.png", "b.jpg", "--output", "{image_name}/{seed}.png")
    assert result.out.split() == ["a/42.png", "b/42.png"]
    saved(photo(), in_folder / "{seed}.png")
    assert upscale("-i", "{seed}.png", "--output", "of_{image_name}.png").out.split() == ["of_{seed}.png"]


def test_a_folder_with_a_truncated_one(upscale, in_folder):
    folder = in_folder / "photos"
    (folder / "inner").mkdir(parents=True)
    for name in ("B.png", "a.JPG", "c.gif"):
        saved(photo(), folder / name)
    # Its header is sound, so that it shows when its turn comes.
    whole = saved(photo(400, 300), folder / "broken.jpg").read_bytes()
    (folder / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.webp").write_bytes(b"")
    (folder / "page.jpeg").write_text("<!doctype html>")
    (folder / "notes.txt").write_text("no picture")
    saved(photo(), folder / "._a.jpg", format="JPEG")
    saved(photo(), folder / "inner" / "d.png")
    (folder / "gone.png").symlink_to("nowhere")
    result = upscale("-i", folder, "nothing.png", "--output", "out/x.png")
    assert result.status == 1
    assert result.out.split() == ["out/x_a.png", "out/x_B.png", "out/x_c.png"]
    assert len(list(Path("out").iterdir())) == 3
    wrong = [str(folder / "empty.webp"), str(folder / "page.jpeg"), "nothing.png", str(folder / "broken.jpg")]
    told = [line.removeprefix("warning: ").partition(" is left out: ")[0] for line in result.warnings]
    assert told == wrong
    names = ", ".join(wrong)
    assert result.errors == [f"error: 4 of 7 could not be drawn, the warnings say why: {names}"]
    assert "1 of 4: a.JPG, 40x24 to 26x16\n" in result.err
    assert " left\n" in result.err


def test_a_folder_without_pictures(upscale, in_folder):
    (in_folder / "photos").mkdir()
    (in_folder / "photos" / "notes.txt").write_text("")
    result = upscale("-i", "photos")
    assert result.status == 1
    assert "the folder photos holds no pictures (bmp, gif, jpeg, jpg, png, tif, tiff, webp)" in result.warnings[0]
    assert result.errors == ["error: 1 of 1 could not be drawn, the warnings say why: photos"]
    saved(photo(), in_folder / "a.png")
    result = upscale("-i", "photos", "a.png")
    assert (result.status, result.out.split()) == (1, ["image_a.png"])
    assert result.errors == ["error: 1 of 2 could not be drawn, the warnings say why: photos"]


def test_an_empty_name_is_not_the_folder_one_is_in(upscale, in_folder):
    saved(photo(), in_folder / "a.png")
    result = upscale("-i", "")
    assert (result.status, result.out) == (2, "")
    assert "argument --image-path/-i: a path is empty" in result.errors[0]


def test_one_picture_that_fails_is_told_before_anything_is_loaded(upscale, in_folder):
    whole = saved(photo(400, 300), in_folder / "a.png").read_bytes()
    (in_folder / "a.png").write_bytes(whole[: len(whole) // 2])
    (in_folder / "text.png").write_text("no picture")
    told = {
        "a.png": "the image a.png cannot be read",
        "text.png": "the image text.png is not a picture that can be read",
        "none.png": "the image none.png does not exist: check its path",
    }
    told["x" * 300] = "cannot be read (File name too long)"
    for name, sentence in told.items():
        result = upscale("-i", name, model=in_folder / "no-model")
        assert (result.status, result.out, result.warnings) == (1, "", [])
        assert len(result.errors) == 1
        assert sentence in result.errors[0]
    result = upscale("-i", saved(photo(5, 5), in_folder / "small.png"), "-r", "2x", model=in_folder / "no-model")
    assert result.status == 2
    assert "2x of 5 pixels" in result.errors[0]


def test_transparency_is_kept_or_refused(upscale, in_folder):
    image = photo(mode="RGBA")
    image.putalpha(PIL.Image.linear_gradient("L").resize(image.size))
    saved(image, in_folder / "clear.png")
    saved(photo(mode="RGBA"), in_folder / "opaque.png")
    result = upscale("-i", "clear.png", "-r", 24)
    with PIL.Image.open(result.paths[0]) as drawn:
        assert drawn.mode == "RGBA"
        assert np.array_equal(array(drawn.getchannel("A")), array(image.getchannel("A")))
    result = upscale("-i", "clear.png", "--output", "a.jpg")
    assert result.status == 2
    sentence = "a.jpg cannot hold transparency, and clear.png has some: use .png, .webp or .tiff"
    assert result.errors == [f"error: {sentence}"]
    result = upscale("-i", "clear.png", "opaque.png", "--output", "{image_name}.jpg")
    assert (result.status, result.out.split()) == (1, ["opaque.jpg"])
    assert "clear.jpg cannot hold transparency" in result.warnings[0]


def test_what_is_wrong_for_all_is_told_once(upscale, in_folder, folder):
    for name in ("a.png", "b.png"):
        saved(photo(), in_folder / name)
    broken = in_folder / "broken"
    shutil.copytree(folder, broken)
    next((broken / "transformer").glob("*.safetensors")).write_bytes(b"nothing")
    result = upscale("-i", "a.png", "b.png", model=broken)
    assert (result.status, len(result.errors), result.warnings) == (1, 1, [])
    assert "diffusion_pytorch_model.safetensors" in result.errors[0]
    result = upscale("-i", "a.png", "b.png", "--output", "nowhere")
    assert (result.status, result.warnings) == (2, [])
    assert "its name has no ending; use .png, .jpg or .webp" in result.errors[0]
    assert not [path for path in in_folder.iterdir() if path.name.startswith(("nowhere", "image"))]


def test_tiles_are_as_large_as_is_said(upscale, in_folder, monkeypatch):
    seen = []
    monkeypatch.setattr(SeedVR2, "encode_pixels", lambda self, pixels: seen.append(self.tiling_config) or 1 / 0)
    saved(photo(), in_folder / "a.png")
    for words in ((), ("--vae-tiling",), ("--low-ram",), ("--vae-tile-size", 256)):
        with pytest.raises(ZeroDivisionError):
            upscale("-i", "a.png", *words)
    assert seen[:3] == [TilingConfig()] * 3
    assert seen[3:] == [TilingConfig(vae_decode_tile_size=256, vae_encode_tile_size=256)]


def test_steps_are_shown(upscale, in_folder):
    saved(photo(), in_folder / "a.png")
    assert upscale("-i", "a.png", "--stepwise-image-output-dir", "steps").status == 0
    names = sorted(path.name for path in Path("steps").iterdir())
    assert names == ["seed_42_composite.png", "seed_42_step0of1.png", "seed_42_step1of1.png"]


def test_memory_that_is_not_there_leaves_one_picture_out(upscale, in_folder, monkeypatch):
    for name in ("a.png", "b.png"):
        saved(photo(), in_folder / name)
    encode = SeedVR2.encode_pixels

    def short(self, pixels):
        if not short.told:
            short.told = True
            raise RuntimeError("[malloc] Unable to allocate 1 bytes")
        return encode(self, pixels)

    short.told = False
    monkeypatch.setattr(SeedVR2, "encode_pixels", short)
    result = upscale("-i", "a.png", "b.png")
    assert (result.status, result.out.split()) == (1, ["image_b.png"])
    assert "a.png is left out: not enough memory: try --low-ram, a smaller --resolution" in result.warnings[0]


def test_models_of_others_and_commands_of_others(cli, in_folder):
    saved(photo(), in_folder / "a.png")
    result = cli("upscale-seedvr2", "--model", "schnell", "-i", "a.png")
    assert result.status == 2
    assert "mflux-upscale-seedvr2 does not draw with schnell: use mflux-generate --model schnell" in result.errors[0]
    for name in ("seedvr2", "seedvr2-7b"):
        result = cli("generate", "--model", name, "--prompt", "x")
        assert result.status == 2
        assert f"use mflux-upscale-seedvr2 --model {name}" in result.errors[0]


@pytest.mark.parametrize("kind", ["3b", "7b"])
def test_saved_and_quantized_it_draws_the_same(cli, in_folder, kind):
    folder = write_tiny(in_folder / f"seedvr2-{kind}", wide=True, kind=kind)
    path = saved(photo(), in_folder / "a.png")
    result = cli("save", "--model", folder, "--path", "saved", "-q", 8)
    assert result.status == 0, result.err
    record = json.loads(Path("saved", "mflux_model.json").read_text())
    assert (record["base_model"], record["quantize"]) == (f"seedvr2-{kind}", 8)
    drawn = []
    for model, words in ((folder, ["-q", 8]), ("saved", []), (folder, [])):
        result = cli("upscale-seedvr2", "--model", model, "-i", path, "-r", 32, *words)
        assert result.status == 0, result.err
        drawn.append(array(result.paths[0]))
    assert MetadataReader.read_exif_metadata("image_1.png")["quantize"] == 8
    assert np.array_equal(drawn[0], drawn[1])
    assert 0 < np.abs(drawn[0] - drawn[2]).mean() < 40


def test_errors_are_of_the_kinds_that_programs_catch(tmp_path, model):
    with pytest.raises(ImageError):
        model.generate_image(1, tmp_path / "none.png", 48)
    with pytest.raises(UsageError):
        model.generate_image(1, saved(photo(), tmp_path / "a.png"), 3)
    with pytest.raises(MfluxError):
        model.generate_image(1, None, 48)
