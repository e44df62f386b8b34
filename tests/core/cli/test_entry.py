"""One entry: `mflux-generate`, and `mflux generate`, hand over to the command of the model that they are given."""

from __future__ import annotations

import json

import pytest
from support import not_built

from mflux.cli.entry import command_for
from mflux.models.common.family import built, first_command


@pytest.fixture
def usage(cli, capsys):
    """The program whose help is shown."""

    def usage(*words: object) -> str:
        with pytest.raises(SystemExit) as ended:
            cli("generate", *words, "--help")
        assert ended.value.code == 0
        return capsys.readouterr().out.split()[1]

    return usage


def handed_over(*words: str) -> str | None:
    command = command_for(words)
    return None if command is None else command.command.prog


def test_every_model_s_options_are_shown(usage):
    assert usage() == "mflux-generate"
    for model, command in built().items():
        if "upscale-seedvr2" not in command:
            assert usage("--model", model) == command


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["--model", "z-image-turbo"], "mflux-generate-z-image-turbo"),
        (["--model=z-image"], "mflux-generate-z-image"),
        (["-m", "Tongyi-MAI/Z-Image-Turbo", "-q", "8"], "mflux-generate-z-image-turbo"),
        (["-mflux2-klein-4b", "--prompt", "x"], "mflux-generate-flux2"),
        (["--base-model", "fibo"], "mflux-generate-fibo"),
        (["--model", "somewhere/mine", "--base-model", "qwen-image"], "mflux-generate-qwen"),
        (["--prompt", "x", "--model", "dev-fill"], "mflux-generate-fill"),
        (["--model", "schnell"], "mflux-generate"),
        (["--prompt", "--model=z-image"], "mflux-generate-z-image"),
        (["--prompt=--model=z-image"], None),
        # What is wrong is said by the command that was asked.
        ([], None),
        (["--model"], None),
        (["--model", "nonsense"], None),
        (["--model", "seedvr2-3b"], None),
        (["--model", not_built.KEY], None),
        (["-C", "nowhere.json"], None),
    ],
    ids=str,
)
def test_the_words_that_name_a_model(in_folder, words, command):
    assert handed_over(*words) == command


def test_settings_of_an_earlier_image(in_folder):
    settings = {"model": "Tongyi-MAI/Z-Image-Turbo", "model_path": None, "base_model": None}
    (in_folder / "a.json").write_text(json.dumps(settings))
    assert handed_over("-C", "a.json") == "mflux-generate-z-image-turbo"
    assert handed_over("--config-from-metadata", "a.json", "-m", "schnell") == "mflux-generate"
    (in_folder / "b.json").write_text(json.dumps({"model": "Qwen/Qwen-Image-2512", "model_path": "mine"}))
    assert handed_over("-C", "b.json") == "mflux-generate-qwen"
    (in_folder / "c.json").write_text(json.dumps({"model": ["x"]}))
    assert handed_over("-C", "c.json") is None


def test_a_saved_folder_says_what_it_is(in_folder):
    (in_folder / "thing").mkdir()
    assert handed_over("--model", "thing") is None
    (in_folder / "thing" / "mflux_model.json").write_text(json.dumps({"base_model": "flux2-klein-4b"}))
    assert handed_over("--model", "thing") == first_command("flux2-klein-4b").prog
    assert handed_over("--model", "thing", "--base-model", "fibo") == "mflux-generate-fibo"


def test_what_no_command_generates_from_a_prompt_is_named_with_its_command(cli):
    result = cli("generate", "--model", "seedvr2-3b", "--prompt", "x")
    told = "mflux-generate does not draw with seedvr2-3b: use mflux-upscale-seedvr2 --model seedvr2-3b"
    assert (result.status, result.errors) == (2, [f"error: {told}"])


def test_what_is_wrong_is_said_by_the_command_that_it_was_handed_to(cli):
    result = cli("generate", "--model", "z-image-turbo", "--prompt", "x", "--nonsense")
    told = "unrecognized arguments: --nonsense (see mflux-generate-z-image-turbo --help)"
    assert (result.status, result.errors) == (2, [f"error: {told}"])


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("seedvr2-3b", "mflux-generate does not generate with seedvr2-3b: see mflux-upscale-seedvr2 --help"),
        (not_built.KEY, not_built.TOLD),
        ("schnel", "there is no model and no folder 'schnel' (did you mean schnell?)"),
        ("black-forest-labs/FLUX.2-dev", "the model 'black-forest-labs/FLUX.2-dev' is not known: 'flux2' in its name"),
    ],
)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_for_a_model_that_it_does_not_generate_with(cli, capsys, model, told, flag):
    """FLUX.1's help would be taken for that model's."""
    with pytest.raises(SystemExit) as ended:
        cli("generate", "--model", model, flag)
    out, err = capsys.readouterr()
    assert not ended.value.code and out.startswith("usage: mflux-generate ")
    assert err.startswith(f"warning: {told}") and err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [["--model"], ["--steps", "many"], ["--nonsense"], ["--model", "schnell", "--width", "x"], ["a", "b"],
     ["--model", "z-image-turbo", "--steps", "many"], ["--prompt"], ["-C", "missing.json"]],
    ids=" ".join,
)  # fmt: skip
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_never_fails(cli, capsys, in_folder, words, flag):
    for typed in ([*words, flag], [flag, *words]):
        with pytest.raises(SystemExit) as ended:
            cli("generate", *typed)
        assert not ended.value.code and capsys.readouterr().out.startswith("usage: mflux-generate")


@pytest.mark.parametrize("folder", ["", " "])
def test_a_folder_for_steps_without_a_name(cli, folder):
    result = cli("generate", "--model", "demo", "--prompt", "x", "--stepwise-image-output-dir", folder)
    assert (result.status, result.err) == (
        2,
        "error: --stepwise-image-output-dir is empty: name a folder, or leave it out\n",
    )
