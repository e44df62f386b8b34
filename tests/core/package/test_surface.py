"""The outside of mflux 0.24: what programs import and what people type is still there, with the same meaning.

tests/data/surface holds facts read off mflux 0.24.0: its commands' options, its classes' signatures, its models. Each
test goes over whatever of that exists here, so that what is built later is held to it without being named.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import inspect
import json
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mflux import import_paths
from mflux.cli.commands import COMMANDS, NOT_BUILT
from mflux.errors import NotBuiltError
from mflux.models.common.family import families

ROOT = Path(__file__).parents[3]
SURFACE = ROOT / "tests" / "data" / "surface"
CLASSES = json.loads((SURFACE / "python.json").read_text())
OPTIONS = json.loads((SURFACE / "cli.json").read_text())
MODULES = json.loads((SURFACE / "modules.json").read_text())
# Where 0.24 had classes, and what each draws with.
TITLES = json.loads((SURFACE / "paths.json").read_text())
PATHS = sorted(CLASSES.keys() | TITLES.keys())

# Pipelines are no MLX modules here, so they do not have a module's own methods.
OF_A_MODULE = {"freeze", "state", "training"}


def found(path: str) -> object | None:
    """The object at a dotted path, None if its module does not exist."""
    module, _, name = path.rpartition(".")
    try:
        if importlib.util.find_spec(module) is None:
            return None
    except ModuleNotFoundError:
        return None
    thing = getattr(importlib.import_module(module), name, None)
    return None if import_paths.is_missing(thing) else thing


BUILT_CLASSES = sorted(path for path in CLASSES if found(path) is not None)


# ---- classes


def test_the_classes_of_the_first_version_are_there():
    first = {
        "mflux.callbacks.instances.battery_saver.BatterySaver",
        "mflux.callbacks.instances.memory_saver.MemorySaver",
        "mflux.callbacks.instances.stepwise_handler.StepwiseHandler",
        "mflux.models.common.config.ModelConfig",
        "mflux.models.common.config.config.Config",
        "mflux.models.common.config.model_config.ModelConfig",
        "mflux.models.depth_pro.model.depth_pro.DepthPro",
        "mflux.models.flux.variants.txt2img.flux.Flux1",
        "mflux.utils.exceptions.StopImageGenerationException",
        "mflux.utils.generated_image.GeneratedImage",
        "mflux.utils.image_util.ImageUtil",
        "mflux.utils.metadata_reader.MetadataReader",
    }
    assert first <= set(BUILT_CLASSES)


@pytest.mark.parametrize("path", BUILT_CLASSES)
def test_a_class_takes_what_it_took(path):
    checked = 0
    for name, signature in CLASSES[path].items():
        if name in OF_A_MODULE or signature == "property":
            continue
        theirs = parameters_of(signature)
        ours = inspect.signature(getattr(found(path), name)).parameters
        assert list(ours)[: len(theirs)] == list(theirs), f"{path}.{name}"
        for parameter, default in theirs.items():
            if parameter in ("height", "width") and default == 1024 and ours[parameter].default is None:
                # The model's own size: 1024 for every model that 0.24 has, 128 for the embedded one.
                continue
            if name == "generate_image" and parameter == "scheduler" and ours[parameter].default is None:
                # The checkpoint's schedule, which 0.24's default stood for.
                continue
            assert_same_default(f"{path}.{name}({parameter})", ours[parameter].default, default)
        more = list(ours.values())[len(theirs) :]
        assert all(p.default is not p.empty or p.kind in (p.VAR_KEYWORD, p.KEYWORD_ONLY) for p in more), path
        checked += 1
    assert checked or not CLASSES[path]


def imported(path: str) -> object:
    """As a program writes it."""
    module, _, name = path.rpartition(".")
    namespace = {}
    exec(f"from {module} import {name}", namespace)
    return namespace[name]


@pytest.mark.parametrize("path", PATHS)
def test_every_path_can_be_imported(path):
    """One that is missing must not cost a program the others; it says so when it is used."""
    thing, name = imported(path), path.rpartition(".")[2]
    assert isinstance(thing, type)
    if not import_paths.is_missing(thing):
        return
    title = TITLES[path]

    class Derived(thing):
        def __init__(self, *args):
            pass

    uses = [thing, Derived, lambda: thing(quantize=4), lambda: thing.from_name("schnell"), lambda: thing.create_noise()]
    for use in uses:
        with pytest.raises(NotBuiltError, match=f"^{name}: {title} is not built yet"):
            use()
    assert not hasattr(thing, "create_noise")


def test_every_path_can_be_asked_for():
    """`hasattr` says yes before anything was imported from there, and `getattr` gives what `import` does."""
    code = """
