"""Whatever a person can get wrong ends in one line that says what it was and what to do, never in a traceback."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from support import not_built

from mflux.backend import mx
from mflux.cli.commands import NOT_BUILT
from mflux.cli.parser.parsers import Said
from mflux.cli.replay import take_settings
from mflux.errors import UsageError
from mflux.models.common.family import all_settings, families
from mflux.utils import values

SUGGESTION = (
    "use --model with demo, which needs no download, schnell, dev or another that mflux --help lists, "
    "a Hugging Face repository (org/name) or a folder"
)
SEE = "(see mflux-generate --help)"
BASIC = ["--prompt", "a red circle", "--width", 32, "--height", 32, "--steps", 1, "--seed", 1]


@pytest.fixture
def refused(cli, in_folder, tiny_schnell):
    """Run `mflux generate` with the tiny model, and make sure that it is refused in one line and leaves nothing."""

    def check(
        *words, status: int, message: str | re.Pattern, model: object = tiny_schnell, basic=BASIC, **options
    ) -> None:
        before = sorted(in_folder.rglob("*"))
        chosen = [] if model is None else ["--model", model]
        result = cli("generate", *chosen, *basic, *words, **options)
        if isinstance(message, str):
            assert result.errors == [f"error: {message}"]
        else:
            assert len(result.errors) == 1
            assert message.fullmatch(result.errors[0].removeprefix("error: "))
        assert result.status == status
        assert result.out == ""
        assert result.err.splitlines()[-1] == result.errors[0]
        assert sorted(in_folder.rglob("*")) == before

    return check


# ---- the model


def test_no_model_at_all(refused):
    refused(model=None, status=2, message=f"no model was named: {SUGGESTION}")


def test_an_unknown_model(refused):
    first = [family.commands[0].models[0] for family in families().values() if family.commands[0].models]
    names = [name if name != "demo" else "schnell" for name in first]
    told = (
        f"a repository or folder whose name does not tell needs --base-model, as {', '.join(names[:-1])} or {names[-1]}"
    )
    refused(model="nonsense", status=2, message=f"the model 'nonsense' is not known: {SUGGESTION}; {told}")


def test_every_family_that_draws_is_named_for_a_folder_that_does_not_tell():
    from mflux.errors import ModelConfigError
    from mflux.models.common.config.model_config import ModelConfig
    from mflux.models.common.registry import MODELS

    with pytest.raises(ModelConfigError) as failure:
        ModelConfig.from_name("nonsense")
    named = set(re.findall(r"[\w-]+", str(failure.value).partition("needs --base-model, as ")[2])) - {"or"}
    for family in families().values():
        models = {model for command in family.commands for model in command.models}
        assert not models or models & named, family.title
    assert named <= set(MODELS)


@pytest.mark.parametrize(
    ("name", "near"),
    [("DEVV", "dev"), ("shcnell-dev", "schnell"), ("devkontext", "dev-kontext"), ("z-image-turob", "z-image-turbo")],
)
def test_a_mistyped_model_that_contains_another_s_name(refused, name, near):
    message = f"there is no model and no folder '{name}' (did you mean {near}?): {SUGGESTION}"
    refused(model=name, status=2, message=message)


def test_an_unknown_base_model(refused, tiny_schnell):
    from mflux.models.common.registry import MODELS

    message = f"the base model 'nonsense' is not known: choose one of {', '.join(MODELS)}"
    refused("--base-model", "nonsense", status=2, message=message)
    refused("--base-model", "nonsense", model=None, status=2, message=message)


@pytest.mark.parametrize("name", [not_built.KEY, not_built.REPOSITORY, f"someone/{not_built.KEY}-mine"])
def test_a_model_that_is_known_but_not_built(refused, name):
    refused(model=name, status=2, message=f"{not_built.TOLD}: mflux --help lists those that are")


def test_a_model_that_another_command_draws_with(refused):
    told = "mflux-generate does not draw with seedvr2-3b: use mflux-upscale-seedvr2 --model seedvr2-3b"
    refused(model="seedvr2-3b", status=2, message=told)


def test_a_folder_that_is_not_there(refused):
    message = "there is no folder ./schnell: check the path, or give a Hugging Face repository as org/name"
    refused(model="./schnell", status=1, message=message.replace("./", ""))


# ---- the checkpoint


@pytest.fixture
def broken(tiny_schnell, tmp_path) -> Path:
    """A copy of the tiny model to be damaged, outside the working directory of the command."""
    return Path(shutil.copytree(tiny_schnell, tmp_path.parent / f"{tmp_path.name}-schnell"))


def test_a_truncated_file_of_weights(refused, broken):
    path = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    # All offsets are right, so the first entry that passes the end is named.
    name = next(
        name
        for name, entry in header.items()
        if name != "__metadata__"
        and entry["data_offsets"][1] > len(content) - 108 - int.from_bytes(content[:8], "little")
    )
    ends = f"should end at byte {len(content):,} but the file ends after {len(content) - 100:,}"
    message = f"{path} is truncated: {name} {ends}: fetch it again"
    refused(model=broken, status=1, message=message)


def test_a_file_of_weights_without_an_end_of_its_header(refused, broken):
    path = broken / "vae" / "diffusion_pytorch_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:200])
    length = int.from_bytes(content[:8], "little")
    message = f"{path} is truncated: its header says {length:,} bytes but the file ends after 200: fetch it again"
    refused(model=broken, status=1, message=message)


def change_weights(folder: Path, change) -> None:
    path = next(folder.glob("*.safetensors"))
    tensors = dict(mx.load(str(path)))
    change(tensors)
    mx.eval(tensors)
    mx.save_safetensors(str(path), tensors)


MISFIT = "fetch it again, or take the config.json that belongs to these weights"


def test_a_missing_tensor(refused, broken):
    change_weights(broken / "transformer", lambda tensors: tensors.pop("transformer_blocks.0.attn.norm_k.weight"))
    refused(
        model=broken,
        status=1,
        message=f"{broken}/transformer does not fit the FluxTransformer of its config.json: "
        f"1 tensor missing (transformer_blocks.0.attn.norm_k.weight); {MISFIT}",
    )


def test_a_tensor_too_many(refused, broken):
    change_weights(broken / "text_encoder_2", lambda tensors: tensors.update({"encoder.more.weight": mx.ones(3)}))
    refused(
        model=broken,
        status=1,
        message=f"{broken}/text_encoder_2 does not fit the T5Encoder of its config.json: "
        f"1 tensor left over (encoder.more.weight); {MISFIT}",
    )


def test_a_tensor_of_another_shape(refused, broken):
    change_weights(broken / "vae", lambda tensors: tensors.update({"decoder.conv_in.weight": mx.ones((16, 4, 3, 3))}))
    refused(
        model=broken,
        status=1,
        message=f"{broken}/vae does not fit the AutoencoderKL of its config.json: decoder.conv_in.weight has the shape "
        f"[16, 3, 3, 4] instead of [16, 3, 3, 16] (as MLX lays them out); {MISFIT}",
    )


def test_a_component_without_configuration(refused, broken):
    (broken / "text_encoder" / "config.json").unlink()
    refused(
        model=broken,
        status=1,
        message=f"{broken}/text_encoder/config.json is missing: "
        "the folder is not a complete model in the diffusers layout",
    )


CUT = "is truncated: it ends in the middle of its JSON; fetch it again"


def test_a_configuration_that_is_no_json(refused, broken):
    (broken / "vae" / "config.json").write_text("{")
    refused(
        model=broken,
        status=1,
        message=f"{broken}/vae/config.json is truncated: it ends in the middle of its JSON; fetch it again",
    )


def test_a_configuration_that_makes_no_sense(refused, broken):
    path = broken / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"axes_dims_rope": [4, 4, 4]}))
    refused(model=broken, status=1, message=f"{path}: axes_dims_rope [4, 4, 4] does not add up to 16 per head")


def test_a_component_without_weights(refused, broken):
    (broken / "text_encoder" / "model.safetensors").unlink()
    refused(
        model=broken,
        status=1,
        message=f"{broken}/text_encoder holds no weights, no .safetensors file: "
        "fetch them, or name a folder that has them",
    )


def test_a_model_of_another_kind(refused, broken):
    path = broken / "transformer" / "config.json"
    path.write_text(json.dumps({"_class_name": "QwenImageTransformer2DModel"}))
    refused(
        model=broken,
        status=1,
        message=f"{broken} holds a QwenImageTransformer2DModel, not FLUX.1's transformer: "
        "mflux-generate-qwen --base-model qwen-image draws with it",
    )


def test_another_model_s_autoencoder(refused, broken):
    path = broken / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"latent_channels": 4}))
    refused(
        model=broken,
        status=1,
        message=f"{broken} holds an autoencoder with 4 latent channels for every 8 pixels of a side; "
        "FLUX.1's has 16 for every 8: put the folders of one model there",
    )


def test_an_empty_folder(refused, broken):
    shutil.rmtree(broken)
    broken.mkdir()
    refused(
        model=broken,
        status=1,
        message=f"{broken} is an empty folder: give a folder of a model in the diffusers layout, a repository "
        "(org/name), or a name that mflux --help lists",
    )


def test_a_damaged_tokenizer(refused, broken):
    (broken / "tokenizer_2" / "tokenizer.json").write_text("not a tokenizer")
    # The reason is the tokenizers package's own.
    message = re.escape(f"{broken}/tokenizer_2/tokenizer.json is damaged: ") + ".+"
    refused(model=broken, status=1, message=re.compile(message))


# ---- the prompt


def test_no_prompt(refused):
    message = 'no prompt was given: use --prompt "…", --prompt - or --prompt-file FILE'
    refused(basic=["--steps", 1], status=2, message=message)


def test_an_empty_prompt(refused):
    refused(basic=["--prompt", "  "], status=2, message="there is no prompt: --prompt is empty")


def test_a_prompt_in_another_encoding(refused):
    message = "--prompt is not text in UTF-8: save it as UTF-8"
    refused(basic=["--prompt", "caf\udce9"], status=2, message=message)


def test_nothing_on_standard_input(refused):
    refused(basic=["--prompt", "-"], stdin="\n", status=2, message="there is no prompt: standard input is empty")


def test_a_prompt_file(refused, tmp_path):
    path = tmp_path / "prompt.txt"
    basic = ["--prompt-file", path]
    message = f"cannot read the prompt file {path}: No such file or directory"
    refused(basic=basic, status=2, message=message)
    path.write_text(" \n")
    refused(basic=basic, status=2, message=f"there is no prompt: the prompt file {path} is empty")
    path.write_bytes("café".encode("latin-1"))
    refused(basic=basic, status=2, message=f"the prompt file {path} is not text in UTF-8: save it as UTF-8")
    message = f"cannot read the prompt file {tmp_path}: Is a directory"
    refused(basic=["--prompt-file", tmp_path], status=2, message=message)


def test_two_prompts(refused):
    message = f"argument --prompt-file: not allowed with argument --prompt {SEE}"
    refused("--prompt-file", "prompt.txt", status=2, message=message)


# ---- numbers


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--width", "0", "0 is too small: at least 16"),
        ("--height", "-5", "-5 is too small: at least 16"),
        ("--height", "15", "15 is too small: at least 16"),
        ("--width", "16385", "16385 is too large: at most 16384"),
        ("--width", "wide", "'wide' is neither a number of pixels, nor auto, nor a scale factor such as 2x"),
        ("--width", "1e3", "'1e3' is neither a number of pixels, nor auto, nor a scale factor such as 2x"),
        ("--height", "twox", "'twox' is not a scale factor such as 2x or 1.5x"),
        ("--height", "0x", "a scale factor of 0 leaves nothing: it must be above 0"),
        ("--steps", "0", "0 is too small: at least 1"),
        ("--steps", "four", "'four' is not a whole number"),
        ("--steps", "10001", "10001 is too large: at most 10000"),
        ("--seed", "-1", "-1 is too small: at least 0"),
        ("--seed", "18446744073709551616", "18446744073709551616 is too large: at most 18446744073709551615"),
        ("--seed", "1.5", "'1.5' is not a whole number"),
        ("--auto-seeds", "1000001", "1000001 is too large: at most 1000000"),
        ("--guidance", "-1", "-1 is too small: at least 0"),
        ("--guidance", "nan", "'nan' is not a number"),
        ("--guidance", "inf", "'inf' is not a number"),
        ("--image-strength", "1.5", "1.5 is too large: at most 1"),
        ("--mlx-cache-limit-gb", "0", "0 is not above 0"),
        ("--mlx-cache-limit-gb", "inf", "'inf' is not a number"),
        ("--vae-tile-size", "64", "64 is too small: at least 128"),
        ("--vae-tile-size", "200", "200 is not a multiple of 16"),
        ("--battery-percentage-stop-limit", "low", "'low' is not a whole number"),
    ],
)
def test_a_number_out_of_bounds(refused, option, value, message):
    names = {"--battery-percentage-stop-limit": "--battery-percentage-stop-limit/-B"}
    refused(option, value, status=2, message=f"argument {names.get(option, option)}: {message} {SEE}")


def test_a_scale_without_a_picture(refused):
    message = "a size of 2x needs a picture to start from: use --image PATH, or say it in pixels"
    refused("--width", "2x", status=2, message=message)


def test_an_option_that_does_not_exist(refused):
    refused("--colour", "red", status=2, message=f"unrecognized arguments: --colour red {SEE}")
    # Shortened options would change their meaning when a new one comes.
    refused("--guid", "1", status=2, message=f"unrecognized arguments: --guid 1 {SEE}")


# ---- the picture to start from


def test_an_image_that_is_not_there(refused):
    refused("--image", "none.png", status=1, message="the image none.png does not exist: check its path")


def test_an_image_that_is_none(refused, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    message = "the image text.png is not a picture that can be read: give a PNG, JPEG or WebP"
    refused("--image", "text.png", status=1, message=message)


def test_an_image_that_ends_early(refused, tmp_path):
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(whole, format="PNG")
    (tmp_path / "half.png").write_bytes(whole.getvalue()[:1500])
    # What stands in brackets is Pillow's own.
    message = r"the image half\.png cannot be read \(.*truncated.*\): check the file, or give another"
    refused("--image", "half.png", status=1, message=re.compile(message))


def test_a_folder_for_an_image(refused, tmp_path):
    message = f"the image {tmp_path} cannot be read (Is a directory): check the file, or give another"
    refused("--image", tmp_path, status=1, message=message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a.png", "0.5", "b.png"], "--image takes a path and a strength, not 3 values: --image photo.jpg 0.6"),
        (["a.png", "1.5"], "the strength of --image: 1.5 is too large: at most 1"),
        (["a.png", "strong"], "the strength of --image: 'strong' is not a number"),
    ],
)
def test_a_wrong_number_of_values_for_an_image(refused, values, message):
    refused("--image", *values, status=2, message=message)


def test_an_image_said_twice(refused):
    message = "--image says what --image-path and --image-strength say: use --image PATH [STRENGTH] alone"
    refused("--image", "a.png", "--image-path", "a.png", status=2, message=message)
    refused("--image", "a.png", "--image-strength", "0.5", status=2, message=message)


def test_a_strength_of_nothing(refused):
    message = "--image-strength says how much of a picture to keep, and there is none: use --image PATH STRENGTH"
    refused("--image-strength", "0.5", status=2, message=message)


def test_a_picture_scaled_to_nothing(refused, tmp_path):
    Image.new("RGB", (20, 64)).save(tmp_path / "thin.png")
    message = (
        "the source image has 20 x 64 pixels, too few to take the size from: use a larger one, or say --width and "
        "--height"
    )
    refused("--image", "thin.png", "--width", "0.5x", status=1, message=message)


# ---- the output


def test_a_folder_that_cannot_be_made(refused, tmp_path):
    (tmp_path / "file").write_text("")
    message = "cannot write to the folder file/inside: Not a directory; choose another folder"
    refused("--output", "file/inside/image.png", status=1, message=message)
    refused("--stepwise-image-output-dir", "file/inside", status=1, message=message)


def test_a_folder_that_is_a_file(refused, tmp_path):
    (tmp_path / "file").write_text("")
    message = "cannot write to the folder file: it is a file; choose another folder"
    refused("--output", "file/image.png", status=1, message=message)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("picture", "its name has no ending"),
        ("picture.txt", "'.txt' is no format for that"),
        ("picture.psd", "'.psd' is no format for that"),  # Pillow only reads it
        ("picture.xbm", "'.xbm' is no format for that"),  # has no colours
    ],
)
def test_an_ending_that_is_no_picture(refused, name, reason):
    message = f"cannot write a picture to {name}: {reason}; use .png, .jpg or .webp"
    refused("--output", name, status=2, message=message)


def test_an_empty_name_for_a_picture(refused):
    message = "a path is empty: give the name of a file"
    refused("--output", "", status=2, message=message)
    refused("--output", "", "--seed", 1, 2, status=2, message=message)


def test_a_name_that_is_too_long(refused):
    name = "x" * 300 + ".png"
    refused("--output", name, status=1, message=f"cannot write {name}: File name too long; choose another name")


# ---- what is not built yet


PID = "PiD decoding is not built yet in this version: leave --pid-decode out"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pid-decode"], PID),
        (["--pid-degrade-sigma", "0.5"], PID),
    ],
)
def test_an_option_that_is_not_built(refused, words, message):
    refused(*words, status=2, message=message)


def test_a_command_that_is_not_built(cli):
    name = next(name for name in NOT_BUILT if name.startswith("generate-"))
    for words in ([name], [name, "--prompt", "x"], [f"mflux-{name}"]):
        result = cli(*words)
        assert result.status == 2
        assert result.err == f"error: mflux {words[0]} is not built yet in this version (see mflux --help)\n"


def test_a_command_that_does_not_exist(cli):
    result = cli("nonsense")
    assert (result.status, result.err) == (2, "error: there is no command 'nonsense' (see mflux --help)\n")


def test_a_scheduler_that_is_not_there(refused):
    known = "use linear, flow_match_euler_discrete, lightning, er_sde, or your own as package.module.Class"
    refused("--scheduler", "cosine", status=2, message=f"the scheduler 'cosine' is not known: {known}")
    refused(
        *("--scheduler", "no_such_package.Class"),
        status=2,
        message="the scheduler 'no_such_package.Class' cannot be imported: No module named 'no_such_package'",
    )
    refused(
        *("--scheduler", "json.JSONDecoder"),
        status=2,
        message="'json.JSONDecoder' is not a class derived from mflux.models.common.schedulers.BaseScheduler",
    )


@pytest.mark.parametrize("name", [".", "..x", "x.", ".x", ""])
def test_a_scheduler_that_is_hardly_a_name(cli, in_folder, tiny_schnell, name):
    result = cli("generate", "--model", tiny_schnell, *BASIC, "--scheduler", name)
    assert result.status == 2
    assert len(result.errors) == 1


# ---- settings of an earlier picture


def test_settings_that_are_not_there(refused):
    message = "cannot read the settings in none.json: No such file or directory"
    refused("-C", "none.json", status=2, message=message)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"model": "schnell", "model_path": "stranger/thing"}, "stranger/thing"),
        ({"model": "stranger/flux-schnell"}, "stranger/flux-schnell"),
        ({"model": "dev", "lora_paths": ["stranger/lora", "o/n:a.safetensors"]}, "stranger/lora, o/n:a.safetensors"),
        ({"model": "stranger/dev", "lora_paths": ["hf:o/n/a.safetensors"]}, "stranger/dev, hf:o/n/a.safetensors"),
    ],
)
def test_repositories_that_settings_name_are_told_before_one_is_asked(cli, in_folder, monkeypatch, settings, told):
    import mflux.hub

    asked = []

    def ask(*args, **kwargs):
        asked.append(log.records[-1:])
        raise mflux.hub.DownloadError("asked")

    log = logging.Handler()
    log.records = []
    log.emit = log.records.append
    monkeypatch.setattr("mflux.hub.resolve._fetch", ask)
    monkeypatch.setattr("mflux.cli.replay.log.handlers", [log])
    (in_folder / "old.json").write_text(json.dumps(settings | {"prompt": "x"}))
    result = cli("generate", "-C", "old.json")
    assert result.errors == ["error: asked"]
    line = f"old.json names {told}: Hugging Face is asked for what is not here yet"
    assert line in result.err.splitlines()
    assert asked[0][0].getMessage() == line


def test_what_was_said_and_what_is_here_is_not_told(cli, in_folder, tiny_schnell):
    (in_folder / "name").symlink_to(tiny_schnell)
    (in_folder / "old.json").write_text(json.dumps({"model": "name", "base_model": "schnell", "prompt": "x"}))
    small = ("--width", 16, "--height", 16, "--steps", 1)
    for words in ((), ("--model", tiny_schnell)):
        result = cli("generate", "-C", "old.json", *small, *words)
        assert result.status == 0
        assert "Hugging Face" not in result.err


ELSEWHERE = ("~/Pictures/a.png", "/etc/passwd", "../a.png", "a/b.png", "a\\b.png", "C:\\a.png", "..", "~", "~root/x")


@pytest.mark.parametrize("setting", [setting for setting in all_settings() if setting.takes], ids=lambda one: one.name)
def test_settings_choose_none_of_the_users_files(in_folder, cli, setting):
    """Each setting that names a file: with folders it is refused, with the option that says it, which overrides it."""
    args = argparse.Namespace(config_from_metadata=Path("s.json"), scheduler=None, model=None, base_model=None)
    vars(args).update({one.name: None for one in all_settings()})
    (in_folder / "a").mkdir()
    (in_folder / "a" / "b.png").write_bytes(b"")
    for value in (*ELSEWHERE, "good.png"):
        named = [value] if isinstance(setting.kind, values.Several) else value
        (in_folder / "s.json").write_text(json.dumps({setting.name: named}))
        typed = Said(frozenset({setting.name, *(("model",) if "model" in setting.name else ())}))
        take_settings(argparse.Namespace(**vars(args)), typed)
        if value == "good.png":
            take_settings(argparse.Namespace(**vars(args)), Said(frozenset()))
            continue
        with pytest.raises(UsageError, match="choose none of your files") as caught:
            take_settings(argparse.Namespace(**vars(args)), Said(frozenset()))
        assert f"say {setting.option} yourself" in str(caught.value)


def test_a_prompt_without_end(tmp_path):
    """As `yes | mflux-generate --prompt -` has it."""
    program = "from mflux.models.flux.cli.flux_generate import main; raise SystemExit(main())"
    with Path("/dev/zero").open("rb") as zeros:
        call = [sys.executable, "-c", program, "--model", "schnell", "--prompt", "-"]
        done = subprocess.run(call, stdin=zeros, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: standard input has more than")


def test_a_prompt_in_settings_is_not_standard_input(in_folder, cli, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    (in_folder / "s.json").write_text(json.dumps({"prompt": "-", "model": "demo", "steps": 1, "seed": 1}))
    result = cli("generate", "-C", "s.json", "--width", 32, "--height", 32)
    assert result.status == 0, result.err


def test_what_settings_take_over_is_told(in_folder, cli):
    said = {"prompt": "x", "model": "demo", "image_path": "a.png", "steps": 1, "seed": 3}
    (in_folder / "s.json").write_text(json.dumps(said))
    result = cli("generate", "-C", "s.json")
    assert "from s.json: model demo, prompt, seed, steps, source picture a.png" in result.err.splitlines()
    result = cli("generate", "-C", "s.json", "--image", "b.png", "--prompt", "y", "--model", "schnell")
    assert "from s.json: seed, steps" in result.err.splitlines()


@pytest.mark.parametrize("content", ["", "garbage", "[1, 2]", "null", "[" * 100_000])
def test_settings_that_are_none(refused, tmp_path, content):
    (tmp_path / "old.json").write_text(content)
    message = "old.json holds no settings: it is neither a .metadata.json nor a picture made with mflux"
    refused("-C", "old.json", status=2, message=message)


def test_a_picture_without_settings(refused, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    message = "plain.png holds no settings: it is neither a .metadata.json nor a picture made with mflux"
    refused("-C", "plain.png", status=2, message=message)


@pytest.mark.parametrize(
    ("name", "value", "told", "option"),
    [
        ("steps", "four", "'four' is not a number", "--steps"),
        ("steps", 0, "0 is too small: at least 1", "--steps"),
        ("steps", 2.5, "'2.5' is not a whole number", "--steps"),
        ("steps", True, "'True' is not a number", "--steps"),
        ("seed", [1, 2], "'[1, 2]' is not a number", "--seed"),
        ("seed", -3, "-3 is too small: at least 0", "--seed"),
        ("guidance", {"a": 1}, "\"{'a': 1}\" is not a number", "--guidance"),
        ("width", "wide", "'wide' is not a number", "--width"),
        ("height", 8, "8 is too small: at least 16", "--height"),
        ("height", 64.0, "'64.0' is not a whole number", "--height"),
        ("prompt", 7, "7 is not text", "--prompt"),
        ("model", ["dev"], "['dev'] is not text", "--model"),
        ("image_path", 5, "5 is not text", "--image"),
        ("image_strength", 7, "7 is too large: at most 1", "--image-strength"),
        ("scheduler", 5, "5 is not text", "--scheduler"),
    ],
)
def test_a_setting_of_the_wrong_type(refused, tmp_path, name, value, told, option):
    (tmp_path / "old.json").write_text(json.dumps({"model": "schnell", "prompt": "x", name: value}))
    refused(
        *("-C", "old.json"),
        model=None,
        basic=[],
        status=2,
        message=f"old.json: its {name} makes no sense, {told}: say {option} yourself",
    )


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"guidance": NaN}', "is damaged: it holds NaN, which is no number in JSON"),
        ('{"seed": 1, "seed": 2}', "is damaged: it says seed twice"),
        ('{"seed": 1', "is truncated: it ends in the middle of its JSON"),
        ('{"seed": ' * 3000, "is damaged: its JSON is nested too deep"),
        ('{"seed": ' * 300 + "1" + "}" * 300, "is damaged: its JSON is nested too deep"),
    ],
)
def test_settings_that_are_no_json(refused, tmp_path, content, told):
    (tmp_path / "old.json").write_text(content)
    refused("-C", "old.json", status=2, message=f"the settings in old.json cannot be read: it {told}")


def test_settings_that_would_import(refused, tmp_path):
    (tmp_path / "old.json").write_text(json.dumps({"scheduler": "some.module.Class"}))
    message = "old.json: its scheduler some.module.Class would be imported: say --scheduler yourself"
    refused("-C", "old.json", status=2, message=message)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"pid_decode": True},
            "the model of that picture is decoded with PiD, which is not built yet: --no-pid-decode does without",
        ),
    ],
)
def test_settings_that_are_not_built(refused, tmp_path, setting, message):
    (tmp_path / "old.json").write_text(json.dumps(setting))
    refused("-C", "old.json", status=2, message=f"old.json: {message}")


# ---- mflux-info


def test_info_about_what_carries_nothing(cli, in_folder):
    Image.new("RGB", (8, 8)).save("plain.png")
    Path("text.txt").write_text("no picture")
    told = {
        "plain.png": "plain.png carries no settings: it was not made with mflux, or with --no-metadata",
        "none.png": "the image none.png does not exist: check its path",
        "text.txt": "the image text.txt is not a picture that can be read: give a PNG, JPEG or WebP",
        ".": ". is a folder: name a picture in it, or a .metadata.json",
    }
    for name, message in told.items():
        result = cli("info", name)
        assert (result.status, result.out, result.err) == (1, "", f"error: {message}\n")


# ---- from outside: exit status, streams, interruption


def test_the_process_ends_with_the_status(cli_process, tmp_path):
    result = cli_process("generate", "--prompt", "x", cwd=tmp_path)
    assert (result.status, result.out, result.err) == (2, "", f"error: no model was named: {SUGGESTION}\n")
    (tmp_path / "plain.png").write_text("no picture")
    result = cli_process("info", "plain.png", cwd=tmp_path)
    assert result.status == 1
    assert len(result.errors) == len(result.err.splitlines()) == 1


SCHEDULER = """
import os, signal
from mflux.models.common.schedulers import LinearScheduler

