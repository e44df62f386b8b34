"""`mflux-generate` from end to end, with a tiny FLUX.1 model of random weights: what is drawn, written and said."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mflux.backend import mx
from mflux.callbacks.instances.memory_saver import MemorySaver
from mflux.errors import NotBuiltError, UsageError
from mflux.models.common import model as model_module
from mflux.models.common import pipeline as module
from mflux.models.common.config import ModelConfig
from mflux.models.common.memory import Keep, is_loaded
from mflux.models.common.networks.autoencoders.tiling import TilingConfig, decode
from mflux.models.common.networks.text_encoders.t5 import T5Encoder
from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator
from mflux.models.flux.variants.txt2img.flux import Flux1
from mflux.utils.metadata_reader import MetadataReader

PROMPT = "a red circle on a white background"


def pixels(path: Path | str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.fixture
def draw(cli, in_folder, tiny_schnell):
    """Run `mflux generate` with small defaults, see it succeed, and make sure that stdout holds paths and no more."""

    def run(*words, model: Path = tiny_schnell, prompt: str | None = PROMPT, size=(48, 32), steps: int = 2, **options):
        call = ["generate", "--model", model, "--steps", steps]
        call += [] if prompt is None else ["--prompt", prompt]
        call += [] if size is None else ["--width", size[0], "--height", size[1]]
        result = cli(*call, *words, **options)
        assert result.status == 0, result.err
        assert result.paths
        assert all(path.is_file() for path in result.paths)
        assert result.errors == []
        return result

    return run


@pytest.fixture
def seen(monkeypatch) -> list[str]:
    """What a `Flux1` does, in order: "load NAME", "encode PROMPT", and what else is in memory while it loads."""
    events = []
    load = model_module.load_component

    def spy(module_class, folder, **options):
        events.append(f"load {folder.name}")
        return load(module_class, folder, **options)

    monkeypatch.setattr(model_module, "load_component", spy)
    encode = T5Encoder.__call__

    def encoding(self, ids):
        events.append("encode")
        return encode(self, ids)

    monkeypatch.setattr(T5Encoder, "__call__", encoding)
    return events


# ---- seeds and names


def test_one_picture(draw):
    result = draw("--seed", 3)
    assert result.out == "image.png\n"
    with Image.open("image.png") as image:
        assert (image.size, image.mode, image.format) == ((48, 32), "RGB", "PNG")
    # Neither empty nor saturated: random weights draw noise.
    assert 20 < pixels("image.png").std() < 110


def test_a_seed_for_each_picture(draw):
    result = draw("--seed", 1, 2, 1, "--output", "out/circle.png")
    assert result.out == "out/circle_seed_1.png\nout/circle_seed_2.png\nout/circle_seed_1_1.png\n"
    one, two, again = map(pixels, result.paths)
    assert (one == again).all()
    assert abs(one - two).mean() > 5
    assert MetadataReader.read_exif_metadata("out/circle_seed_2.png")["seed"] == 2


def test_the_seed_in_the_name(draw):
    assert draw("--seed", 5, "--output", "s{seed}.png").out == "s5.png\n"
    assert draw("--seed", 5, 6, "--output", "{seed}/s.png").out == "5/s.png\n6/s.png\n"


def test_random_seeds(draw):
    result = draw("--auto-seeds", 3, "--steps", 1, size=(16, 16))
    seeds = [int(re.fullmatch(r"image_seed_(\d+)\.png", line)[1]) for line in result.out.splitlines()]
    assert len(set(seeds)) == 3
    other = draw("--auto-seeds", 3, "--steps", 1, size=(16, 16))
    assert result.out != other.out


@pytest.mark.parametrize(
    "words, told",
    [
        (["--seed", 4, "--auto-seeds", 3], "--auto-seeds draws its seeds and --seed says them"),
        (["--auto-seeds", 0], "--auto-seeds 0 asks for no picture"),
        (["--auto-seeds", -1], "--auto-seeds -1 asks for no picture"),
    ],
)
def test_seeds_that_contradict_each_other(cli, in_folder, tiny_schnell, words, told):
    result = cli("generate", "--model", tiny_schnell, "--prompt", PROMPT, *words)
    assert (result.status, result.out, len(result.errors)) == (2, "", 1)
    assert told in result.err


def test_a_seed_from_the_clock(draw, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1234.5)
    draw(size=(16, 16))
    assert MetadataReader.read_exif_metadata("image.png")["seed"] == 1234


def test_nothing_is_overwritten(draw):
    Path("image.png").write_text("mine")
    assert draw("--seed", 1, size=(16, 16)).out == "image_1.png\n"
    assert draw("--seed", 1, size=(16, 16)).out == "image_2.png\n"
    assert Path("image.png").read_text() == "mine"


def test_no_sidecar_is_overwritten_either(draw):
    Path("image.metadata.json").write_text("mine")
    assert draw("--seed", 1, "--metadata", size=(16, 16)).out == "image_1.png\n"
    assert Path("image.metadata.json").read_text() == "mine"
    assert json.loads(Path("image_1.metadata.json").read_text())["seed"] == 1
    # Without a sidecar of its own a picture does not mind another's.
    assert draw("--seed", 1, size=(16, 16)).out == "image.png\n"


# ---- the same settings, the same picture


def test_the_same_seed_draws_the_same(draw):
    draw("--seed", 1, "--output", "a.png")
    draw("--seed", 1, "--output", "b.png")
    assert (pixels("a.png") == pixels("b.png")).all()


def test_every_setting_matters(draw, tiny_dev):
    def drawn(*words, **options) -> np.ndarray:
        return pixels(draw("--seed", 1, *words, **options).paths[0])

    plain = drawn(model=tiny_dev)
    others = {
        "prompt": drawn(model=tiny_dev, prompt="a blue square"),
        "steps": drawn(model=tiny_dev, steps=3),
        "guidance": drawn("--guidance", 8, model=tiny_dev),
        "scheduler": drawn("--scheduler", "flow_match_euler_discrete", model=tiny_dev, steps=2),
    }
    for name, other in others.items():
        assert abs(plain - other).mean() > 0.05, name
    assert (drawn("--guidance", 3.5, model=tiny_dev) == plain).all()


def test_the_class_draws_what_the_command_draws(draw, tiny_dev):
    draw("--seed", 9, "--guidance", 2, model=tiny_dev, steps=3)
    flux = Flux1(model_path=str(tiny_dev), model_config=ModelConfig.dev())
    image = flux.generate_image(9, PROMPT, num_inference_steps=3, height=32, width=48, guidance=2.0)
    assert (np.asarray(image.image) == pixels("image.png")).all()
    # and again, from what is still in memory
    again = flux.generate_image(9, PROMPT, num_inference_steps=3, height=32, width=48, guidance=2.0)
    assert (np.asarray(again.image) == pixels("image.png")).all()
    assert image.save("of_class.png") == Path("of_class.png")
    mine, other = (MetadataReader.read_exif_metadata(name) for name in ("image.png", "of_class.png"))
    for varying in ("created_at", "generation_time_seconds", "base_model", "model"):
        mine.pop(varying), other.pop(varying)
    assert mine == other


def test_sixteen_bit_weights_draw_nearly_the_same(draw, tiny_schnell, tmp_path):
    from support.tiny import write_checkpoint

    half = write_checkpoint(tmp_path / "half-schnell", seed=1, guidance=False, dtype=mx.bfloat16)
    draw("--seed", 1, "--output", "full.png")
    draw("--seed", 1, "--output", "half.png", model=half)
    difference = abs(pixels("full.png") - pixels("half.png"))
    assert 0 < difference.mean() < 4


# ---- prompts


def test_a_prompt_is_encoded_once(draw, seen):
    draw("--seed", 1, 2, 3, size=(16, 16))
    assert seen == ["load text_encoder_2", "encode", "load text_encoder", "load transformer", "load vae"]


def test_a_prompt_file_is_read_anew_for_each_picture(draw, seen, monkeypatch):
    Path("prompt.txt").write_text(" a red circle\n")
    prompts = iter(["a red circle", "a blue square"])
    save = module.GeneratedImage.save_with_image

    def saving(self, *args, **kwargs):
        path = save(self, *args, **kwargs)
        # Between one picture and the next.
        if (prompt := next(prompts, None)) is not None:
            Path("prompt.txt").write_text(prompt)
        return path

    monkeypatch.setattr(module.GeneratedImage, "save_with_image", saving)
    result = draw("--prompt-file", "prompt.txt", "--seed", 1, 2, 3, size=(16, 16), prompt=None)
    prompts = [MetadataReader.read_exif_metadata(path)["prompt"] for path in result.paths]
    assert prompts == ["a red circle", "a red circle", "a blue square"]
    assert seen.count("encode") == 2


def test_a_prompt_from_standard_input(draw):
    draw("--seed", 1, 2, prompt="-", stdin="a red circle\n", size=(16, 16))
    for path in ("image_seed_1.png", "image_seed_2.png"):
        assert MetadataReader.read_exif_metadata(path)["prompt"] == "a red circle"
    # The next run reads its own.
    draw("--seed", 3, prompt="-", stdin="a blue square\n", size=(16, 16))
    assert MetadataReader.read_exif_metadata("image.png")["prompt"] == "a blue square"


def test_a_prompt_that_is_too_long(draw):
    long = " ".join(["a large red circle"] * 100)
    result = draw("--seed", 1, 2, prompt=long, size=(16, 16))
    assert result.warnings == [
        "warning: the prompt is longer than the 256 tokens this model reads: its end is left out"
    ]
    assert MetadataReader.read_exif_metadata("image_seed_1.png")["prompt"] == long


def test_a_prompt_in_many_scripts(draw):
    prompt = "ein roter Kreis, 赤い円, 🔴 'quoted' \\ <&> \x07"
    draw("--seed", 1, prompt=prompt, size=(16, 16))
    assert MetadataReader.read_exif_metadata("image.png")["prompt"] == prompt
    assert MetadataReader.read_xmp_metadata("image.png")["description"] == prompt.replace("\x07", "").strip()


# ---- pictures to start from


@pytest.fixture
def photo(in_folder) -> Path:
    """A 64 x 32 picture with something in it."""
    y, x = np.mgrid[0:32, 0:64]
    Image.fromarray(np.stack([4 * x, 8 * y, 255 - 4 * x], axis=-1).astype(np.uint8)).save("photo.png")
    return Path("photo.png")


def test_a_picture_to_start_from(draw, photo):
    drawn = []
    for strength in (1, 0.6, 0.3):
        path = draw("--seed", 1, "--image", photo, strength, size=(64, 32), steps=4).paths[0]
        settings = MetadataReader.read_exif_metadata(path)
        assert (settings["image_path"], settings["image_strength"]) == ("photo.png", strength)
        drawn.append(pixels(path))
    kept, half, little = drawn
    assert abs(kept - half).mean() > 5
    assert abs(half - little).mean() > 5


@pytest.mark.parametrize(("strength", "start"), [(0.01, 1), (0.3, 1), (0.5, 2), (0.99, 3), (1.0, 4)])
def test_where_a_picture_comes_in(tiny_schnell, photo, strength, start):
    """mflux's meaning of strength: the share of steps that are left out, at least one of them."""
    flux = Flux1(model_path=str(tiny_schnell))
    calls = []

    class Watch:
        def call_before_loop(self, latents, **kwargs):
            calls.append(latents)

        def call_in_loop(self, t, **kwargs):
            calls.append(t)

    flux.callbacks.register(Watch())
    image = flux.generate_image(5, PROMPT, 4, 32, 64, image_path=photo, image_strength=strength)
    latents, *steps = calls
    assert steps == list(range(start, 4))
    sigma = 1 - start / 4
    source = flux.encode_image(photo, 32, 64)
    noise = mx.random.normal((1, 2 * 4, 64), key=mx.random.key(5))
    assert mx.allclose(latents, (1 - sigma) * source + sigma * noise, atol=1e-5)
    if strength == 1:
        # All of it is kept: the picture as the autoencoder sees it.
        unpacked = FluxLatentCreator.unpack_latents(source, 32, 64)
        decoded = np.asarray(module.ImageUtil.to_pil(flux.vae.decode(unpacked)))
        assert (np.asarray(image.image) == decoded).all()


