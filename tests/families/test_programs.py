"""What programs on top of mflux do with a model, with every family's tiny one: callbacks, and parts of their own."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from mflux.callbacks.callback_manager import CallbackManager
from mflux.utils.prompt_util import PromptUtil
from support.tiny_models import EVERY_TINY, SIZE, pixels

from mflux.backend import mx, nn
from mflux.cli.commands import COMMANDS
from mflux.cli.parser.parsers import CommandLineParser
from mflux.errors import MfluxError, UsageError
from mflux.models.common.replaced import ReplacedError
from mflux.utils.exceptions import StopImageGenerationException

# Rows and columns of the latents that a picture of the tiny size has, by family, as mflux 0.24's callbacks got them.
SHAPES = {
    "flux": lambda h, w: (1, h // 16 * (w // 16), 64),
    "flux2": lambda h, w: (1, h // 16 * (w // 16), 128),
    "anima": lambda h, w: (1, 16, h // 8, w // 8),
    "flux3": lambda h, w: (1, h // 16 * (w // 16), 128),
    "ideogram4": lambda h, w: (1, h // 16 * (w // 16), 128),
    "qwen": lambda h, w: (1, h // 16 * (w // 16), 64),
    "fibo": lambda h, w: (1, h // 16 * (w // 16), 48),
    "z_image": lambda h, w: (16, 1, h // 8, w // 8),
    "ernie_image": lambda h, w: (1, 128, h // 16, w // 16),
    "krea2": lambda h, w: (1, 16, h // 8, w // 8),
}
TOKENIZERS = {
    "flux": {"clip", "t5"},
    "flux2": {"qwen3"},
    "flux3": {"qwen3_vl"},
    "anima": {"qwen3", "t5"},
    "ideogram4": {"ideogram4"},
    "qwen": {"qwen"},
    "fibo": {"fibo"},
    "z_image": {"z_image"},
    "ernie_image": {"ernie"},
    "krea2": {"qwen3vl"},
}


class Watch:
    """Writes down the shapes and dtypes of all latents that it is given."""

    def __init__(self, stops: bool = False):
        self.seen: dict[str, set] = {}
        self._stops = stops

    def _note(self, moment, latents, config):
        self.seen.setdefault(moment, set()).add((latents.shape, latents.dtype))
        self.size = config.height, config.width

    def call_before_loop(self, seed, prompt, latents, config, canny_image=None, depth_image=None, control_images=None):
        self._note("before", latents, config)

    def call_in_loop(self, t, seed, prompt, latents, config, time_steps, denoised):
        self._note("in", latents, config)
        self._note("denoised", denoised, config)
        if self._stops:
            raise KeyboardInterrupt

    def call_after_loop(self, seed, prompt, latents, config):
        self._note("after", latents, config)

    def call_interrupt(self, t, seed, prompt, latents, config, time_steps):
        self._note("interrupt", latents, config)


def family_of(model) -> str:
    cls = model if isinstance(model, type) else type(model)
    return cls.__module__.split(".")[2]


@EVERY_TINY
def test_latents_in_callbacks_have_0_24_s_shape(tiny):
    model = tiny.pipeline()
    for watch, ends in ((Watch(), {"after"}), (Watch(stops=True), {"interrupt"})):
        model.callbacks.register(watch)
        try:
            tiny.generate(model)
        except StopImageGenerationException:
            assert ends == {"interrupt"}
        expected = SHAPES[family_of(model)](*watch.size), mx.float32
        assert watch.seen == {moment: {expected} for moment in {"before", "in", "denoised"} | ends}
        # What a program unpacks and decodes by itself.
        unpacked = model.latent_creator.unpack_latents(mx.zeros(expected[0]), *watch.size)
        assert unpacked.shape[0] == 1 and unpacked.ndim == 4
        assert model.latent_creator.create_noise(1, *watch.size).shape == expected[0]
        for moment in ("before_loop", "in_loop", "after_loop", "interrupt"):
            assert getattr(model.callbacks, f"{moment}_callbacks")() is getattr(model.callbacks, moment)
            getattr(model.callbacks, moment).clear()


@EVERY_TINY
def test_tokenizers_have_0_24_s_names(tiny):
    model = tiny.pipeline()
    assert TOKENIZERS[family_of(model)] <= model.tokenizers.keys()
    for tokenizer in model.tokenizers.values():
        assert tokenizer.encode("a red circle", max_length=20)


@EVERY_TINY
def test_a_model_passes_for_a_module_where_that_costs_nothing(tiny):
    model = tiny.pipeline()
    assert model.eval() is model and model.train(False) is model and model.freeze() is model
    assert model.training is False


# ---- parts of a program's own


class Counting:
    """Stands in the place of a transformer, and hands on what it is called with."""

    def __init__(self, inner):
        self.inner, self.calls = inner, []

    def __call__(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return self.inner(*args, **kwargs)


def keywords(*names: str) -> frozenset[str]:
    return frozenset(names)


# What mflux 0.24 calls each family's transformer with, by keyword alone.
CALLED_WITH = {
    "flux": keywords("t", "config", "hidden_states", "prompt_embeds", "pooled_prompt_embeds"),
    "qwen": keywords("t", "config", "hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask"),
    "flux2": keywords("hidden_states", "encoder_hidden_states", "timestep", "img_ids", "txt_ids", "guidance"),
    "flux3": keywords(
        "hidden_states",
        "encoder_hidden_states",
        "timestep",
        "target_timestep",
        "img_ids",
        "txt_ids",
        "cond_hidden_states",
        "cond_ids",
    ),
    "z_image": keywords("x", "timestep", "sigmas", "cap_feats"),
    "ernie_image": keywords("hidden_states", "timestep", "text_bth", "text_lens"),
    "anima": keywords("latents", "sigma", "context"),
}
BESIDE = {"Flux1Kontext": {"kontext_image_ids"}, "QwenImageEdit": {"cond_image_grid"}}
# Their ControlNet, or what they look at, needs more of a transformer than its prediction; Ideogram 4 has two.
NEEDS_MORE = {"Flux1Controlnet", "Flux1Concept", "FIBO", "Krea2", "Krea2Controlnet", "Ideogram4"}


@EVERY_TINY
def test_what_stands_in_the_place_of_a_transformer_is_called_as_in_0_24(tiny):
    model = tiny.pipeline()
    plain = tiny.picture(model)
    proxy = Counting(model.transformer)
    model.transformer = proxy
    if type(model).__name__ in NEEDS_MORE:
        with pytest.raises(UsageError, match="place of"):
            tiny.picture(model)
        return
    assert np.array_equal(tiny.picture(model), plain)
    expected = CALLED_WITH[family_of(model)] | BESIDE.get(type(model).__name__, set())
    assert len(proxy.calls) >= 2
    assert {(args, frozenset(kwargs)) for args, kwargs in proxy.calls} == {((), expected)}
    if "t" in expected:
        assert sorted({kwargs["t"] for _, kwargs in proxy.calls}) == [0, 1]
    # It is used, and not only called.
    model.transformer = lambda **kwargs: 0.5 * proxy.inner(**kwargs)
    assert not np.array_equal(tiny.picture(model), plain)
    model.transformer = proxy.inner
    assert np.array_equal(tiny.picture(model), plain)


@EVERY_TINY
def test_what_reads_0_24_s_layers_is_told(tiny):
    model = tiny.pipeline()
    if type(model).__name__ in NEEDS_MORE:
        pytest.skip("refused before")
    inner = model.transformer
    model.transformer = lambda **_: getattr(inner, "compute_text\nembeddings")
    with pytest.raises(ReplacedError, match="place of the transformer fails .AttributeError.*docs/programs.md") as told:
        tiny.generate(model)
    assert isinstance(told.value.__cause__, AttributeError) and "\n" not in str(told.value)


WITH_STEPS = {"Flux2Klein", "Flux2KleinEdit", "ZImage"}


@EVERY_TINY
@pytest.mark.parametrize("where", ["object", "class"])
def test_a_step_of_a_program_s_own_is_used(tiny, monkeypatch, where):
    model = tiny.pipeline()
    if type(model).__name__ not in WITH_STEPS:
        pytest.skip("mflux 0.24 has none there")
    plain = tiny.picture(model)
    original, calls = model._predict, []

    def replaced(transformer):
        predict = original(transformer)

        def step(**kwargs):
            calls.append(frozenset(kwargs))
            return predict(**kwargs)

        return step

    if where == "object":
        model._predict = replaced
    else:
        monkeypatch.setattr(type(model), "_predict", staticmethod(replaced))
    assert np.array_equal(tiny.picture(model), plain)
    assert len(calls) == 2 and len(set(calls)) == 1
    assert {"latents", "timestep", "guidance"} < calls[0]
    if where == "object":
        model._predict = lambda transformer: lambda **kwargs: 0.5 * original(transformer)(**kwargs)
        assert not np.array_equal(tiny.picture(model), plain)
        model._predict = lambda transformer: lambda **kwargs: transformer.patch_size_of_another_time
        with pytest.raises(ReplacedError, match="place of _predict fails"):
            tiny.generate(model)
        del model._predict
        assert np.array_equal(tiny.picture(model), plain)


# ---- objects that a program puts together

HANDED_OVER = (
    "tokenizers", "model_config", "bits", "callbacks", "tiling_config", "prompt_cache", "lora_paths", "lora_scales",
)  # fmt: skip


@EVERY_TINY
@pytest.mark.parametrize("cache", ["the other's", "empty", "none"])
def test_an_object_put_together_of_another_s_parts(tiny, cache):
    """A server's way to an edit object without loading a second time."""
    whole = tiny.pipeline()
    if type(whole).__name__ in ELSEWHERE:
        pytest.skip("it looks for more than its parts in its folder")
    plain = tiny.picture(whole)
    made = type(whole).__new__(type(whole))
    nn.Module.__init__(made)
    parts = [part.name for part in whole.components]
    for name in (*parts, *HANDED_OVER):
        setattr(made, name, getattr(whole, name))
    if cache == "empty":
        made.prompt_cache = {}
    elif cache == "none":
        del made.prompt_cache
    for _ in range(2):
        assert np.array_equal(tiny.picture(made), plain)
    # What it was handed over it keeps: it could not load it again.
    assert set(made.loaded()) == set(parts)
    made.transformer = None
    with pytest.raises(MfluxError, match="put together without a transformer"):
        tiny.generate(made)


