"""What holds for every command: the version, names that are nearly right, paths, and short options in one word."""

from __future__ import annotations

import importlib
import json
import logging
import tomllib
from pathlib import Path

import pytest
from PIL import Image

import mflux
from mflux.cli.commands import COMMANDS
from mflux.cli.parser.parsers import MfluxParser, Said
from mflux.errors import UsageError
from mflux.models.common.family import built
from mflux.models.common.memory import release
from mflux.models.flux.variants.txt2img.flux import Flux1
from mflux.utils import values
from mflux.utils.paths import user_path

BASIC = ["--prompt", "a red circle", "--width", 16, "--height", 16, "--steps", 1, "--seed", 1]


def parsers(name: str) -> list[MfluxParser]:
    """A command's parser and those of what stands below it."""
    parser = importlib.import_module(COMMANDS[name].module).build_parser()
    below = [action.choices.values() for action in parser._actions if action.nargs == "A..."]
    return [parser, *(inner for inners in below for inner in inners)]


# ---- names


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_its_version(name, cli, capsys):
    for call in (lambda: cli(name, "--version"), lambda: cli("--version")):
        try:
            out = call().out
        except SystemExit as end:
            assert not end.code
            out = capsys.readouterr().out
        assert out == f"mflux {mflux.__version__}\n"


@pytest.mark.parametrize(
    "typed, meant", [("generat", "generate"), ("mflux-inof", "info"), ("lora-libary", "lora-library"), ("sav", "save")]
)
def test_a_mistyped_command_gets_the_nearest(cli, typed, meant):
    result = cli(typed)
    assert result.status == 2
    assert result.errors == [f"error: there is no command {typed!r}: did you mean {meant}? (see mflux --help)"]


@pytest.mark.parametrize("command", ["generate", "save"])
@pytest.mark.parametrize("typed, meant", [("schnel", "schnell"), ("Krea-Dve", "krea-dev")])
def test_a_mistyped_model_gets_the_nearest(cli, in_folder, command, typed, meant):
    result = cli(command, "--model", typed, *(BASIC if command == "generate" else ["--path", "x"]))
    assert result.status == 2 and f"no model and no folder {typed!r} (did you mean {meant}?)" in result.errors[0]


@pytest.mark.parametrize("name", ["demo", "schnell", "dev"])
def test_a_model_s_name_is_not_case_sensitive(name):
    from mflux.models.common.config.model_config import built_key, is_builtin

    assert name in built()
    for written in (name.upper(), name.title()):
        assert built_key(written) == name and is_builtin(written)