import importlib, sys

for path in sys.argv[1:]:
    owner, _, name = path.rpartition(".")
    module = importlib.import_module(owner)
    assert name in dir(module), path
    assert hasattr(module, name) and not hasattr(module, name + "X"), path
    there = getattr(module, name)
    namespace = {}
    exec(f"from {owner} import {name}", namespace)
    assert namespace[name] is there, path
"""
    subprocess.run([sys.executable, "-c", code, *reversed(PATHS)], check=True)


def test_type_checkers_are_told_the_same():
    """`python tools/stubs.py` writes them."""
    source = Path(import_paths.__file__).parents[1]
    there = {str(path.relative_to(source)): path.read_text() for path in (source / "mflux").rglob("*.pyi")}
    assert there == runpy.run_path(str(ROOT / "tools" / "stubs.py"))["stubs"]()
    for path in there:
        # What a stub stands for says nothing of its own.
        module = source / path.removesuffix("i")
        assert path == "mflux/__init__.pyi" or not module.is_file() or module.read_text() == ""


def test_a_class_is_one_thing_at_all_its_paths():
    """A variant that is built is built at each path that 0.24 had it at."""
    found = {}
    for path in PATHS:
        found.setdefault((path.split(".")[2], path.rpartition(".")[2]), set()).add(imported(path))
    assert {name: things for name, things in found.items() if len(things) > 1} == {}


TOLD = (
    r": [\w .-]+ is not built yet in this version",
    r" is a part of mflux 0\.24 that this version is made without \(docs/programs\.md says what there is\)",
)


def test_every_module_of_0_24_is_there_or_says_why_not():
    """Programs import many in one go, some of them inside `try`: each that is not here is an ImportError with one line
    that says so, however the program gets at it."""
    there = set()
    for name in MODULES:
        try:
            assert importlib.import_module(name).__name__ == name
            there.add(name)
        except import_paths.NotHereError as error:
            assert isinstance(error, ModuleNotFoundError) and error.name is not None
            told = str(error)
            # Of what lies below a package that is not here, Python asks for that first.
            assert name == error.name or name.startswith(f"{error.name}."), name
            assert re.fullmatch(rf"mflux\.[\w.]+({'|'.join(TOLD)})", told), told
            with pytest.raises(ModuleNotFoundError, match=re.escape(told)):
                importlib.util.find_spec(name)
    assert len(MODULES) == 1030 and 250 < len(there) < 400
    # A family that is built is one that is there: what it lacks is made otherwise, and never "not built yet".
    for name in {*MODULES} - there:
        parts = name.split(".")
        if parts[1] == "models" and parts[2] in families() and "training" not in name:
            with pytest.raises(ImportError, match="made without"):
                importlib.import_module(name)


# What public programs were seen to import, beside classes that generate.
IMPORTED = """
mflux.callbacks.callback_manager CallbackManager
mflux.callbacks.generation_context GenerationContext
mflux.callbacks.instances.canny_saver CannyImageSaver
mflux.callbacks.instances.depth_saver DepthImageSaver
mflux.cli.capabilities SCHEMA_VERSION build_capabilities describe_command discover_commands
mflux.cli.check_model build_parser main
mflux.cli.completions.install main
mflux.cli.defaults.defaults IMAGE_STRENGTH MODEL_INFERENCE_STEPS QUANTIZE_CHOICES model_choices
mflux.cli.parser.parsers CommandLineParser
mflux.models.common.cli.info main
mflux.models.common.cli.save main
mflux.models.common.config Config ModelConfig
mflux.models.common.schedulers InvalidSchedulerType SchedulerClassNotFound SchedulerModuleNotFound
mflux.models.common.schedulers SeedVR2EulerScheduler try_import_external_scheduler
mflux.models.common.vae TilingConfig VAETiler
mflux.models.common.weights.loading.weight_definition ComponentDefinition
mflux.models.common.weights.loading.weight_loader WeightLoader
mflux.models.flux.variants.controlnet.controlnet_util ControlnetUtil
mflux.models.flux.variants.in_context.utils.in_context_loras LORA_NAME_MAP LORA_REPO_ID get_lora_path
mflux.models.flux.weights.flux_weight_definition FluxWeightDefinition
mflux.models.flux2.weights.flux2_weight_definition Flux2KleinWeightDefinition
mflux.models.qwen.weights.qwen_weight_definition QwenWeightDefinition
mflux.models.z_image.weights.z_image_weight_definition ZImageWeightDefinition
mflux.utils.apple_silicon AppleSiliconUtil
mflux.utils.box_values BoxValueError
mflux.utils.exceptions CommandExecutionError ReferenceVsOutputImageError
mflux.utils.exif_orientation open_oriented oriented_size
mflux.utils.prompt_util PromptUtil
"""


@pytest.mark.parametrize("line", IMPORTED.split("\n")[1:-1])
def test_what_programs_import_is_there(line):
    """First thing in a process, and by `getattr` as by `import`."""
    module, *names = line.split()
    code = f"""
