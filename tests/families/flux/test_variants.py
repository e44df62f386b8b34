"""FLUX.1's variants: their commands, settings, saved models, and what they refuse."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from support.cases import Tiny
from support.images import opened, photo

from families.flux.cases_variants import TINY, write_pictures
from mflux.backend import mx, tree_flatten
from mflux.checkpoints.late import late_layers
from mflux.checkpoints.quantization import Quantization, planned
from mflux.checkpoints.saving import estimated_bytes
from mflux.errors import CheckpointError, ImageError, UsageError
from mflux.models.common.config import ModelConfig
from mflux.models.flux.family import CONTROLNET, FAMILY, IMAGE_EMBEDDER, IMAGE_ENCODER
from mflux.models.flux.model.redux import SiglipConfig, SiglipProcessor
from mflux.utils.metadata_reader import MetadataReader

SURFACE = Path(__file__).parents[2] / "data" / "surface"
SMALL = ("--steps", 2, "--width", 48, "--height", 32, "--seed", 1)
BY_NAME = {case.command: case for case in TINY}


@pytest.fixture(scope="module")
def models(written_models):
    """The tiny model of a variant; not to be written to."""
    return lambda case: written_models(f"flux {case.command}", False)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path)
    return tmp_path


@pytest.fixture
def draw(cli, here, models):
    """Run a variant's command with its own words, and see it succeed."""

    def run(case: Tiny, *more, small=SMALL, model: Path | None = None, prompt=("--prompt", "a red circle")):
        # A saved model knows what it is.
        which = ("--model", models(case), "--base-model", case.base_model) if model is None else ("--model", model)
        result = cli(case.command, *which, *prompt, *case.words, *small, *more)
        assert result.status == 0, result.err
        return result

    return run


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(opened(path)).astype(int)


# ---- Kontext


@pytest.mark.parametrize("words", ["--image photo.png 0.5", "--image-path photo.png --image-strength 0.5"])
def test_kontext_has_no_use_for_a_strength(cli, here, models, draw, words):
    case = BY_NAME["generate-kontext"]
    draw(case, "--output", "plain.png")
    named = ("--model", models(case), "--base-model", case.base_model, "--prompt", "a red circle")
    result = cli("generate-kontext", *named, *words.split(), *SMALL, "--output", "b.png")
    assert len(result.warnings) == 1 and "--image-strength (the number after --image PATH) is ignored" in result.err
    assert np.array_equal(pixels("b.png"), pixels("plain.png"))


@pytest.mark.parametrize("command", sorted(BY_NAME))
def test_a_strength_where_an_image_is_seen_in_every_step(here, models, caplog, command):
    """A program with one slider for all its models always sends one; it generates as without."""
    case = BY_NAME[command]
    cls = case.pipeline_class()
    if "ignore_strength" not in vars(sys.modules[cls.__module__]):
        pytest.skip("it has a use for a strength, or no such argument")
    config = ModelConfig.from_name(str(models(case)), case.base_model)
    pipeline = cls(model_path=str(models(case)), model_config=config)
    settings = {"seed": 1, "prompt": "x", "num_inference_steps": 2, "width": 48, "height": 32} | dict(case.generate)
    plain = np.asarray(pipeline.generate_image(**settings).image)
    caplog.clear()
    assert np.array_equal(np.asarray(pipeline.generate_image(**settings, image_strength=0.5).image), plain)
    assert [text.partition(":")[0] for text in caplog.messages if "strength" in text] == ["image_strength is ignored"]
    with pytest.raises(UsageError, match="image_strength is 7"):
        pipeline.generate_image(**settings, image_strength=7)


def test_kontext_needs_an_image(models):
    case = BY_NAME["generate-kontext"]
    pipeline = case.pipeline_class()(model_path=str(models(case)))
    with pytest.raises(UsageError, match="image_path"):
        pipeline.generate_image(1, "x")


def test_kontext_takes_the_size_of_its_picture(draw):
    case = BY_NAME["generate-kontext"]
    result = draw(case, small=("--steps", 1))
    assert (opened("image.png").size, result.warnings) == ((64, 48), [])


def test_a_large_picture_is_drawn_at_a_megapixel(here, caplog):
    from mflux.models.flux.sources import fitted_size

    PIL.Image.new("RGB", (4032, 3024)).save("large.jpg")
    width, height = fitted_size("large.jpg")
    assert (width, height) == (1168, 880)
    assert "4032 x 3024" in caplog.text


@pytest.mark.parametrize("words", [(), ("--width", "auto", "--height", "auto")])
def test_a_photo_from_a_phone_is_fitted(draw, here, monkeypatch, words):
    """Larger than the model was made for, and lying on its side with a note to turn it."""
    from mflux.models.flux import sources

    monkeypatch.setattr(sources, "MEGAPIXEL", 48 * 64)
    turned = PIL.Image.Exif()
    turned[0x0112] = 6
    photo(192, 128).save("photo.png", exif=turned)
    result = draw(BY_NAME["generate-kontext"], *words, small=("--steps", 1))
    assert opened("image.png").size == (32, 64)
    (warning,) = result.warnings
    assert "128 x 192" in warning and "32 x 64" in warning
    assert draw(BY_NAME["generate-kontext"], small=SMALL).warnings == [], "a size of one's own is taken"


# ---- Fill


