"""Where mflux 0.24 had its classes: importing those that this version does not have works, using them says so.

A program that offers many models imports them all at its top; one that is missing must not cost it the others. The
modules below are made where Python finds none, and a class is put where a package lacks it: the real one if it stands
at another of its paths, else one that raises `NotBuiltError`. So what is built comes first without a change here.
Loads nothing.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from types import ModuleType

from mflux.errors import NotBuiltError

# What they draw with → the classes, under `mflux.models`: each at its own module, and in the packages that offered it.
CLASSES: dict[str, tuple[str, ...]] = {
    "FLUX.1 Kontext": ("flux.variants.kontext.flux_kontext.Flux1Kontext",),
    "FLUX.1 ControlNet": ("flux.variants.controlnet.flux_controlnet.Flux1Controlnet",),
    "FLUX.1 Fill": ("flux.variants.fill.flux_fill.Flux1Fill",),
    "FLUX.1 Depth": ("flux.variants.depth.flux_depth.Flux1Depth",),
    "FLUX.1 Redux": ("flux.variants.redux.flux_redux.Flux1Redux",),
    "FLUX.1 In-Context": (
        "flux.variants.in_context.flux_in_context_dev.Flux1InContextDev",
        "flux.variants.in_context.flux_in_context_fill.Flux1InContextFill",
    ),
    "FLUX.1 Concept Attention": (
        "flux.variants.concept_attention.flux_concept.Flux1Concept",
        "flux.variants.concept_attention.flux_concept_from_image.Flux1ConceptFromImage",
    ),
    "FLUX.2": (
        "flux2.Flux2Klein",
        "flux2.latent_creator.Flux2LatentCreator",
        "flux2.latent_creator.flux2_latent_creator.Flux2LatentCreator",
        "flux2.variants.Flux2Klein",
        "flux2.variants.Flux2KleinEdit",
        "flux2.variants.edit.Flux2KleinEdit",
        "flux2.variants.edit.flux2_klein_edit.Flux2KleinEdit",
        "flux2.variants.txt2img.Flux2Klein",
        "flux2.variants.txt2img.flux2_klein.Flux2Klein",
    ),
    "Qwen-Image": (
        "qwen.latent_creator.qwen_latent_creator.QwenLatentCreator",
        "qwen.variants.edit.QwenImageEdit",
        "qwen.variants.edit.qwen_image_edit.QwenImageEdit",
        "qwen.variants.txt2img.qwen_image.QwenImage",
    ),
    "Z-Image": (
        "z_image.ZImage",
        "z_image.ZImageTurbo",
        "z_image.latent_creator.ZImageLatentCreator",
        "z_image.latent_creator.z_image_latent_creator.ZImageLatentCreator",
        "z_image.variants.ZImage",
        "z_image.variants.ZImageTurbo",
        "z_image.variants.z_image.ZImage",
        "z_image.variants.z_image.ZImageTurbo",
    ),
    "Z-Image ControlNet": (
        "z_image.ZImageTurboControlnet",
        "z_image.variants.ZImageTurboControlnet",
        "z_image.variants.controlnet.ControlSpec",
        "z_image.variants.controlnet.ControlType",
        "z_image.variants.controlnet.ZImageTurboControlnet",
        "z_image.variants.controlnet.control_types.ControlSpec",
        "z_image.variants.controlnet.control_types.ControlType",
        "z_image.variants.controlnet.z_image_turbo_controlnet.ZImageTurboControlnet",
    ),
    "FIBO": (
        "fibo.latent_creator.fibo_latent_creator.FiboLatentCreator",
        "fibo.variants.edit.FIBOEdit",
        "fibo.variants.edit.fibo_edit.FIBOEdit",
        "fibo.variants.txt2img.fibo.FIBO",
    ),
    "Anima": (
        "anima.Anima",
        "anima.latent_creator.AnimaLatentCreator",
        "anima.latent_creator.anima_latent_creator.AnimaLatentCreator",
        "anima.variants.Anima",
        "anima.variants.txt2img.Anima",
        "anima.variants.txt2img.anima.Anima",
    ),
    "Boogu": (
        "boogu.BooguImage",
        "boogu.variants.BooguImage",
        "boogu.variants.txt2img.BooguImage",
        "boogu.variants.txt2img.boogu_image.BooguImage",
    ),
    "ERNIE-Image": (
        "ernie_image.ErnieImage",
        "ernie_image.latent_creator.ErnieLatentCreator",
        "ernie_image.latent_creator.ernie_latent_creator.ErnieLatentCreator",
        "ernie_image.variants.ErnieImage",
        "ernie_image.variants.txt2img.ErnieImage",
        "ernie_image.variants.txt2img.ernie_image.ErnieImage",
    ),
    "FIBO 2": (
        "fibo2.Fibo2",
        "fibo2.Fibo2Edit",
        "fibo2.latent_creator.fibo2_latent_creator.Fibo2LatentCreator",
        "fibo2.variants.Fibo2",
        "fibo2.variants.Fibo2Edit",
        "fibo2.variants.edit.fibo2_edit.Fibo2Edit",
        "fibo2.variants.txt2img.fibo2.Fibo2",
    ),
    "FLUX.3": (
        "flux3.Flux3Klein",
        "flux3.Flux3KleinEdit",
        "flux3.latent_creator.Flux3LatentCreator",
        "flux3.latent_creator.flux3_latent_creator.Flux3LatentCreator",
        "flux3.variants.Flux3Klein",
        "flux3.variants.Flux3KleinEdit",
        "flux3.variants.edit.flux3_klein_edit.Flux3KleinEdit",
        "flux3.variants.txt2img.Flux3Klein",
        "flux3.variants.txt2img.flux3_klein.Flux3Klein",
    ),
    "Ideogram 4": (
        "ideogram4.Ideogram4",
        "ideogram4.latent_creator.Ideogram4LatentCreator",
        "ideogram4.latent_creator.ideogram4_latent_creator.Ideogram4LatentCreator",
        "ideogram4.variants.Ideogram4",
        "ideogram4.variants.txt2img.Ideogram4",
        "ideogram4.variants.txt2img.ideogram4.Ideogram4",
    ),
    "Iris": (
        "iris.Iris",
        "iris.latent_creator.iris_latent_creator.IrisLatentCreator",
        "iris.variants.Iris",
        "iris.variants.txt2img.Iris",
        "iris.variants.txt2img.iris.Iris",
    ),
    "Krea 2": (
        "krea2.Krea2",
        "krea2.latent_creator.Krea2LatentCreator",
        "krea2.latent_creator.krea2_latent_creator.Krea2LatentCreator",
        "krea2.variants.Krea2",
        "krea2.variants.controlnet.krea2_controlnet.Krea2Controlnet",
        "krea2.variants.txt2img.Krea2",
        "krea2.variants.txt2img.krea2.Krea2",
    ),
    "Lens": ("lens.variants.txt2img.lens_image.LensImage",),
    "Ming": (
        "ming_image.MingImage",
        "ming_image.latent_creator.ming_latent_creator.MingLatentCreator",
        "ming_image.variants.ming_image.MingImage",
    ),
    "MOSS-Image": (
        "moss_image.MOSSImage",
        "moss_image.latent_creator.MOSSImageLatentCreator",
        "moss_image.latent_creator.moss_image_latent_creator.MOSSImageLatentCreator",
        "moss_image.variants.MOSSImage",
        "moss_image.variants.txt2img.MOSSImage",
        "moss_image.variants.txt2img.moss_image.MOSSImage",
    ),
    "Qwen-Image 2.1": (
        "qwen21.latent_creator.qwen21_latent_creator.Qwen21LatentCreator",
        "qwen21.latent_creator.qwen_image21_latent_creator.QwenImage21LatentCreator",
        "qwen21.variants.controlnet.qwen_image_21_controlnet.QwenImage21Controlnet",
        "qwen21.variants.edit.qwen_image_21_edit.QwenImage21Edit",
        "qwen21.variants.txt2img.qwen_image_21.QwenImage21",
    ),
}
# Modules of 0.24 that stand elsewhere now.
MOVED = {
    "mflux.models.depth_pro.model.depth_pro": "mflux.models.common.controls.depth_pro.depth_pro",
    "mflux.models.fibo_vlm.model.fibo_vlm": "mflux.models.fibo.vlm.fibo_vlm",
}
_TITLES = {f"mflux.models.{path}": title for title, paths in CLASSES.items() for path in paths}
# Every module that holds one of them or lies above one that does.
_MODULES = {path.rsplit(".", depth)[0] for path in _TITLES for depth in range(1, path.count(".") - 1)}
_MODULES |= {path.rsplit(".", depth)[0] for path in MOVED for depth in range(path.count(".") - 1)}


class _MissingAttribute(NotBuiltError, AttributeError):
    """So that `hasattr` says no, and whoever goes on without asking is told why."""


class _NotBuilt(type):
    def __call__(cls, *args, **kwargs):
        raise NotBuiltError(_sentence(cls))

    def __getattr__(cls, name: str):
        if name.startswith("_"):
            raise AttributeError(f"type object {cls.__name__!r} has no attribute {name!r}")
        if name == "from_name":
            return cls
        raise _MissingAttribute(_sentence(cls))


def _sentence(cls: type) -> str:
    from mflux.models.common.family import built

    known = next(base for base in cls.__mro__ if f"{base.__module__}.{base.__name__}" in _TITLES)
    title = _TITLES[f"{known.__module__}.{known.__name__}"]
    return f"{known.__name__}: {title} is not built yet in this version: there are {', '.join(built())}"


def is_missing(thing: object) -> bool:
    """Whether a class, or an object at a class's path, only stands for what is not built."""
    return isinstance(thing, _NotBuilt)


