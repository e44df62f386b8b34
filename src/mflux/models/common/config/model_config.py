"""A model's identity and settings, and how a name becomes one. Loads nothing heavy."""

from __future__ import annotations

import copy
import difflib
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mflux.errors import CheckpointError, InvalidBaseModel, ModelConfigError, OtherModelError, UsageError
from mflux.models.common.component_config import ComponentConfig
from mflux.models.common.config.inferred import is_lora, told
from mflux.models.common.registry import MODELS
from mflux.text import shown, written
from mflux.utils.paths import is_file, is_there, user_path

if TYPE_CHECKING:
    from mflux.backend import mx
    from mflux.models.common.config.by_name import ByName
else:
    ByName = object

log = logging.getLogger(__name__)
# Files of which it was said what they are taken for.
_assumed: set[str] = set()

DEFAULT_SIZE = 1024
DEFAULT_STEPS = 25


# What a scheduler_config.json may say beside its numbers; left out means the same.
_BUILT_SCHEDULES = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "time_shift_type": "exponential",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "invert_sigmas": False,
    "stochastic_sampling": False,
}


@dataclass(frozen=True)
class ScheduleConfig(ComponentConfig):
    """What a `scheduler_config.json` says of the sigmas' shift; None where it says nothing."""

    use_dynamic_shifting: bool | None = None
    base_shift: float | None = field(default=None, metadata={"least": -20, "most": 20})
    max_shift: float | None = field(default=None, metadata={"least": -20, "most": 20})
    base_image_seq_len: int | None = None
    max_image_seq_len: int | None = None
    shift: float | None = field(default=None, metadata={"least": 0.001, "most": 1000})
    shift_terminal: float | None = field(default=None, metadata={"least": 0, "most": 0.99})


class _Precision:
    """`precision` of the class and of its instances, without importing MLX before someone asks."""

    def __get__(self, config: object, owner: type | None = None) -> mx.Dtype:
        from mflux.backend import compute_dtype, mx

        return compute_dtype(mx.bfloat16)