def test_a_folder_of_another_variant_is_refused(cli, here, models):
    text_to_image = models(BY_NAME["generate-kontext"])
    words = BY_NAME["generate-fill"].words
    result = cli("generate-fill", "--model", text_to_image, "--base-model", "dev-fill", "--prompt", "x", *words)
    assert (result.status, len(result.errors)) == (1, 1)
    assert "takes 64 channels a token, not 384" in result.err


def test_what_is_black_in_the_mask_decides(draw):
    """The picture under white does not reach the model, and the picture under black does."""
    case = BY_NAME["generate-fill"]
    draw(case, "--output", "a.png")
    white = np.asarray(opened("mask.png")) > 127
    for part, same in ((white, True), (~white, False)):
        changed = np.asarray(photo(64, 48)).copy()
        changed[part] = (0, 255, 0)
        PIL.Image.fromarray(changed).save("photo.png")
        draw(case, "--output", "b.png", small=(*SMALL[:2], "--width", 64, "--height", 48, "--seed", 1))
        photo(64, 48).save("photo.png")
        draw(case, "--output", "c.png", small=(*SMALL[:2], "--width", 64, "--height", 48, "--seed", 1))
        assert (pixels("b.png") == pixels("c.png")).all() == same
        Path("b.png").unlink(), Path("c.png").unlink()


# ---- side by side


@pytest.fixture
def ic_edit_lora(monkeypatch, tmp_path) -> Path:
    from mflux.backend import mx
    from mflux.models.flux.cli import flux_generate_in_context_edit as command

    path = tmp_path / "edit.safetensors"
    name = "transformer.transformer_blocks.0.attn.to_q"
    draws = [mx.random.normal(shape, key=mx.random.key(number)) for number, shape in enumerate([(2, 48), (48, 2)])]
    mx.save_safetensors(str(path), {f"{name}.lora_A.weight": draws[0], f"{name}.lora_B.weight": draws[1]})
    monkeypatch.setattr(command, "LORA", path.name)
    return path


def edit(cli, model: Path, *words):
    start = ("generate-in-context-edit", "--model", model, "--reference-image", "photo.png", "--steps", 1, "--seed", 1)
    return cli(*start, *words)


def test_editing_wraps_the_instruction_and_adds_its_lora(cli, here, models, ic_edit_lora, monkeypatch):
    from mflux.models.flux.cli import flux_generate_in_context_edit as command

    monkeypatch.setattr(command, "_WIDTH", 48)
    model = models(BY_NAME["generate-fill"])
    assert edit(cli, model, "--instruction", "it rains", "--output", "a.png").status == 0
    settings = MetadataReader.read_exif_metadata("a.png")
    assert settings["prompt"].startswith("A diptych with two side-by-side images of the same scene.")
    assert settings["prompt"].endswith("on the left but it rains")
    assert (settings["lora_paths"], settings["lora_scales"]) == (["edit.safetensors"], [1.0])
    assert opened("a.png").size == (48, 32)
    result = edit(cli, model, "-C", "a.png", "--output", "b.png")
    assert result.status == 0, result.err
    assert (pixels("a.png") == pixels("b.png")).all()
    result = edit(cli, model, "--prompt", "x", "--width", 64, "--save-full-image", "--output", "c.png")
    assert [path.name for path in result.paths] == ["c.png", "c_full.png"]
    assert opened("c_full.png").size == (96, 32)
    assert len(result.warnings) == 1 and "--width is ignored" in result.err


def test_editing_needs_words(cli, here, models):
    model = models(BY_NAME["generate-fill"])
    assert "--instruction" in edit(cli, model).err
    result = edit(cli, model, "--instruction", "x", "--prompt", "y")
    assert (result.status, len(result.errors)) == (2, 1)


def test_catvton_has_words_of_its_own(draw):
    draw(BY_NAME["generate-in-context-catvton"], prompt=())
    assert "[IMAGE2]" in MetadataReader.read_exif_metadata("image.png")["prompt"]


def test_catvton_takes_the_authors_transformer(here, models, monkeypatch):
    """Without a folder Fill's own transformer is not even looked at."""
    from mflux.models.common import model as module
    from mflux.models.flux.variants.in_context import flux_in_context_fill

    fill = models(BY_NAME["generate-fill"])
    asked = []

    def resolve(name, components, beside, **_):
        asked.append((name, [component.folder for component in components]))
        return fill / "transformer" if name == "xiaozaa/catvton-flux-beta" else fill

    monkeypatch.setattr(module, "resolve", resolve)
    monkeypatch.setattr(flux_in_context_fill, "resolve", resolve)
    pipeline = flux_in_context_fill.Flux1InContextFill(model_config=ModelConfig.dev_fill_catvton())
    assert asked == [
        ("black-forest-labs/FLUX.1-Fill-dev", ["text_encoder", "text_encoder_2", "vae"]),
        ("xiaozaa/catvton-flux-beta", [""]),
    ]
    assert pipeline.transformer.config.in_channels == 384


# ---- Depth


class FlatWorld:
    """In place of Depth Pro, which is four gigabytes."""

    made: list = []

    def __init__(self, quantize=None, model_path=None):
        FlatWorld.made.append(quantize)

    def create_depth_map(self, image_path):
        from types import SimpleNamespace

        return SimpleNamespace(depth_image=opened(image_path).convert("L"))


@pytest.fixture
def depth_pro(monkeypatch):
    monkeypatch.setattr("mflux.models.common.controls.depth_pro.depth_pro.DepthPro", FlatWorld)
    FlatWorld.made = []
    return FlatWorld


