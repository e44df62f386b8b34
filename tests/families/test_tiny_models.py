"""What every family's commands and classes do, with a tiny model of random weights and no reference (no torch).

The models are data: `TINY` in tests/families/<family>/cases*.py.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import shutil
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from support.cases import Tiny
from support.tiny_models import EVERY_TINY, EVERY_TINY_BOTH_WAYS, SIZE, TINY, pixels

from mflux.backend import mx, nn, tree_flatten
from mflux.cli.commands import COMMANDS
from mflux.cli.generate import Generate
from mflux.errors import CheckpointError, MfluxError, NotBuiltError, UsageError
from mflux.models.common.config.model_config import key_of
from mflux.models.common.family import built, family_of
from mflux.models.common.memory import Keep, is_loaded
from mflux.utils.metadata_reader import MetadataReader


def command_of(tiny: Tiny) -> Generate:
    return importlib.import_module(COMMANDS[tiny.command].module).COMMAND


@EVERY_TINY
def test_the_same_seed_draws_the_same_picture_and_another_one_another(tiny):
    first, again, other = (tiny.draw("--seed", seed, "--output", f"{n}.png") for n, seed in enumerate((1, 1, 2)))
    assert pixels(first).shape[:2] == (32, 64)
    assert np.array_equal(pixels(first), pixels(again))
    assert np.abs(pixels(first) - pixels(other)).mean() > 0.5


@EVERY_TINY
def test_a_picture_is_drawn_again_from_its_own_settings(tiny):
    first = tiny.draw("--seed", 3, "--metadata")
    settings = MetadataReader.read_exif_metadata(first)
    written = first.with_suffix(".metadata.json").read_text()
    assert settings == json.loads(written)
    assert str(Path.cwd()) not in written, "a folder of the machine that it was made on"
    assert (settings["seed"], settings["steps"], settings["width"], settings["height"]) == (3, 2, 64, 32)
    if "settings" in command_of(tiny.case).leave_out:
        pytest.skip("mflux 0.24 reads no settings with it")
    for source in (first, first.with_suffix(".metadata.json")):
        # Pictures say the names of their sources, not where these lie: the command's own words say that.
        result = tiny.run("-C", source)
        assert result.status == 0, result.err
        assert np.array_equal(pixels(result.paths[0]), pixels(first))


@EVERY_TINY_BOTH_WAYS
def test_class_and_command_agree_with_the_command(tiny):
    assert np.array_equal(tiny.picture(tiny.pipeline()), pixels(tiny.draw("--seed", 1)))


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


def words_of(tiny) -> list[str]:
    """What the command is told for one small picture."""
    case = tiny.case
    words = ("--model", tiny.folder(), "--base-model", case.base_model, *case.words, "--prompt", case.prompt)
    return [str(word) for word in (*words, "--steps", 2, *SIZE, "--seed", 1)]


@EVERY_TINY
def test_a_program_plans_what_a_command_line_does(tiny):
    """Without argv: settings by their names, through the same checks, and one loaded model for what has its key."""
    command, words = command_of(tiny.case), words_of(tiny)
    typed, planned = command.settle(*command.build_parser().parse(words)), command.plan(as_settings(command, words))
    assert planned == typed
    assert hash(planned.key) == hash(typed.key) and planned.key == typed.key
    more = as_settings(command, words) | {"quantize": 8}
    assert command.plan(more).key != planned.key
    other = command.plan(as_settings(command, words) | {"seed": [2, 3]})
    assert other.key == planned.key and [image["seed"] for image in other.images] == [2, 3]
    (image,) = command.images(planned, planned.load())
    image = image.image if command.pixels is None else command.pixels(image, planned.options)
    assert np.array_equal(np.asarray(image).astype(int), pixels(tiny.draw("--seed", 1)))


@EVERY_TINY
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
def test_what_a_program_asks_for_is_checked(tiny, wrong, told):
    command = command_of(tiny.case)
    with pytest.raises(UsageError) as caught:
        command.plan(as_settings(command, words_of(tiny)) | wrong)
    assert told in str(caught.value)


@EVERY_TINY_BOTH_WAYS
def test_a_stage_holds_only_what_it_needs(tiny):
    """No text encoder is left when the steps begin, and before the last picture is decoded nothing else is either."""
    model = tiny.pipeline()
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
    tiny.picture(model)
    steps = held[: held.index("decode")]
    assert len(steps) == 2
    assert all(entry == {"encode": False, "denoise": True} for entry in steps)
    before_decode = held[held.index("decode") + 1]
    assert not set(before_decode) & {part for parts in by_stage.values() for part in parts}


@EVERY_TINY
def test_a_file_that_is_cut_is_told_before_anything_is_loaded(tiny, tmp_path):
    """Not when its turn comes: what was computed until then would be lost."""
    folder = tmp_path / "cut"
    shutil.copytree(tiny.folder(), folder)
    later = [part.folder for part in tiny.case.pipeline_class().components if part.stage != "encode"]
    parts = [part for part in later if (folder / part).is_dir()]
    assert {"transformer", "vae"} <= set(parts)
    for part in parts:
        path = next((folder / part).glob("*.safetensors"))
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        with pytest.raises(CheckpointError, match=f"{part}/.* is truncated"):
            tiny.pipeline(folder)
        path.unlink()
        with pytest.raises(CheckpointError, match=f"{part} holds no weights|{part} is incomplete"):
            tiny.pipeline(folder)
        path.write_bytes(whole)


@EVERY_TINY
def test_what_is_released_is_gone(tiny):
    """Nothing that a class still holds, such as a step's function, keeps a transformer in memory while it decodes."""
    model = tiny.pipeline()
    model.keep = Keep(for_next_image=False)
    loaded: list[weakref.ref] = []

    class Watch:
        def call_after_loop(self, **_):
            parts = [part.name for part in model.components if part.stage == "denoise" and is_loaded(model, part.name)]
            assert "transformer" in parts
            loaded.extend(weakref.ref(getattr(model, name)) for name in parts)

    model.callbacks.register(Watch())
    decode, alive = model.decode, []
    model.decode = lambda *args: alive.append([one() is not None for one in loaded]) or decode(*args)
    tiny.picture(model)
    assert len(alive) == 1 and not any(alive[0])


