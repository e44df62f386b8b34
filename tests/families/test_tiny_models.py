"""What every family's commands and classes do, with a tiny model of random weights and no reference (no torch).

The models are data: `TINY` in tests/families/<family>/cases*.py.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from support.cases import Tiny, every

from mflux.backend import mx, nn, tree_flatten
from mflux.cli.commands import COMMANDS
from mflux.cli.generate import Generate
from mflux.errors import MfluxError, NotBuiltError, UsageError
from mflux.models.common.config import ModelConfig
from mflux.models.common.config.model_config import key_of
from mflux.models.common.family import built, family_of
from mflux.models.common.memory import Keep, is_loaded
from mflux.utils.metadata_reader import MetadataReader

TINY: dict[str, Tiny] = every("TINY")
SIZE = ("--width", 64, "--height", 32)


@pytest.fixture(autouse=True)
def patches(monkeypatch):
    for tiny in TINY.values():
        for path, value in tiny.patches.items():
            monkeypatch.setattr(path, value)


@pytest.fixture(autouse=True)
def pictures(request, in_folder):
    """What a model's command is told to draw from, in the working directory."""
    if (write := TINY[request.getfixturevalue("name")].pictures) is not None:
        write(in_folder)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Each family's tiny model, written once; not to be written to. `wide`: so that most layers can be quantized."""
    written: dict[tuple[str, bool], Path] = {}

    def folder(name: str, wide: bool = False) -> Path:
        if (name, wide) not in written:
            path = tmp_path_factory.mktemp("tiny") / ("wide" if wide else "narrow")
            written[name, wide] = TINY[name].write(path, wide=wide)
        return written[name, wide]

    return folder


@pytest.fixture
def draw(cli, in_folder, folder):
    """Draw with a family's command and see it succeed; returns the picture's path."""

    def draw(name: str, *words: object, model: Path | None = None) -> Path:
        tiny = TINY[name]
        call = [tiny.command, "--model", model or folder(name), "--base-model", tiny.base_model, *tiny.words]
        result = cli(*call, "--prompt", tiny.prompt, "--steps", 2, *SIZE, *words)
        assert result.status == 0, result.err
        assert result.errors == result.warnings == []
        # What else there is stands beside it.
        return result.paths[0]

    return draw


def pixels(path: Path) -> np.ndarray:
    with PIL.Image.open(path) as image:
        return np.asarray(image).astype(int)


def pipeline(name: str, root: Path, **options):
    tiny = TINY[name]
    config = ModelConfig.from_name(str(root), tiny.base_model)
    return tiny.pipeline_class()(model_path=str(root), model_config=config, **options)


def picture(pipeline, name: str, seed: int = 1) -> np.ndarray:
    tiny = TINY[name]
    settings = {"num_inference_steps": 2, "width": 64, "height": 32} | dict(tiny.generate)
    drawn = pipeline.generate_image(seed=seed, prompt=tiny.prompt, **settings)
    return np.asarray((drawn.get_right_half() if tiny.right_half else drawn).image).astype(int)


def command_of(tiny: Tiny) -> Generate:
    return importlib.import_module(COMMANDS[tiny.command].module).COMMAND


@pytest.mark.parametrize("name", TINY)
def test_the_same_seed_draws_the_same_picture_and_another_one_another(draw, name):
    first, again, other = (draw(name, "--seed", seed, "--output", f"{n}.png") for n, seed in enumerate((1, 1, 2)))
    assert pixels(first).shape[:2] == (32, 64)
    assert np.array_equal(pixels(first), pixels(again))
    assert np.abs(pixels(first) - pixels(other)).mean() > 0.5


@pytest.mark.parametrize("name", TINY)
def test_a_picture_is_drawn_again_from_its_own_settings(draw, cli, name):
    first = draw(name, "--seed", 3, "--metadata")
    settings = MetadataReader.read_exif_metadata(first)
    written = first.with_suffix(".metadata.json").read_text()
    assert settings == json.loads(written)
    assert str(Path.cwd()) not in written, "a folder of the machine that it was made on"
    assert (settings["seed"], settings["steps"], settings["width"], settings["height"]) == (3, 2, 64, 32)
    tiny = TINY[name]
    if "settings" in command_of(tiny).leave_out:
        pytest.skip("mflux 0.24 reads no settings with it")
    for source in (first, first.with_suffix(".metadata.json")):
        call = [tiny.command, "-C", source, "--model", folder_of(draw, name), "--base-model", tiny.base_model]
        # Pictures say the names of their sources, not where these lie.
        result = cli(*call, *tiny.words)
        assert result.status == 0, result.err
        assert np.array_equal(pixels(result.paths[0]), pixels(first))