import importlib
module = importlib.import_module({module!r})
for name in {names!r}:
    there = getattr(module, name)
    exec(f"from {module} import {{name}} as again")
    assert again is there and name in dir(module), name
assert not hasattr(module, "something_else")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# What mflux 0.24's modules of commands said of their options, as far as it is so here.
TOLD_OF_OPTIONS = [
    *(
        (f"flux.cli.flux_generate{name}", "IGNORED_OPTIONS", {"--negative-prompt"})
        for name in (
            "", "_controlnet", "_depth", "_fill", "_in_context_catvton", "_in_context_dev", "_in_context_edit",
            "_kontext", "_redux",
        )
    ),
    ("flux.cli.flux_upscale", "IGNORED_OPTIONS", {"--negative-prompt"}),
    ("flux.cli.flux_generate", "CONDITIONAL_OPTIONS", {"--guidance"}),
    ("flux.cli.flux_generate_controlnet", "CONDITIONAL_OPTIONS", {"--guidance"}),
    ("flux2.cli.flux2_generate", "REJECTED_OPTIONS", {"--negative-prompt", "--pid-decode"}),
    ("flux2.cli.flux2_edit_generate", "REJECTED_OPTIONS", {"--negative-prompt"}),
    ("flux2.cli.flux2_generate", "CONDITIONAL_OPTIONS", {"--guidance", "--small-text-encoder"}),
    ("flux2.cli.flux2_edit_generate", "CONDITIONAL_OPTIONS", {"--guidance", "--small-text-encoder"}),
    ("seedvr2.cli.seedvr2_upscale", "IGNORED_OPTIONS", set()),
    ("z_image.cli.z_image_generate", "CONDITIONAL_OPTIONS", {"--guidance", "--negative-prompt"}),
    ("z_image.cli.z_image_turbo_generate", "IGNORED_OPTIONS", {"--guidance", "--negative-prompt"}),
    ("z_image.cli.z_image_turbo_generate_controlnet", "IGNORED_OPTIONS", {"--guidance", "--negative-prompt"}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "name", "options"), TOLD_OF_OPTIONS)
def test_what_a_command_says_of_its_options(path, name, options):
    table = getattr(importlib.import_module(f"mflux.models.{path}"), name)
    assert options <= table.keys()
    reasons = [entry["reason"] if isinstance(entry, dict) else entry for entry in table.values()]
    assert all(isinstance(reason, str) and reason for reason in reasons)
    if name == "CONDITIONAL_OPTIONS":
        assert all(entry["condition"] for entry in table.values())