# What stands for a second prompt with each family's guidance, where its class takes one.
GUIDED = {"guidance": 3.0, "negative_prompt": "a green square"}


@EVERY_TINY
def test_an_encoder_is_loaded_once_for_an_image(tiny, caplog):
    """Also with guidance, whose other prompt is encoded in the same visit; and not again for the same prompts."""
    model = tiny.pipeline()
    if hasattr(model, "is_distilled"):
        model.is_distilled = False
    known = inspect.signature(model.generate_image).parameters
    guided = {name: value for name, value in GUIDED.items() if name in known and name not in tiny.case.generate}
    encoders = {component.name for component in model.components if component.stage == "encode"}
    caplog.set_level("INFO", logger="mflux")
    tiny.generate(model, **guided)
    assert sorted(name for name in loads(caplog.messages) if name in encoders) == sorted(encoders)
    caplog.clear()
    tiny.generate(model, **guided | {"seed": 2})
    assert not encoders & set(loads(caplog.messages))


def loads(messages: Sequence[str]) -> list[str]:
    """The components that the log says were loaded: "load text_encoder: 0.1 s, 0.00 GB"."""
    return [line.removeprefix("load ").partition(":")[0] for line in messages if line.startswith("load ")]


@EVERY_TINY
def test_both_halves_of_generation_have_one_name(tiny):
    """`encode_prompts` gives a condition for each prompt, `predictor` the velocity of latents from conditions."""
    model = tiny.pipeline()
    about = {"images": [PIL.Image.new("RGB", (64, 64))]} if "images" in parameters(model.encode_prompts) else {}
    first, second, again = model.encode_prompts(tiny.case.prompt, "", tiny.case.prompt, **about)
    assert first is again
    assert flat(first) and len(flat(first)) == len(flat(second))
    assert all(array.dtype == mx.float32 for array in flat(first))
    assert next(iter(parameters(model.predictor))) == "config"
    assert model.loaded() == {}, "the text encoders are released"


def parameters(function) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def flat(condition: Any) -> list[mx.array]:
    """The arrays of what a prompt was encoded to."""
    if is_dataclass(condition):
        condition = [getattr(condition, field.name) for field in fields(condition)]
    if isinstance(condition, (list, tuple)):
        return [array for part in condition for array in flat(part)]
    return [condition] if isinstance(condition, mx.array) else []


def strong_lora(tiny) -> str:
    """A LoRA in PEFT's layout, which every family knows, on one layer of the transformer; in the working directory."""
    weights = tree_flatten(tiny.pipeline().transformer.parameters())
    layer, weight = next((path, value) for path, value in weights if path.endswith(".to_q.weight"))
    shapes = {"lora_A": (2, weight.shape[1]), "lora_B": (weight.shape[0], 2)}
    tensors = {
        f"transformer.{layer.removesuffix('weight')}{part}.weight": mx.random.normal(shape, key=mx.random.key(number))
        for number, (part, shape) in enumerate(shapes.items())
    }
    mx.save_safetensors("strong.safetensors", tensors)
    return "strong.safetensors"


