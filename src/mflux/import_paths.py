"""Where mflux 0.24 had its classes, as one table that `import`, `getattr`, `hasattr` and type checkers follow.

A program that offers many models imports them all at its top; one that is missing must not cost it the others. So a
module or package of the table that is not there can be imported all the same, and what is there gets the names that
0.24's packages offered. A class is the real one where its own module is built, else one that raises `NotBuiltError`
when it is used. What is built comes first without a change here, and `tools/stubs.py` tells type checkers. Loads
nothing.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from functools import cache, partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mflux.errors import NotBuiltError

if TYPE_CHECKING:
    from importlib.abc import Loader
else:
    # Its module takes 13 ms of every start, and Python asks for no such class.
    Loader = object

# What they draw with → class → where 0.24 had it, below `mflux.models`; it stands in the last of these. A class that is
# built and was offered by its own module alone needs no entry.
CLASSES: dict[str, dict[str, tuple[str, ...]]] = {
    "FLUX.2": {
        "Flux2Klein": ("flux2", "flux2.variants", "flux2.variants.txt2img", "flux2.variants.txt2img.flux2_klein"),
        "Flux2LatentCreator": ("flux2.latent_creator", "flux2.latent_creator.flux2_latent_creator"),
        "Flux2KleinEdit": ("flux2.variants", "flux2.variants.edit", "flux2.variants.edit.flux2_klein_edit"),
    },
    "Qwen-Image": {"QwenImageEdit": ("qwen.variants.edit", "qwen.variants.edit.qwen_image_edit")},
    "Z-Image": {
        "ZImage": ("z_image", "z_image.variants", "z_image.variants.z_image"),
        "ZImageTurbo": ("z_image", "z_image.variants", "z_image.variants.z_image"),
        "ZImageLatentCreator": ("z_image.latent_creator", "z_image.latent_creator.z_image_latent_creator"),
    },
    "Z-Image ControlNet": {
        "ZImageTurboControlnet": (
            "z_image",
            "z_image.variants",
            "z_image.variants.controlnet",
            "z_image.variants.controlnet.z_image_turbo_controlnet",
        ),
        "ControlSpec": ("z_image.variants.controlnet", "z_image.variants.controlnet.control_types"),
        "ControlType": ("z_image.variants.controlnet", "z_image.variants.controlnet.control_types"),
    },
    "FIBO": {"FIBOEdit": ("fibo.variants.edit", "fibo.variants.edit.fibo_edit")},
    "Anima": {
        "Anima": ("anima", "anima.variants", "anima.variants.txt2img", "anima.variants.txt2img.anima"),
        "AnimaLatentCreator": ("anima.latent_creator", "anima.latent_creator.anima_latent_creator"),
    },
    "Boogu": {
        "BooguImage": ("boogu", "boogu.variants", "boogu.variants.txt2img", "boogu.variants.txt2img.boogu_image")
    },
    "ERNIE-Image": {
        "ErnieImage": (
            "ernie_image",
            "ernie_image.variants",
            "ernie_image.variants.txt2img",
            "ernie_image.variants.txt2img.ernie_image",
        ),
        "ErnieLatentCreator": ("ernie_image.latent_creator", "ernie_image.latent_creator.ernie_latent_creator"),
    },
    "FIBO 2": {
        "Fibo2": ("fibo2", "fibo2.variants", "fibo2.variants.txt2img.fibo2"),
        "Fibo2Edit": ("fibo2", "fibo2.variants", "fibo2.variants.edit.fibo2_edit"),
        "Fibo2LatentCreator": ("fibo2.latent_creator.fibo2_latent_creator",),
    },
    "FLUX.3": {
        "Flux3Klein": ("flux3", "flux3.variants", "flux3.variants.txt2img", "flux3.variants.txt2img.flux3_klein"),
        "Flux3KleinEdit": ("flux3", "flux3.variants", "flux3.variants.edit.flux3_klein_edit"),
        "Flux3LatentCreator": ("flux3.latent_creator", "flux3.latent_creator.flux3_latent_creator"),
    },
    "Ideogram 4": {
        "Ideogram4": (
            "ideogram4",
            "ideogram4.variants",
            "ideogram4.variants.txt2img",
            "ideogram4.variants.txt2img.ideogram4",
        ),
        "Ideogram4LatentCreator": ("ideogram4.latent_creator", "ideogram4.latent_creator.ideogram4_latent_creator"),
    },
    "Iris": {
        "Iris": ("iris", "iris.variants", "iris.variants.txt2img", "iris.variants.txt2img.iris"),
        "IrisLatentCreator": ("iris.latent_creator.iris_latent_creator",),
    },
    "Krea 2": {
        "Krea2": ("krea2", "krea2.variants", "krea2.variants.txt2img", "krea2.variants.txt2img.krea2"),
        "Krea2LatentCreator": ("krea2.latent_creator", "krea2.latent_creator.krea2_latent_creator"),
        "Krea2Controlnet": ("krea2.variants.controlnet.krea2_controlnet",),
    },
    "Lens": {"LensImage": ("lens.variants.txt2img.lens_image",)},
    "Ming": {
        "MingImage": ("ming_image", "ming_image.variants.ming_image"),
        "MingLatentCreator": ("ming_image.latent_creator.ming_latent_creator",),
    },
    "MOSS-Image": {
        "MOSSImage": (
            "moss_image",
            "moss_image.variants",
            "moss_image.variants.txt2img",
            "moss_image.variants.txt2img.moss_image",
        ),
        "MOSSImageLatentCreator": ("moss_image.latent_creator", "moss_image.latent_creator.moss_image_latent_creator"),
    },
    "Qwen-Image 2.1": {
        "Qwen21LatentCreator": ("qwen21.latent_creator.qwen21_latent_creator",),
        "QwenImage21LatentCreator": ("qwen21.latent_creator.qwen_image21_latent_creator",),
        "QwenImage21Controlnet": ("qwen21.variants.controlnet.qwen_image_21_controlnet",),
        "QwenImage21Edit": ("qwen21.variants.edit.qwen_image_21_edit",),
        "QwenImage21": ("qwen21.variants.txt2img.qwen_image_21",),
    },
    # Moved.
    "SeedVR2": {"SeedVR2": ("seedvr2", "seedvr2.variants.upscale.seedvr2")},
    "Depth Pro": {
        "DepthPro": ("depth_pro.model.depth_pro", "common.controls.depth_pro.depth_pro"),
        "DepthResult": ("depth_pro.model.depth_pro", "common.controls.depth_pro.depth_pro"),
    },
    "FIBO-VLM": {"FiboVLM": ("fibo_vlm.model.fibo_vlm", "fibo.vlm.fibo_vlm")},
}
# Module or package → the classes that it offers: each by the module that it stands in, and what it draws with.
OFFERED: dict[str, dict[str, tuple[str, str]]] = {}
for _title, _classes in CLASSES.items():
    for _name, _places in _classes.items():
        for _place in _places:
            OFFERED.setdefault(f"mflux.models.{_place}", {})[_name] = f"mflux.models.{_places[-1]}", _title
# These, and all that lies above them.
_MODULES = {path.rsplit(".", depth)[0] for path in OFFERED for depth in range(path.count(".") - 1)} | OFFERED.keys()


class _MissingAttribute(NotBuiltError, AttributeError):
    """So that `hasattr` says no, and whoever goes on without asking is told why."""


class _NotBuilt(type):
    _what: str

    @property
    def _sentence(cls) -> str:
        from mflux.models.common.family import built

        return f"{cls._what} is not built yet in this version: there are {', '.join(built())}"

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise NotBuiltError(cls._sentence)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"type object {cls.__name__!r} has no attribute {name!r}")
        if name == "from_name":
            return cls
        raise _MissingAttribute(cls._sentence)


def is_missing(thing: object) -> bool:
    """Whether a class, or an object at a class's path, only stands for what is not built."""
    return isinstance(thing, _NotBuilt)


