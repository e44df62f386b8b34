"""FIBO-VLM from end to end on a small model that knows its answers by heart: commands, class, processor.

Needs the extra `vlm` and no torch.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.small_vlm import Conversation, picture, write_model, write_tokenizer

from mflux.backend import nn
from mflux.errors import CheckpointError, ImageError, UsageError
from mflux.models.common.memory import weight_bytes
from mflux.models.fibo.cli import fibo_inspire, fibo_refine
from mflux.models.fibo.vlm import prompts, weights
from mflux.models.fibo.vlm.fibo_vlm import FiboVLM, as_edit
from mflux.models.fibo.vlm.generation import AnswerText
from mflux.models.fibo.vlm.json_text import AnswerError
from mflux.models.fibo.vlm.processor import FiboVLMProcessor

WITHOUT_TORCH = Path(__file__).parents[2] / "support" / "without_torch"
RED, BLUE, GREY = picture(200, 20, 20), picture(20, 20, 200), picture(90, 90, 90, size=(48, 96))
WALL = {"short_description": "a red wall", "objects": []}
GREEN = {"short_description": "a green wall", "objects": []}
ASKED = json.dumps(WALL)

CONVERSATIONS = (
    Conversation(prompts.inspire(RED, None), ASKED),
    Conversation(prompts.inspire(BLUE, None), '{"short_description": "a blue wall", "objects": []}'),
    Conversation(prompts.inspire(RED, "at night"), '{"short_description": "é 猫 🙂"}', end="<|endoftext|>"),
    Conversation(prompts.inspire(GREY, None), '{"short_description": "grey" "objects"'),
    Conversation(prompts.inspire(GREY, "fenced"), '```json\n{"objects": ["a",], "context": "x"}\n```'),
    Conversation(prompts.refine(ASKED, "make it green"), json.dumps(GREEN)),
    Conversation(prompts.generate("a wall"), '{"context": "wall", "objects": []}<|im_end|>', end=""),
    Conversation(prompts.edit(RED, "paint it", use_mask=False), '{"lighting": {}, "edit_instruction": "Paint."}'),
    Conversation(prompts.edit(BLUE, "paint it", use_mask=False), '{"context": "x"}'),
    Conversation(prompts.refine_picture(BLUE, "paint it"), '{"context": "blue", "text_render": []}'),
    Conversation(prompts.edit(RED, "fill it", use_mask=True), "No."),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("vlm") / "model", CONVERSATIONS)


@pytest.fixture(scope="module")
def vlm(model) -> FiboVLM:
    return FiboVLM(model_path=str(model))


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    RED.save("red.png")
    BLUE.save("blue.png")
    GREY.save("grey.png")
    Path("wall.json").write_text(json.dumps(WALL, indent=4))
    return tmp_path


def command(module, *words) -> int:
    return module.main([str(word) for word in words])


# ---- commands


@pytest.mark.parametrize(("name", "colour"), [("red.png", "red"), ("blue.png", "blue")])
def test_inspire(model, here, capsys, name, colour):
    assert command(fibo_inspire, "--model", model, "--image-path", name, "--seed", 1) == 0
    assert capsys.readouterr().out == "inspired.json\n"
    assert json.loads(Path("inspired.json").read_text())["short_description"] == f"a {colour} wall"
    assert Path("inspired.json").read_text().startswith('{\n  "short_description"')


def test_inspire_with_a_prompt(model, here, capsys):
    words = ("--image-path", "red.png", "--prompt", " at night\n", "--output", "new/night.json", "--temperature", 0)
    assert command(fibo_inspire, "--model", model, *words) == 0
    assert capsys.readouterr().out == f"{Path('new/night.json')}\n"
    written = Path("new/night.json").read_text(encoding="utf-8")
    assert json.loads(written) == {"short_description": "é 猫 🙂"}
    assert "é 猫 🙂" in written


def test_refine(model, here, capsys):
    words = ("--prompt-file", "wall.json", "--instructions", "make it green")
    assert command(fibo_refine, "--model", model, *words) == 0
    assert capsys.readouterr().out == "refined.json\n"
    assert json.loads(Path("refined.json").read_text()) == GREEN
    assert json.loads(Path("wall.json").read_text()) == WALL


def test_an_existing_file_stays(model, here, capsys):
    words = ("--model", model, "--image-path", "red.png", "--output", "wall.json")
    assert command(fibo_inspire, *words) == 0
    assert capsys.readouterr().out == "wall_1.json\n"
    assert json.loads(Path("wall_1.json").read_text()) == json.loads(Path("wall.json").read_text()) == WALL


def test_verbose_streams_to_stderr(model, here, capsys):
    assert command(fibo_inspire, "--model", model, "--image-path", "red.png") == 0
    quiet = capsys.readouterr()
    assert command(fibo_inspire, "--model", model, "--image-path", "red.png", "-v", "--output", "b.json") == 0
    verbose = capsys.readouterr()
    assert verbose.out == "b.json\n"
    assert f"{ASKED}\n" in verbose.err
    assert ASKED not in quiet.err
    for told in (quiet.err, verbose.err):
        assert "per second" in told
        assert "load decoder" in told


def test_mended(model, here, capsys):
    assert command(fibo_inspire, "--model", model, "--image-path", "grey.png", "--prompt", "fenced") == 0
    assert json.loads(Path("inspired.json").read_text()) == {"objects": ["a"], "context": "x"}
    told = capsys.readouterr().err
    assert "warning: the answer's JSON was mended" in told
    assert "a comma too many" in told


def test_cut_off(model, here, capsys):
    words = ("--model", model, "--image-path", "red.png", "--max-tokens", 8)
    assert command(fibo_inspire, *words) == 0
    cut = json.loads(Path("inspired.json").read_text())["short_description"]
    assert cut and WALL["short_description"].startswith(cut)
    told = capsys.readouterr().err
    assert "cut off after 8 tokens" in told
    assert "lacks objects" in told


def test_broken_answers_are_refused(model, here, capsys):
    assert command(fibo_inspire, "--model", model, "--image-path", "grey.png") == 1
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "at character 30 of it a comma or } belongs here" in line
    assert not list(here.glob("*inspired*"))


@pytest.mark.parametrize(
    ("module", "words", "status", "says"),
    [
        (fibo_inspire, ("--image-path", "none.png"), 1, "none.png does not exist"),
        (fibo_inspire, ("--image-path", "wall.json"), 1, "wall.json"),
        (fibo_inspire, ("--image-path", "red.png", "-q", "7"), 2, "7"),
        (fibo_inspire, ("--image-path", "red.png", "--top-p", "1.5"), 2, "--top-p"),
        (fibo_inspire, ("--image-path", "red.png", "--temperature", "-1"), 2, "--temperature"),
        (fibo_inspire, ("--image-path", "red.png", "--max-tokens", "0"), 2, "--max-tokens"),
        (fibo_inspire, ("--image-path", "red.png", "--seed", "-1"), 2, "--seed"),
        (fibo_inspire, ("--image-path", "red.png", "--prompt", "a \udcff"), 2, "UTF-8"),
        (fibo_inspire, ("--image-path", "red.png", "--prompt", "<|image_pad|>"), 2, "stands for a picture"),
        (fibo_inspire, ("--image-path", "red.png", "--output", "."), 2, "is a folder"),
        (fibo_inspire, ("--image-path", "red.png", "--output", "wall.json/a.json"), 1, "wall.json"),
        (fibo_inspire, (), 2, "--image-path"),
        (fibo_refine, ("--prompt-file", "none.json", "--instructions", "x"), 2, "none.json"),
        (fibo_refine, ("--prompt-file", "red.png", "--instructions", "x"), 2, "UTF-8"),
        (fibo_refine, ("--prompt-file", "broken.json", "--instructions", "x"), 2, "is truncated"),
        (fibo_refine, ("--prompt-file", "list.json", "--instructions", "x"), 2, "no JSON object"),
        (fibo_refine, ("--prompt-file", "deep.json", "--instructions", "x"), 2, "too deep"),
        (fibo_refine, ("--prompt-file", "empty.json", "--instructions", "x"), 2, "is empty"),
        (fibo_refine, ("--prompt-file", "wall.json", "--instructions", " "), 2, "--instructions is empty"),
        (fibo_refine, ("--prompt-file", "wall.json"), 2, "--instructions"),
    ],
)
def test_what_is_wrong_is_one_line(model, here, capsys, module, words, status, says):
    Path("broken.json").write_text("{")
    Path("list.json").write_text("[]")
    Path("empty.json").write_text("\n")
    Path("deep.json").write_text('{"a":' + "[" * 100_000)
    assert command(module, "--model", model, *words) == status
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = [line for line in err.splitlines() if "error" in line]
    assert line.startswith("error: ")
    assert says in line


def test_a_folder_that_is_no_model(model, here, capsys):
    Path("other").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model / name, f"other/{name}")
    assert command(fibo_inspire, "--model", "./other", "--image-path", "red.png") == 1
    assert "holds no tokenizer" in capsys.readouterr().err
    Path("other/config.json").write_text('{"model_type": "llama"}')
    assert command(fibo_inspire, "--model", "./other", "--image-path", "red.png") == 1
    assert "'llama'" in capsys.readouterr().err


def test_options_are_those_of_mflux():
    """Flags and defaults of mflux 0.24; --model and --device are new."""
    shared = {
        ("--output",): ..., ("-q", "--quantize"): None, ("--top-p",): 0.9, ("--temperature",): 0.2,
        ("--max-tokens",): 4096, ("--seed",): None, ("--verbose", "-v"): False,
        ("--model", "-m"): "briaai/FIBO-vlm", ("--device",): None,
    }  # fmt: skip
    for module, own, output in (
        (fibo_inspire, {("--image-path",): None, ("--prompt",): None}, "inspired.json"),
        (fibo_refine, {("--prompt-file",): None, ("--instructions",): None}, "refined.json"),
    ):
        options = {tuple(action.option_strings): action for action in module.build_parser()._actions}
        options.pop(("-h", "--help"))
        options.pop(("--version",))
        expected = shared | own | {("--output",): Path(output)}
        assert {flags: action.default for flags, action in options.items()} == expected
        assert options["-q", "--quantize"].choices == (3, 4, 5, 6, 8)
        required = {flags[0] for flags, action in options.items() if action.required}
        assert required == {"--image-path"} if module is fibo_inspire else {"--prompt-file", "--instructions"}


def test_without_torch_from_the_cache(model, here):
    """As a person runs it: the console script's function in a process where torch cannot be had, the published
    repository in the cache, no network."""
    commit = "0123456789" * 4
    repository = here / "cache" / "models--briaai--FIBO-vlm"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(model, repository / "snapshots" / commit)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(WITHOUT_TORCH), os.environ.get("PYTHONPATH")])),
        "HF_HUB_CACHE": str(here / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    run = (
        "import sys\n"
        "from mflux.models.fibo.cli.fibo_{0} import main\n"
        "status = main(sys.argv[1:])\n"
        "assert 'transformers' in sys.modules and not {{'torch', 'torchvision'}} & sys.modules.keys()\n"
        "sys.exit(status)"
    )
    for name, words, result in (
        ("inspire", ("--image-path", "red.png"), WALL),
        ("refine", ("--prompt-file", "inspired.json", "--instructions", "make it green"), GREEN),
    ):
        ended = subprocess.run(
            [sys.executable, "-c", run.format(name), *words], env=environment, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr
        assert json.loads((here / ended.stdout.strip()).read_text()) == result
        assert "PyTorch" not in ended.stderr


# ---- the class


def test_generate_and_stop(vlm):
    assert json.loads(vlm.generate("a wall", seed=3)) == {"context": "wall", "objects": []}
    # A stop string, in the middle of a token or across several, ends the answer before it.
    with pytest.raises(AnswerError, match="no JSON object"):
        vlm.generate("a wall", stop=['"con', "{"])
    stopped = vlm.inspire(RED, stop=["wall", "ll"])
    assert json.loads(stopped) == {"short_description": "a red "}


def test_an_answer_that_cannot_be_used_says_what_may_help(vlm):
    with pytest.raises(AnswerError, match="cut off after 1 tokens; allow more"):
        vlm.generate("a wall", max_tokens=1)
    with pytest.raises(AnswerError, match="try again with another seed"):
        vlm.inspire(GREY)
    # It would be the same with every seed.
    with pytest.raises(AnswerError, match="a higher --temperature") as raised:
        vlm.inspire(GREY, temperature=0)
    assert "seed" not in str(raised.value)


def test_settings_that_make_no_sense(vlm):
    for settings in ({"temperature": -0.1}, {"top_p": 1.1}, {"max_tokens": 0}, {"seed": -1}, {"temperature": np.nan}):
        with pytest.raises(UsageError):
            vlm.generate("a wall", **settings)
    with pytest.raises(UsageError, match="8192"):
        vlm.generate("a b c d " * 5000)


def test_the_network_comes_and_goes(model):
    vlm = FiboVLM(model_path=str(model))
    assert "_component_decoder" not in vlm.__dict__
    assert json.loads(vlm.inspire(RED)) == WALL
    assert "_component_decoder" in vlm.__dict__
    vlm.decoder = None
    assert "_component_decoder" not in vlm.__dict__
    assert json.loads(vlm.inspire(RED)) == WALL


def test_quantized(model, vlm):
    """Fewer bits take less memory and know less well what they knew."""
    inputs = vlm.processor(prompts.inspire(RED, None))

    def of(decoder) -> tuple[int, np.ndarray]:
        prompt = decoder.prompt(inputs.ids, inputs.patches, inputs.grids)
        # Before the head: what was learned by heart is too fine for the fewest bits.
        state = decoder.model.language_model(prompt.embeddings, prompt.positions, deepstack=prompt.deepstack)
        return weight_bytes(decoder), np.array(state[0, -1])

    size, state = of(vlm.decoder)
    sizes, errors = [size], [0.0]
    for bits in (8, 4, 3):
        decoder = FiboVLM(model_path=str(model), quantize=bits).decoder
        assert isinstance(decoder.model.language_model.embed_tokens, nn.QuantizedEmbedding)
        size, other = of(decoder)
        sizes.append(size)
        errors.append(np.linalg.norm(other - state) / np.linalg.norm(state))
    assert sizes == sorted(sizes, reverse=True) and sizes[1] < 0.4 * sizes[0]
    assert errors == sorted(errors) and errors[1] < 0.1
    with pytest.raises(UsageError, match="7 bits"):
        FiboVLM(model_path=str(model), quantize=7)


def test_a_quantized_command(model, here, capsys):
    assert command(fibo_inspire, "--model", model, "--image-path", "red.png", "-q", "8", "--temperature", 0) == 0
    assert json.loads(Path("inspired.json").read_text()) == WALL
    assert "to 8 bits" in capsys.readouterr().err


def test_edit(vlm, caplog):
    scores = {"preference_score": "very high", "aesthetic_score": "very high"}
    assert json.loads(vlm.edit(RED, "paint it")) == {"edit_instruction": "Paint.", "aesthetics": scores}
    # Without an instruction in the answer, it is asked for in another way, and the person's own stands in.
    expected = {"context": "blue", "aesthetics": scores, "edit_instruction": "Paint it"}
    with caplog.at_level("WARNING", logger="mflux"):
        assert json.loads(vlm.edit(BLUE, " paint it ")) == expected
    with pytest.raises(AnswerError, match="no JSON object"):
        vlm.edit(RED, "fill it", use_mask=True)


def test_edits_hold_nothing_empty():
    value = {
        "objects": [{"pose": "", "texture": "wool"}, {"pose": None}, {}], "lighting": {"shadows": ""}, "context": "x",
        "aesthetics": {"preference_score": "low", "composition": []}, "edit_instruction": "Dye it.", "count": 0,
    }  # fmt: skip
    assert as_edit(value) == {
        "objects": [{"texture": "wool"}], "context": "x", "edit_instruction": "Dye it.", "count": 0,
        "aesthetics": {"preference_score": "low", "aesthetic_score": "very high"},
    }  # fmt: skip
    assert value["objects"][1] == {"pose": None}
    for nothing in ({}, {"edit_instruction": " "}, {"edit_instruction": 3}):
        with pytest.raises(AnswerError, match="edit_instruction"):
            as_edit(nothing)
    assert as_edit({}, instead="élargis")["edit_instruction"] == "Élargis"


# ---- the processor


def test_turns():
    """The turns that FIBO-VLM was trained on."""
    assert prompts.inspire(RED, None)[0]["content"] == [{"type": "image", "image": RED}, part("<inspire>")]
    assert prompts.inspire(RED, "  a\nb ")[0]["content"][1] == part("<inspire>\na\nb")
    assert prompts.inspire(RED, "  ")[0]["content"][1] == part("<inspire>")
    assert prompts.generate(" a dog ")[0]["content"] == [part("<generate>\na dog")]
    (turn,) = prompts.refine('{ "a" : [1, "é"],\n "b": null}', " make it blue ")
    assert turn == {
        "role": "user",
        "content": [part('<refine>\nInput:\n{"a":[1,"é"],"b":null}\nEditing instructions:\nmake it blue')],
    }
    assert prompts.refine(" no json ", "x")[0]["content"][0]["text"] == (
        "<refine>\nInput:\nno json\nEditing instructions:\nx"
    )
    picture_turn = prompts.refine_picture(RED, "x")[0]["content"]
    assert picture_turn == [{"type": "image", "image": RED}, part("<refine>\nEditing instructions:\nx")]
    for use_mask in (False, True):
        system, user = prompts.edit(RED, " x ", use_mask=use_mask)
        assert all(f"- {name}: " in system["content"] for name in [*prompts.FIELDS, "edit_instruction"])
        assert ("masked regions" in system["content"]) == use_mask
        assert "x" in user["content"][1]["text"]


def part(text: str) -> dict:
    return {"type": "text", "text": text}


def processor_of(folder: Path, model: Path, **options) -> FiboVLMProcessor:
    folder.mkdir()
    write_tokenizer(folder, ["a b c"], **options)
    return FiboVLMProcessor.from_folder(folder, weights.read_config(model))


def rendered(processor: FiboVLMProcessor, messages) -> str:
    return processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_the_template_where_there_is_none(model, tmp_path):
    processor = processor_of(tmp_path / "none", model)
    spaced = [{"role": "user", "content": [{"type": "image", "image": RED}, part(" <inspire>\n\nx ")]}]
    assert rendered(processor, spaced) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|> <inspire>\n\nx <|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert rendered(processor, turns) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


PLAIN = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
USUAL = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + PLAIN
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
# Of Qwen3-VL's kind and of Qwen2-VL's; what else stands in them is not run.
KINDS = {"{{ 1/0 }} <|im_start|> <|im_end|> " + PICTURE: PLAIN}
KINDS |= {own + "You are a helpful assistant.": USUAL for own in KINDS}


@pytest.mark.parametrize(("own", "expected"), KINDS.items())
def test_the_repository_has_its_own_template(model, tmp_path, own, expected):
    turns = [{"role": "user", "content": "Hi"}]
    assert rendered(processor_of(tmp_path / "config", model, chat_template=own), turns) == expected
    folder = tmp_path / "separate"
    processor_of(folder, model)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": own}))
    assert rendered(FiboVLMProcessor.from_folder(folder, weights.read_config(model)), turns) == expected
    (folder / "chat_template.json").unlink()
    (folder / "chat_template.jinja").write_text(own)
    assert rendered(FiboVLMProcessor.from_folder(folder, weights.read_config(model)), turns) == expected


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "own", ["{{ 1/0 }}", LOOPS, "{% bad", "<|im_start|><|im_end|>", f"<think><|im_start|><|im_end|>{PICTURE}"]
)
def test_a_template_of_another_kind_is_refused_and_not_run(model, tmp_path, own):
    with pytest.raises(CheckpointError, match="has a chat template that is not of") as caught:
        processor_of(tmp_path / "config", model, chat_template=own)
    assert own not in str(caught.value)


def test_pictures_become_tokens(vlm):
    processor = vlm.processor
    messages = [*prompts.inspire(RED, "é 🙂"), *prompts.inspire(GREY, None)]
    inputs = processor(messages)
    assert all(rows % 2 == columns % 2 == 0 for rows, columns in inputs.grids)
    counts = [rows * columns // 4 for rows, columns in inputs.grids]
    text = rendered(processor, messages)
    for count in counts:
        text = text.replace("<|image_pad|>", "<|place|>" * count, 1)
    text = text.replace("<|place|>", "<|image_pad|>")
    assert inputs.ids == processor.tokenizer(text)["input_ids"]
    assert inputs.patches.shape == (4 * sum(counts), 3 * 2 * 16 * 16)
    # The text alone has no patches.
    alone = processor(prompts.generate("é"))
    assert alone.patches is None and alone.grids == ()


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((448, 448), (28, 28)),  # as many pixels as there must be at least
        ((64, 48), (26, 34)),  # enlarged
        ((3000, 2000), (44, 68)),  # shrunk to at most 802,816 pixels
        ((700, 500), (32, 44)),  # only rounded
    ],
)
def test_sizes_of_pictures(vlm, size, grid):
    _, (found,) = vlm.processor.see([Image.new("RGB", size)])
    assert found == grid
    assert 256 * 28**2 <= found[0] * found[1] * 16**2 <= 1024 * 28**2


def test_colours_of_pictures(vlm):
    white, _ = vlm.processor.see([Image.new("RGB", (448, 448), "white")])
    black, _ = vlm.processor.see([Image.new("L", (448, 448), 0)])
    assert np.allclose(np.array(white), 1) and np.allclose(np.array(black), -1)
    # What is transparent is on white.
    clear, _ = vlm.processor.see([Image.new("RGBA", (448, 448), (0, 0, 0, 0))])
    assert np.array_equal(np.array(clear), np.array(white))
    # Channel by channel, frame by frame: red only in the first third.
    red, _ = vlm.processor.see([Image.new("RGB", (448, 448), (255, 0, 0))])
    assert np.allclose(np.array(red).reshape(-1, 3, 512).mean((0, 2)), [1, -1, -1])


def test_upright_pictures(vlm):
    lying = Image.new("RGB", (600, 300))
    exif = lying.getexif()
    exif[0x0112] = 6
    file = io.BytesIO()
    lying.save(file, format="PNG", exif=exif)
    _, ((rows, columns),) = vlm.processor.see([Image.open(io.BytesIO(file.getvalue()))])
    assert rows > columns


def test_pictures_that_cannot_be_seen(vlm):
    with pytest.raises(ImageError, match="too long and narrow"):
        vlm.inspire(Image.new("RGB", (2010, 10)))
    assert vlm.processor.see([Image.new("RGB", (2000, 10))])[1]


def test_damaged_tokenizers(model, tmp_path):
    shutil.copytree(model, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer"):
        FiboVLM(model_path=str(tmp_path / "copy"))


# ---- text as it comes


@pytest.mark.parametrize("text", ["", "plain text", "é 猫 🙂 ok 👩‍👩‍👧", " spaces  and\nlines\t", "🙂" * 5, "\ufffd!"])
def test_text_in_pieces(vlm, text):
    tokenizer = vlm.processor.tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces: list[str] = []
    answer = AnswerText(tokenizer, on_text=pieces.append)
    assert not any([answer.add(token) for token in ids])
    assert answer.finish() == "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


def test_text_stops(vlm):
    tokenizer = vlm.processor.tokenizer

    def said(text: str, *stop: str) -> tuple[str, str, bool]:
        pieces: list[str] = []
        answer = AnswerText(tokenizer, stop, pieces.append)
        has_ended = any(answer.add(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"])
        whole = answer.finish()
        return whole, "".join(pieces), has_ended

    assert said("one two three", "tw") == ("one ", "one ", True)
    assert said("one two three", "three", "two") == ("one ", "one ", True)
    # What began like a stop string and was none is said after all.
    assert said("one tw", "two") == ("one tw", "one tw", False)
    assert said("a<|im_end|>b", "<|im_end|>") == ("a", "a", True)
    # Other special tokens are not said, but stop strings may contain them.
    assert said("a<|endoftext|>b") == ("ab", "ab", False)
    assert said("a<|endoftext|>bc", "<|endoftext|>b") == ("a", "a", True)
    assert said("a<|endoftext|>bc", "ab") == ("abc", "abc", False)
    assert said("abc", "") == ("abc", "abc", False)