@EVERY_TINY_BOTH_WAYS
def test_other_loras_for_a_loaded_model(tiny):
    """What `set_loras` leaves is what a new model with the same LoRAs is."""
    model, lora = tiny.pipeline(), strong_lora(tiny)
    plain = tiny.picture(model)
    model.set_loras([lora], [0.5])
    assert (model.lora_paths, model.lora_scales) == ([lora], [0.5])
    changed = tiny.picture(model)
    assert np.abs(changed - plain).max() > 1
    assert np.array_equal(changed, tiny.picture(tiny.pipeline(lora_paths=[lora], lora_scales=[0.5])))
    # Baked into the weights, these are read again; beside them they come and go, and the weights stay.
    model.set_loras(None)
    assert np.array_equal(tiny.picture(model), plain)
    transformer = model.transformer
    model.set_loras([lora, lora], [0.3, 0.2], bake=False)
    beside = tiny.picture(model)
    assert np.abs(beside - plain).max() > 1
    fresh = tiny.pipeline(lora_paths=[lora, lora], lora_scales=[0.3, 0.2], bake_lora=False)
    assert np.array_equal(beside, tiny.picture(fresh))
    model.set_loras(None)
    assert np.array_equal(tiny.picture(model), plain)
    # What a ControlNet adds to the weights stands in them where no LoRA is beside.
    if model.loras_of(model.component("transformer"), to_save=False) is None:
        assert model.transformer is transformer
    with pytest.raises(MfluxError):
        model.set_loras(["nowhere.safetensors"])
    assert model.lora_paths is None
    assert np.array_equal(tiny.picture(model), plain), "a LoRA that is not there changes nothing"


@EVERY_TINY
def test_low_ram_draws_the_same(tiny):
    plain, low = tiny.draw("--seed", 1), tiny.draw("--seed", 1, "--low-ram", "--output", "low.png")
    assert np.abs(pixels(plain) - pixels(low)).max() <= 1


@EVERY_TINY_BOTH_WAYS
def test_saved_and_quantized_it_draws_what_it_drew(tiny):
    """Quantizing while loading and loading what was saved quantized are the same, tensor by tensor."""
    root = tiny.folder(wide=True)
    saved = tiny.save("-q", 8, model=root)
    record = json.loads((saved / "mflux_model.json").read_text())
    assert (record["base_model"], record["quantize"]) == (key_of(tiny.case.base_model), 8)
    fresh, stored = tiny.pipeline(root, quantize=8), tiny.pipeline(saved)
    assert (fresh.bits, stored.bits) == (8, 8)
    if tiny.case.changes_weights:
        difference = np.abs(tiny.picture(fresh) - tiny.picture(stored))
        assert 0 < difference.mean() < 20, "not the same numbers, and nearly the same image"
        return
    for part in fresh.components:
        if not (saved / part.folder).is_dir():
            continue
        assert (saved / part.folder / "model.safetensors.index.json").is_file()
        one, other = (dict(tree_flatten(getattr(model, part.name).parameters())) for model in (fresh, stored))
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert mx.array_equal(value, other[key], equal_nan=True).item(), (part.name, key)
    assert any(isinstance(layer, nn.QuantizedLinear) for layer in fresh.transformer.modules())
    from_stored = tiny.picture(stored)
    assert np.array_equal(tiny.picture(fresh), from_stored)
    assert 0 < np.abs(tiny.picture(tiny.pipeline(root)) - from_stored).mean() < 40


@EVERY_TINY
def test_a_saved_model_knows_what_it_is(cli, tiny):
    case, saved = tiny.case, tiny.save()
    words = (*case.words, "--prompt", case.prompt, "--steps", 2, *SIZE, "--seed", 1, "--output", "saved.png")
    # Whatever its name: `mflux-generate` asks the folder, and hands over to the model's first command.
    is_first = built()[key_of(case.base_model)] == f"mflux-{case.command}"
    result = cli("generate" if is_first else case.command, "--model", saved, *words)
    assert (result.status, result.errors) == (0, []), result.err
    assert np.array_equal(pixels(result.paths[0]), pixels(tiny.draw("--seed", 1)))