def folder_of(draw, name: str) -> Path:
    return draw.__closure__[[cell for cell in draw.__code__.co_freevars].index("folder")].cell_contents(name)


@pytest.mark.parametrize("name", TINY)
def test_class_and_command_agree_with_the_command(draw, folder, name):
    assert np.array_equal(picture(pipeline(name, folder(name)), name), pixels(draw(name, "--seed", 1)))


def as_settings(command: Generate, words: Sequence[object]) -> dict[str, object]:
    """Words of a command line as a program has them: {"image_path": "photo.png", "steps": 2}."""
    options = {flag: action for action in command.build_parser()._actions for flag in action.option_strings}
    settings: dict[str, object] = {}
    for word in map(str, words):
        if word in options:
            action = options[word]
            settings[action.dest] = [] if action.nargs in ("*", "+") else None
            continue
        value = float(word) if re.fullmatch(r"[0-9.]+", word) else word
        value = int(value) if isinstance(value, float) and value.is_integer() else value
        # One number of several may stand alone.
        taken = settings[action.dest]
        settings[action.dest] = value if taken is None or action.dest == "seed" else [*taken, value]
    return settings


@pytest.mark.parametrize("name", TINY)
def test_a_program_plans_what_a_command_line_does(draw, folder, name):
    """Without argv: settings by their names, through the same checks, and one loaded model for what has its key."""
    tiny, command = TINY[name], command_of(TINY[name])
    words = ["--model", folder(name), "--base-model", tiny.base_model, *tiny.words, "--prompt", tiny.prompt]
    words = [str(word) for word in (*words, "--steps", 2, *SIZE, "--seed", 1)]
    typed, planned = command.settle(*command.build_parser().parse(words)), command.plan(as_settings(command, words))
    assert planned == typed
    assert hash(planned.key) == hash(typed.key) and planned.key == typed.key
    more = as_settings(command, words) | {"quantize": 8}
    assert command.plan(more).key != planned.key
    other = command.plan(as_settings(command, words) | {"seed": [2, 3]})
    assert other.key == planned.key and [image["seed"] for image in other.images] == [2, 3]
    (image,) = command.images(planned, planned.load())
    image = image.image if command.pixels is None else command.pixels(image, planned.options)
    assert np.array_equal(np.asarray(image).astype(int), pixels(draw(name, "--seed", 1)))


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"step": 2}, "has no setting 'step': did you mean steps?"),
        ({"steps": "2"}, "steps: '2' is not a number"),
        ({"steps": 0}, "steps: 0 is too small: at least 1"),
        ({"quantize": 7}, "quantize: 7 is not one of 3, 4, 5, 6, 8"),
        ({"low_ram": 1}, "low_ram: 1 is neither true nor false"),
        ({"prompt": 3}, "prompt: 3 is not text"),
        ({"prompt_file": "a.txt"}, "is not allowed with"),
        ({"output": ["a.png"]}, "output: ['a.png'] is not text"),
    ],
    ids=str,
)
def test_what_a_program_asks_for_is_checked(folder, name, wrong, told):
    tiny, command = TINY[name], command_of(TINY[name])
    words = ["--model", folder(name), "--base-model", tiny.base_model, *tiny.words, "--prompt", tiny.prompt]
    with pytest.raises(UsageError) as caught:
        command.plan(as_settings(command, words) | wrong)
    assert told in str(caught.value)