def test_depth_is_found_once_and_written_only_where_asked(cli, here, models, depth_pro):
    model = models(BY_NAME["generate-depth"])
    start = ("generate-depth", "--model", model, "--prompt", "x", "--image-path", "photo.png", *SMALL[:-2])
    before = {path.name for path in here.iterdir()}
    result = cli(*start, "--seed", 1, 2)
    assert result.status == 0, result.err
    assert depth_pro.made == [None]
    assert {path.name for path in here.iterdir()} - before == {"image_seed_1.png", "image_seed_2.png"}
    result = cli(*start, "--seed", 1, "--save-depth-map")
    assert [path.name for path in result.paths] == ["image.png", "image_depth_map.png"]
    # The map that was written draws the same picture, and Depth Pro is not asked for it.
    depth_pro.made.clear()
    given = cli(*start[:5], "--depth-image-path", "image_depth_map.png", *SMALL, "--output", "b.png")
    assert given.status == 0 and depth_pro.made == []
    assert (pixels("b.png") == pixels("image.png")).all()


def test_a_depth_pro_of_a_program_s_own(here, models, depth_pro):
    pipeline = BY_NAME["generate-depth"].pipeline_class()(
        model_path=str(models(BY_NAME["generate-depth"])), model_config=ModelConfig.dev_depth()
    )
    assert pipeline.depth_pro is None
    pipeline.depth_pro = FlatWorld()
    depth_pro.made.clear()
    assert pipeline.generate_image(1, "x", 1, 32, 48, image_path="photo.png").depth_image is not None
    assert depth_pro.made == []


def test_depth_of_what_is_no_picture(here, models, depth_pro):
    pipeline = BY_NAME["generate-depth"].pipeline_class()(
        model_path=str(models(BY_NAME["generate-depth"])), model_config=ModelConfig.dev_depth()
    )
    for path in ("missing.png", "."):
        with pytest.raises(ImageError):
            pipeline.generate_image(seed=1, prompt="x", image_path=path, height=32, width=48)
    assert depth_pro.made == []


def test_depth_needs_a_picture(cli, here, models):
    model = models(BY_NAME["generate-depth"])
    result = cli("generate-depth", "--model", model, "--prompt", "x")
    assert (result.status, len(result.errors)) == (2, 1)
    result = cli(
        "generate-depth", "--model", model, "--prompt", "x", "--depth-image-path", "photo.png", "--save-depth-map"
    )
    assert (result.status, len(result.errors)) == (2, 1)


# ---- ControlNets


def test_edges_are_followed_and_written(draw, here):
    case = BY_NAME["generate-controlnet"]
    result = draw(case, "--controlnet-save-canny")
    assert [path.name for path in result.paths] == ["image.png", "image_controlnet_canny.png"]
    assert set(np.unique(pixels("image_controlnet_canny.png"))) <= {0, 255}
    draw(case, "--controlnet-strength", 0, "--output", "none.png")
    draw(case, "--controlnet-strength", 1, "--output", "all.png")
    assert (pixels("none.png") != pixels("all.png")).any()
    # No strength at all is one that was said.
    draw(case, "-C", "none.png", "--output", "again.png", small=(), prompt=())
    assert (pixels("again.png") == pixels("none.png")).all()


def test_a_controlnet_of_ones_own(here, models, tmp_path):
    case = BY_NAME["generate-controlnet"]
    net = shutil.copytree(models(case) / "transformer_controlnet", tmp_path / "net")
    bare = shutil.copytree(models(case), tmp_path / "bare")
    shutil.rmtree(bare / "transformer_controlnet")
    settings = dict(seed=1, prompt="x", num_inference_steps=1, height=32, width=48, controlnet_image_path="photo.png")
    own, given = (
        case.pipeline_class()(
            model_path=str(folder), controlnet_path=path, model_config=ModelConfig.dev_controlnet_canny()
        )
        for folder, path in ((models(case), None), (bare, str(net)))
    )
    one, other = (np.asarray(pipeline.generate_image(**settings).image) for pipeline in (own, given))
    assert (one == other).all()
    with pytest.raises(CheckpointError, match="not a ControlNet of FLUX.1"):
        case.pipeline_class()(model_path=str(bare), controlnet_path=str(bare / "transformer"))


@pytest.mark.parametrize("said, key", [("dev", "dev-controlnet-canny"), ("schnell", "schnell-controlnet-canny")])
def test_a_plain_model_stands_for_its_controlnet(monkeypatch, here, cli, said, key):
    from mflux.models.flux.variants.controlnet import flux_controlnet

    def refuse(self, *args, model_config, **kwargs):
        raise UsageError(f"{model_config.aliases[0]} and {model_config.controlnet_model}")

    monkeypatch.setattr(flux_controlnet.Flux1Controlnet, "__init__", refuse)
    result = cli("generate-controlnet", "--model", said, "--prompt", "x", "--controlnet-image-path", "photo.png")
    assert result.errors == [f"error: {key} and InstantX/FLUX.1-dev-Controlnet-Canny"]