@pytest.mark.parametrize(
    ("path", "name", "model"),
    [
        ("qwen.cli.qwen_image_generate", "QwenImageCommand", "qwen-image"),
        ("qwen.cli.qwen_image_edit_generate", "QwenImageEditCommand", "qwen-image-edit"),
        ("z_image.cli.z_image_generate", "ZImageCommand", "z-image"),
        ("z_image.cli.z_image_turbo_generate", "ZImageTurboCommand", "z-image-turbo"),
        (
            "z_image.cli.z_image_turbo_generate_controlnet",
            "ZImageTurboControlnetCommand",
            "z-image-turbo-controlnet-union-2.1",
        ),
    ],
)
def test_the_steps_of_a_command(path, name, model):
    module = importlib.import_module(f"mflux.models.{path}")
    steps = getattr(module, name)
    assert model == module.DEFAULT_MODEL and isinstance(module.FAMILY_MODELS, tuple)
    assert all(callable(getattr(steps, step)) for step in ("validate", "load", "generate"))
    assert hasattr(steps.latent_creator, "unpack_latents")


@pytest.mark.parametrize("owner", sorted(import_paths.MOVED))
def test_what_moved_stands_where_the_table_says(owner):
    for module, names in import_paths.MOVED[owner].items():
        for name in names:
            assert getattr(importlib.import_module(owner), name) is getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(
    ("module", "told"),
    [
        ("mflux.cli.check_model", "usage: mflux-check "),
        ("mflux.cli.completions", "usage: mflux-completions "),
        ("mflux.cli.completions.install", "usage: mflux-completions "),
        ("mflux.models.common.cli.info", "usage: mflux-info "),
        ("mflux.models.common.cli.save", "usage: mflux-save "),
        ("mflux.models.fibo_vlm.cli.fibo_inspire", "usage: mflux-inspire-fibo "),
        ("mflux.models.z_image.cli.z_image_generate", "usage: mflux-generate-z-image "),
    ],
)
def test_modules_of_0_24_s_commands_run(module, told):
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(told)


def test_training_is_where_programs_look_for_it():
    """They fall back to the module where there is no script."""
    words = [sys.executable, "-m", "mflux.models.common.cli.train", "--config", "nothing.json"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: there is no configuration nothing.json")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "statement",
    [
        "import mflux.models.seedvr3",
        "import mflux.models.flux.nothing",
        "import mflux.utils.nothing",
        "from mflux.cli.defaults.defaults import NOTHING",
        "from mflux.models.z_image.cli.z_image_generate import QwenImageCommand",
        "import mflux.models.krea2.nothing",
        "from mflux.models.krea2 import Krea3",
        "from mflux.models.flux.variants.txt2img.flux import QwenImage",
        "import mflux.nothing",
    ],
)
def test_what_mflux_024_lacks_is_not_made_up(statement):
    with pytest.raises(ImportError):
        exec(statement)