@pytest.mark.parametrize("name", TINY)
def test_a_stage_holds_only_what_it_needs(folder, name):
    """No text encoder is left when the steps begin, and before the last picture is decoded nothing else is either."""
    model = pipeline(name, folder(name))
    by_stage = {stage: [c.name for c in model.components if c.stage == stage] for stage in ("encode", "denoise")}
    assert all(by_stage.values())
    held = []

    class Watch:
        def call_in_loop(self, **_):
            held.append({stage: any(is_loaded(model, part) for part in by_stage[stage]) for stage in by_stage})

    model.callbacks.register(Watch())
    model.keep = Keep(for_next_image=False)
    decode = model.decode
    model.decode = lambda *args: held.append("decode") or held.append(sorted(model.loaded())) or decode(*args)
    picture(model, name)
    steps = held[: held.index("decode")]
    assert len(steps) == 2
    assert all(entry == {"encode": False, "denoise": True} for entry in steps)
    before_decode = held[held.index("decode") + 1]
    assert not set(before_decode) & {part for parts in by_stage.values() for part in parts}


@pytest.mark.parametrize("name", TINY)
def test_low_ram_draws_the_same(draw, name):
    plain, low = draw(name, "--seed", 1), draw(name, "--seed", 1, "--low-ram", "--output", "low.png")
    assert np.abs(pixels(plain) - pixels(low)).max() <= 1


@pytest.mark.parametrize("name", TINY)
def test_saved_and_quantized_it_draws_what_it_drew(cli, draw, folder, name):
    """Quantizing while loading and loading what was saved quantized are the same, tensor by tensor."""
    tiny, root = TINY[name], folder(name, wide=True)
    result = cli("save", "--model", root, "--base-model", tiny.base_model, "--path", "saved", "-q", 8)
    assert result.status == 0, result.err
    for part in pipeline(name, Path("saved")).components:
        if (Path("saved") / part.folder).is_dir():
            assert (Path("saved") / part.folder / "model.safetensors.index.json").is_file()
    record = json.loads(Path("saved", "mflux_model.json").read_text())
    assert (record["base_model"], record["quantize"]) == (key_of(tiny.base_model), 8)
    fresh, stored = pipeline(name, root, quantize=8), pipeline(name, Path("saved"))
    assert (fresh.bits, stored.bits) == (8, 8)
    for part in fresh.components:
        if not (Path("saved") / part.folder).is_dir():
            continue
        one, other = (dict(tree_flatten(getattr(model, part.name).parameters())) for model in (fresh, stored))
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert mx.array_equal(value, other[key], equal_nan=True).item(), (part.name, key)
    assert any(isinstance(layer, nn.QuantizedLinear) for layer in fresh.transformer.modules())
    assert np.array_equal(picture(fresh, name), picture(stored, name))
    whole = picture(pipeline(name, root), name)
    assert 0 < np.abs(whole - picture(stored, name)).mean() < 40


@pytest.mark.parametrize("name", TINY)
def test_a_saved_model_knows_what_it_is(cli, draw, folder, name):
    tiny = TINY[name]
    result = cli("save", "--model", folder(name), "--base-model", tiny.base_model, "--path", "saved")
    assert result.status == 0, result.err
    # Whatever its name: `mflux-generate` asks the folder, and hands over to the model's first command.
    is_first = built()[key_of(tiny.base_model)] == f"mflux-{tiny.command}"
    result = cli(
        *("generate" if is_first else tiny.command, "--model", "saved", *tiny.words, "--prompt", tiny.prompt),
        *("--steps", 2, *SIZE, "--seed", 1, "--output", "saved.png"),
    )
    assert (result.status, result.errors) == (0, []), result.err
    assert np.array_equal(pixels(result.paths[0]), pixels(draw(name, "--seed", 1)))


@pytest.mark.parametrize("name", TINY)
def test_a_lora_changes_what_is_drawn(draw, folder, name):
    """In PEFT's layout, which every family knows, on one layer of the transformer."""
    weights = tree_flatten(pipeline(name, folder(name)).transformer.parameters())
    layer, weight = next((path, value) for path, value in weights if path.endswith(".to_q.weight"))
    shapes = {"lora_A": (2, weight.shape[1]), "lora_B": (weight.shape[0], 2)}
    tensors = {
        f"transformer.{layer.removesuffix('weight')}{part}.weight": mx.random.normal(shape, key=mx.random.key(number))
        for number, (part, shape) in enumerate(shapes.items())
    }
    mx.save_safetensors("strong.safetensors", tensors)
    plain, none, all_of_it, beside = (
        draw(name, "--seed", 1, *words, "--output", f"{number}.png")
        for number, words in enumerate(
            [
                (),
                ("--lora", "strong.safetensors", 0),
                ("--lora", "strong.safetensors", 1),
                ("--lora", "strong.safetensors", 1, "--no-bake-lora"),
            ]
        )
    )
    assert np.abs(pixels(plain) - pixels(none)).max() <= 1
    assert np.abs(pixels(plain) - pixels(all_of_it)).max() > 1
    assert np.abs(pixels(beside) - pixels(all_of_it)).max() <= 1
    settings = MetadataReader.read_exif_metadata(beside)
    assert (settings["lora_paths"], settings["lora_scales"]) == (["strong.safetensors"], [1.0])
    assert settings["bake_lora"] is False