def test_nothing_kept_is_as_without_a_picture(draw, photo):
    draw("--seed", 1, "--image", photo, 0, "--output", "with.png", size=(64, 32))
    draw("--seed", 1, "--output", "without.png", size=(64, 32))
    assert (pixels("with.png") == pixels("without.png")).all()


def test_the_strength_by_itself(draw, photo):
    draw("--seed", 1, "--image", photo, 0.7, "--output", "a.png", size=None)
    draw("--seed", 1, "--image-path", photo, "--image-strength", 0.7, "--output", "b.png", size=None)
    assert (pixels("a.png") == pixels("b.png")).all()
    draw("--seed", 1, "--image", photo, "--output", "c.png", size=None)
    assert MetadataReader.read_exif_metadata("c.png")["image_strength"] == 0.4


@pytest.mark.parametrize(
    ("words", "size"),
    [
        ([], (64, 32)),
        (["--width", "auto", "--height", "auto"], (64, 32)),
        (["--width", "2x"], (128, 32)),
        (["--width", "0.5x", "--height", "1.5X"], (32, 48)),
        (["--width", "48"], (48, 32)),
        (["--height", "0.8x"], (64, 16)),  # 25.6, rounded down
    ],
)
def test_the_size_of_the_source(draw, photo, words, size):
    result = draw("--seed", 1, "--image", photo, *words, size=None, steps=2)
    with Image.open(result.paths[0]) as image:
        assert image.size == size
    assert result.warnings == []


