"""Write the stubs that tell type checkers what Python finds out when it is asked: what packages offer by
`mflux.import_paths`, which class `mflux.load` returns for which name, and `ModelConfig`'s methods, one for each model.

    python tools/stubs.py          writes them into src/
"""

from __future__ import annotations

import importlib
from pathlib import Path

from mflux.import_paths import MOVED, OFFERED, is_missing
from mflux.models.common.config.model_config import built_key, constructor_name
from mflux.models.common.family import built, family_of
from mflux.models.common.registry import MODELS

SOURCE = Path(__file__).parents[1] / "src"
_HEAD = '"""Written by tools/stubs.py."""\n'
_ARGUMENTS = """\
    *,
    quantize: int | None = None,
    model_path: str | os.PathLike[str] | None = None,
    lora_paths: list[str] | None = None,
    lora_scales: list[float] | None = None,
    base_model: str | None = None,
    **settings: Any,
"""


def stubs() -> dict[str, str]:
    """What each stub says, by its path below src/."""
    found = {"mflux/__init__.pyi": _package(), "mflux/models/common/config/by_name.pyi": _by_name()}
    for owner, names in OFFERED.items():
        if owner in MOVED:
            # Old names for what a program that is checked finds elsewhere.
            continue
        moved = {name: module for name, (module, _) in names.items() if module != owner}
        moved = {name: module for name, module in moved.items() if not is_missing(_at(module, name))}
        if moved:
            path = Path(*owner.split("."))
            is_package = (SOURCE / path).is_dir()
            found[f"{path}/__init__.pyi" if is_package else f"{path}.pyi"] = (
                _HEAD
                + "".join(f"\nfrom {module} import {name} as {name}" for name, module in sorted(moved.items()))
                + "\n"
            )
            # What lies between packages and a module that stands elsewhere is nowhere else either.
            for parent in path.parents:
                if not (SOURCE / parent / "__init__.py").is_file() and parent != Path():
                    found[f"{parent}/__init__.pyi"] = _HEAD
    return found


def _at(module: str, name: str) -> object:
    return getattr(importlib.import_module(module), name)


def _package() -> str:
    """`mflux` itself: one signature of `load` for each class, by all names that mean it."""
    names: dict[type, dict[str, None]] = {}
    for key in built():
        for name in (key, *MODELS[key]["aliases"], MODELS[key]["model_name"]):
            family = family_of(built_key(name))
            assert family is not None
            names.setdefault(family.pipeline_class(built_key(name)), {})[name] = None
    imports = {f"from {cls.__module__} import {cls.__name__}\n" for cls in names}
    imports.add("from mflux.models.common.pipeline import Pipeline\n")
    text = f"{_HEAD}\nimport os\nfrom typing import Any, Literal, overload\n\n{''.join(sorted(imports))}"
    text += "\n__version__: str\n\n"
    for cls, known in names.items():
        literals = "".join(f'        "{name}",\n' for name in known)
        text += f"@overload\ndef load(\n    name: Literal[\n{literals}    ],\n{_ARGUMENTS}) -> {cls.__name__}: ...\n"
    return f"{text}@overload\ndef load(\n    name: str | os.PathLike[str],\n{_ARGUMENTS}) -> Pipeline: ...\n"


def _by_name() -> str:
    """What `ModelConfig` gets for each model of the registry."""
    methods = "".join(f"    @staticmethod\n    def {constructor_name(key)}() -> ModelConfig: ...\n" for key in MODELS)
    return f"{_HEAD}\nfrom mflux.models.common.config.model_config import ModelConfig\n\nclass ByName:\n{methods}"


def main() -> None:
    for path, text in stubs().items():
        file = SOURCE / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