def test_a_saved_model_says_which_controlnet_it_has(here, models, tmp_path, monkeypatch):
    from mflux.models.common import model as module

    case = BY_NAME["generate-controlnet"]
    bare = shutil.copytree(models(case), tmp_path / "bare")
    shutil.rmtree(bare / "transformer_controlnet")
    net = models(case) / "transformer_controlnet"
    revision = tmp_path / "models--InstantX--FLUX.1-dev-Controlnet-Canny" / "snapshots" / "0123"
    shutil.copytree(net, revision)
    monkeypatch.setattr(module, "resolve", lambda name, *_, **__: revision if "InstantX" in name else Path(name))
    instant, own = "InstantX/FLUX.1-dev-Controlnet-Canny", shutil.copytree(net, tmp_path / "secret" / "my-net")
    place = {"repo_id": instant, "revision": "0123"}
    recorded = [
        (bare, None, {"source": instant, "upstream": place}),
        (bare, str(own), {"source": "my-net", "upstream": None}),
        # As it says itself; and where nothing is known, nothing is said.
        (Path("saved0"), None, {"source": instant, "upstream": place}),
        (models(case), None, None),
    ]
    for number, (folder, path, expected) in enumerate(recorded):
        config = ModelConfig.dev_controlnet_canny()
        pipeline = case.pipeline_class()(model_path=str(folder), controlnet_path=path, model_config=config)
        pipeline.save_model(f"saved{number}")
        text = Path(f"saved{number}", "mflux_model.json").read_text()
        assert "secret" not in text
        assert json.loads(text).get("components", {}).get("transformer_controlnet") == expected


def test_the_settings_of_a_control_picture_are_kept(cli, draw, here):
    """As mflux 0.24 does: those that it was made with stand beside the new ones, as `original_…`."""
    assert cli("generate", "--model", "demo", "--prompt", "a red square", "--seed", 9, "--steps", 3).status == 0
    for command in ("generate-controlnet", "upscale-controlnet"):
        # `--controlnet-image-path` stands twice, and the later one counts.
        draw(BY_NAME[command], "--controlnet-image-path", "image.png", "--output", f"{command}.png")
        settings = MetadataReader.read_exif_metadata(f"{command}.png")
        kept = {name: value for name, value in settings.items() if name.startswith("original_")}
        assert kept == {
            "original_seed": 9, "original_steps": 3, "original_model": "demo", "original_width": 128,
            "original_height": 128,
        }  # fmt: skip
        assert (settings["seed"], settings["prompt"]) == (1, "a red circle")
    draw(BY_NAME["upscale-controlnet"], "--output", "plain.png")
    assert not [name for name in MetadataReader.read_exif_metadata("plain.png") if name.startswith("original_")]


def test_upscaling_by_a_factor(draw):
    draw(BY_NAME["upscale-controlnet"], small=("--steps", 1, "--width", "2x", "--height", "2x"))
    assert opened("image.png").size == (128, 96)


# ---- Redux


def test_redux_counts_strengths(cli, here, models):
    model = models(BY_NAME["generate-redux"])
    start = ("generate-redux", "--model", model, "--prompt", "x")
    result = cli(*start)
    assert (result.status, len(result.errors)) == (2, 1) and "--redux-image-paths" in result.err
    result = cli(*start, "--redux-image-paths", "photo.png", "--redux-image-strengths", 1, 2)
    assert (result.status, len(result.errors)) == (2, 1) and "2" in result.err


def processor_of(model: Path, folder: Path, **changes) -> Path:
    """A copy of a Redux model that says how pictures are shown to it, as its repository does."""
    shutil.copytree(model, folder)
    settings = {
        "do_convert_rgb": None, "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3, "image_processor_type": "SiglipImageProcessor", "processor_class": "SiglipProcessor",
        "resample": 3, "rescale_factor": 0.00392156862745098, "size": {"height": 56, "width": 56},
    }  # fmt: skip
    (folder / "feature_extractor").mkdir()
    (folder / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(settings | changes))
    return folder


def test_redux_shows_pictures_as_its_folder_says(draw, models, tmp_path):
    case = BY_NAME["generate-redux"]
    shown = [{}, {"resample": 2}, {"image_mean": [0.4, 0.5, 0.6]}, {"image_std": [0.3] * 3}, {"rescale_factor": 0.002}]
    draw(case, "--output", "plain.png")
    drawn = []
    for number, changes in enumerate(shown):
        folder = processor_of(models(case), tmp_path / f"model{number}", **changes)
        draw(case, "--base-model", "dev-redux", "--output", f"{number}.png", model=folder)
        drawn.append(pixels(f"{number}.png"))
    assert (drawn[0] == pixels("plain.png")).all(), "Redux's own are what is taken where nothing is said"
    assert len({picture.tobytes() for picture in drawn}) == len(shown)


def test_redux_s_own_pictures_are_the_default():
    published = json.loads((SURFACE / "configs.json").read_text())["FLUX.1-Redux-dev/feature_extractor"]
    read = SiglipProcessor.from_dict(published)
    assert replace(read, size=None) == SiglipProcessor()
    assert read.fits(SiglipConfig()) is None


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"size": {"height": 384, "width": 384}}, "the image encoder takes 56 x 56"),
        ({"resample": 7}, "resample is 7"),
        ({"image_std": [0.5, 0, 0.5]}, "divides by zero"),
        ({"image_mean": "grey"}, "image_mean is 'grey'"),
    ],
)
def test_redux_refuses_what_it_cannot_show(cli, here, models, tmp_path, changes, told):
    case = BY_NAME["generate-redux"]
    folder = processor_of(models(case), tmp_path / "model", **changes)
    result = cli(case.command, "--model", folder, "--base-model", case.base_model, "--prompt", "x", *case.words, *SMALL)
    assert (result.status, len(result.errors)) == (1, 1)
    assert told in result.err and "preprocessor_config.json" in result.err