@pytest.mark.parametrize("name", TINY)
def test_weights_that_are_not_finite_draw_nothing(draw, cli, folder, in_folder, name):
    import shutil

    tiny = TINY[name]
    broken, before = in_folder / "broken", set(in_folder.glob("*.png"))
    shutil.copytree(folder(name), broken)
    path = next((broken / "transformer").glob("*.safetensors"))
    tensors = mx.load(str(path))
    key = next(key for key, value in sorted(tensors.items()) if value.ndim == 2)
    tensors[key] = mx.full(tensors[key].shape, float("nan"), dtype=tensors[key].dtype)
    mx.save_safetensors(str(path), tensors)
    call = [tiny.command, "--model", broken, "--base-model", tiny.base_model, *tiny.words, "--prompt", tiny.prompt]
    result = cli(*call, "--steps", 1, *SIZE)
    assert result.status == 1
    assert len(result.errors) == 1
    assert "not finite" in result.errors[0]
    assert key in result.errors[0]
    assert set(in_folder.glob("*.png")) == before


@pytest.mark.parametrize("name", TINY)
def test_its_models_are_listed_and_other_commands_tell_its_own(cli, name):
    tiny = TINY[name]
    key = key_of(tiny.base_model)
    assert family_of(key) is not None
    assert tiny.command in [command.name for command in family_of(key).commands]
    assert key in built()
    other = "generate-qwen" if tiny.command != "generate-qwen" else "generate-flux2"
    result = cli(other, "--model", tiny.base_model, "--prompt", "x")
    assert result.status == 2
    assert f"{built()[key]} --model {tiny.base_model}" in result.errors[0]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_inference_steps": 2.5}, "num_inference_steps"),
        ({"width": "64"}, "width"),
        ({"seed": None}, "seed"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"prompt": None}, "prompt"),
    ],
    ids=str,
)
def test_arguments_of_the_wrong_type(folder, name, settings, told):
    model = pipeline(name, folder(name))
    tiny = TINY[name]
    plain = {"seed": 1, "prompt": tiny.prompt, "num_inference_steps": 1, "width": 32, "height": 32}
    with pytest.raises(MfluxError, match=told) as failure:
        model.generate_image(**plain | dict(tiny.generate) | settings)
    assert failure.value.exit_code == 2
    assert model.loaded() == {}, "refused before any work"


@pytest.mark.parametrize("name", TINY)
def test_numpy_s_numbers_are_numbers(folder, name, tmp_path):
    model = pipeline(name, folder(name))
    tiny = TINY[name]
    sizes = {"num_inference_steps": np.int64(1), "width": np.int32(32), "height": np.int16(32)}
    image = model.generate_image(seed=np.uint64(1), prompt=tiny.prompt, **sizes | dict(tiny.generate))
    saved = image.save(tmp_path / "image.png", export_json_metadata=True)
    assert MetadataReader.read_exif_metadata(saved)["seed"] == 1


@pytest.mark.parametrize("name", TINY)
def test_pid_is_refused_where_mflux_had_it(folder, name):
    model = pipeline(name, folder(name))
    if "pid_decode" not in inspect.signature(model.generate_image).parameters:
        pytest.skip("mflux 0.24 has no PiD for it")
    for asked in ({"pid_decode": True}, {"pid_degrade_sigma": 0.5}):
        with pytest.raises(NotBuiltError, match="leave pid_decode"):
            model.generate_image(1, TINY[name].prompt, **asked)
    assert model.loaded() == {}