def test_the_size_as_it_is_seen(draw, photo):
    """A phone's upright photo lies on its side in the file."""
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(photo) as image:
        image.save("turned.jpg", exif=exif)
    result = draw("--seed", 1, "--image", "turned.jpg", size=None, steps=1)
    with Image.open(result.paths[0]) as image:
        assert image.size == (32, 64)


def test_sizes_that_do_not_fit_the_grid(draw):
    result = draw("--seed", 1, 2, size=(63, 40))
    assert result.warnings == [
        "warning: a width of 63 is not a multiple of 16: 48 is taken",
        "warning: a height of 40 is not a multiple of 16: 32 is taken",
    ]
    with Image.open(result.paths[1]) as image:
        assert image.size == (48, 32)
    assert MetadataReader.read_exif_metadata(result.paths[0])["width"] == 48


# ---- settings that do nothing say so


def test_a_negative_prompt_is_ignored(draw):
    result = draw("--seed", 1, 2, "--negative-prompt", "blue")
    assert result.warnings == ["warning: --negative-prompt is ignored: FLUX.1 has no negative branch"]
    draw("--seed", 1, "--output", "without.png")
    assert (pixels("image_seed_1.png") == pixels("without.png")).all()


def test_guidance_is_ignored_by_a_model_without(draw, tiny_schnell, tiny_dev):
    result = draw("--seed", 1, 2, "--guidance", "7")
    assert result.warnings == [f"warning: --guidance is ignored: {tiny_schnell} was made without guidance"]
    assert MetadataReader.read_exif_metadata("image_seed_1.png")["guidance"] is None
    assert draw("--seed", 1).warnings == []
    assert draw("--seed", 1, "--guidance", "7", model=tiny_dev).warnings == []