class _Finder:
    """Stands last among Python's finders, so it is asked only for what does not exist."""

    @staticmethod
    def find_spec(name: str, path: Iterable[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name in _MODULES:
            below = any(module.startswith(f"{name}.") for module in _MODULES)
            return ModuleSpec(name, _Finder, is_package=below)
        # `from package import Class` asks for a module of that name where the package lacks it.
        return ModuleSpec(name, _Finder) if name in _TITLES else None

    @staticmethod
    def create_module(spec: ModuleSpec) -> None:
        return None

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        name = module.__name__
        if name in MOVED:
            sys.modules[name] = importlib.import_module(MOVED[name])
            return
        if name in _TITLES:
            # What the import system finds here afterwards is what it hands on.
            sys.modules[name] = _class(name)
            return
        for path in _TITLES:
            owner, _, short = path.rpartition(".")
            if owner == name:
                setattr(module, short, _class(path))


_made: dict[str, type] = {}


def _class(path: str) -> type:
    """The class at a path; the same one at each of the paths that 0.24 had it at, or the real one."""
    name = path.rpartition(".")[2]
    family = path.split(".")[2]
    real = _real(family, name)
    if real is not None:
        return real
    key = f"{family}.{name}"
    if key not in _made:
        _made[key] = _NotBuilt(name, (), {"__module__": path.rpartition(".")[0]})
    return _made[key]


def _real(family: str, name: str) -> type | None:
    """The class itself, if it is built at another of its paths."""
    for path in _TITLES:
        owner, _, short = path.rpartition(".")
        if short == name and path.split(".")[2] == family:
            spec = importlib.util.find_spec(owner)
            if spec is not None and spec.loader is not _Finder:
                found = getattr(importlib.import_module(owner), name, None)
                if found is not None and not is_missing(found):
                    return found
    return None


def install() -> None:
    """Let Python ask here for what it finds nowhere else."""
    if _Finder not in sys.meta_path:
        sys.meta_path.append(_Finder)
