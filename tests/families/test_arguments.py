"""What is no such argument is refused by its name, in every argument of every family's class: no error of Python's, and
no text taken letter by letter."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.tiny_models import EVERY_TINY

import mflux
from mflux.errors import MfluxError, ModelConfigError, UsageError
from mflux.models.common.arguments import CHECKS
from mflux.models.common.config import ModelConfig
from mflux.models.common.family import families, load_object
from mflux.models.common.pipeline import Pipeline


class Unruly:
    def __repr__(self) -> str:
        raise RuntimeError


WRONG: dict[str, Any] = {
    "a text": "photo.pn", "a number": 4.5, "below zero": -1, "a list": ["a"], "an empty list": [], "a table": {"a": 1},
    "a switch": True, "bytes": b"x", "an object": object(),
    "an array": np.array([1, 2]), "an array of none": np.array(3),
    "beyond a float": 10**400,
    "beyond writing": 10**5000, "a tuple": (), "a long text": "x" * 100_000, "a long list": [1] * 5000,
    "an unruly object": Unruly(),
}  # fmt: skip


# What they may be besides is said there.
CHECKED_BY_THEIR_CLASS = ("controls", "concept_attention", "heatmap_layer_indices", "heatmap_timesteps")


class Reached(Exception):
    """All arguments were taken."""


def sound(tiny) -> tuple[type, dict[str, Any], dict[str, Any]]:
    """A class, and arguments that it takes."""
    cls, folder = tiny.case.pipeline_class(), tiny.folder()
    made = {"model_path": str(folder), "model_config": ModelConfig.from_name(str(folder), tiny.case.base_model)}
    size = {"seed": 1, "num_inference_steps": 1, "width": 64, "height": 32, "prompt": tiny.case.prompt}
    known = inspect.signature(cls.generate_image).parameters
    return cls, made, {name: value for name, value in size.items() if name in known} | dict(tiny.case.generate)


@EVERY_TINY
def test_each_argument_of_each_class(tiny, monkeypatch):
    def reached(*_: object, **__: object) -> None:
        raise Reached

    monkeypatch.setattr(Pipeline, "denoise", reached)
    logging.getLogger("mflux").setLevel(logging.ERROR)
    cls, made, drawn = sound(tiny)
    model = cls(**made)
    calls = [(cls, name, made) for name in inspect.signature(cls).parameters]
    calls += [(model.generate_image, name, drawn) for name in inspect.signature(model.generate_image).parameters]
    wrong = []
    for function, name, arguments in calls:
        for kind, value in WRONG.items():
            if name == "model_config" and value is None:
                continue
            try:
                function(**arguments | {name: value})
            except Reached:
                pass
            except MfluxError as error:
                if "\n" in str(error) or len(str(error)) > 2500:
                    wrong.append((name, kind, str(error)))
            except Exception as error:
                wrong.append((name, kind, repr(error)))
    assert wrong == []


@EVERY_TINY
def test_one_thing_where_several_are_meant(tiny, monkeypatch):
    def reached(*_: object, **__: object) -> None:
        raise Reached

    monkeypatch.setattr(Pipeline, "denoise", reached)
    cls, made, drawn = sound(tiny)
    model = cls(**made)
    known = inspect.signature(model.generate_image).parameters
    for name in {"image_paths", "redux_image_paths"} & known.keys():
        for one in (drawn[name][0], Path(drawn[name][0])):
            strength = {"redux_image_strengths": 0.5} if "redux_image_strengths" in known else {}
            with pytest.raises(Reached):
                model.generate_image(**drawn | {name: one} | strength)
    if "lora_paths" in inspect.signature(cls).parameters:
        with pytest.raises(MfluxError, match=r"there is no (file|LoRA) .*none\.safetensors"):
            cls(**made, lora_paths="none.safetensors", lora_scales=0.5)
        with pytest.raises(MfluxError, match="bake_lora is 'no' \\(str\\), which is neither True nor False"):
            cls(**made, bake_lora="no")


def test_where_several_are_meant_is_known():
    """Each argument of a class that takes several things, or a path, is in the table."""
    classes = {load_object(name) for family in families().values() for name in family.pipelines}
    for cls in classes:
        for function in (cls, cls.generate_image):
            for name, parameter in inspect.signature(function).parameters.items():
                kind = str(parameter.annotation)
                if "list" in kind or "Sequence" in kind or "Path" in kind:
                    assert name in CHECKS or name in CHECKED_BY_THEIR_CLASS, (cls, name, kind)


@pytest.mark.parametrize("scales", [0.5, [0.5], np.float32(0.5), (0.5,)], ids=str)
def test_one_lora_and_one_scale(tmp_path, tiny_schnell, scales):
    from mflux.backend import mx
    from mflux.models.flux.variants.txt2img.flux import Flux1

    stem = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{stem}.lora_A.weight": mx.ones((1, 32)), f"{stem}.lora_B.weight": mx.ones((32, 1))}
    mx.save_safetensors(str(tmp_path / "a.safetensors"), tensors)
    for path in (str(tmp_path / "a.safetensors"), tmp_path / "a.safetensors"):
        config = ModelConfig.schnell()
        model = Flux1(model_path=str(tiny_schnell), model_config=config, lora_paths=path, lora_scales=scales)
        assert (model.lora_paths, model.lora_scales) == ([str(tmp_path / "a.safetensors")], [0.5])
        model.set_loras(path, scales)
        assert model.lora_scales == [0.5]


@pytest.mark.parametrize("value", [4.5, b"x", ["a"], {"a": 1}, True, object()], ids=lambda value: type(value).__name__)
def test_names_of_models_are_text(value):
    for call in (ModelConfig.from_name, mflux.load):
        with pytest.raises(MfluxError) as caught:
            call(value)
        assert "which is not text" in str(caught.value)
    with pytest.raises(ModelConfigError):
        ModelConfig.from_name("schnell", base_model=value)


@pytest.mark.parametrize("settings", [None, 4, "prompt", ["prompt"], {4: 5}], ids=repr)
def test_settings_of_a_plan(settings):
    from mflux.models.flux.cli.flux_generate import COMMAND

    with pytest.raises(UsageError):
        COMMAND.plan(settings)


@pytest.mark.parametrize(
    "name", ["nonsense", "schnel", "someone/thing", "black-forest-labs/FLUX.2-dev", "a/flux-dev-lora"]
)
def test_load_speaks_of_its_own_arguments(name):
    with pytest.raises(ModelConfigError) as caught:
        mflux.load(name)
    told = str(caught.value).replace("mflux --help", "")
    assert "--" not in told and len(told) > 20


def test_load_of_what_lies_on_the_disk(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ModelConfigError, match=r"is a picture \(PNG\), no model: a picture to start from is said with"):
        mflux.load(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("name", "value"),
    [("use_kv_cache", "photo.png"), ("height", ()), ("height", False), ("height", 0), ("width", ""), ("quantize", ""),
     ("quantize", np.array(3)), ("pid_degrade_sigma", ""), ("pid_degrade_sigma", np.array([1, 2]))],
    ids=lambda value: repr(value)[:20],
)  # fmt: skip
@EVERY_TINY
def test_nothing_is_taken_for_nothing(tiny, monkeypatch, name, value):
    """What Python counts as false, or true, is no setting for that."""

    def reached(*_: object, **__: object) -> None:
        raise Reached

    cls, made, drawn = sound(tiny)
    if name in inspect.signature(cls).parameters:
        with pytest.raises(UsageError, match=name):
            cls(**made | {name: value})
    elif name in inspect.signature(cls.generate_image).parameters:
        model = cls(**made)
        monkeypatch.setattr(Pipeline, "denoise", reached)
        with pytest.raises(UsageError, match=f"{name}|a side|must be at least|16"):
            model.generate_image(**drawn | {name: value})


class Hooks:
    call_in_loop = 3


class Listener:
    def call_after_loop(self, **_: object) -> None: ...


@pytest.mark.parametrize(
    "callback", [3, None, "x", object(), Hooks(), Listener, 10**5000, Unruly()], ids=lambda value: type(value).__name__
)
def test_a_callback_that_nobody_would_call(callback):
    from mflux.callbacks.callback_registry import CallbackRegistry

    registry = CallbackRegistry()
    with pytest.raises(UsageError):
        registry.register(callback)
    assert not registry.in_loop and not registry.after_loop
    registry.register(Listener())
    assert len(registry.after_loop) == 1


@pytest.mark.parametrize("name", ["callbacks", "model_config"])
def test_what_a_program_takes_away(name, tiny_schnell):
    from mflux.models.flux.variants.txt2img.flux import Flux1

    model = Flux1(model_path=str(tiny_schnell), model_config=ModelConfig.schnell())
    setattr(model, name, None)
    with pytest.raises(UsageError, match=name):
        model.generate_image(seed=1, prompt="x", num_inference_steps=1, width=16, height=16)


def test_what_programs_of_mflux_call():
    from mflux.models.common.config.config import Config
    from mflux.programs.defaults import get_lora_path
    from mflux.programs.weights import FluxWeightDefinition, WeightLoader

    part = FluxWeightDefinition.get_components()[0]
    calls = [
        (get_lora_path, ([],)), (get_lora_path, (None,)), (WeightLoader.load_single_local, (None, None)),
        (WeightLoader.load_single_local, (part, None)), (WeightLoader.load_single, (None, "a/b")), (Config, (None,)),
        (ModelConfig.from_name, ("x" * 5000,)), (mflux.load, ("x" * 5000,)),
    ]  # fmt: skip
    for function, arguments in calls:
        with pytest.raises(MfluxError) as caught:
            function(*arguments)
        assert len(str(caught.value)) < 2500