def test_the_transformer_knows_whether_it_takes_guidance(draw, tiny_dev, in_folder):
    """The name says schnell, the weights say otherwise."""
    (in_folder / "dev-to-schnell").symlink_to(tiny_dev)
    result = draw("--seed", 1, "--guidance", "7", model=in_folder / "dev-to-schnell")
    assert result.warnings == []
    assert MetadataReader.read_exif_metadata(result.paths[0])["guidance"] == 7


def test_the_defaults_are_the_model_s(cli, in_folder, tiny_schnell, tiny_dev, monkeypatch):
    asked = []

    def generate(self, **settings):
        asked.append(settings)
        raise UsageError("enough")

    monkeypatch.setattr(Flux1, "generate_image", generate)
    for model in (tiny_schnell, tiny_dev):
        assert cli("generate", "--model", model, "--prompt", "x").errors == ["error: enough"]
    assert [(settings["num_inference_steps"], settings["guidance"]) for settings in asked] == [(4, 3.5), (25, 3.5)]
    assert {(settings["width"], settings["height"]) for settings in asked} == {(1024, 1024)}


# ---- memory


def test_text_encoders_are_gone_before_the_transformer_comes(tiny_schnell, monkeypatch):
    flux = Flux1(model_path=str(tiny_schnell))
    parts = ("t5_text_encoder", "clip_text_encoder", "transformer", "vae")
    held = {}
    load = model_module.load_component

    def spy(module_class, folder, **options):
        held[folder.name] = {part for part in parts if is_loaded(flux, part)}
        return load(module_class, folder, **options)

    monkeypatch.setattr(model_module, "load_component", spy)
    flux.generate_image(1, PROMPT, 1, 16, 16)
    assert held == {"text_encoder_2": set(), "text_encoder": set(), "transformer": set(), "vae": {"transformer"}}
    assert {part for part in parts if is_loaded(flux, part)} == {"transformer", "vae"}
    # Nothing is encoded or loaded again for the same prompt.
    held.clear()
    flux.generate_image(2, PROMPT, 1, 16, 16)
    assert held == {}


def test_text_encoders_may_stay(tiny_schnell, seen):
    flux = Flux1(model_path=str(tiny_schnell))
    flux.keep = Keep(text_encoders=True)
    flux.generate_image(1, "a red circle", 1, 16, 16)
    flux.generate_image(1, "a blue square", 1, 16, 16)
    assert seen.count("load text_encoder_2") == 1
    assert seen.count("encode") == 2


def test_low_ram_draws_the_same(draw, seen):
    draw("--seed", 1, "--output", "plain.png")
    seen.clear()
    result = draw("--seed", 1, "--low-ram", "--output", "low.png")
    assert (pixels("plain.png") == pixels("low.png")).all()
    assert seen == ["load text_encoder_2", "encode", "load text_encoder", "load transformer", "load vae"]
    assert re.search(r"^peak MLX memory: \d+\.\d\d GB$", result.err, re.MULTILINE)


def test_low_ram_lets_the_transformer_go(tiny_schnell, monkeypatch):
    flux = Flux1(model_path=str(tiny_schnell))
    flux.callbacks.register(MemorySaver(flux, keep_transformer=False))
    held = []
    load = model_module.load_component

    def spy(module_class, folder, **options):
        held.append((folder.name, is_loaded(flux, "transformer")))
        return load(module_class, folder, **options)

    monkeypatch.setattr(model_module, "load_component", spy)
    flux.generate_image(1, PROMPT, 1, 16, 16)
    assert ("vae", False) in held
    assert flux.tiling_config == TilingConfig()