def test_redux_takes_what_reads_pictures_from_its_own_repository(here, models, tmp_path, monkeypatch):
    from mflux.models.common import model as module
    from mflux.models.flux.family import FAMILY
    from mflux.models.flux.variants.redux.flux_redux import Flux1Redux

    whole = processor_of(models(BY_NAME["generate-redux"]), tmp_path / "whole")
    processor = ("feature_extractor",)
    base = shutil.copytree(whole, tmp_path / "base")
    for part in ("image_encoder", "image_embedder", "feature_extractor"):
        shutil.rmtree(base / part)
    asked, redux = [], "black-forest-labs/FLUX.1-Redux-dev"

    def resolve(name, components, beside, **_):
        asked.append((name, [component.folder for component in components], beside))
        return {redux: whole, "black-forest-labs/FLUX.1-dev": base}.get(name) or Path(name)

    monkeypatch.setattr(module, "resolve", resolve)
    pipeline = Flux1Redux()
    own = ["text_encoder", "text_encoder_2", "transformer", "vae"]
    expected = [("black-forest-labs/FLUX.1-dev", own, FAMILY.beside), (redux, ["image_encoder"], processor)]
    # How pictures are shown is checked before anything is encoded.
    assert asked == expected
    assert pipeline.image_encoder and pipeline.image_embedder
    assert asked == [*expected, (redux, ["image_embedder"], ())]
    pipeline.save_model("saved")
    record = json.loads(Path("saved", "mflux_model.json").read_text())["components"]
    assert record == {part: {"source": redux, "upstream": None} for part in ("image_encoder", "image_embedder")}
    assert Path("saved", "feature_extractor", "preprocessor_config.json").is_file()
    # What it says of them stays true when it is saved anew.
    Flux1Redux(model_path="saved", quantize=8).save_model("again")
    assert json.loads(Path("again", "mflux_model.json").read_text())["components"] == record
    assert Path("again", "feature_extractor", "preprocessor_config.json").is_file()


# ---- LoRAs


def test_a_lora_for_another_entrance_is_refused(cli, here, models):
    """FLUX.1-dev's tokens have fewer channels than Fill's and Depth's; those of Depth's and Canny's LoRAs have more."""
    for channels, command in ((64, "generate-fill"), (64, "generate-depth"), (128, "generate-kontext")):
        case = BY_NAME[command]
        shapes = {"lora_A": (2, channels), "lora_B": (48, 2)}
        tensors = {f"transformer.x_embedder.{part}.weight": mx.ones(shape) for part, shape in shapes.items()}
        mx.save_safetensors("entrance.safetensors", tensors)
        which = ("--model", models(case), "--base-model", case.base_model, "--prompt", "x", *case.words)
        result = cli(command, *which, *SMALL, "--lora", "entrance.safetensors")
        assert (result.status, len(result.errors), result.paths) == (1, 1, [])
        assert "entrance.safetensors" in result.err and "x_embedder" in result.err


def test_a_lora_and_a_controlnet(cli, here, models):
    """A ControlNet takes none: a file that is for one is refused, whatever it is applied to."""
    case = BY_NAME["generate-controlnet"]
    tensors = {
        f"controlnet.controlnet_blocks.0.{part}.weight": mx.ones(shape)
        for part, shape in {"lora_A": (2, 48), "lora_B": (48, 2)}.items()
    }
    mx.save_safetensors("control.safetensors", tensors)
    which = ("--model", models(case), "--base-model", case.base_model, "--prompt", "x", *case.words)
    result = cli(case.command, *which, *SMALL, "--lora", "control.safetensors")
    assert (result.status, len(result.errors), result.paths) == (1, 1, [])
    assert "control.safetensors" in result.err


# ---- memory


README = Path(__file__).parents[3] / "src" / "mflux" / "models" / "flux" / "README.md"


def test_the_readme_s_sizes_are_those_of_the_published_models():
    """Counted from our own modules' shapes, which parity tests compare with the reference's."""
    rows = re.findall(r"^\| `(\w+)`[^|]*\|[^|]*\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", README.read_text(), re.M)
    sizes = {name: tuple(map(float, numbers)) for name, *numbers in rows}
    components = (*FAMILY.components, CONTROLNET, IMAGE_ENCODER, IMAGE_EMBEDDER)
    assert sizes.keys() == {component.name for component in components}
    for component in components:
        kind = component.module_class()
        # A configuration's defaults are the published model's; nothing of the module is computed.
        module = kind(kind.config_class())
        late = late_layers(module)
        tensors = {
            name: value.astype(mx.bfloat16)
            for name, value in tree_flatten(module.parameters())
            if name.rpartition(".")[0] not in late
        }
        found = (
            estimated_bytes(tensors, None),
            *(estimated_bytes(tensors, one, planned(module, one)) for one in (Quantization(8), Quantization(4))),
        )
        assert tuple(round(size / 1e9, 1) for size in found) == sizes[component.name], component.name


# ---- what mflux 0.24 saved


def as_saved_by_024(folder: Path, part: str, target: Path) -> None:
    """One component under 0.24's names and in its layout, without a configuration."""
    from mflux.backend import mx

    names = {".net.0.proj.": ".linear1.", ".net.2.": ".linear2.", "vision_model.": ""}
    tensors = {}
    for name, value in mx.load(str(next((folder / part).glob("*.safetensors")))).items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        tensors[name] = mx.contiguous(mx.moveaxis(value, 1, -1)) if value.ndim == 4 else value
    (target / part).mkdir(parents=True)
    mx.save_safetensors(str(target / part / "0.safetensors"), tensors)


