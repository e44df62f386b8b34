"""`mflux.load`: a model by its name, as an instance of its family's class. Loads nothing heavy until it is called."""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING, Any

from mflux.errors import ModelConfigError, UsageError
from mflux.models.common.config.model_config import ModelConfig, built_key, is_builtin
from mflux.models.common.family import family_of
from mflux.models.common.saved_model import recorded_base_model
from mflux.text import shown
from mflux.utils import values

if TYPE_CHECKING:
    from mflux.models.common.pipeline import Pipeline


def load(
    name: str | os.PathLike[str],
    *,
    quantize: int | None = None,
    model_path: str | os.PathLike[str] | None = None,
    lora_paths: list[str] | None = None,
    lora_scales: list[float] | None = None,
    base_model: str | None = None,
    **settings: Any,
) -> Pipeline:
    """Open a model; its components load when the first image needs them.

    Args:
        name: a built-in model's name or alias, a folder, a file of weights, or a Hugging Face repository.
        quantize: 3, 4, 5, 6 or 8 bits for the weights, quantized while they load.
        model_path: a folder, file or repository to take the weights from instead of those that `name` stands for.
        lora_paths: LoRAs to apply, as files, names in the library, or files on Hugging Face.
        lora_scales: how much of each.
        base_model: which built-in model a folder or repository derives from, when its name does not tell.
        settings: further arguments of the family's class, such as `bake_lora`.

    Raises:
        ModelConfigError: the name tells nothing.
        UsageError: this version cannot generate with that model, or its class has no such argument.
        DownloadError: the weights cannot be had.
        CheckpointError: the folder is not a model of this kind.
    """
    try:
        return _load(name, quantize, model_path, lora_paths, lora_scales, base_model, settings)
    except ModelConfigError as error:
        # It speaks of options, for who types a command.
        error.args = (as_arguments(str(error)),)
        raise


def as_arguments(message: str) -> str:
    """A sentence about a model's name, for who called `load`."""
    message = message.replace("use --model with demo", "name demo").replace("say --model", "load")
    message = message.replace("use --lora", "say lora_paths:").replace("and --model with", "and load")
    return message.replace("--base-model", "base_model").replace("--lora (lora_paths in Python)", "lora_paths")


def _load(
    name: Any,
    quantize: Any,
    model_path: Any,
    lora_paths: Any,
    lora_scales: Any,
    base_model: Any,
    settings: dict[str, Any],
) -> Pipeline:
    name = values.name(name, "name")
    base_model = values.text(base_model, "base_model", optional=True) or recorded_base_model(name)
    key = built_key(name, base_model)
    if model_path is None and not is_builtin(name):
        model_path = name
    family = family_of(key)
    assert family is not None, "built_key answers for families that are there"
    pipeline: type[Pipeline] = family.pipeline_class(key)
    said: dict[str, Any] = {"quantize": quantize, "lora_paths": lora_paths, "lora_scales": lora_scales}
    said["model_path"] = None if model_path is None else values.name(model_path, "model_path")
    arguments = {argument: value for argument, value in said.items() if value is not None} | settings
    known = inspect.signature(pipeline).parameters.keys() - {"model_config"}
    if beyond := [argument for argument in arguments if argument not in known]:
        raise UsageError(
            f"{family.title} ({pipeline.__name__}) takes no {shown(beyond[0])}: leave it out, or use one of "
            f"{', '.join(sorted(known))}"
        )
    return pipeline(model_config=ModelConfig.from_name(name, base_model), **arguments)