class ModelConfig(ByName):
    """One model: names, repository, and the settings that do not come with the weights.

    Built-in models come from `ModelConfig.from_name("schnell")` or `ModelConfig.schnell()`.

    Attributes:
        precision: the dtype that this machine computes in.
    """

    precision = _Precision()

    def __init__(
        self,
        priority: int,
        aliases: list[str],
        model_name: str,
        base_model: str | None,
        controlnet_model: str | None,
        custom_transformer_model: str | None,
        num_train_steps: int | None,
        max_sequence_length: int | None,
        supports_guidance: bool | None,
        requires_sigma_shift: bool | None,
        transformer_overrides: dict | None = None,
        text_encoder_overrides: dict | None = None,
        sigma_base_shift: float = 0.5,
        sigma_max_shift: float = 1.15,
        sigma_base_seq_len: int = 256,
        sigma_max_seq_len: int = 4096,
        sigma_shift_terminal: float | None = None,
        lora_training_steps: int | None = None,
        lora_training_guidance: float | None = None,
        supports_kv_cache: bool = False,
        sigma_shift: float = 1.0,
        sigma_grid: int | None = None,
        default_steps: int = DEFAULT_STEPS,
        default_size: int = DEFAULT_SIZE,
        family: str | None = None,
    ):
        self.priority = priority
        self.aliases = aliases
        self.model_name = model_name
        self.base_model = base_model
        self.controlnet_model = controlnet_model
        self.custom_transformer_model = custom_transformer_model
        self.num_train_steps = num_train_steps
        self.max_sequence_length = max_sequence_length
        self.supports_guidance = supports_guidance
        self.requires_sigma_shift = requires_sigma_shift
        self.transformer_overrides = transformer_overrides or {}
        self.text_encoder_overrides = text_encoder_overrides or {}
        self.sigma_base_shift = sigma_base_shift
        self.sigma_max_shift = sigma_max_shift
        self.sigma_base_seq_len = sigma_base_seq_len
        self.sigma_max_seq_len = sigma_max_seq_len
        self.sigma_shift_terminal = sigma_shift_terminal
        self.lora_training_steps = lora_training_steps
        self.lora_training_guidance = lora_training_guidance
        self.supports_kv_cache = supports_kv_cache
        # Beyond mflux 0.24: a shift that does not depend on the size, of how many noise levels the steps' are picked,
        # and what a command takes when nothing is said.
        self.sigma_shift = sigma_shift
        self.sigma_grid = sigma_grid
        self.default_steps = default_steps
        self.default_size = default_size
        self.family = family

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelConfig) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(self.model_name)

    @staticmethod
    def from_name(model_name: str | None, base_model: str | None = None) -> ModelConfig:
        """The configuration that a name means.

        Args:
            model_name: a built-in name or alias, a Hugging Face repository, or a local folder.
            base_model: which built-in model a repository or folder derives from, when its name does not tell.

        Raises:
            ModelConfigError: the name tells nothing.
            InvalidBaseModel: `base_model` is not a built-in model.
        """
        root = AVAILABLE_MODELS[key_of(model_name, base_model)]
        # A copy: what a caller changes is its own.
        config = copy.deepcopy(root)
        if model_name is not None and model_name != root.model_name and _exact(model_name) is None:
            config.model_name = model_name
            config.base_model = root.model_name
        return config

    def with_scheduler(self, scheduler: dict[str, Any]) -> ModelConfig:
        """This model with the sigma shift that a checkpoint's `scheduler_config.json` asks for.

        Raises:
            CheckpointError: it asks for a schedule that is not built.
        """
        for name, built in _BUILT_SCHEDULES.items():
            if scheduler.get(name) not in (None, built):
                raise CheckpointError(
                    f"scheduler_config.json asks for {name} {shown(repr(scheduler[name]), 80)} and only {built!r} is "
                    "built: take another copy of this model"
                )
        asked = ScheduleConfig.from_dict(scheduler, source="scheduler_config.json")
        config = copy.copy(self)
        names = {
            "use_dynamic_shifting": "requires_sigma_shift",
            "base_shift": "sigma_base_shift",
            "max_shift": "sigma_max_shift",
            "base_image_seq_len": "sigma_base_seq_len",
            "max_image_seq_len": "sigma_max_seq_len",
            "shift": "sigma_shift",
            "shift_terminal": "sigma_shift_terminal",
        }
        for theirs, ours in names.items():
            if (value := getattr(asked, theirs)) is not None:
                setattr(config, ours, value)
        if "shift_terminal" in scheduler:
            # A schedule that is not to be stretched to its end says so with null.
            config.sigma_shift_terminal = asked.shift_terminal
        if config.sigma_max_seq_len == config.sigma_base_seq_len:
            raise CheckpointError(
                f"scheduler_config.json has {config.sigma_base_seq_len} for both base_image_seq_len and "
                "max_image_seq_len, which no line goes through: take another copy of this model"
            )
        return config

    def x_embedder_input_dim(self) -> int:
        """Channels of a FLUX.1 variant's input tokens: the picture's own 64, and what the variant adds."""
        if "Fill" in self.model_name:
            return 384
        return 128 if "Depth" in self.model_name else 64

    def is_canny(self) -> bool:
        """Whether this is a ControlNet that follows Canny edges."""
        return "canny" in (self.controlnet_model or "").lower()


def check_model_config(value: object) -> None:
    """
    Raises:
        UsageError: it is no `ModelConfig`.
    """
    if not isinstance(value, ModelConfig):
        raise UsageError(
            f"model_config is {shown(written(value), 60)}, and has to be a ModelConfig: ModelConfig.from_name gives one"
        )


