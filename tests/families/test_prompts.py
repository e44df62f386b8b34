"""A prompt is the same one in whichever form it comes: line ends, byte-order marks, composed characters or not."""

from __future__ import annotations

import codecs
import importlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.tiny_models import EVERY_TINY, SIZE

from mflux.text import plain

# FIBO takes JSON or one line, so the lines lie inside of a text that both may be.
PROMPT = "a café,\nred\n\ncircle"
FORMS = {
    "CRLF": PROMPT.replace("\n", "\r\n"),
    "CR": PROMPT.replace("\n", "\r"),
    "a mark": "\ufeff" + PROMPT,
    "marks inside": PROMPT.replace("\n", "\ufeff\n"),
    "decomposed": PROMPT.replace("é", "e\u0301"),
    "all": "\ufeff" + PROMPT.replace("\n", "\r\n").replace("é", "e\u0301"),
}
FILES = {
    "UTF-8": PROMPT.encode(),
    "UTF-8, CRLF, a mark": codecs.BOM_UTF8 + FORMS["CRLF"].encode(),
    "UTF-8, CR": FORMS["CR"].encode(),
    "UTF-16": FORMS["all"].encode("utf-16"),
    "UTF-16 BE": codecs.BOM_UTF16_BE + FORMS["CRLF"].encode("utf-16-be"),
    "UTF-32": FORMS["CRLF"].encode("utf-32"),
    "blank lines around": b"\r\n\r\n" + FORMS["CRLF"].encode() + b"\r\n\r\n",
}


def settings_of(path: Path) -> dict:
    return json.loads(path.with_suffix(".metadata.json").read_text())


@pytest.mark.parametrize("form", FORMS)
def test_one_form(form):
    assert plain(FORMS[form]) == PROMPT == plain(PROMPT)


@EVERY_TINY
def test_every_tokenizer_gives_one_prompt_the_same_ids(tiny):
    """The classes encode what `encode_prompts` is given, whoever asks."""
    import inspect

    if not hasattr(tiny.case.pipeline_class(), "encode_prompts"):
        pytest.skip("it takes no prompt")
    from mflux.models.common.config import ModelConfig

    model = tiny.case.pipeline_class()(
        model_path=str(tiny.folder()), model_config=ModelConfig.from_name(str(tiny.folder()), tiny.case.base_model)
    )
    images = {}
    if "images" in inspect.signature(model.encode_prompts).parameters:
        images = {"images": [Image.new("RGB", (64, 32), "red")]}
    whole, *others = [json.dumps(_arrays(one)) for one in model.encode_prompts(PROMPT, *FORMS.values(), **images)]
    assert [form for form, other in zip(FORMS, others, strict=True) if other != whole] == []


def _arrays(value) -> object:
    """Whatever a family's condition is, as plain numbers."""
    if isinstance(value, (list, tuple)):
        return [_arrays(one) for one in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    return _arrays(list(vars(value).values())) if hasattr(value, "__dict__") else value


@EVERY_TINY
def test_every_command_records_it_in_one_form(tiny, in_folder):
    parser = importlib.import_module(_module(tiny.case.command)).build_parser()
    flags = {flag for action in parser._actions for flag in action.option_strings}
    if "--prompt" not in flags:
        pytest.skip("it takes no prompt")
    form = tiny.case.prompt + FORMS["all"] if not tiny.case.prompt.startswith("{") else tiny.case.prompt + "\r\n"
    negative = ["--negative-prompt", FORMS["all"]] if "--negative-prompt" in flags else []
    if "flux2" in tiny.case.command or "flux3" in tiny.case.command:
        # They refuse one.
        negative = []
    result = tiny.run("--prompt", form, *negative, "--steps", 1, *SIZE, "--metadata", "--seed", 1)
    assert result.status == 0, result.err
    found = settings_of(result.paths[0])
    # What a class makes of words may be another text; these have no other line ends in any case.
    for name in ("prompt", "negative_prompt"):
        text = found.get(name) or ""
        assert "\r" not in text and "\ufeff" not in text and text == plain(text)


def _module(command: str) -> str:
    from mflux.cli.commands import COMMANDS

    return COMMANDS[command].module


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("piped", [True, False])
def test_every_encoding_of_a_prompt_s_file(kind, piped, cli, in_folder, tiny_schnell, monkeypatch, capsys):
    words = [
        "--model",
        str(tiny_schnell),
        "--steps",
        "1",
        "--width",
        "16",
        "--height",
        "16",
        "--seed",
        "1",
        "--metadata",
    ]
    (in_folder / "prompt.txt").write_bytes(FILES[kind])
    if piped:
        from mflux.cli.main import main

        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(FILES[kind]), encoding="ascii"))
        assert main(["generate", "--prompt", "-", *words]) == 0
        path = Path(capsys.readouterr().out.strip())
    else:
        path = cli("generate", "--prompt-file", "prompt.txt", *words).paths[0]
    assert settings_of(path)["prompt"] == PROMPT