# Redux' image encoder has a processor in its folder; a ControlNet's kind is told by where it comes from.
ELSEWHERE = {"Flux1Redux", "Flux1Controlnet"}


# ---- plugins: a command of their own, made of the steps of one of ours


def words_of(tiny) -> list[str]:
    case = tiny.case
    model = ("--model", tiny.folder(), "--base-model", case.base_model)
    return [str(word) for word in (*model, *case.words, "--prompt", case.prompt, "--steps", 2, *SIZE)]


@EVERY_TINY
def test_a_plugin_s_command(tiny, monkeypatch, capsys, caplog):
    """As mflux-teacache does it: 0.24's parser with a group of its own, its steps, its callbacks, its saving."""
    module = importlib.import_module(COMMANDS[tiny.case.command].module)
    steps = [name for name in STEPS if hasattr(module, name)]
    if family_of(tiny.case.pipeline_class()) not in ("z_image", "qwen"):
        assert not steps
        pytest.skip("mflux 0.24 had these steps for Z-Image and Qwen-Image")
    (name,) = steps
    command = getattr(module, name)
    assert getattr(module, name) is command and command.__name__ == name
    assert module.COMMAND.default_model == module.DEFAULT_MODEL
    assert {module.DEFAULT_MODEL, *module.FAMILY_MODELS} == set(module.COMMAND.models)
    assert not hasattr(module, "SomeOtherCommand") and not hasattr(module, "OPTIONS")

    parser = module.build_parser()
    assert isinstance(parser, CommandLineParser)
    parser.add_argument_group("TeaCache").add_argument("--threshold", type=float, default=None)
    words = [*words_of(tiny), "--threshold", "0.5", "--seed", "1", "2", "--stepwise-image-output-dir", "steps"]
    monkeypatch.setattr(sys, "argv", ["mflux-generate-teacache", *words])
    args = parser.parse_args()
    assert (args.threshold, args.seed, args.steps) == (0.5, [1, 2], 2)
    assert args.model_path == args.model == str(tiny.folder())
    assert CommandLineParser._option_was_provided("--threshold") and not CommandLineParser._option_was_provided("-q")
    with pytest.warns(UserWarning, match="--threshold is ignored: why"):
        CommandLineParser.warn_ignored_options({"--threshold": "why", "--quantize": "not said"})

    if "negative_prompt" in module.COMMAND.ignored:
        monkeypatch.setattr(sys, "argv", [*sys.argv, "--negative-prompt", "blue"])
        caplog.clear()
        args = parser.parse_args()
        assert caplog.text.count("--negative-prompt is ignored") == 1
        caplog.clear()
    config = command.validate(args)
    assert type(config).__name__ == "ModelConfig"
    model = command.load(args)
    assert type(model) is tiny.case.pipeline_class() and command.latent_creator is model.latent_creator
    memory = CallbackManager.register_callbacks(args=args, model=model, latent_creator=command.latent_creator)
    assert memory is None
    # What has no effect is told once, when the options are parsed.
    assert "is ignored" not in caplog.text
    for seed in args.seed:
        image = command.generate(model, args, seed, PromptUtil.read_prompt(args))
        image.save(path=args.output.format(seed=seed), export_json_metadata=args.metadata)
    assert sorted(path.name for path in Path("steps").iterdir())
    assert np.array_equal(pixels(Path("image_seed_1.png")), pixels(tiny.draw("--seed", 1, "--output", "own.png")))
    assert not np.array_equal(pixels(Path("image_seed_2.png")), pixels(Path("own.png")))

    # By hand, as a program without a command line makes them: what it leaves out has its default.
    bare = argparse.Namespace(**{name: getattr(args, name) for name in OTHER if hasattr(args, name)})
    for made in (bare, argparse.Namespace(**vars(bare), scheduler=parser.get_default("scheduler"))):
        again = command.generate(command.load(made), made, 1, tiny.case.prompt)
        assert np.array_equal(np.asarray(again.image), pixels(Path("own.png")))

    # What is wrong ends its process as argparse does, and no traceback is seen.
    capsys.readouterr()
    for wrong in (["--steps", "0"], ["--bogus"], ["--model", "flux2-klein-4b"], ["--auto-seeds", "1"]):
        monkeypatch.setattr(sys, "argv", ["x", *words, *wrong])
        with pytest.raises(SystemExit) as ended:
            parser.parse_args()
        assert ended.value.code == 2
        assert capsys.readouterr().err.count("error: ") == 1
    with pytest.raises(SystemExit) as ended:
        parser.error("--threshold must be at most 1")
    assert ended.value.code == 2 and "error: --threshold must be at most 1" in capsys.readouterr().err


STEPS = ("QwenImageCommand", "QwenImageEditCommand", "ZImageCommand", "ZImageTurboCommand")
OTHER = ("model", "base_model", "prompt", "steps", "image_paths", "width", "height", "guidance", "negative_prompt")