def test_low_ram_makes_room_for_another_prompt(draw, monkeypatch):
    held = []
    load = model_module.load_component
    made = []
    build = Flux1.__init__

    def building(self, *args, **kwargs):
        build(self, *args, **kwargs)
        made.append(self)

    def spy(module_class, folder, **options):
        held.append((folder.name, is_loaded(made[0], "transformer"), is_loaded(made[0], "vae")))
        return load(module_class, folder, **options)

    monkeypatch.setattr(Flux1, "__init__", building)
    monkeypatch.setattr(model_module, "load_component", spy)
    Path("prompt.txt").write_text("a red circle")
    save = module.GeneratedImage.save_with_image

    def saving(self, *args, **kwargs):
        Path("prompt.txt").write_text("a blue square")
        return save(self, *args, **kwargs)

    monkeypatch.setattr(module.GeneratedImage, "save_with_image", saving)
    draw("--prompt-file", "prompt.txt", "--seed", 1, 2, 3, "--low-ram", size=(16, 16), prompt=None)
    # Red for the first picture, blue for the other two; while a text encoder is loaded, nothing else is there.
    names = [name for name, *_ in held]
    assert names.count("text_encoder_2") == names.count("transformer") == 2
    assert {(transformer, vae) for name, transformer, vae in held if name.startswith("text")} == {(False, False)}