class Interrupted(LinearScheduler):
    def step(self, noise, timestep, latents, **kwargs):
        if timestep == 1:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's ignores it
            os.kill(os.getpid(), signal.SIGINT)
        return super().step(noise, timestep, latents, **kwargs)
"""


def test_ctrl_c_in_the_middle(cli_process, tiny_schnell, tmp_path):
    (tmp_path / "of_mine.py").write_text(SCHEDULER)
    work = tmp_path / "work"
    work.mkdir()
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    result = cli_process(
        *("generate", "--model", tiny_schnell, "--prompt", "a red circle", "--width", 48, "--height", 32),
        *("--steps", 4, "--seed", 7, "--scheduler", "of_mine.Interrupted", "--stepwise-image-output-dir", "steps"),
        cwd=work,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    assert result.status == 130
    assert result.errors == ["error: stopped at step 2 of 4"]
    assert result.out == ""
    assert "Traceback" not in result.err
    # What was done so far survives; the picture itself was not begun.
    names = sorted(path.relative_to(work).as_posix() for path in work.rglob("*") if path.is_file())
    assert names == [f"steps/seed_7_{step}.png" for step in ("composite", "step0of4", "step1of4")]
    with Image.open(work / "steps" / "seed_7_composite.png") as composite:
        composite.load()
        assert composite.size == (96, 32)


def test_ctrl_c_while_writing(cli, in_folder, tiny_schnell, monkeypatch):
    def interrupted(self, file, **kwargs):
        file.write(b"half a picture")
        raise KeyboardInterrupt

    monkeypatch.setattr("mflux.utils.image_util.check_output", lambda path: None)
    monkeypatch.setattr(Image.Image, "save", interrupted)
    result = cli("generate", "--model", tiny_schnell, *BASIC)
    assert (result.status, result.errors) == (130, ["error: stopped"])
    assert list(in_folder.iterdir()) == []


def test_no_memory(cli, in_folder, tiny_schnell, monkeypatch):
    from mflux.models.flux.variants.txt2img.flux import Flux1

    def fail(*args, **kwargs):
        raise RuntimeError("[malloc] Unable to allocate 99 bytes.")

    monkeypatch.setattr(Flux1, "generate_image", fail)
    result = cli("generate", "--model", tiny_schnell, *BASIC)
    message = "error: not enough memory: try --low-ram, or a smaller --width and --height"
    assert (result.status, result.errors) == (1, [message])


def test_a_bug_keeps_its_traceback(cli, in_folder, tiny_schnell, monkeypatch):
    from mflux.models.flux.variants.txt2img.flux import Flux1

    def fail(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(Flux1, "generate_image", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli("generate", "--model", tiny_schnell, *BASIC)


@pytest.mark.filterwarnings("default::PIL.Image.DecompressionBombWarning")
def test_what_a_library_warns_of_is_one_line(cli, in_folder, monkeypatch):
    from mflux.utils.image_util import ImageUtil

    path = ImageUtil.save_image(Image.new("RGB", (15, 10)), in_folder / "large.png", {"seed": 1})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    result = cli("info", path)
    assert (result.status, result.out) == (0, "Seed: 1\n")
    assert len(result.warnings) == len(result.err.splitlines()) > 0
    assert "Image size (150 pixels) exceeds limit of 100 pixels" in result.warnings[0]


def test_a_reader_that_goes_away(tmp_path):
    """`mflux-info picture.png | head -0` ends quietly."""
    from mflux.utils.image_util import ImageUtil

    ImageUtil.save_image(Image.new("RGB", (8, 8)), tmp_path / "image.png", {"prompt": "x" * 30_000})
    call = [sys.executable, "-m", "mflux.cli.main", "info", str(tmp_path / "image.png")]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        errors = process.stderr.read().decode()
        assert process.wait(30) == 1
    assert errors == ""


def test_the_settings_of_a_folder(cli, tmp_path):
    result = cli("info", tmp_path)
    told = f"error: {tmp_path} is a folder: name a picture in it, or a .metadata.json"
    assert (result.status, result.errors) == (1, [told])
