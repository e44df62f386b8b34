"""What modulates is worked out before the steps, whose numbers stay as they are: every family's tiny model."""

from __future__ import annotations

import json
import shutil

import numpy as np
import PIL.Image
import pytest
from support.tiny_models import EVERY_TINY, TINY, TinyModel

from mflux.backend import mx, nn, tree_flatten
from mflux.checkpoints.late import LateLinear, late_layers
from mflux.checkpoints.quantization import Quantization, pack
from mflux.errors import CheckpointError
from mflux.models.common import model as model_module
from mflux.models.common.schedulers import LinearScheduler, register_contrib

STEPS = 3
# One of each family, where its classes do not differ.
FIRST = {name.split()[0]: name for name in reversed(TINY)}.values()
EVERY_FAMILY = pytest.mark.parametrize("tiny", FIRST, indirect=True)


class Latents:
    """Keeps the latents of each step."""

    def __init__(self):
        self.seen: list[np.ndarray] = []

    def call_in_loop(self, *, latents, **_):
        self.seen.append(np.array(latents))


def steps_of(tiny: TinyModel, model, **settings) -> list[np.ndarray]:
    watch = Latents()
    model.callbacks.register(watch)
    tiny.generate(model, **{"num_inference_steps": STEPS} | settings)
    model.callbacks.in_loop.clear()
    assert watch.seen
    return watch.seen


def same(some: list[np.ndarray], others: list[np.ndarray]) -> bool:
    return len(some) == len(others) and all(map(np.array_equal, some, others))


def late(model) -> list[LateLinear]:
    """Of all its components that are in memory."""
    return [part for _, part in model.named_modules() if isinstance(part, LateLinear)]


def as_before(tiny: TinyModel, monkeypatch, root=None, **options):
    """A model with all its weights in memory, whose steps work their modulation out for themselves."""
    real = model_module.load_component
    model = tiny.pipeline(root, **options)
    with monkeypatch.context() as patched:
        patched.setattr(model_module, "load_component", lambda *args, **more: real(*args, **more | {"late": False}))
        for component in model.components:
            if component.stage == "denoise":
                getattr(model, component.name)
    model.ahead = lambda *_, **__: lambda sigma: None
    assert not late(model)
    return model


def read_by(model, monkeypatch) -> list[LateLinear]:
    """The layers that are read from now on."""
    read: list[LateLinear] = []
    real = LateLinear.read
    monkeypatch.setattr(LateLinear, "read", lambda layer: read.append(layer) or real(layer))
    return read


def changed_layer(tiny: TinyModel) -> str:
    """A modulation layer of the transformer."""
    kind = tiny.pipeline().component("transformer").module_class()
    config = json.loads((tiny.folder() / "transformer" / "config.json").read_text())
    return sorted(late_layers(kind(kind.config_class.from_dict(config))))[0]


@EVERY_TINY
def test_the_steps_have_the_same_bits(tiny, monkeypatch):
    plain = steps_of(tiny, as_before(tiny, monkeypatch))
    model = tiny.pipeline()
    read = read_by(model, monkeypatch)
    assert same(steps_of(tiny, model), plain)
    layers = late(model)
    # Each once, and nothing of it is left; a concept reads those that it goes through for itself.
    assert {id(layer) for layer in layers} >= {id(layer) for layer in read}
    assert len(layers) <= len(read) < 2 * len(layers)
    assert all(layer._kept is None and not layer.parameters() for layer in layers)


@EVERY_TINY
def test_another_image_reads_what_is_new_to_it(tiny, monkeypatch):
    model = tiny.pipeline()
    steps_of(tiny, model)
    layers, read = late(model), read_by(model, monkeypatch)
    steps_of(tiny, model, seed=2)
    # What a concept goes through is its own.
    assert not read or type(model).__name__ == "Flux1Concept"
    read.clear()
    steps_of(tiny, model, num_inference_steps=STEPS + 1)
    assert len(read) >= len(layers)
    read.clear()
    other = tiny.case.prompt.replace("red", "green").replace("night", "noon").replace("wall", "hall")
    assert other != tiny.case.prompt
    steps_of(tiny, model, num_inference_steps=STEPS + 1, prompt=other)
    # FLUX.1's follows from the prompt as well.
    assert bool(read) is (tiny.case.pipeline.startswith("mflux.models.flux.") and bool(layers))