def _offered(owner: str, name: str) -> type:
    """The class that a module of the table has under a name, the same one for all that offer it."""
    if name not in OFFERED.get(owner, ()):
        raise AttributeError(f"module {owner!r} has no attribute {name!r}")
    module, title = OFFERED[owner][name]
    found = _not_built(module, name, title) if owner == module else getattr(importlib.import_module(module), name)
    setattr(sys.modules[owner], name, found)
    return found


@cache
def _not_built(module: str, name: str, title: str) -> type:
    return _NotBuilt(name, (), {"__module__": module, "_what": f"{name}: {title}"})


class _Loader(Loader):
    """Loads a module of the table as its own loader does, if there is one, and gives it what it offers."""

    def __init__(self, real: Any):
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec) if self._real else None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        if self._real:
            module.__loader__ = self._real
            if module.__spec__ is not None:
                module.__spec__.loader = self._real
            self._real.exec_module(module)
        if name in OFFERED:
            vars(module)["__getattr__"] = partial(_offered, name)
            vars(module)["__dir__"] = lambda: sorted(vars(module).keys() | OFFERED[name].keys())
        if name in OFFERED and hasattr(module, "__path__"):
            vars(module).setdefault("__all__", sorted(OFFERED[name]))


class _Finder:
    """Stands first among Python's finders, and leaves all modules but those of the table to the others."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _MODULES:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not _Finder)
        spec = next(filter(None, others), None)
        if spec is None:
            below = any(module.startswith(f"{name}.") for module in _MODULES)
            return ModuleSpec(name, _Loader(None), is_package=below)
        spec.loader = _Loader(spec.loader)
        return spec


def install() -> None:
    """Have Python ask here."""
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)