@pytest.mark.parametrize(
    "command, part",
    [
        ("generate-controlnet", "transformer_controlnet"),
        ("generate-redux", "image_encoder"),
        ("generate-redux", "image_embedder"),
        ("generate-fill", "transformer"),
    ],
)
def test_components_that_024_saved(models, tmp_path, command, part):
    """No configuration lies beside them: it follows from the tensors, as the published one would say."""
    from mflux.checkpoints.loading import load_component
    from mflux.models.common.model import open_folder
    from mflux.models.flux.family import CONTROLNET, FAMILY, IMAGE_EMBEDDER, IMAGE_ENCODER

    source = models(BY_NAME[command])
    parts = {one.folder: one for one in (*FAMILY.components, CONTROLNET, IMAGE_EMBEDDER, IMAGE_ENCODER)}
    as_saved_by_024(source, part, tmp_path)
    if part != "transformer":
        as_saved_by_024(source, "transformer", tmp_path)
    folder = open_folder(tmp_path, FAMILY)
    kind = parts[part].module_class()
    expected = load_component(kind, source / part)
    # Heads narrower than the published ones, which no shape tells.
    untold = {"image_encoder": ("num_attention_heads",), "image_embedder": ()}.get(part, ("axes_dims_rope",))
    config = folder.config(part) | {name: getattr(expected.config, name) for name in untold}
    loaded = load_component(kind, tmp_path / part, config=config, tensors=folder.tensors(part))
    assert loaded.config == expected.config
    from mflux.backend import mx, tree_flatten

    ours, theirs = (dict(tree_flatten(module.parameters())) for module in (loaded, expected))
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)


# ---- concept attention


def concept(cli, model: Path, *words, command="concept"):
    start = (command, "--model", model, "--base-model", "dev", "--prompt", "a red circle", "--concept", "circle")
    return cli(*start, *SMALL, *words)


def look(cli, model: Path, *words):
    return concept(cli, model, "--input-image-path", "photo.png", *words, command="concept-from-image")


def test_a_heatmap_stands_beside_the_picture_with_how_it_was_found(cli, here, models):
    model = models(BY_NAME["concept"])
    result = concept(cli, model, "--metadata", "--output", "a.png")
    assert (result.status, result.errors, result.warnings) == (0, [], []), result.err
    assert [path.name for path in result.paths] == ["a.png", "a_heatmap.png"]
    told = {"concept_prompt": "circle", "layer_indices": [0, 1, 2], "timesteps": [0, 1], "height": 32, "width": 48}
    assert MetadataReader.read_exif_metadata("a_heatmap.png") == told
    assert json.loads(Path("a_heatmap.metadata.json").read_text()) == told
    heat = pixels("a_heatmap.png")
    assert heat.shape == (32, 48, 3)
    assert (heat == heat[::16, ::16].repeat(16, axis=0).repeat(16, axis=1)).all()
    # A name that is taken: both files get the same free one.
    result = concept(cli, model, "--no-metadata", "--output", "a.png")
    assert [path.name for path in result.paths] == ["a_1.png", "a_1_heatmap.png"]
    assert MetadataReader.read_exif_metadata("a_1_heatmap.png") is None
    result = concept(cli, model, "--seed", 1, 2, "--output", "b.jpg")
    names = ["b_seed_1.jpg", "b_seed_1_heatmap.jpg", "b_seed_2.jpg", "b_seed_2_heatmap.jpg"]
    assert [path.name for path in result.paths] == names
    assert (pixels("b_seed_1_heatmap.jpg") != pixels("b_seed_2_heatmap.jpg")).any()


def test_looking_does_not_change_what_is_drawn(cli, here, models):
    model = models(BY_NAME["concept"])
    concept(cli, model, "--output", "seen.png")
    plain = ("generate", "--model", model, "--base-model", "dev", "--prompt", "a red circle", *SMALL)
    assert cli(*plain, "--output", "plain.png").status == 0
    assert (pixels("seen.png") == pixels("plain.png")).all()
    # Its settings say nothing that `mflux-generate` has no option for.
    assert cli("generate", "-C", "seen.png", "--model", model, "--base-model", "dev", "--output", "c.png").status == 0
    assert (pixels("seen.png") == pixels("c.png")).all()


def test_what_is_looked_for_and_where_matters(cli, here, models):
    model = models(BY_NAME["concept"])
    calls = [
        (), ("--concept", "square"), ("--heatmap-layer-indices", 0), ("--heatmap-timesteps", 1),
        ("--scheduler", "flow_match_euler_discrete", "--steps", 3, "--heatmap-timesteps", 2),
        ("--steps", 3, "--heatmap-timesteps", 2),
    ]  # fmt: skip
    heats = []
    for number, words in enumerate(calls):
        result = concept(cli, model, *words, "--output", f"{number}.png")
        assert result.status == 0, result.err
        heats.append(pixels(f"{number}_heatmap.png").tobytes())
    assert len(set(heats)) >= 5
    told = MetadataReader.read_exif_metadata("2_heatmap.png")
    assert (told["layer_indices"], told["timesteps"]) == ([0], [0, 1])
    concept(cli, model, "--heatmap-layer-indices", 2, 0, 2, "--heatmap-timesteps", "--output", "many.png")
    told = MetadataReader.read_exif_metadata("many_heatmap.png")
    assert (told["layer_indices"], told["timesteps"]) == ([0, 2], [0, 1])