@EVERY_TINY
def test_fewer_steps_from_an_image(tiny, monkeypatch, tmp_path):
    if "image_strength" not in tiny.case.pipeline_class().generate_image.__annotations__:
        pytest.skip("it starts from noise")
    path = tmp_path / "source.png"
    PIL.Image.new("RGB", (64, 32), (200, 30, 40)).save(path)
    settings = {"image_path": path, "image_strength": 0.4}
    model = tiny.pipeline()
    if model.sees_image or "image_path" in tiny.case.generate:
        pytest.skip("it sees its image in every step")
    assert same(steps_of(tiny, model, **settings), steps_of(tiny, as_before(tiny, monkeypatch), **settings))


class Wandering(LinearScheduler):
    """Its noise levels are others than it said before the first step."""

    def step(self, noise, timestep, latents, **more):
        after = super().step(noise, timestep, latents, **more)
        if timestep == 0:
            self._sigmas = mx.concatenate([self._sigmas[:1], 0.9 * self._sigmas[1:]])
        return after


@EVERY_FAMILY
def test_a_schedule_that_changes_on_the_way(tiny, monkeypatch):
    register_contrib(Wandering, "wandering")
    if "scheduler" not in tiny.case.pipeline_class().generate_image.__annotations__:
        pytest.skip("its schedule is fixed")
    plain = steps_of(tiny, as_before(tiny, monkeypatch), scheduler="wandering")
    model = tiny.pipeline()
    assert same(steps_of(tiny, model, scheduler="wandering"), plain)
    layers = late(model)
    assert all(layer._kept is not None for layer in layers)


@EVERY_FAMILY
@pytest.mark.parametrize("bake", [True, False])
@pytest.mark.parametrize("bits", [None, 8])
def test_loras_on_modulation(tiny, monkeypatch, in_folder, bake, bits):
    layer = changed_layer(tiny)
    root = tiny.folder(wide=True)
    tensors = mx.load(str(next((root / "transformer").glob("*.safetensors"))))
    out, width = tensors[f"{layer}.weight"].shape
    mx.save_safetensors(
        "lora.safetensors",
        {
            f"transformer.{layer}.lora_A.weight": mx.random.normal((2, width), key=mx.random.key(1)),
            f"transformer.{layer}.lora_B.weight": mx.random.normal((out, 2), key=mx.random.key(2)),
        },
    )
    options = {"lora_paths": ["lora.safetensors"], "lora_scales": [0.7], "bake_lora": bake, "quantize": bits}
    found = steps_of(tiny, tiny.pipeline(root, **options))
    assert same(found, steps_of(tiny, as_before(tiny, monkeypatch, root, **options)))
    model = tiny.pipeline(root, quantize=bits)
    plain = steps_of(tiny, model)
    assert not same(found, plain)
    if bake:
        return
    # Put on beside weights that stay and taken off again: of those that have done their work, only what it changes is
    # read once more.
    transformer, read = model.transformer, read_by(model, monkeypatch)
    for paths, scales, expected in ((["lora.safetensors"], [0.7], found), (None, None, plain)):
        model.set_loras(paths, scales, bake=False)
        assert same(steps_of(tiny, model), expected)
        assert model.transformer is transformer
        # Two where one is given what the other makes.
        assert bool(late(model)) <= len({id(one) for one in read}) <= 2
        read.clear()