def test_what_is_built_comes_before_the_table(tmp_path):
    """A family that comes later needs no change there: its module, and then its class in every package above."""
    folder = tmp_path / "mflux" / "models" / "iris" / "variants" / "txt2img"
    folder.mkdir(parents=True)
    (folder / "iris.py").write_text("class Iris:\n    real = True\n")
    code = f"""
import mflux.models
mflux.models.__path__.append({str(tmp_path / "mflux" / "models")!r})
from mflux.models.iris import Iris
from mflux.models.iris.variants import Iris as Second
from mflux.models.iris.variants.txt2img.iris import Iris as Third
assert Iris is Second is Third and Iris.real
from mflux.models.iris.latent_creator.iris_latent_creator import IrisLatentCreator
from mflux.import_paths import is_missing
assert is_missing(IrisLatentCreator)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


REQUIRED, SOMETHING = object(), object()


def parameters_of(signature: str) -> dict[str, object]:
    """Parameter → its default; `SOMETHING` where it is an object that has no literal."""
    arguments = ast.parse(f"def f{signature}: pass").body[0].args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [REQUIRED] * (len(positional) - len(arguments.defaults)) + [literal(node) for node in arguments.defaults]
    found = {argument.arg: default for argument, default in zip(positional, defaults, strict=True)}
    for argument, node in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found[argument.arg] = REQUIRED if node is None else literal(node)
    if arguments.kwarg:
        found[arguments.kwarg.arg] = REQUIRED
    return found


def literal(node: ast.expr) -> object:
    value = ast.literal_eval(node)
    return SOMETHING if value is ... else value


def assert_same_default(where: str, ours: object, theirs: object) -> None:
    if theirs is REQUIRED:
        # A default where there was none breaks no caller.
        return
    assert ours is not inspect.Parameter.empty, where
    if theirs is not SOMETHING:
        same = list(ours) == theirs if isinstance(theirs, list) else ours == theirs
        assert same, f"{where}: {ours!r}, was {theirs!r}"


def test_a_configuration_has_its_properties():
    from mflux.models.common.config import ModelConfig
    from mflux.models.common.config.config import Config

    config = Config(ModelConfig.schnell(), height=32, width=32)
    path = "mflux.models.common.config.config.Config"
    for name in (name for name, kind in CLASSES[path].items() if kind == "property"):
        assert hasattr(config, name), name


def test_both_paths_lead_to_one_class():
    from mflux.models.common.config import ModelConfig
    from mflux.models.common.config.model_config import ModelConfig as TheSame

    assert ModelConfig is TheSame


# ---- commands and options


def test_every_command_is_there_or_refused_by_name():
    ours = {f"mflux-{name}" for name in COMMANDS}
    refused = {f"mflux-{name}" for name in NOT_BUILT}
    assert not ours & refused
    assert OPTIONS.keys() == (ours & OPTIONS.keys()) | refused
    assert {"mflux-generate", "mflux-info", "mflux-completions"} <= ours


def test_the_console_scripts_are_the_commands():
    scripts = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]["scripts"]
    expected = {f"mflux-{name}": f"{command.module}:main" for name, command in COMMANDS.items()}
    assert scripts == expected | {"mflux": "mflux.cli.main:main"}


# Choices that mflux 0.24 has not.
OURS_TOO = {"--compute-precision": {"bfloat16"}}


@pytest.mark.parametrize("command", sorted(name for name in COMMANDS if f"mflux-{name}" in OPTIONS))
def test_a_command_takes_what_it_took(command):
    parser = importlib.import_module(COMMANDS[command].module).build_parser()
    assert parser.prog == f"mflux-{command}"
    by_flag = {flag: action for action in parser._actions for flag in action.option_strings or [action.dest]}
    for option in OPTIONS[f"mflux-{command}"]:
        flags = option["flags"]
        assert set(flags) <= by_flag.keys(), flags
        actions = {id(by_flag[flag]) for flag in flags}
        assert len(actions) == 1, f"{flags} are no longer one option"
        assert_same_option(by_flag[flags[0]], option)


def assert_same_option(action: argparse.Action, option: dict) -> None:
    where = option["flags"]
    assert action.nargs == option.get("nargs"), where
    if action.option_strings:
        assert action.required == option.get("required", False), where
    choices = None if action.choices is None else sorted(map(str, action.choices))
    theirs = option.get("choices")
    ours_too = OURS_TOO.get(where[0], set())
    assert choices == (None if theirs is None else sorted({*theirs, *ours_too})), where
    default = str(action.default) if isinstance(action.default, Path) else action.default
    assert default == option.get("default"), where
    kinds = {"int": (int, "64"), "float": (float, "0.5"), "Path": (Path, "a/b"), "str": (str, "text")}
    if option.get("type") in kinds:
        kind, text = kinds[option["type"]]
        value = (action.type or str)(theirs[0] if theirs else text)
        # Paths may stay text, and text that is one may become a path.
        assert isinstance(value, (str, Path) if kind in (str, Path) else kind), where
