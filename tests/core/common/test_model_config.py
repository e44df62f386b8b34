"""Names of models: all that mflux 0.24 knows, with its settings, and how others are told by their names."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from mflux import hub
from mflux.cli.commands import COMMANDS
from mflux.errors import InvalidBaseModel, MfluxError, ModelConfigError, OtherModelError, UsageError
from mflux.models.common.config import ModelConfig
from mflux.models.common.config.model_config import AVAILABLE_MODELS, DEFAULT_STEPS, built_key, key_of
from mflux.models.common.family import built, families
from mflux.models.common.registry import MODELS

FACTS = json.loads((Path(__file__).parents[2] / "data" / "surface" / "models.json").read_text())
CONSTRUCTORS = {
    "dev": "dev",
    "dev-controlnet-canny": "dev_controlnet_canny",
    "krea-dev": "krea_dev",
    "krea-2": "krea2",
    "flux2-klein-4b": "flux2_klein_4b",
    "qwen-image-edit-2511": "qwen_image_edit_2511",
    "qwen-image-2.1": "qwen_image_21",
    "z-image-turbo": "z_image_turbo",
    "ideogram-4-fp8": "ideogram4_fp8",
}

NAMES = """
anima_aesthetic anima_base anima_turbo boogu_image_turbo dev dev_controlnet_canny dev_controlnet_upscaler dev_depth
dev_fill dev_fill_catvton dev_kontext dev_redux ernie_image ernie_image_turbo fibo fibo2 fibo2_edit_turbo fibo_edit
fibo_edit_rmbg fibo_lite flux2_klein_4b flux2_klein_9b flux2_klein_9b_kv flux2_klein_base_4b flux2_klein_base_9b
flux3_image_klein flux3_image_klein_base ideogram4_fp8 iris_3b iris_3b_base krea2 krea2_controlnet_depth krea2_raw
krea_dev lens_turbo ming_image_design moss_image_base moss_image_sft qwen_image qwen_image_21
qwen_image_21_controlnet_union qwen_image_21_turbo qwen_image_21_turbo_controlnet_union qwen_image_edit
qwen_image_edit_2511 schnell schnell_controlnet_canny seedvr2_3b seedvr2_7b z_image z_image_turbo
z_image_turbo_controlnet_union_2_1
"""


def test_all_models_are_known():
    assert MODELS.keys() == FACTS.keys() | {"demo"}
    # Where a name could mean two, the earlier one is meant.
    assert [key for key in MODELS if key != "demo"] == list(FACTS)


@pytest.mark.parametrize("key", list(FACTS))
def test_a_model_is_as_in_mflux(key):
    config = AVAILABLE_MODELS[key]
    for name, value in FACTS[key].items():
        assert getattr(config, name) == value, name
    unsaid = {
        "controlnet_model", "custom_transformer_model", "max_sequence_length", "num_train_steps",
        "requires_sigma_shift", "sigma_shift_terminal", "supports_guidance",
    } - FACTS[key].keys()  # fmt: skip
    assert {name: getattr(config, name) for name in unsaid} == dict.fromkeys(unsaid)
    assert config.base_model is None


@pytest.mark.parametrize("key", list(MODELS))
def test_every_name_leads_to_it(key):
    for alias in MODELS[key]["aliases"]:
        assert ModelConfig.from_name(alias) == AVAILABLE_MODELS[key]
        assert ModelConfig.from_name(None, base_model=alias) == AVAILABLE_MODELS[key]


@pytest.mark.parametrize(
    ("repository", "key"),
    [
        ("black-forest-labs/FLUX.1-dev", "dev"),
        ("black-forest-labs/FLUX.1-schnell", "schnell"),
        ("black-forest-labs/FLUX.1-Fill-dev", "dev-fill"),
        ("Tongyi-MAI/Z-Image-Turbo", "z-image-turbo"),  # not its ControlNet, which stands before it
        ("Qwen/Qwen-Image-2.1", "qwen-image-2.1"),
    ],
)
def test_a_repository_is_the_model_itself(repository, key):
    assert ModelConfig.from_name(repository) == AVAILABLE_MODELS[key]


@pytest.mark.parametrize(("key", "name"), list(CONSTRUCTORS.items()))
def test_a_constructor_for_each_model(key, name):
    assert getattr(ModelConfig, name)() == AVAILABLE_MODELS[key]


def test_the_constructors_are_mflux_s():
    ours = {name for name, value in vars(ModelConfig).items() if isinstance(value, staticmethod)} - {"from_name"}
    assert ours == {"demo", *NAMES.split()}
    made = [getattr(ModelConfig, name)() for name in sorted(ours)]
    assert len(made) == len(AVAILABLE_MODELS)
    assert all(config in made for config in AVAILABLE_MODELS.values())


def test_what_a_caller_changes_is_its_own():
    ModelConfig.schnell().aliases.append("mine")
    ModelConfig.from_name("schnell").requires_sigma_shift = True
    assert "mine" not in ModelConfig.from_name("schnell").aliases
    assert ModelConfig.schnell().requires_sigma_shift is False


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("someone/FLUX.1-schnell-4bit", "schnell"),
        ("someone/flux-dev-to-schnell", "schnell"),  # the longer alias
        ("./models/my-krea-dev/", "krea-dev"),  # not dev
        ("someone/flux2-klein-base-9b-mlx", "flux2-klein-base-9b"),
        ("C:\\models\\flux-dev", "dev"),
        ("/home/schnell/models/flux-dev", "dev"),  # only the last part tells
        ("someone/Dev-Mix", "dev"),
        ("someone/devilish-schnell", "schnell"),
        ("someone/my-dev-4-bit", "dev"),
        ("someone/flux-dev-anime-v2", "dev"),
        ("someone/FLUX.1-Fill-dev-mflux-q8-lora01", "dev-fill"),  # all its words, in any order
        ("someone/FLUX.1-Kontext-dev-8bit", "dev-kontext"),
        ("someone/FLUX.2-klein-4B-8bit", "flux2-klein-4b"),
        ("someone/FLUX.2-klein-base-9b-fp8", "flux2-klein-base-9b"),
        ("Qwen/Qwen-Image", "qwen-image"),
        ("Qwen/Qwen-Image-Edit", "qwen-image-edit"),
        ("someone/Qwen-Image-2512-8bit", "qwen-image"),
        ("someone/qwen-8bit", "qwen-image"),
        ("someone/Z-Image-Base-bf16", "z-image"),
        ("someone/FIBO-mflux-8bit", "fibo"),
        ("someone/fibo_lite_q8", "fibo-lite"),
        ("/cache/hub/models--black-forest-labs--FLUX.1-schnell/snapshots/0123abc", "schnell"),
    ],
)
def test_a_name_may_tell(name, key):
    config = ModelConfig.from_name(name)
    assert config.model_name == name
    assert config.base_model == AVAILABLE_MODELS[key].model_name
    assert config.max_sequence_length == AVAILABLE_MODELS[key].max_sequence_length
    assert key_of(name) == key


@pytest.mark.parametrize("name", ["nonsense", "someone/model", "/home/dev/models/mine", "", "demolition"])
def test_a_name_that_tells_nothing(name):
    with pytest.raises(ModelConfigError, match="is not known: use --model with demo"):
        ModelConfig.from_name(name)


@pytest.mark.parametrize(
    ("name", "word", "recalled"),
    [
        ("black-forest-labs/FLUX.2-dev", "flux2", "dev"),
        ("black-forest-labs/FLUX.2-pro", "flux2", None),
        ("someone/flux2-dev-8bit", "flux2", "dev"),
        ("HiDream-ai/HiDream-I1-Dev", "hidream", "dev"),
        ("Lightricks/LTX-Video-0.9.7-dev", "ltx", "dev"),
        ("black-forest-labs/FLUX.1-Canny-dev", "canny", "dev"),
        ("someone/FLUX.1-dev-ControlNet-Union-Pro", "controlnet", "dev"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "qwen2.5", None),
        ("Qwen/Qwen3-4B", "qwen3", None),
        ("Qwen/Qwen-VL", "vl", "qwen-image"),
        ("Qwen/Qwen-7B", "7b", "qwen-image"),
        ("Qwen/Qwen-Image-Layered", "layered", "qwen-image"),
        ("someone/Qwen-Image-2.0", "2.0", "qwen-image"),
        ("someone/Z-Image-Edit", "edit", "z-image"),
        ("someone/Z-Image-Omni-Base", "omni", "z-image"),
        ("someone/Z-Image-2", "2", "z-image"),
        ("briaai/FIBO-vlm", "vlm", "fibo"),
        ("someone/FLUX.2-klein-32B", "32b", "flux2-klein-4b"),
        ("someone/devilish-dev", "devilish", "dev"),
        ("someone/contact-lens", "contact", "lens-turbo"),
        ("stabilityai/stable-diffusion-3.5-large", "stable", None),
        ("/cache/models--black-forest-labs--FLUX.2-dev/snapshots/0123abc", "flux2", "dev"),
    ],
)  # fmt: skip
def test_a_name_that_is_another_model_s(name, word, recalled):
    """It is refused by its name, lest something be fetched, and no command sends to another that sends back."""
    with pytest.raises(OtherModelError) as caught:
        key_of(name)
    also = f", though it recalls {recalled};" if recalled else ";"
    assert f"is not known: {word!r} in its name says that it is another{also}" in str(caught.value)
    # Whoever knows better says so.
    assert key_of(name, "dev") == "dev"


GENERATING = [command.name for family in families().values() for command in family.commands if command.pipeline]
OTHERS = ("black-forest-labs/FLUX.2-dev", "Qwen/Qwen-Image-Layered", "someone/devilish-dev")


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("command", GENERATING + ["save"])
def test_no_command_takes_another_model_for_its_own(command, name, cli, in_folder, monkeypatch):
    monkeypatch.setattr(hub.resolve, "_fetch", lambda repository: pytest.fail(f"{repository} would be fetched"))
    Image.new("RGB", (16, 16)).save("a.png")
    parser = importlib.import_module(COMMANDS[command].module).build_parser()
    needed = []
    for action in parser._actions:
        if action.required and action.dest != "model":
            needed += [action.option_strings[0], "canny:a.png" if action.dest == "control" else "a.png"]
    result = cli(command, "--model", name, *needed)
    assert result.status == 2 and len(result.errors) == 1
    assert "in its name says that it is another" in result.errors[0]


@pytest.mark.parametrize(
    ("model", "base_model", "key"),
    [("demo", "z-image", None), ("demo", "schnell", None), ("schnell", "z-image", None), ("z-image", "dev", None),
     ("schnell", "dev", "schnell"), ("demo", "demo", "demo"), ("black-forest-labs/FLUX.1-dev", "dev-fill", "dev"),
     ("Tongyi-MAI/Z-Image", "qwen-image", None)],
)  # fmt: skip
def test_a_base_model_of_a_model_of_its_own(model, base_model, key):
    """It says nothing there; what contradicts it is not ignored."""
    if key is not None:
        assert key_of(model, base_model) == key
        return
    with pytest.raises(
        ModelConfigError, match=f"{model} is a model of its own, which does not derive from {base_model}"
    ):
        key_of(model, base_model)


def test_no_name():
    with pytest.raises(ModelConfigError, match="no model was named"):
        ModelConfig.from_name(None)


def test_a_base_model_says_what_the_name_does_not():
    config = ModelConfig.from_name("someone/mine", base_model="krea-dev")
    assert (config.model_name, config.base_model) == ("someone/mine", "black-forest-labs/FLUX.1-Krea-dev")
    # It comes before what the name seems to tell, and after a built-in name.
    assert key_of("someone/schnell-like", "dev") == "dev"
    assert key_of("schnell", "dev") == "schnell"
    assert key_of("someone/mine", "black-forest-labs/FLUX.1-dev") == "dev"
    with pytest.raises(InvalidBaseModel, match="the base model 'nonsense' is not known: choose one of demo, krea-2"):
        ModelConfig.from_name("dev", base_model="nonsense")


def test_errors_keep_their_families():
    """Programs built on mflux catch these names; a command shows the message and ends with 2."""
    from mflux.utils import exceptions

    assert exceptions.InvalidBaseModel is InvalidBaseModel
    assert exceptions.ModelConfigError is ModelConfigError
    assert issubclass(InvalidBaseModel, ModelConfigError)
    assert issubclass(ModelConfigError, MfluxError)
    assert issubclass(ModelConfigError, ValueError)
    assert InvalidBaseModel("x").exit_code == 2


def test_a_derived_model_does_not_touch_its_base():
    derived = ModelConfig.from_name("someone/ernie-image-mine")
    derived.transformer_overrides["rope_axes_dim"].append(1)
    derived.sigma_max_shift = 9
    assert AVAILABLE_MODELS["ernie-image"].transformer_overrides == {"rope_axes_dim": [32, 48, 48]}
    assert AVAILABLE_MODELS["ernie-image"].sigma_max_shift == 1.3863


def test_the_checkpoint_s_schedule_comes_first():
    """As published with FLUX.1-schnell and with FLUX.1-dev."""
    schnell = {"base_shift": 0.5, "max_shift": 1.15, "shift": 1.0, "use_dynamic_shifting": False}
    config = ModelConfig.dev().with_scheduler(schnell | {"base_image_seq_len": 128, "max_image_seq_len": 2048})
    assert (config.requires_sigma_shift, config.sigma_shift) == (False, 1.0)
    assert (config.sigma_base_seq_len, config.sigma_max_seq_len) == (128, 2048)
    config = ModelConfig.schnell().with_scheduler({"shift": 3.0, "use_dynamic_shifting": True, "max_shift": 0.9})
    assert (config.requires_sigma_shift, config.sigma_shift, config.sigma_max_shift) == (True, 3.0, 0.9)
    values = {"base_shift": 0.3, "max_shift": 0.8, "base_image_seq_len": 10, "max_image_seq_len": 20}
    config = ModelConfig.dev().with_scheduler(values | {"shift": 2.0, "shift_terminal": 0.1})
    assert (config.sigma_base_shift, config.sigma_max_shift) == (0.3, 0.8)
    assert (config.sigma_base_seq_len, config.sigma_max_seq_len) == (10, 20)
    assert (config.sigma_shift, config.sigma_shift_terminal) == (2.0, 0.1)
    # Neither does it touch the built-in one, nor does what is unsaid change anything.
    assert ModelConfig.schnell().requires_sigma_shift is False
    assert vars(ModelConfig.dev().with_scheduler({"shift_terminal": None})) == vars(ModelConfig.dev())


def test_what_a_variant_s_tokens_hold():
    assert ModelConfig.dev().x_embedder_input_dim() == 64
    assert ModelConfig.dev_fill().x_embedder_input_dim() == 384
    assert ModelConfig.dev_depth().x_embedder_input_dim() == 128
    assert ModelConfig.dev_controlnet_canny().is_canny()
    assert not ModelConfig.dev_controlnet_upscaler().is_canny()
    assert not ModelConfig.dev().is_canny()


def test_steps():
    assert ModelConfig.schnell().default_steps == 4
    assert ModelConfig.dev().default_steps == ModelConfig.krea_dev().default_steps == 25
    assert ModelConfig.from_name("someone/schnell-mine").default_steps == 4
    assert ModelConfig.seedvr2_3b().default_steps == DEFAULT_STEPS


def test_only_some_models_are_built():
    assert {key: built_key(key) for key in built()} == {key: key for key in built()}
    for key in MODELS.keys() - built().keys():
        with pytest.raises(UsageError, match=f"{key} is not built yet in this version"):
            built_key(key)


def test_precision_belongs_to_class_and_instance():
    from mflux.backend import compute_dtype, mx

    assert ModelConfig.precision == ModelConfig.dev().precision == compute_dtype(mx.bfloat16)


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("black-forest-labs/FLUX.1-Depth-dev-lora", True), ("someone/FLUX.1-dev-LoRA-AntiBlur", True),
        ("someone/qwen-image-loras@main", True), ("someone/flux-dev-lora-merged", False),
        ("someone/FLUX.1-Fill-dev-mflux-q8-lora01", False), ("./models/flux-dev-lora", False),
    ],
)  # fmt: skip
def test_a_repository_that_calls_itself_a_lora(name, is_one):
    if not is_one:
        assert key_of(name)
        return
    with pytest.raises(ModelConfigError, match=re.escape(f"is a LoRA by its name, no model: use --lora {name}")):
        key_of(name)
    assert key_of(name, "dev") == "dev"


@pytest.mark.parametrize("rest", ["", "/", "/tree/main", "/tree/main/transformer", "/blob/main/README.md"])
def test_an_address_tells_as_its_repository(rest):
    assert key_of(f"https://huggingface.co/black-forest-labs/FLUX.1-dev{rest}") == "dev"


@pytest.mark.parametrize(
    ("name", "near"), [("flux-dev", "dev"), ("flux-schnell", "schnell"), ("flux1-fill-dev", "dev-fill")]
)
def test_a_name_with_more_words_than_an_alias(name, near):
    from mflux.models.common.config.model_config import check_is_somewhere

    with pytest.raises(ModelConfigError, match=re.escape(f"(did you mean {near}?)")):
        check_is_somewhere(name)
