"""FLUX.1's variants: their commands, settings, saved models, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from families.cases import Tiny
from families.fibo import mask, photo
from families.flux_variants import TINY

from mflux.cli.commands import COMMANDS
from mflux.errors import UsageError
from mflux.models.common.config import ModelConfig
from mflux.models.common.stages import is_loaded
from mflux.utils.metadata_reader import MetadataReader

SMALL = ("--steps", 2, "--width", 48, "--height", 32, "--seed", 1)
BY_NAME = {case.command: case for case in TINY}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    written: dict[str, Path] = {}

    def model(case: Tiny) -> Path:
        if case.command not in written:
            written[case.command] = case.write(tmp_path_factory.mktemp("models") / "tiny")
        return written[case.command]

    return model


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    photo(64, 48).save("photo.png")
    photo(40, 56).save("other.png")
    mask(64, 48).save("mask.png")
    return tmp_path


@pytest.fixture
def draw(cli, here, models):
    """Run a variant's command with its own words, and see it succeed."""

    def run(case: Tiny, *more, small=SMALL, model: Path | None = None, prompt=("--prompt", "a red circle")):
        result = cli(case.command, "--model", model or models(case), *prompt, *case.words, *small, *more)
        assert result.status == 0, result.err
        return result

    return run


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(PIL.Image.open(path)).astype(int)


cases = pytest.mark.parametrize("case", TINY, ids=lambda case: case.command)


@cases
def test_it_draws_and_notes_how(draw, case):
    result = draw(case, "--metadata")
    assert result.errors == result.warnings == []
    assert 10 < pixels("image.png").std() < 120
    settings = MetadataReader.read_exif_metadata("image.png")
    assert (settings["seed"], settings["steps"], settings["prompt"]) == (1, 2, "a red circle")
    # No folder of the machine it was made on.
    assert str(Path.cwd()) not in Path("image.metadata.json").read_text()


@cases
def test_its_settings_draw_it_again(draw, case):
    draw(case, "--output", "a.png")
    parser = __import__(COMMANDS[case.command].module, fromlist=["COMMAND"]).COMMAND
    if "settings" in parser.leave_out:
        return
    draw(case, "-C", "a.png", "--output", "b.png", small=(), prompt=())
    assert (pixels("a.png") == pixels("b.png")).all()


@cases
def test_a_saved_model_draws_the_same(cli, draw, here, models, case):
    draw(case, "--output", "a.png")
    saved = cli("save", "--model", models(case), "--base-model", case.base_model, "--path", "saved")
    assert saved.status == 0, saved.err
    assert draw(case, "--output", "b.png", model=here / "saved").warnings == []
    assert (pixels("a.png") == pixels("b.png")).all()


@cases
def test_a_class_draws_what_its_command_draws(draw, models, case):
    draw(case)
    settings = dict(seed=1, prompt=case.prompt, num_inference_steps=2, height=32, width=48, **case.generate)
    config = ModelConfig.from_name(str(models(case)), case.base_model)
    pipeline = case.pipeline_class()(model_path=str(models(case)), model_config=config)
    assert not pipeline.loaded()
    picture = pipeline.generate_image(**settings)
    written = picture.get_right_half() if picture.image.width == 2 * 48 else picture
    assert (np.asarray(written.image).astype(int) == pixels("image.png")).all()
    # Text encoders have done their work; the transformer stays for the next picture, unless there is none.
    assert is_loaded(pipeline, "transformer") and not is_loaded(pipeline, "t5_text_encoder")
    pipeline.is_last_picture = True
    pipeline.generate_image(**settings)
    assert not is_loaded(pipeline, "transformer")


# ---- Kontext


@pytest.mark.parametrize("words", ["--image photo.png 0.5", "--image-path photo.png --image-strength 0.5"])
def test_kontext_refuses_a_strength(cli, here, models, words):
    case = BY_NAME["generate-kontext"]
    result = cli("generate-kontext", "--model", models(case), "--prompt", "x", *words.split())
    assert (result.status, len(result.errors)) == (2, 1)
    assert "leave the strength" in result.err
    config = ModelConfig.dev_kontext()
    pipeline = case.pipeline_class()(model_path=str(models(case)), model_config=config)
    with pytest.raises(UsageError, match="leave the strength"):
        pipeline.generate_image(1, "x", image_path="photo.png", image_strength=0.5)
    with pytest.raises(UsageError, match="image_path"):
        pipeline.generate_image(1, "x")


def test_kontext_takes_the_size_of_its_picture(draw):
    case = BY_NAME["generate-kontext"]
    result = draw(case, small=("--steps", 1))
    assert (PIL.Image.open("image.png").size, result.warnings) == ((64, 48), [])


def test_a_large_picture_is_drawn_at_a_megapixel(here, caplog):
    from mflux.models.flux.sources import fitted_size

    PIL.Image.new("RGB", (4032, 3024)).save("large.jpg")
    width, height = fitted_size("large.jpg")
    assert (width, height) == (1168, 880)
    assert "4032 x 3024" in caplog.text
