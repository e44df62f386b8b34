"""Where mflux 0.24 had its classes, as one table that `import`, `getattr`, `hasattr` and type checkers follow.

A program that offers many models imports them all at its top; one that is missing must not cost it the others. So a
module or package of the table that is not there can be imported all the same, and what is there gets the names that
0.24's packages offered. A class is the real one where its own module is built, else one that raises `NotBuiltError`
when it is used. What is built comes first without a change here, and `tools/stubs.py` tells type checkers. Modules of
0.24 that are neither built nor moved say so when they are imported, as an ImportError. Loads nothing.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Sequence
from functools import cache, partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, ModuleType
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
# What else programs import: module of 0.24 → the module here → names, the same in both.
_PROGRAMS = "mflux.programs"
_TRAINING = "mflux.models.common.training"
MOVED: dict[str, dict[str, tuple[str, ...]]] = {
    "mflux.callbacks.callback_manager": {f"{_PROGRAMS}.commands": ("CallbackManager",)},
    "mflux.callbacks.generation_context": {"mflux.callbacks.callback_registry": ("GenerationContext",)},
    "mflux.callbacks.instances.canny_saver": {f"{_PROGRAMS}.commands": ("CannyImageSaver",)},
    "mflux.callbacks.instances.depth_saver": {f"{_PROGRAMS}.commands": ("DepthImageSaver",)},
    "mflux.cli.check_model": {"mflux.cli.check": ("build_parser", "main")},
    "mflux.cli.completions.install": {"mflux.cli.completions": ("main",)},
    "mflux.cli.defaults.defaults": {
        f"{_PROGRAMS}.defaults": (
            "BATTERY_PERCENTAGE_STOP_LIMIT", "CONTROLNET_STRENGTH", "DEFAULT_DEPTH_GUIDANCE",
            "DEFAULT_DEV_FILL_GUIDANCE", "DEFAULT_INFERENCE_STEPS", "DIMENSION_STEP_PIXELS", "GUIDANCE_SCALE",
            "GUIDANCE_SCALE_KONTEXT", "HEIGHT", "IMAGE_STRENGTH", "MFLUX_CACHE_DIR", "MFLUX_LORA_CACHE_DIR",
            "MODEL_INFERENCE_STEPS", "QUANTIZE_CHOICES", "UNION_CONTROLNET_STRENGTH", "WIDTH",
            "canonical_model_choices", "model_choices", "model_inference_steps",
        ),
    },
    "mflux.cli.parser.parsers": {"mflux.cli.parser.plugins": ("CommandLineParser",)},
    "mflux.models.common.cli.info": {"mflux.cli.info": ("build_parser", "main")},
    "mflux.models.common.cli.save": {"mflux.cli.save": ("build_parser", "main")},
    "mflux.models.common.config": {"mflux.models.common.config.config": ("Config",)},
    "mflux.models.common.schedulers.seedvr2_euler_scheduler": {
        "mflux.models.common.schedulers": ("SeedVR2EulerScheduler",)
    },
    "mflux.models.common.training.adapters": {f"{_TRAINING}.adapter": ("TrainingAdapter",)},
    "mflux.models.common.training.adapters.base": {f"{_TRAINING}.adapter": ("TrainingAdapter",)},
    "mflux.models.common.training.dataset": {f"{_TRAINING}.data": ("Batch", "DataItem", "Dataset", "Iterator")},
    "mflux.models.common.training.dataset.batch": {f"{_TRAINING}.data": ("Batch", "DataItem")},
    "mflux.models.common.training.dataset.dataset": {f"{_TRAINING}.data": ("Dataset",)},
    "mflux.models.common.training.dataset.iterator": {f"{_TRAINING}.data": ("Iterator",)},
    "mflux.models.common.training.lora.path_util": {
        f"{_TRAINING}.lora": ("expand_module_paths", "get_at_path", "set_at_path")
    },
    "mflux.models.common.training.lora.target_injector": {f"{_TRAINING}.lora": ("inject_lora_targets",)},
    "mflux.models.common.training.optimization": {f"{_TRAINING}.optimizer": ("Optimizer", "Optimizers")},
    "mflux.models.common.training.optimization.optimizer": {f"{_TRAINING}.optimizer": ("Optimizer", "Optimizers")},
    "mflux.models.common.training.state": {f"{_TRAINING}.spec": ("TrainingSpec",)},
    "mflux.models.common.training.state.training_spec": {
        f"{_TRAINING}.spec": (
            "BlockRange", "CheckpointSpec", "DataSpec", "LoraLayersSpec", "LoraTargetSpec", "MonitoringSpec",
            "OptimizerSpec", "StatisticsSpec", "TrainingLoopSpec", "TrainingSpec",
        ),
    },
    "mflux.models.common.vae": {f"{_PROGRAMS}.images": ("VAETiler",)},
    "mflux.models.common.vae.vae_tiler": {f"{_PROGRAMS}.images": ("VAETiler",)},
    "mflux.models.common.weights": {f"{_PROGRAMS}.weights": ("ComponentDefinition", "LoadedWeights", "WeightLoader")},
    "mflux.models.common.weights.loading.loaded_weights": {f"{_PROGRAMS}.weights": ("LoadedWeights", "MetaData")},
    "mflux.models.common.weights.loading.weight_definition": {
        f"{_PROGRAMS}.weights": ("ComponentDefinition", "TokenizerDefinition")
    },
    "mflux.models.common.weights.loading.weight_loader": {f"{_PROGRAMS}.weights": ("WeightLoader",)},
    "mflux.models.fibo_vlm.cli.fibo_inspire": {"mflux.models.fibo.cli.fibo_inspire": ("build_parser", "main")},
    "mflux.models.fibo_vlm.cli.fibo_refine": {"mflux.models.fibo.cli.fibo_refine": ("build_parser", "main")},
    "mflux.models.flux.variants.controlnet.controlnet_util": {f"{_PROGRAMS}.images": ("ControlnetUtil",)},
    "mflux.models.flux.variants.in_context.utils.in_context_loras": {
        f"{_PROGRAMS}.defaults": (
            "IC_EDIT_LORA_FILENAME", "IC_EDIT_LORA_REPO_ID", "IC_EDIT_LORA_SCALE", "LORA_NAME_MAP", "LORA_REPO_ID",
            "get_ic_edit_lora_path", "get_lora_path",
        ),
    },
    "mflux.utils.apple_silicon": {f"{_PROGRAMS}.defaults": ("AppleSiliconUtil",)},
    "mflux.utils.exif_orientation": {f"{_PROGRAMS}.images": ("open_oriented", "oriented_size")},
    "mflux.utils.prompt_util": {f"{_PROGRAMS}.commands": ("PromptUtil",)},
}  # fmt: skip
# Where 0.24's tables of a family's weights stood: family → class, in the package and in a module of it.
WEIGHTS = {
    "anima": "AnimaWeightDefinition", "ernie_image": "ErnieWeightDefinition", "fibo": "FIBOWeightDefinition",
    "flux": "FluxWeightDefinition", "flux2": "Flux2KleinWeightDefinition", "flux3": "Flux3KleinWeightDefinition",
    "ideogram4": "Ideogram4WeightDefinition", "krea2": "Krea2WeightDefinition",
    "qwen": "QwenWeightDefinition", "seedvr2": "SeedVR2WeightDefinition", "z_image": "ZImageWeightDefinition",
}  # fmt: skip
_STEMS = {"ernie_image": "ernie"}
for _family, _name in WEIGHTS.items():
    for _place in ("weights", f"weights.{_STEMS.get(_family, _family)}_weight_definition"):
        MOVED[f"mflux.models.{_family}.{_place}"] = {f"{_PROGRAMS}.weights": (_name,)}

# Module or package → the names that it offers: each by the module that it stands in, and what it draws with.
OFFERED: dict[str, dict[str, tuple[str, str]]] = {}
for _title, _classes in CLASSES.items():
    for _name, _places in _classes.items():
        for _place in _places:
            OFFERED.setdefault(f"mflux.models.{_place}", {})[_name] = f"mflux.models.{_places[-1]}", _title
for _place, _modules in MOVED.items():
    for _module, _names in _modules.items():
        OFFERED.setdefault(_place, {}).update(dict.fromkeys(_names, (_module, "")))
# These, and all that lies above them.
_MODULES = {path.rsplit(".", depth)[0] for path in OFFERED for depth in range(path.count(".") - 1)} | OFFERED.keys()
# A package in 0.24, of which nothing that lay below is here.
_MORE_BELOW = "mflux.models.common.checking"
_MODULES.add(_MORE_BELOW)

# What of 0.24 is known by its path alone, below `mflux`, and is not here: what is not built yet, and what is made
# otherwise.
_NOT_YET = {
    "training for this family": r"models\.\w+\.training_adapter",
    "PiD decoding": r"models\.common\.pid_decoder",
    "a control of poses": r"models\.openpose",
    "a control of soft edges": r"models\.hed",
}
_OTHERWISE = (
    r"models\.common\.(cfg_end|checking|compute_precision|lora\.(layer|mapping)|resolution|step_cache|tokenizer|training"
    r"|vae\.(block_decoder|vae_decode_options)|weights)|models\.common_models|release"
    r"|models\.\w+\.(model|tokenizer|weights|\w+_initializer|latent_creator\.\w+_reference_images)"
    r"|models\.\w+\.variants\.(\w+\.)?(util|utils|\w+_(concept|controlnet|core|helpers|rewriter|util))"
    r"|callbacks\.callbacks|cli\.completions\.generator"
    r"|utils\.(image_compare|info_util|logging_util|lora_library_util)"
)
_OF_A_FAMILY = r"models\.(\w+)\.(cli|latent_creator|model|reference|tokenizer|utils?|variants|weights|\w+_\w+)(\.|$)"
_HERE = Path(__file__).parent


class NotHereError(NotBuiltError, ModuleNotFoundError):
    """A module of mflux 0.24 that this version does not have; what can go on without it catches an ImportError."""

    def __init__(self, message: str, *, name: str):
        super().__init__(message)
        self.name = name


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


def _offered(owner: str, name: str) -> Any:
    """What a module of the table has under a name, the same for all that offer it."""
    if name not in OFFERED.get(owner, ()):
        raise AttributeError(f"module {owner!r} has no attribute {name!r}")
    module, title = OFFERED[owner][name]
    found = _not_built(module, name, title) if owner == module else getattr(importlib.import_module(module), name)
    setattr(sys.modules[owner], name, found)
    return found


@cache
def _not_built(module: str, name: str, title: str) -> type:
    return _NotBuilt(name, (), {"__module__": module, "_what": f"{name}: {title}"})


def _offered_by_command(owner: str, name: str) -> Any:
    """What 0.24's modules of commands had beside `build_parser` and `main`, made of ours."""
    if not name.startswith("_"):
        from mflux.programs.commands import offered

        return offered(sys.modules[owner], name)
    raise AttributeError(f"module {owner!r} has no attribute {name!r}")


