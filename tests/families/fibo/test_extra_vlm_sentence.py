"""From a sentence to a picture on one machine: FIBO-VLM writes the JSON, FIBO draws it. Small models that know their
answers by heart; needs the extra `vlm`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from support.images import opened
from support.small_vlm import Conversation, picture, write_model

from families.fibo.cases import write_tiny
from mflux.models.common.memory import is_loaded
from mflux.models.fibo.cli import fibo_edit, fibo_generate
from mflux.models.fibo.sources import source_picture
from mflux.models.fibo.vlm import fibo_vlm, prompts

WALL = {"short_description": "a wall", "objects": []}
PAINTED = {"short_description": "a red wall", "edit_instruction": "Paint."}
RED = picture(200, 20, 20)


def masked() -> PIL.Image.Image:
    """RED with its left half grey."""
    image = RED.copy()
    image.paste((128, 128, 128), (0, 0, 32, 48))
    return image


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    conversations = (
        Conversation(prompts.generate("a wall"), json.dumps(WALL)),
        Conversation(prompts.generate("a door"), "No."),
        Conversation(prompts.edit(RED, "paint it", use_mask=False), json.dumps(PAINTED)),
        Conversation(prompts.edit(masked(), "fill it", use_mask=True), '{"context": "x", "edit_instruction": "Fill."}'),
    )
    return write_tiny(folder / "fibo-small"), write_model(folder / "vlm", conversations)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    RED.save("red.png")
    mask = np.zeros((48, 64), np.uint8)
    mask[:, :32] = 255
    PIL.Image.fromarray(mask).save("mask.png")
    assert (np.asarray(source_picture("red.png", "mask.png")) == np.asarray(masked())).all()
    return tmp_path


def run(module, models, base: str, *words: str) -> int:
    fibo, vlm = map(str, models)
    small = ("--steps", "2", "--seed", "1", "--vlm-model", vlm)
    return module.main(["--model", fibo, "--base-model", base, *small, *words])


def test_a_sentence_becomes_a_picture(here, models, monkeypatch):
    asked = []
    made = fibo_vlm.FiboVLM.__init__

    def remember(self, *arguments, **options):
        made(self, *arguments, **options)
        asked.append(self)

    monkeypatch.setattr(fibo_vlm.FiboVLM, "__init__", remember)
    size = ("--width", "48", "--height", "32")
    assert run(fibo_generate, models, "fibo", "--prompt", "a wall", *size, "--output", "said.png") == 0
    assert len(asked) == 1
    assert not is_loaded(asked[0], "decoder"), "FIBO-VLM stayed in memory"
    assert json.loads(Path("said.json").read_text()) == WALL
    # The same as from the JSON that lies beside it now.
    assert run(fibo_generate, models, "fibo", "--prompt-file", "said.json", *size, "--output", "read.png") == 0
    assert len(asked) == 1
    assert (np.asarray(opened("said.png")) == np.asarray(opened("read.png"))).all()
    assert np.asarray(opened("said.png")).std() > 10


def test_a_picture_and_a_sentence_become_a_picture(here, models):
    words = ("--prompt", "paint it", "--image-path", "red.png")
    assert run(fibo_edit, models, "fibo-edit", *words, "--output", "painted.png") == 0
    written = json.loads(Path("painted.json").read_text())
    assert written["edit_instruction"] == "Paint."
    assert written["short_description"] == "a red wall"


def test_a_mask_reaches_fibo_vlm(here, models):
    words = ("--prompt", "fill it", "--image-path", "red.png", "--mask-path", "mask.png")
    assert run(fibo_edit, models, "fibo-edit", *words, "--output", "filled.png") == 0
    assert json.loads(Path("filled.json").read_text())["edit_instruction"] == "Fill."


def test_an_answer_that_is_no_prompt(here, models, capsys):
    assert run(fibo_generate, models, "fibo", "--prompt", "a door") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "there is no JSON object in it: say it in other words" in error
    assert "seed" not in error
    assert not list(here.glob("image*"))