def test_a_prompt_in_the_settings_of_an_image(cli, in_folder, tiny_schnell):
    settings = {
        "prompt": FORMS["all"],
        "negative_prompt": FORMS["all"],
        "steps": 1,
        "width": 16,
        "height": 16,
        "seed": 1,
    }
    (in_folder / "a.json").write_text(json.dumps(settings))
    path = cli("generate", "--model", tiny_schnell, "-C", "a.json", "--metadata").paths[0]
    assert settings_of(path)["prompt"] == PROMPT
    plainly = cli("generate", "--model", tiny_schnell, "-C", "a.json", "--prompt", PROMPT, "--output", "b.png").paths[0]
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(plainly)))


def test_python(in_folder, tiny_schnell):
    from mflux.models.common.config import ModelConfig
    from mflux.models.flux.variants.txt2img.flux import Flux1

    model = Flux1(model_path=str(tiny_schnell), model_config=ModelConfig.schnell())
    image = model.generate_image(seed=1, prompt=FORMS["all"], num_inference_steps=1, width=16, height=16)
    image.save("a.png", export_json_metadata=True)
    assert settings_of(in_folder / "a.png")["prompt"] == PROMPT


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe\0", b"a caf\xe9", b"\xfe\xff\xd8\0", "a cat".encode("utf-16-le"), "a cat".encode("utf-16-be"), b"a\0b"],
)
def test_what_is_in_no_unicode_encoding(content, cli, in_folder, tiny_schnell, monkeypatch, capsys):
    (in_folder / "prompt.txt").write_bytes(content)
    result = cli("generate", "--model", tiny_schnell, "--prompt-file", "prompt.txt")
    assert result.status and "is not text in UTF-8: save it as UTF-8" in result.errors[0]
    if b"\0" not in content:
        return
    # The same from wherever it comes.
    text = content.decode("latin-1")
    (in_folder / "a.json").write_text(json.dumps({"prompt": text}))
    for words in (["--prompt", text], ["-C", "a.json"]):
        result = cli("generate", "--model", tiny_schnell, *words)
        assert result.status and "is not text in UTF-8: save it as UTF-8" in result.errors[0], words
    from mflux.cli.main import main

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))
    assert main(["generate", "--model", str(tiny_schnell), "--prompt", "-"])
    assert "standard input is not text in UTF-8: save it as UTF-8" in capsys.readouterr().err


@EVERY_TINY
def test_python_refuses_what_is_no_text(tiny):
    import inspect

    from mflux.errors import UsageError
    from mflux.models.common.config import ModelConfig

    folder = tiny.folder()
    model = tiny.case.pipeline_class()(
        model_path=str(folder), model_config=ModelConfig.from_name(str(folder), tiny.case.base_model)
    )
    known = inspect.signature(model.generate_image).parameters
    size = {"seed": 1, "num_inference_steps": 1, "width": 64, "height": 32, "prompt": tiny.case.prompt}
    sound = {name: value for name, value in size.items() if name in known} | dict(tiny.case.generate)
    for name in {"prompt", "negative_prompt", "concept"} & known.keys():
        for text in ("a\0b", "a\ud800"):
            with pytest.raises(UsageError, match=f"the {name.replace('_', ' ')} is not text in UTF-8"):
                model.generate_image(**sound | {name: text})


@pytest.mark.parametrize(
    "text", ["\u200b", " \u2060\ufeff\n", "\u3164", "\ufe0f\u200d", "\u00ad", "\u2800 "], ids=ascii
)
def test_what_nobody_sees_is_no_prompt(text, cli, in_folder, tiny_schnell):
    (in_folder / "prompt.txt").write_text(text, encoding="utf-8")
    for words in (["--prompt", text], ["--prompt-file", "prompt.txt"]):
        result = cli("generate", "--model", tiny_schnell, *words)
        assert result.status and result.errors[0].endswith("is empty")