def test_the_last_picture_is_decoded_without_the_transformer(draw, monkeypatch):
    held = []
    made = []
    build = Flux1.__init__

    def building(self, *args, **kwargs):
        build(self, *args, **kwargs)
        made.append(self)

    def decoding(*args):
        held.append((is_loaded(made[0], "transformer"), is_loaded(made[0], "vae")))
        return decode(*args)

    monkeypatch.setattr(Flux1, "__init__", building)
    monkeypatch.setattr(module.tiling, "decode", decoding)
    draw("--seed", 1, 2, size=(16, 16), steps=1)
    # The autoencoder is an argument, so it has been loaded by then; the second picture still has the first one's.
    assert held == [(True, True), (False, True)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_released_goes_back_to_the_system():
    """Blocks that glibc would keep: 80 layers of 4 MB, once that size has been freed before, below one that stays."""
    code = """
import os
from mflux.backend import mx, nn
from mflux.models.common.memory import LazyComponent

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def build(pipeline):
    module = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(80)))
    mx.eval(module.parameters())
    return module

class Pipeline:
    transformer = LazyComponent(build)

pipeline = Pipeline()
pipeline.transformer
pipeline.transformer = None
before = resident()
pipeline.transformer
stays = mx.random.normal((256, 1024))
mx.eval(stays)
held = resident()
pipeline.transformer = None
print(held - before, resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    held, left = map(int, done.stdout.split())
    assert held > 300e6
    assert left < 40e6


def test_the_cache_limit(draw, monkeypatch):
    """What was said holds; `--low-ram` alone never raises MLX's own limit, which on a CPU is below its gigabyte."""
    limits = []
    own = 10**10

    def limiting(limit):
        limits.append(limit)
        return own

    monkeypatch.setattr(mx, "set_cache_limit", limiting)
    draw("--seed", 1, "--mlx-cache-limit-gb", 1.5, size=(16, 16))
    assert limits == [1_500_000_000]
    draw("--seed", 1, "--low-ram", size=(16, 16))
    assert limits[1:] == [1_000_000_000]
    draw("--seed", 1, "--low-ram", "--mlx-cache-limit-gb", 2, size=(16, 16))
    assert limits[-1] == 2_000_000_000
    own = 32_000_000
    draw("--seed", 1, "--low-ram", size=(16, 16))
    assert limits[-1] == own


def test_tiles_fit_together(draw, monkeypatch):
    """Group norms see a tile at a time, so the picture is not quite the same; what overlaps fades without a seam."""
    seen = []
    monkeypatch.setattr(module.tiling, "decode", lambda *args: seen.append(args[2]) or decode(*args))
    draw("--seed", 1, "--output", "whole.png", size=(256, 192), steps=1)
    draw("--seed", 1, "--vae-tile-size", 128, "--output", "tiles.png", size=(256, 192), steps=1)
    draw("--seed", 1, "--vae-tiling", "--output", "one.png", size=(256, 192), steps=1)
    assert [tiling and tiling.vae_decode_tile_size for tiling in seen] == [None, 128, 512]
    whole, tiles, one = map(pixels, ("whole.png", "tiles.png", "one.png"))
    assert (whole == one).all()  # a single tile of 512 covers it
    assert 0 < abs(whole - tiles).mean() < 6


# ---- watching it come about


def test_pictures_of_each_step(draw):
    result = draw("--seed", 1, 2, "--stepwise-image-output-dir", "steps", size=(32, 32), steps=3)
    names = sorted(path.name for path in Path("steps").iterdir())
    steps = [f"seed_{seed}_{what}.png" for seed in (1, 2) for what in ("composite", *(f"step{n}of3" for n in range(4)))]
    assert names == steps
    assert len(result.paths) == 2
    for seed, path in ((1, "image_seed_1.png"), (2, "image_seed_2.png")):
        assert (pixels(f"steps/seed_{seed}_step3of3.png") == pixels(path)).all()
        composite = pixels(f"steps/seed_{seed}_composite.png")
        assert composite.shape == (32, 4 * 32, 3)
        assert (composite[:, -32:] == pixels(path)).all()
        assert abs(composite[:, :32] - composite[:, -32:]).mean() > 5


def test_steps_of_an_earlier_run_stay(draw):
    draw("--seed", 1, "--stepwise-image-output-dir", "steps", size=(16, 16), steps=1)
    before = {path.name: path.read_bytes() for path in Path("steps").iterdir()}
    draw("--seed", 1, "--stepwise-image-output-dir", "steps", size=(32, 32), steps=1)
    after = {path.name: path.read_bytes() for path in Path("steps").iterdir()}
    assert before.items() <= after.items()
    assert sorted(after.keys() - before.keys()) == [
        f"seed_1_{name}_1.png" for name in ("composite", "step0of1", "step1of1")
    ]


def test_steps_with_a_picture_begin_where_it_comes_in(draw, photo):
    draw("--seed", 1, "--image", photo, 0.5, "--stepwise-image-output-dir", "steps", size=None, steps=4)
    names = sorted(path.name for path in Path("steps").iterdir())
    assert names == ["seed_1_composite.png", *(f"seed_1_step{n}of4.png" for n in (2, 3, 4))]


def test_progress_goes_to_stderr(draw):
    result = draw("--seed", 1)
    for stage in ("load t5_text_encoder: ", "load transformer: ", "denoise: 100%", "load vae: ", "decode: "):
        assert stage in result.err
    assert result.out == "image.png\n"


# ---- metadata


@pytest.mark.parametrize("name", ["image.png", "image.jpg", "image.webp", "IMAGE.JPEG"])
def test_a_picture_carries_its_settings(draw, tiny_dev, name):
    draw("--seed", 7, "--guidance", 2.5, "--output", name, model=tiny_dev)
    settings = MetadataReader.read_exif_metadata(name)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+", settings.pop("created_at"))
    assert settings.pop("generation_time_seconds") > 0
    nothing = (
        "quantize",
        "lora_paths",
        "lora_scales",
        "image_path",
        "image_paths",
        "image_strength",
        "negative_prompt",
    )
    nothing += ("controlnet_image_path", "controlnet_strength", "masked_image_path", "depth_image_path")
    nothing += ("redux_image_paths", "redux_image_strengths", "text_encoder_paths", "vae_path")
    import mflux

    assert settings == dict.fromkeys(nothing) | {
        "mflux_version": mflux.__version__,
        # Not where it lies: a picture goes out to others.
        "model": "tiny-dev",
        "model_path": "tiny-dev",
        "base_model": "black-forest-labs/FLUX.1-dev",
        "seed": 7,
        "steps": 2,
        "guidance": 2.5,
        "height": 32,
        "width": 48,
        "precision": "mlx.core.float32" if mx.default_device() == mx.cpu else "mlx.core.bfloat16",
        "prompt": PROMPT,
    }


def test_a_png_also_carries_xmp(draw, tiny_dev):
    draw("--seed", 7, model=tiny_dev, prompt="a <red> & blue circle")
    found = MetadataReader.read_all_metadata("image.png")
    assert found["exif"]["seed"] == 7
    found["xmp"].pop("generation_time"), found["xmp"].pop("creator_tool")
    assert found["xmp"] == {
        "description": "a <red> & blue circle",
        "seed": "7",
        "steps": "2",
        "guidance": "3.5",
        "model": "tiny-dev",
    }


def test_a_sidecar(draw):
    draw("--seed", 7, "--metadata", prompt="ein schöner Kreis")
    text = Path("image.metadata.json").read_text(encoding="utf-8")
    assert json.loads(text) == MetadataReader.read_exif_metadata("image.png")
    assert "schöner" in text


def test_a_picture_without_settings(draw):
    draw("--seed", 7, "--no-metadata", "--metadata")
    assert MetadataReader.read_all_metadata("image.png") == {"exif": None, "xmp": None}
    with Image.open("image.png") as image:
        assert image.info == {}
    # The sidecar is a matter of its own.
    assert json.loads(Path("image.metadata.json").read_text())["seed"] == 7
    # and the next run is not touched
    draw("--seed", 7, "--output", "b.png")
    assert MetadataReader.read_exif_metadata("b.png")["seed"] == 7


def test_earlier_settings_draw_the_same_again(draw, cli, tiny_dev):
    # Settings name a folder of this machine by its last part, which `-C` looks for where it is run.
    Path("tiny-dev").symlink_to(tiny_dev)
    draw("--seed", 11, "--guidance", 6, "--metadata", "--output", "first.webp", model=tiny_dev, steps=2)
    draw("--seed", 11, "--guidance", 6, "--output", "first.png", model=tiny_dev, steps=2)
    for flag, source in (
        ("-C", "first.png"),
        ("--config-from-metadata", "first.metadata.json"),
        ("--config-from-conf", "first.webp"),
    ):
        result = cli("generate", flag, source, "--output", "again{seed}.png")
        assert result.status == 0, result.err
        assert (pixels("first.png") == pixels(result.paths[0])).all()


def test_earlier_settings_with_all_that_matters(draw, cli, tiny_dev, photo, in_folder):
    (in_folder / "unnamed").symlink_to(tiny_dev)
    draw(
        *("--base-model", "krea-dev", "--seed", 11, "--image", photo, 0.5, "--height", 48),
        *("--scheduler", "flow_match_euler_discrete", "--output", "first.jpg", "--metadata"),
        model="unnamed",
        size=None,
        steps=4,
    )
    result = cli("generate", "-C", "first.jpg", "--output", "again.png")
    assert (result.status, result.out) == (0, "again.png\n"), result.err
    cli("generate", "-C", "first.metadata.json", "--output", "more.png")
    assert (pixels("more.png") == pixels("again.png")).all()
    draw(
        *("--base-model", "krea-dev", "--seed", 11, "--image", photo, 0.5, "--height", 48),
        *("--scheduler", "flow_match_euler_discrete", "--output", "plain.png"),
        model="unnamed",
        size=None,
        steps=4,
    )
    assert (pixels("plain.png") == pixels("again.png")).all()
    settings = MetadataReader.read_exif_metadata("again.png")
    assert settings["scheduler"] == "flow_match_euler_discrete"
    assert settings["base_model"] == "black-forest-labs/FLUX.1-Krea-dev"


def test_earlier_settings_with_what_lies_elsewhere(draw, cli, tiny_dev, photo):
    """The settings name no folders; what is not found under its bare name is asked for by it."""
    Path("elsewhere").mkdir()
    photo.rename("elsewhere/photo.png")
    draw("--seed", 11, "--image", "elsewhere/photo.png", 0.5, "--output", "first.png", model=tiny_dev)
    result = cli("generate", "-C", "first.png")
    assert result.errors == ["error: the image photo.png does not exist: check its path"]
    result = cli("generate", "-C", "first.png", "--image", "elsewhere/photo.png", 0.5)
    assert result.errors == [
        "error: there is no model and no folder 'tiny-dev': use --model with demo, which needs no download, schnell, "
        "dev or another that mflux --help lists, a Hugging Face repository (org/name) or a folder"
    ]
    again = ["-C", "first.png", "--image", "elsewhere/photo.png", 0.5, "--model", tiny_dev, "--output", "again.png"]
    assert cli("generate", *again).status == 0
    assert (pixels("first.png") == pixels("again.png")).all()


def test_what_is_said_comes_before_earlier_settings(draw, cli, tiny_schnell, tiny_dev, photo):
    draw("--seed", 11, "--guidance", 6, "--output", "first.png", model=tiny_dev, steps=3)
    said = ["--seed", "12", "--steps", "2", "--guidance=2", "--prompt", "a blue square", "--width", "32"]
    cli("generate", "-C", "first.png", *said, "--model", tiny_schnell, "--image", photo, 0.3, "--output", "b.png")
    settings = MetadataReader.read_exif_metadata("b.png")
    expected = {
        "seed": 12, "steps": 2, "guidance": None, "prompt": "a blue square", "width": 32, "height": 32,
        "model_path": "tiny-schnell", "base_model": "black-forest-labs/FLUX.1-schnell",
        "image_path": "photo.png", "image_strength": 0.3,
    }  # fmt: skip
    assert expected.items() <= settings.items()


def test_earlier_settings_with_other_seeds(draw, cli, tiny_dev):
    Path("tiny-dev").symlink_to(tiny_dev)
    draw("--seed", 11, "--output", "first.png", model=tiny_dev)
    result = cli("generate", "-C", "first.png", "--auto-seeds", 2, "--output", "b.png")
    assert len(result.paths) == 2
    assert all(MetadataReader.read_exif_metadata(path)["seed"] != 11 for path in result.paths)


def test_settings_of_mflux_0_24(cli, in_folder, tiny_dev):
    """Names and values as mflux 0.24 writes them, with its own for a built-in model that has no base."""
    Path("mine").symlink_to(tiny_dev)
    settings = {
        "mflux_version": "0.24.0", "model": "black-forest-labs/FLUX.1-dev", "model_path": "mine",
        "base_model": "None", "seed": 3, "steps": 2, "guidance": 3.5, "height": 32, "width": 48,
        "precision": "mlx.core.bfloat16", "quantize": None, "generation_time_seconds": 9.1, "lora_paths": None,
        "lora_scales": None, "image_path": None, "image_strength": None, "prompt": PROMPT, "negative_prompt": None,
    }  # fmt: skip
    Path("old.metadata.json").write_text(json.dumps(settings))
    result = cli("generate", "-C", "old.metadata.json")
    assert result.status == 0, result.err
    assert (result.out, result.warnings) == ("image.png\n", [])
    assert MetadataReader.read_exif_metadata("image.png")["base_model"] == "black-forest-labs/FLUX.1-dev"


def test_a_picture_that_had_loras_without_them(cli, in_folder, tiny_dev):
    Path("mine").symlink_to(tiny_dev)
    settings = {"model": "dev", "model_path": "mine", "prompt": "x", "lora_paths": ["a.safetensors"]}
    Path("old.json").write_text(json.dumps(settings | {"width": 16, "height": 16, "steps": 1, "seed": 1}))
    result = cli("generate", "-C", "old.json", "--lora-paths")
    assert (result.status, result.out) == (0, "image.png\n"), result.err


def test_info(draw, cli, tiny_dev, photo):
    draw("--seed", 7, "--image", photo, 0.5, model=tiny_dev)
    result = cli("info", "image.png")
    assert result.status == 0
    lines = result.out.splitlines()
    assert result.err == ""
    assert lines[:12] == [
        f"Prompt: {PROMPT}",
        "Model: tiny-dev",
        "Weights: tiny-dev",
        "Base model: black-forest-labs/FLUX.1-dev",
        "Width: 48",
        "Height: 32",
        "Seed: 7",
        "Steps: 2",
        "Guidance: 3.5",
        f"Precision: {MetadataReader.read_exif_metadata('image.png')['precision']}",
        "Source picture: photo.png",
        "Image strength: 0.5",
    ]
    assert [line.partition(":")[0] for line in lines[12:]] == ["Generation time (s)", "Created", "mflux version"]


# ---- the class


def test_the_class_refuses_what_is_not_built(tiny_schnell):
    flux = Flux1(model_path=str(tiny_schnell))
    with pytest.raises(NotBuiltError, match="PiD decoding is not built yet"):
        flux.generate_image(1, PROMPT, 1, 16, 16, pid_decode=True)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps (--steps) is 0: it must be at least 1"),
        ({"width": 8}, "a width of 8 is too small"),
        ({"height": 20000}, "a height of 20000 is too large"),
        ({"image_strength": 1.5}, "image_strength is 1.5: it must be at most 1"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "a seed is a whole number"),
        ({"scheduler": "cosine"}, "the scheduler 'cosine' is not known"),
    ],
)
def test_the_class_refuses_what_makes_no_sense(tiny_schnell, settings, told):
    flux = Flux1(model_path=str(tiny_schnell))
    with pytest.raises(UsageError, match=re.escape(told)):
        flux.generate_image(**{"seed": 1, "prompt": PROMPT, "width": 16, "height": 16} | settings)