@EVERY_TINY_BOTH_WAYS
def test_a_lora_changes_what_is_drawn(tiny, way):
    strong_lora(tiny)
    plain, none, all_of_it, beside = (
        tiny.draw("--seed", 1, *words, "--output", f"{number}.png")
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
    differences = np.abs(pixels(beside) - pixels(all_of_it))
    # In bfloat16 what is added to the weights is rounded with them, and beside them it is not.
    assert differences.max() <= 1 if way == "plain" else differences.mean() <= 2
    settings = MetadataReader.read_exif_metadata(beside)
    assert (settings["lora_paths"], settings["lora_scales"]) == (["strong.safetensors"], [1.0])
    assert settings["bake_lora"] is False


@EVERY_TINY
def test_weights_that_are_not_finite_draw_nothing(tiny, in_folder):
    broken, before = in_folder / "broken", set(in_folder.glob("*.png"))
    shutil.copytree(tiny.folder(), broken)
    path = next((broken / "transformer").glob("*.safetensors"))
    tensors = mx.load(str(path))
    key = next(key for key, value in sorted(tensors.items()) if value.ndim == 2)
    tensors[key] = mx.full(tensors[key].shape, float("nan"), dtype=tensors[key].dtype)
    mx.save_safetensors(str(path), tensors)
    result = tiny.run("--prompt", tiny.case.prompt, "--steps", 1, *SIZE, model=broken)
    assert result.status == 1
    assert len(result.errors) == 1
    assert "not finite" in result.errors[0]
    assert key in result.errors[0]
    assert set(in_folder.glob("*.png")) == before


def each_refused(field: str):
    """A case for each entry of `Tiny.refused` or `Tiny.refused_later`."""
    cases = [(name, *entry) for name, case in TINY.items() for entry in getattr(case, field)]
    return pytest.mark.parametrize(("tiny", "part", "change", "told"), cases, indirect=["tiny"])


def with_change(source: Path, target: Path, part: str, change: Mapping[str, Any]) -> Path:
    shutil.copytree(source, target)
    path = target / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return target


@each_refused("refused")
def test_another_model_is_refused(tiny, in_folder, part, change, told):
    other = with_change(tiny.folder(), in_folder / "other", part, change)
    with pytest.raises(CheckpointError, match=told):
        tiny.pipeline(other)


@each_refused("refused_later")
def test_another_model_is_refused_when_it_is_loaded(tiny, in_folder, part, change, told):
    pipeline = tiny.pipeline(with_change(tiny.folder(), in_folder / "other", part, change))
    with pytest.raises(CheckpointError, match=told):
        tiny.generate(pipeline)


@EVERY_TINY
def test_its_models_are_listed_and_other_commands_tell_its_own(cli, tiny):
    key = key_of(tiny.case.base_model)
    assert family_of(key) is not None
    assert tiny.case.command in [command.name for command in family_of(key).commands]
    assert key in built()
    other = "generate-qwen" if tiny.case.command != "generate-qwen" else "generate-flux2"
    result = cli(other, "--model", tiny.case.base_model, "--prompt", "x")
    assert result.status == 2
    assert f"{built()[key]} --model {tiny.case.base_model}" in result.errors[0]


@EVERY_TINY
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
def test_arguments_of_the_wrong_type(tiny, settings, told):
    model = tiny.pipeline()
    with pytest.raises(MfluxError, match=told) as failure:
        tiny.generate(model, **settings)
    assert failure.value.exit_code == 2
    assert model.loaded() == {}, "refused before any work"


@EVERY_TINY
def test_numpy_s_numbers_are_numbers(tiny, tmp_path):
    sizes = {"num_inference_steps": np.int64(1), "width": np.int32(32), "height": np.int16(32)}
    image = tiny.generate(tiny.pipeline(), seed=np.uint64(1), **sizes)
    saved = image.save(tmp_path / "image.png", export_json_metadata=True)
    assert MetadataReader.read_exif_metadata(saved)["seed"] == 1


@EVERY_TINY
def test_pid_is_refused_where_mflux_had_it(tiny):
    model = tiny.pipeline()
    if "pid_decode" not in inspect.signature(model.generate_image).parameters:
        pytest.skip("mflux 0.24 has no PiD for it")
    for asked in ({"pid_decode": True}, {"pid_degrade_sigma": 0.5}):
        with pytest.raises(NotBuiltError, match="leave pid_decode"):
            model.generate_image(1, tiny.case.prompt, **asked)
    assert model.loaded() == {}


@EVERY_TINY
def test_parts_from_elsewhere(tiny, tmp_path):
    """A text encoder and an autoencoder of their own folders take the place of the model's."""
    case, folder = tiny.case, tiny.folder()
    model = tiny.pipeline()
    if "vae_path" not in inspect.signature(type(model)).parameters:
        pytest.skip("the class takes no parts")
    bare = tmp_path / folder.name
    shutil.copytree(folder, bare)
    moved = {}
    for component in model.components:
        if component.folder == "vae" or component.folder.startswith("text_encoder"):
            moved[component.folder] = tmp_path / "elsewhere" / component.folder
            shutil.move(bare / component.folder, moved[component.folder])
    encoders = [word for part, place in moved.items() if part != "vae" for word in ("--text-encoder", place)]
    words = ("--prompt", case.prompt, "--steps", 2, *SIZE, "--seed", 1, "--vae", moved["vae"])
    drawn = tiny.run(*words, *encoders, model=bare)
    assert drawn.status == 0, drawn.err
    assert np.array_equal(pixels(drawn.paths[0]), tiny.picture(model))