def _not_here(name: str) -> str | None:
    """Why a module of 0.24 is not here; None of one that it does not have."""
    path = name.removeprefix("mflux.")
    for what, known in _NOT_YET.items():
        if re.match(rf"({known})(\.|$)", path):
            return f"{name}: {what} is not built yet in this version"
    if found := re.match(_OF_A_FAMILY, path):
        for title, classes in CLASSES.items():
            places = next(iter(classes.values()))
            if places[0].partition(".")[0] == found[1] and not _is_family(places[-1]):
                return f"{name}: {title} is not built yet in this version"
    if re.match(rf"({_OTHERWISE})(\.|$)", path):
        return f"{name} is a part of mflux 0.24 that this version is made without (docs/programs.md says what there is)"
    return None


def _is_family(place: str) -> bool:
    return (_HERE / "models" / place.partition(".")[0] / "family.py").is_file()


class _Loader(Loader):
    """Loads a module of the table as its own loader does, if there is one, and gives it what it offers."""

    def __init__(self, real: Any):
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec) if self._real else None

    def get_code(self, name: str) -> CodeType | None:
        """For `python -m`: what moved runs where it is now."""
        if self._real:
            code: CodeType | None = self._real.get_code(name)
            return code
        if "main" not in OFFERED.get(name, ()):
            return None
        return compile(f"import sys\nfrom {OFFERED[name]['main'][0]} import main\nsys.exit(main())", name, "exec")

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
        elif _is_command(name):
            vars(module)["__getattr__"] = partial(_offered_by_command, name)
        if name in OFFERED and hasattr(module, "__path__"):
            vars(module).setdefault("__all__", sorted(OFFERED[name]))
        if _has_more_below(name) and not hasattr(module, "__path__"):
            # A package in 0.24, and one module here.
            module.__path__ = []


class _Finder:
    """Stands first among Python's finders, and leaves all modules but those of the table to the others."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _MODULES and not _is_command(name):
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder not in (_Finder, _Last))
        spec = next(filter(None, others), None)
        if spec is not None:
            spec.loader = _Loader(spec.loader)
        elif name in _MODULES:
            spec = ModuleSpec(name, _Loader(None), is_package=_has_more_below(name))
        return spec


class _Last:
    """Stands last among Python's finders, where nobody has a module, and says why of those that 0.24 had."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        """
        Raises:
            NotHereError: 0.24 had it.
        """
        if name.startswith("mflux.") and (why := _not_here(name)):
            raise NotHereError(why, name=name)


def _is_command(name: str) -> bool:
    """Whether it is a command's module of a family, which offers what 0.24's had beside `build_parser` and `main`."""
    return name.startswith("mflux.models.") and name.count(".") == 4 and name.split(".")[3] == "cli"


def _has_more_below(name: str) -> bool:
    return name == _MORE_BELOW or any(module.startswith(f"{name}.") for module in _MODULES)


def install() -> None:
    """Have Python ask here."""
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)
        sys.meta_path.append(_Last)