@EVERY_FAMILY
def test_quantizing_leaves_it_alone(tiny, in_folder):
    root = tiny.folder(wide=True)
    model = tiny.pipeline(root, quantize=4)
    assert any(isinstance(part, nn.QuantizedLinear) for part in model.transformer.modules())
    assert not any(layer.packed for layer in late(model))
    saved = tiny.save("-q", 4, model=root)
    tensors = mx.load(str(next((saved / "transformer").glob("*.safetensors"))))
    stored = mx.load(str(next((root / "transformer").glob("*.safetensors"))))
    layer = changed_layer(tiny)
    assert f"{layer}.scales" not in tensors
    assert mx.array_equal(tensors[f"{layer}.weight"], stored[f"{layer}.weight"]).item()
    assert same(steps_of(tiny, model), steps_of(tiny, tiny.pipeline(saved)))


@EVERY_FAMILY
def test_a_folder_that_holds_it_quantized(tiny, monkeypatch, in_folder):
    """As mflux 0.24 and the first versions of this one saved them."""
    root = in_folder / "stored"
    shutil.copytree(tiny.save("-q", 8, model=tiny.folder(wide=True)), root)
    path = next((root / "transformer").glob("*.safetensors"))
    tensors, layer = mx.load(str(path)), changed_layer(tiny)
    if tensors[f"{layer}.weight"].shape[1] % 64:
        pytest.skip("too narrow to quantize")
    for leaf, value in pack(tensors.pop(f"{layer}.weight"), Quantization(8)).items():
        tensors[f"{layer}.{leaf}"] = value
    mx.save_safetensors(str(path), tensors)
    (root / "transformer" / "model.safetensors.index.json").unlink(missing_ok=True)
    model = tiny.pipeline(root)
    assert sum(part.packed for part in late_of_transformer(model)) == 1
    assert same(steps_of(tiny, model), steps_of(tiny, as_before(tiny, monkeypatch, root)))


def late_of_transformer(model) -> list[LateLinear]:
    return [part for part in model.transformer.modules() if isinstance(part, LateLinear)]


@EVERY_FAMILY
def test_a_file_that_changed_since(tiny, in_folder):
    """A second image with another schedule reads again, and its file may be another one by then."""
    root = in_folder / "model"
    shutil.copytree(tiny.folder(), root)
    model = tiny.pipeline(root)
    steps_of(tiny, model)
    path = next((root / "transformer").glob("*.safetensors"))
    mx.save_safetensors(str(path), {"other": mx.zeros(3)})
    with pytest.raises(CheckpointError, match="transformer"):
        steps_of(tiny, model, num_inference_steps=STEPS + 1)


def test_every_family_that_has_modulation_is_here():
    kinds = {case.pipeline_class().__module__.split(".")[2] for case in TINY.values()}
    assert kinds >= {"anima", "flux", "flux2", "flux3", "qwen", "fibo", "z_image", "ernie_image", "krea2", "ideogram4"}


@EVERY_FAMILY
def test_nothing_else_is_left_out(tiny):
    """The parameters in memory and those that are not are the file's."""
    model = tiny.pipeline()
    names = {name for name, _ in tree_flatten(model.transformer.parameters())}
    stored = set(mx.load(str(next((tiny.folder() / "transformer").glob("*.safetensors")))))
    kind = model.component("transformer").module_class()
    left = late_layers(kind(model.transformer.config))
    assert names | {name for name in stored if name.rpartition(".")[0] in left} == stored
    assert not any(name.rpartition(".")[0] in left for name in names)


@pytest.mark.parametrize("tiny", ["flux generate"], indirect=True)
def test_two_predictors_of_one_model(tiny):
    """A program that takes them in turns: each has its own prompt's modulation, whoever was made last."""
    model = tiny.pipeline()
    config = model.settings(seed=1, prompt="x", num_inference_steps=2, width=64, height=32)
    prompts = model.encode_prompts("a red circle", "a blue square")
    latents = mx.random.normal((1, 8, 64), key=mx.random.key(1))
    sigma = config.scheduler.sigmas[1]
    alone = [np.array(model.predictor(config, prompt)(latents, sigma)) for prompt in prompts]
    assert not np.array_equal(*alone)
    both = [model.predictor(config, prompt) for prompt in prompts]
    assert all(
        np.array_equal(np.array(one(latents, sigma)), expected) for one, expected in zip(both, alone, strict=True)
    )