def key_of(model_name: str | None, base_model: str | None = None) -> str:
    """The registry key that a model's name, or its `base_model`, stands for; see `ModelConfig.from_name`.

    Raises:
        OtherModelError: the name is known to be another model's, or may well be.
    """
    for value, argument in ((model_name, "model_name"), (base_model, "base_model")):
        if value is not None and not isinstance(value, str):
            raise ModelConfigError(f"{argument} is {shown(written(value), 60)}, which is not text: give a model's name")
    base = None if base_model is None else _exact(base_model)
    if base_model is not None and base is None:
        raise InvalidBaseModel(f"the base model {base_model!r} is not known: choose one of {', '.join(MODELS)}")
    if model_name is None:
        if base is None:
            raise ModelConfigError(f"no model was named: {suggestion()}")
        return base
    if (key := _exact(model_name)) is not None:
        if base is not None and MODELS[base]["model_name"] == model_name and "controlnet_model" not in MODELS[base]:
            # Of several models in one repository.
            return base
        if base is not None and "demo" not in (key, base) and MODELS[base]["family"] == MODELS[key]["family"]:
            return key
        if base not in (None, key):
            raise ModelConfigError(
                f"{model_name} is a model of its own, which does not derive from {base}: leave --base-model out, or "
                f"say --model {base}"
            )
        return key
    if base is not None:
        _check_fits(model_name, base)
        return base
    is_repository = model_name.count("/") == 1 and model_name[0] not in "./~"
    if is_repository and is_lora(model_name) and not is_there(user_path(model_name)):
        raise ModelConfigError(
            f"{shown(model_name)} is a LoRA by its name, no model: use --lora {shown(model_name)}, and --model with "
            "what it was made for"
        )
    found = told(model_name)
    from mflux.models.common.on_disk import kind_on_disk, models_of

    fitting = models_of(model_name) if found.key is None or is_file(user_path(model_name)) else ()
    if found.key is not None and (not fitting or found.key in fitting):
        return found.key
    if len(fitting) == 1 or (fitting and is_file(user_path(model_name))):
        # Of several with the same tensors, the likeliest.
        if len(fitting) > 1 and model_name not in _assumed:
            _assumed.add(model_name)
            others = ", ".join(key for key in fitting[1:] if "controlnet" not in key)
            if others:
                log.warning("%s is taken for %s: if it is %s, say so with --base-model", model_name, fitting[0], others)
        return fitting[0]
    if (here := kind_on_disk(model_name)) is not None:
        raise ModelConfigError(here)
    if not found.is_known and _nearest(model_name):
        # A mistyped name.
        check_is_somewhere(model_name)
    needed = f"what derives from a model that is known needs --base-model, as {_base_models()}"
    if found.other is not None:
        recalled = f", though it recalls {found.recalled}" if found.recalled else ""
        raise OtherModelError(
            f"the model {shown(model_name)!r} is not known: {found.other!r} in its name says that it is another"
            f"{recalled}; mflux --help lists those that are built, and {needed}"
        )
    raise ModelConfigError(
        f"the model {shown(model_name, 300)!r} is not known{_nearest(model_name)}: {suggestion()}; "
        f"a repository or folder whose name does not tell needs --base-model, as {_base_models()}"
    )


def _check_fits(model_name: str, base: str) -> None:
    """
    Raises:
        ModelConfigError: a file's tensors say that it is another model.
    """
    from mflux.models.common.on_disk import models_of

    fitting = models_of(model_name) if is_file(user_path(model_name)) else ()
    if fitting and base not in fitting:
        raise ModelConfigError(
            f"{shown(model_name, 300)} is no {base} by its tensors: say --base-model {fitting[0]}, or leave it out"
        )


def _base_models() -> str:
    """A model of each family that draws, as the end of a sentence."""
    from mflux.models.common.family import families

    drawn = [command.models for family in families().values() for command in family.commands[:1] if command.models]
    names = [next(key for key in models if key != "demo") for models in drawn]
    return f"{', '.join(names[:-1])} or {names[-1]}"