def test_a_schedule_is_honoured(cli, here, models, tmp_path, monkeypatch):
    (tmp_path / "own_schedule.py").write_text(
        "from mflux.models.common.schedulers.linear_scheduler import LinearScheduler\n"
        "from mflux.backend import mx\n\n\nclass Early(LinearScheduler):\n"
        "    def _get_sigmas(self):\n        return mx.array([1.0, 0.99, 0.0])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    model = models(BY_NAME["concept"])
    for name, run in (("drawn", concept), ("seen", look)):
        for words in ((), ("--scheduler", "own_schedule.Early")):
            assert run(cli, model, *words, "--output", f"{name}{len(words)}.png").status == 0
        assert (pixels(f"{name}0_heatmap.png") != pixels(f"{name}2_heatmap.png")).any()


@pytest.mark.parametrize("run", [concept, look])
@pytest.mark.parametrize(
    "words, told",
    [
        ("--heatmap-timesteps 2", "--heatmap-timesteps says 2, and the steps are 0 to 1"),
        ("--heatmap-timesteps -1", "says -1"),
        ("--heatmap-layer-indices 3", "says 3, and the double blocks are 0 to 2"),
        ("--heatmap-layer-indices 15 16 17 18", "the double blocks are 0 to 2"),
        ("--concept= ", "nothing to look for"),
    ],
)
def test_what_there_is_not_to_look_at_is_refused(cli, here, models, run, words, told):
    result = run(cli, models(BY_NAME["concept"]), *words.split(maxsplit=1 if "=" in words else -1))
    assert (result.status, len(result.errors), result.paths) == (2, 1, [])
    assert told in result.err
    assert {path.name for path in here.iterdir()} == {"photo.png", "other.png", "mask.png"}


def test_steps_are_counted_among_those_that_are_taken(cli, here, models):
    """Of four steps a strength of 0.5 leaves two; mflux 0.24 looked for the other two by default, and failed."""
    model = models(BY_NAME["concept"])
    drawn = ("--steps", 4, "--image", "photo.png", 0.5)
    seen = ("--steps", 4, "--image-strength", 0.5)
    for name, run, words in (("drawn", concept, drawn), ("seen", look, seen)):
        result = run(cli, model, *words, "--output", f"{name}.png")
        assert result.status == 0, result.err
        assert MetadataReader.read_exif_metadata(f"{name}_heatmap.png")["timesteps"] == [0, 1]
        result = run(cli, model, *words, "--heatmap-timesteps", 2)
        assert (result.status, len(result.errors)) == (2, 1)
        assert "2, and the steps that are taken are 0 to 1" in result.err
    drawn, seen = ("--image", "photo.png", 1), ("--image-strength", 1)
    for run, words in ((concept, drawn), (look, seen)):
        result = run(cli, model, *words)
        assert (result.status, len(result.errors)) == (2, 1)
        assert "leaves no step to look at" in result.err


def test_looking_at_a_picture(cli, here, models):
    """What comes out is the picture as the autoencoder gives it back, whatever the noise; its heat depends on it."""
    model = models(BY_NAME["concept"])
    for seed in (1, 2):
        assert look(cli, model, "--seed", seed, "--output", f"{seed}.png").status == 0
    assert (pixels("1.png") == pixels("2.png")).all()
    assert (pixels("1_heatmap.png") != pixels("2_heatmap.png")).any()
    settings = MetadataReader.read_exif_metadata("1.png")
    assert settings["image_path"] == "photo.png"
    assert settings["image_strength"] is None
    assert (settings["width"], settings["height"]) == (48, 32)
    again = ("concept-from-image", "-C", "1.png", "--model", model, "--base-model", "dev", "--concept", "circle")
    result = cli(*again, "--input-image-path", "photo.png", "--output", "again.png")
    assert result.status == 0, result.err
    for name in ("", "_heatmap"):
        assert (pixels(f"again{name}.png") == pixels(f"1{name}.png")).all()
    # A strength that a picture notes is a strength that was said.
    look(cli, model, "--steps", 4, "--image-strength", 0.5, "--output", "half.png")
    again = ("concept-from-image", "-C", "half.png", "--model", model, "--base-model", "dev", "--concept", "circle")
    cli(*again, "--input-image-path", "photo.png", "--output", "half_again.png")
    assert (pixels("half_again_heatmap.png") == pixels("half_heatmap.png")).all()
    assert look(cli, model, "--image-strength", 0, "--output", "none.png").warnings == []
    assert (pixels("none_heatmap.png") == pixels("1_heatmap.png")).all()


def test_the_blocks_behind_the_last_one_are_not_computed(here, models, monkeypatch):
    """Of a picture that is given nothing is drawn: only what is looked at is computed."""
    from mflux.models.common.networks.mmdit import SingleTransformerBlock
    from mflux.models.flux.variants.concept_attention.flux_concept_from_image import Flux1ConceptFromImage

    def nothing(self, x, condition, rotary):
        return x + float("nan")

    monkeypatch.setattr(SingleTransformerBlock, "__call__", nothing)
    pipeline = Flux1ConceptFromImage(model_path=str(models(BY_NAME["concept"])), model_config=ModelConfig.dev())
    drawn = pipeline.generate_image(
        seed=1, prompt="x", concept="circle", image_path="photo.png", num_inference_steps=2, height=32, width=48
    )
    assert np.asarray(drawn.concept_heatmap.image).std() > 0


def test_a_lora_changes_what_is_seen(cli, here, models, ic_edit_lora):
    model = models(BY_NAME["concept"])
    for scale in (0, 1):
        assert look(cli, model, "--lora", ic_edit_lora.name, scale, "--output", f"{scale}.png").status == 0
    assert (pixels("0.png") == pixels("1.png")).all()
    assert (pixels("0_heatmap.png") != pixels("1_heatmap.png")).any()


@pytest.mark.parametrize("name", ["flux_concept.Flux1Concept", "flux_concept_from_image.Flux1ConceptFromImage"])
def test_more_steps_to_look_at_take_no_more_memory(here, models, name):
    """One sum is kept; all that is looked at would be some 50 kB a step here."""
    module, _, name = name.partition(".")
    kind = getattr(importlib.import_module(f"mflux.models.flux.variants.concept_attention.{module}"), name)
    pipeline = kind(model_path=str(models(BY_NAME["concept"])), model_config=ModelConfig.dev())
    held = []

    class Watch:
        def call_in_loop(self, **_):
            held.append(mx.get_active_memory())

    pipeline.callbacks.register(Watch())
    settings = dict(seed=1, prompt="x", concept="y", image_path="photo.png", height=128, width=128)
    pipeline.generate_image(num_inference_steps=12, **settings)
    assert abs(held[-1] - held[2]) < 50_000, held


@pytest.mark.parametrize("words", ["--image photo.png", "--image photo.png 0.5", "--image-path photo.png"])
def test_one_picture_is_said_in_one_way(cli, here, models, words):
    result = look(cli, models(BY_NAME["concept"]), *words.split())
    assert (result.status, len(result.errors)) == (2, 1)
    assert "--input-image-path says which picture" in result.err


def test_a_picture_to_look_at_is_for_the_other_command(cli, here, models):
    result = concept(cli, models(BY_NAME["concept"]), "--input-image-path", "photo.png")
    assert (result.status, len(result.errors)) == (2, 1)
    assert "mflux-concept-from-image" in result.err


def test_concepts_without_a_model_s_name(cli, here):
    """mflux 0.24 could not do without it."""
    for command in ("concept", "concept-from-image"):
        picture = ("--input-image-path", "photo.png") if "from" in command else ()
        result = cli(command, "--prompt", "x", "--concept", "y", *picture)
        assert (result.status, len(result.errors)) == (1, 1)
        assert "black-forest-labs/FLUX.1-schnell" in result.err


def test_the_embedded_model_looks_for_concepts_at_its_own_size(cli, here):
    result = cli("concept", "--model", "demo", "--prompt", "a red circle", "--concept", "circle", "--steps", 1)
    assert result.status == 0, result.err
    assert [opened(path).size for path in result.paths] == [(128, 128)] * 2
    told = MetadataReader.read_exif_metadata("image_heatmap.png")
    assert (told["layer_indices"], told["timesteps"]) == ([0], [0])


def test_concepts_in_python(here, models):
    pipeline = BY_NAME["concept"].pipeline_class()(
        model_path=str(models(BY_NAME["concept"])), model_config=ModelConfig.dev()
    )
    settings = dict(seed=1, prompt="x", num_inference_steps=2, height=32, width=48)
    for wrong in ("0", [0.5], [True], 3):
        with pytest.raises(UsageError, match="heatmap_layer_indices"):
            pipeline.generate_image(concept="y", heatmap_layer_indices=wrong, **settings)
    with pytest.raises(UsageError):
        pipeline.generate_image(concept=None, **settings)
    assert not pipeline.loaded()
    drawn = pipeline.generate_image(concept="y", heatmap_timesteps=np.array([1]).tolist(), **settings)
    assert drawn.concept_heatmap.timesteps == [1]
    assert drawn.save_with_heatmap("drawn.png").name == "drawn.png"
    assert drawn.concept_heatmap.save("own.png").name == "own.png"
    assert (pixels("own.png") == pixels("drawn_heatmap.png")).all()
    # Both were encoded at once, and are kept.
    assert set(pipeline.prompt_cache) == {"x", "y"}


def test_heat_is_shown_in_plasma_s_colours():
    """Read off matplotlib 3.9: its `plasma` at whole numbers of 255ths, and the digest of all 256 colours."""
    from mflux.models.flux.variants.concept_attention.attention_data import heat_picture

    heat = np.zeros((2, 256), np.float32)
    heat[0] = np.arange(256) / 255
    shown = np.asarray(heat_picture(heat, 16, 256 * 16))[0, ::16]
    some = [(12, 7, 134), (126, 3, 167), (203, 71, 119), (248, 149, 64), (239, 248, 33)]
    assert [tuple(colour) for colour in shown[[0, 64, 128, 192, 255]].tolist()] == some
    digest = hashlib.sha256(shown.tobytes()).hexdigest()
    assert digest == "3c079586af5e937166b831cf38703adbeb1198aa6bb3f176495e231423a3c14c"
    # Least and most are those of all the concept's tokens, of which the first is shown.
    heat[1] = 2
    assert (np.asarray(heat_picture(heat, 16, 256 * 16))[0, ::16][-1] == shown[128]).all()
    assert np.asarray(heat_picture(np.ones((2, 6), np.float32), 32, 48)).shape == (32, 48, 3)