# ---- paths


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_that_takes_a_path_knows_the_home_folder(name, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    for parser in parsers(name):
        for action in parser._actions:
            if action.type is Path:
                assert parser._get_value(action, "~/x") == Path("/somewhere/x"), action.dest
                with pytest.raises(Exception, match="there is no user nobody-here here"):
                    parser._get_value(action, "~nobody-here/x")


def test_home_in_the_other_options_and_in_arguments(cli, in_folder, monkeypatch, tiny_schnell):
    """Options that may also be something else than a path, and what Python takes."""
    home = in_folder / "home"
    (home / "models").mkdir(parents=True)
    (home / "models" / "tiny-schnell").symlink_to(tiny_schnell)
    Image.new("RGB", (16, 16), "red").save(home / "photo.png")
    monkeypatch.setenv("HOME", str(home))
    result = cli(
        "generate", "--model", "~/models/tiny-schnell", *BASIC, "--output", "~/a/b.png", "--image", "~/photo.png"
    )
    assert (result.status, result.paths) == (0, [home / "a" / "b.png"])
    result = cli("generate", "--model", "~/models/tiny-schnell", *BASIC, "-C", "~/a/b.png", "--output", "~/c.png",
                 "--image-path", "~/photo.png", "--stepwise-image-output-dir", "~/steps")  # fmt: skip
    assert result.status == 0 and (home / "c.png").is_file() and list((home / "steps").iterdir())
    result = cli("save", "--model", "~/models/tiny-schnell", "--path", "~/saved")
    assert (result.status, result.paths) == (0, [home / "saved"])
    flux = Flux1(model_path="~/saved")
    flux.generate_image(seed=1, prompt="x", num_inference_steps=1, image_path="~/photo.png").save("~/d.png")
    flux.save_model("~/again")
    assert (home / "d.png").is_file() and (home / "again" / "mflux_model.json").is_file()
    assert [path.name for path in in_folder.iterdir()] == ["home"]


@pytest.mark.parametrize("wrong", ["", "a\0b", "~nobody-here/x", 5, None, ["a"], "\ud800"])
def test_what_no_path_can_be(wrong):
    with pytest.raises(UsageError, match="^image_path"):
        values.path(wrong, "image_path")
    with pytest.raises(UsageError):
        user_path(wrong)


# ---- short options, and settings of another command


def test_short_options_in_one_word(cli, in_folder, tiny_schnell):
    first = cli("generate", "--model", tiny_schnell, *BASIC, "-q", 8, "--output", "a.png")
    assert first.status == 0 and logging.getLogger("mflux").level == logging.INFO
    both = cli("generate", *BASIC[:2], "-vq4", "-C", "a.png", "--model", tiny_schnell, "--output", "b.png")
    assert both.status == 0 and logging.getLogger("mflux").level == logging.DEBUG
    shown = cli("info", "b.png").out
    assert "Quantization (bits): 4" in shown, "what the command line says comes before the picture"


@pytest.mark.parametrize(
    "setting, option",
    [
        ({"controlnet_image_path": "edges.png"}, "--controlnet-image-path"),
        ({"masked_image_path": "mask.png"}, "--masked-image-path"),
        ({"depth_image_path": "depth.png"}, "--depth-image-path"),
        ({"redux_image_paths": ["a.png"], "redux_image_strengths": [0.5]}, "--redux-image-paths"),
    ],
)
def test_settings_that_a_command_cannot_honour(cli, in_folder, tiny_schnell, setting, option):
    (in_folder / "a.metadata.json").write_text(json.dumps({"prompt": "x", "steps": 1, **setting}))
    result = cli("generate", "--model", tiny_schnell, "-C", "a.metadata.json", "--width", 16, "--height", 16)
    assert result.status == 2
    assert f"({option}), which this command does not have: use the command that made it" in result.errors[0]
    assert [path.name for path in in_folder.iterdir()] == ["a.metadata.json"]


@pytest.mark.parametrize(
    "setting", [{"bake_lora": "\x1b[2J"}, {"lora_scales": "\x1b[2J"}, {"scheduler": "\x1b.C"}, {"model": ["\x1b[2J"]}]
)
def test_settings_that_make_no_sense_are_quoted_as_text(in_folder, setting):
    from mflux.cli.replay import take_settings
    from mflux.models.flux.cli.flux_generate import build_parser

    (in_folder / "a.metadata.json").write_text(json.dumps(setting))
    with pytest.raises(UsageError) as caught:
        take_settings(*build_parser().parse(["-C", "a.metadata.json"]))
    assert str(caught.value).isprintable() and "\\x1b" in str(caught.value)


def test_a_program_that_plans_has_no_standard_input(in_folder):
    from mflux.models.flux.cli.flux_generate import COMMAND

    plan = COMMAND.plan({"model": "demo", "prompt": "-", "output": "nowhere/a.png"})
    assert (plan.prompt, plan.words) == ("-", "-")
    assert list(in_folder.iterdir()) == [], "nothing is written before it is generated"


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"lora": [["a.safetensors", "0.5"], ["b.safetensors"]]}, (["a.safetensors", "b.safetensors"], [0.5, 1.0])),
        ({"lora": ["a.safetensors"]}, "lora: a.safetensors is not a list"),
        ({"lora": [[]]}, "lora: the list is empty"),
        ({"seed": []}, "seed: the list is empty"),
    ],
    ids=str,
)
def test_a_program_plans_with_options_that_take_lists(wanted, expected):
    from mflux.models.flux.cli.flux_generate import COMMAND

    settings = {"model": "demo", "prompt": "a red circle"} | wanted
    if isinstance(expected, str):
        with pytest.raises(UsageError) as caught:
            COMMAND.plan(settings)
        assert str(caught.value) == expected
    else:
        plan = COMMAND.plan(settings)
        assert (plan.constructor["lora_paths"], plan.constructor["lora_scales"]) == expected


def test_a_program_plans_with_a_source_image_s_size(tmp_path):
    from mflux.models.flux.cli.flux_generate import COMMAND

    photo = tmp_path / "photo.png"
    Image.new("RGB", (48, 32)).save(photo)
    settings = {"model": "demo", "prompt": "a red circle", "image_path": photo}
    sizes = [COMMAND.plan(settings | size).images[0] for size in ({"width": "2x"}, {"height": "auto"}, {"width": 64})]
    assert [(image["width"], image["height"]) for image in sizes] == [(96, 32), (48, 32), (64, 32)]


def test_a_loaded_model_serves_one_plan_after_the_other():
    """A server's model: its transformer is loaded once."""
    from mflux.models.flux.cli.flux_generate import COMMAND

    plan = COMMAND.plan({"model": "demo", "prompt": "a red circle", "steps": 1, "seed": 1})
    pipeline = plan.load()
    list(COMMAND.images(plan, pipeline))
    transformer = pipeline.loaded()["transformer"]
    list(COMMAND.images(plan, pipeline))
    assert pipeline.loaded()["transformer"] is transformer


# ---- parts


def test_a_part_that_does_not_exist_is_not_released(tiny_schnell):
    flux = Flux1(model_path=str(tiny_schnell))
    assert flux.vae is not None and "vae" in flux.loaded()
    for name in ("text_encoder_9", "tokenizers", "save_model"):
        with pytest.raises(AttributeError, match=f"Flux1 has no component '{name}' to release"):
            release(flux, "vae", name)
    assert "vae" in flux.loaded()
    release(flux, "vae")
    assert flux.loaded() == {}


# ---- the version


@pytest.mark.parametrize(
    "version, is_old",
    [("0.24.0", True), ("0.9.1", True), ("0.17", True), ("0.25.0.dev0", False), ("0.25.0", False), ("0.100.0", False),
     ("1.0.0.dev0", False), ("unknown", False), ("", False), ("0", False), (None, False)],
)  # fmt: skip
def test_what_counts_as_made_by_024_or_older(version, is_old):
    """This project's first version is 0.25.0; its checkouts called themselves 1.0.0.dev0 before."""
    assert Said(file_version=version).is_old is is_old
    assert not Said(file_version=mflux.__version__).is_old


def test_the_version_is_one_that_programs_of_024_ask_for():
    """They pin mflux<0.26 or <1.0; pip would put an older one in the place of another version."""
    version = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]["version"]
    assert version.startswith("0.25.")