def check_is_somewhere(name: str | Path) -> None:
    """
    Raises:
        ModelConfigError: a name that is no built-in model's stands for no folder and no repository either, as a
            mistyped one that contains a model's name does.
    """
    name = str(name)
    if name and not re.search(r"[/\\]", name) and not is_builtin(name) and not is_there(user_path(name)):
        raise ModelConfigError(
            f"there is no model and no folder {shown(repr(name), 300)}{_nearest(name)}: {suggestion()}"
        )


def _nearest(name: str) -> str:
    """What was perhaps meant, as a part of a sentence."""
    from mflux.models.common.family import built

    names = [alias for key in built() for alias in MODELS[key]["aliases"]]
    near = difflib.get_close_matches(name.lower(), names, n=1)
    # A word too many is no mistyped letter.
    key = told(name).key
    if (
        name.lower().startswith("flux")
        and key in names
        and not difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.85)
    ):
        near = [key]
    return f" (did you mean {near[0]}?)" if near else ""


def built_key(model_name: str | None, base_model: str | None = None) -> str:
    """The registry key of a model that this version can draw with.

    Raises:
        ModelConfigError: as for `ModelConfig.from_name`.
        UsageError: it is known, but not built.
    """
    from mflux.models.common.family import built

    key = key_of(model_name, base_model)
    if key not in built():
        family = MODELS[key]["family"]
        what = "this variant of FLUX.1" if family == "flux" else f"the family {family}"
        raise UsageError(f"{key} is not built yet in this version ({what}): mflux --help lists those that are")
    return key


def is_builtin(model_name: str) -> bool:
    """Whether a name is a built-in model's own, so that its weights are too."""
    name = model_name.lower()
    return any(name in (key, *map(str.lower, model["aliases"])) for key, model in MODELS.items())


def suggestion() -> str:
    """What to type for a model, for messages."""
    return (
        "use --model with demo, which needs no download, schnell, dev or another that mflux --help lists, "
        "a Hugging Face repository (org/name) or a folder"
    )


def _exact(name: str) -> str | None:
    # Names of models are not case-sensitive; those of repositories are.
    found = [key for key, model in MODELS.items() if name.lower() in (key, *map(str.lower, model["aliases"]))]
    # Several models share a repository; a ControlNet is always asked for by its own name.
    found += sorted(
        (key for key, model in MODELS.items() if name == model["model_name"]),
        key=lambda key: "controlnet_model" in MODELS[key],
    )
    return found[0] if found else None


def _build(priority: int, settings: dict[str, Any]) -> ModelConfig:
    settings = copy.deepcopy(settings)
    optional = (
        *("controlnet_model", "custom_transformer_model", "num_train_steps", "max_sequence_length"),
        *("supports_guidance", "requires_sigma_shift"),
    )
    return ModelConfig(
        priority=priority,
        base_model=None,
        default_steps=settings.pop("steps", DEFAULT_STEPS),
        **{name: settings.pop(name, None) for name in optional},
        **settings,
    )


AVAILABLE_MODELS: dict[str, ModelConfig] = {
    key: _build(priority, settings) for priority, (key, settings) in enumerate(MODELS.items())
}


def constructor_name(key: str) -> str:
    """What the method of `ModelConfig` is called that gives a model, by its key in the registry."""
    for spelling, said in (("krea-2", "krea2"), ("ideogram-4", "ideogram4"), ("qwen-image-2.1", "qwen-image-21")):
        if key.startswith(spelling):
            key = key.replace(spelling, said, 1)
    return re.sub(r"[-.]", "_", key)


# ModelConfig.schnell(), ModelConfig.qwen_image_edit(), …: one for each model, as in mflux. What type checkers see
# of them is `by_name.pyi`.
for _key in MODELS:
    setattr(ModelConfig, constructor_name(_key), staticmethod(lambda key=_key: copy.deepcopy(AVAILABLE_MODELS[key])))