def test_the_class_warns_about_a_negative_prompt(tiny_schnell, caplog):
    flux = Flux1(model_path=str(tiny_schnell))
    flux.generate_image(1, PROMPT, 1, 16, 16, negative_prompt="blue")
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["the negative prompt is ignored: FLUX.1 has no negative branch"]


def test_the_noise_is_mflux_s(tiny_schnell):
    """Old seeds keep their pictures: the noise as mflux 0.24 draws it."""
    from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator

    noise = FluxLatentCreator.create_noise(42, 48, 32)
    expected = mx.random.normal((1, 3 * 2, 64), key=mx.random.key(42))
    assert noise.dtype == mx.float32
    assert mx.array_equal(noise, expected)


def test_packing_and_unpacking():
    from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator

    latents = mx.arange(2 * 16 * 4 * 6).reshape(2, 16, 4, 6)
    packed = FluxLatentCreator.pack_latents(latents, height=32, width=48)
    assert packed.shape == (2, 6, 64)
    # Token by token: 16 channels of a 2 x 2 patch, the channel slowest.
    assert mx.array_equal(packed[1, 4].reshape(16, 2, 2), latents[1, :, 2:4, 2:4])
    assert mx.array_equal(FluxLatentCreator.unpack_latents(packed, height=32, width=48), latents)


def test_a_seed_that_the_clock_chose_is_said(cli, in_folder):
    words = ["--model", "demo", "--prompt", "x", "--steps", 1, "--width", 16, "--height", 16]
    told = [line for line in cli("generate", *words, "--metadata").err.splitlines() if line.startswith("seed ")]
    seed = json.loads(Path("image.metadata.json").read_text())["seed"]
    assert told == [f"seed {seed}, by the clock: --seed {seed} makes this image again"]
    assert "by the clock" not in cli("generate", *words, "--seed", 3).err
    assert "by the clock" not in cli("generate", *words, "--auto-seeds", 2).err
