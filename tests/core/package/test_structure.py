"""Which part may import which: nothing points up, `common` knows no family, and there is no circle."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from mflux.models.common.family import all_settings, families
from mflux.utils.settings import SETTINGS

SOURCE = Path(__file__).parents[3] / "src"
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in SOURCE.rglob("*.py")
}

# From the bottom to the top. A module belongs to the longest name that it begins with, a command to "commands", and the
# package itself, which only says its version, to none. Each may import from its own level and from those below.
LEVELS = (
    ("errors", "text"),
    ("backend", "chips", "cpu", "fused", "optional", "utils", "compat"),
    ("checkpoints", "hub", "demo"),
    ("callbacks",),
    ("models.common",),
    ("callbacks.instances", "models"),
    ("commands", "serve", "programs", "import_paths", "__main__"),
)


def imports(name: str, *, late: bool) -> set[str]:
    """The modules of ours that a module imports: when it is loaded, or with `late` at any time; types do not count."""
    nodes = ast.parse(MODULES[name].read_text(encoding="utf-8")).body
    found = set()
    for node in _imports(nodes, late=late):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            assert node.level == 0, f"{name} imports relatively"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return (found & MODULES.keys()) - {"mflux"}


def _imports(nodes: list[ast.stmt], *, late: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _imports(node.orelse, late=late)
        elif late or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inner = [child for child in ast.iter_child_nodes(node) if isinstance(child, (ast.stmt, ast.ExceptHandler))]
            yield from _imports(inner, late=late)


def level(name: str) -> int:
    short = name.removeprefix("mflux.")
    if ".cli." in f"{name}.":
        short = "commands"
    fitting = [(len(room), number) for number, rooms in enumerate(LEVELS) for room in rooms if _within(short, room)]
    assert fitting, f"{name} has no level: add it to LEVELS"
    return max(fitting)[1]


def _within(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def family(name: str) -> str | None:
    parts = name.split(".")
    return parts[2] if parts[:2] == ["mflux", "models"] and len(parts) > 2 and parts[2] != "common" else None


def test_there_is_something_to_test():
    assert len(MODULES) > 100
    assert "mflux.backend" in imports("mflux.models.common.model", late=False)
    late = imports("mflux.models.common.model", late=True) - imports("mflux.models.common.model", late=False)
    assert "mflux.demo" in late
    assert not any(level(name) for name in imports("mflux.callbacks.callback", late=True))


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"mflux"}))
def test_nothing_points_up(name):
    wrong = {other for other in imports(name, late=True) if level(other) > level(name)}
    assert wrong == set(), f"{name} stands below what it imports"


@pytest.mark.parametrize("name", sorted(name for name in MODULES if _within(name, "mflux.models.common")))
def test_common_knows_no_family(name):
    assert {family(other) for other in imports(name, late=True)} <= {None}


def test_families_know_nothing_of_each_other():
    """What two of them need stands in `models.common`."""
    pairs = {(family(name), family(other)) for name in MODULES for other in imports(name, late=True)}
    assert {pair for pair in pairs if None not in pair and pair[0] != pair[1]} == set()


def _words(node: ast.AST) -> Iterator[str]:
    """What a node names: a variable, an attribute, an argument, or as text a setting or an option."""
    for field in ("id", "attr", "arg", "value"):
        if isinstance(word := getattr(node, field, None), str):
            yield word.removeprefix("--").replace("-", "_")


def test_the_settings_of_a_family_are_named_in_its_folder_alone():
    """A family's own settings need nothing beside its folder; what two have stands in `utils/settings.py`."""
    own = {setting.name: name for name, one in families().items() for setting in one.settings}
    assert own["softness"] == "seedvr2"
    # What FLUX.2's and Z-Image's words mean to others: numbers in this format, and pixels of any image.
    elsewhere = {"float32", "resolution"}
    for module, path in MODULES.items():
        named = {word for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) for word in _words(node)}
        found = {name for name in named & own.keys() if own[name] != family(module)}
        assert found <= elsewhere, module
    assert [setting.name for setting in SETTINGS if setting.name in own] == []


def test_settings_stand_in_one_order():
    names = [setting.name for setting in all_settings()]
    assert names == [
        "prompt", "negative_prompt", "model", "model_path", "base_model", "width", "height", "seed", "steps",
        "guidance", "scheduler", "step_cache_ratio", "cfg_end", "quantize", "precision", "compute_precision", "float32",
        "vae_full_precision", "preset", "small_text_encoder", "small_decoder", "text_encoder_paths", "vae_path",
        "lora_paths", "lora_scales", "bake_lora", "image_path", "image_paths",
        "image_strength", "controlnet_image_path", "controlnet_strength", "masked_image_path", "depth_image_path",
        "redux_image_paths", "redux_image_strengths", "resolution", "softness", "pid_decode",
        "generation_time_seconds", "created_at", "mflux_version",
    ]  # fmt: skip


def test_there_is_no_circle():
    """Raises `graphlib.CycleError`, which shows it."""
    list(graphlib.TopologicalSorter({name: imports(name, late=False) for name in MODULES}).static_order())


def test_home_folders_are_looked_up_in_one_place():
    """`Path.expanduser` ends in a RuntimeError where there is no such user; `user_path` says it in a sentence."""
    using = [name for name, path in MODULES.items() if ".expanduser(" in path.read_text(encoding="utf-8")]
    assert using == ["mflux.utils.paths"]
