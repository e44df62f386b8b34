"""What the arguments of all families' classes may be, by their names: one table, looked at before anything else.

A class's own checks, of bounds and of what goes together, come after. Where several things are meant, one counts as a
list of one: of a text, each letter would be one otherwise.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

from mflux.errors import UsageError
from mflux.models.common.tokenizers.checks import check_prompt
from mflux.text import shown, written
from mflux.utils import values

log = logging.getLogger(__name__)

Check = Callable[[Any, str], Any]
F = TypeVar("F", bound=Callable[..., Any])


def _optional(check: Check) -> Check:
    return lambda value, name: None if value is None else check(value, name)


_IMAGE, _IMAGES, _TEXT = _optional(values.image), _optional(values.images), _optional(values.text)
_REAL, _REALS = _optional(values.real), _optional(values.reals)


def _switch_or_real(value: Any, name: str) -> float:
    return float(value) if isinstance(value, bool) else values.real(value, name)


def _dtype(value: Any, name: str) -> Any:
    if type(value).__name__ != "Dtype":
        raise UsageError(f"{name} is {shown(written(value), 60)}: it is mx.float16 or None")
    return value


def _prompt(value: Any, name: str) -> str:
    check_prompt(value, name)
    return cast(str, value)


def _prompt_or_table(value: Any, name: str) -> Any:
    return value if isinstance(value, Mapping) else _prompt(value, name)


CHECKS: Mapping[str, Check] = {
    "cfg_normalization": _switch_or_real,
    "cfg_truncation": values.real,
    "step_cache_ratio": lambda value, name: values.number(value, name, values.some_of_them),
    "cfg_end": lambda value, name: values.number(value, name, values.part_of_them),
    "model_path": _optional(values.name),
    "text_encoder_paths": _optional(values.texts_or_paths),
    "vae_path": _optional(values.name),
    "compute_precision": _optional(_dtype),
    "controlnet_path": _optional(values.name),
    "lora_paths": _optional(values.texts_or_paths),
    "lora_scales": _REALS,
    "quantize": _optional(values.whole),
    "guidance": _REAL,
    "pid_degrade_sigma": values.real,
    "height": values.side,
    "width": values.side,
    "paths": _optional(values.texts_or_paths),
    "scales": _REALS,
    "prompt": _prompt,
    "negative_prompt": _optional(_prompt),
    "concept": _optional(_prompt),
    "scheduler": _TEXT,
    "image_path": _IMAGE,
    "image_strength": _optional(lambda value, name: values.real(value, name, least=0, most=1)),
    "left_image_path": _IMAGE,
    "right_image_path": _IMAGE,
    "masked_image_path": _IMAGE,
    "mask_path": _IMAGE,
    "depth_image_path": _IMAGE,
    "controlnet_image_path": _IMAGE,
    "image_paths": _IMAGES,
    "redux_image_paths": _IMAGES,
    "redux_image_strengths": _REALS,
    "base_path": values.path,
}

# What an argument's annotation tells, whatever its name.
_BY_TYPE: Mapping[Any, Check] = {
    "bool": values.switch,
    bool: values.switch,
    "bool | None": _optional(values.switch),
    "str | dict[str, Any]": _prompt_or_table,
}


def _title(model: Any) -> str:
    return str(model.registered.model_name).rpartition("/")[2]


def without_effect(model: Any, given: Mapping[str, Any], all_of_them: Mapping[str, Any]) -> Iterator[str]:
    """The settings of an image that have no effect as the others are, a sentence for each: one place for all families.

    Args:
        model: a pipeline; its `negative_above` says above which guidance a negative prompt counts.
        given: the arguments that the caller said.
        all_of_them: these, and what is taken for the others.
    """
    asked = all_of_them.get("guidance")
    guidance = model.guidance_of(asked) if hasattr(model, "guidance_of") else asked
    if given.get("guidance") and guidance == 0:
        yield f"guidance is ignored: {_title(model)} was made without"
    above = model.negative_above
    is_unguided = above is None or (isinstance(guidance, (int, float)) and not model.is_guided(guidance))
    if given.get("negative_prompt"):
        if above is None:
            yield f"the negative prompt is ignored: {model.family.title} has no negative branch"
        elif is_unguided:
            yield f"the negative prompt is ignored: without guidance above {above:g} it has no part in the image"
    for name, nothing in (("cfg_normalization", (0, None)), ("cfg_truncation", (1, None))):
        if name in given and given[name] not in nothing and is_unguided:
            yield f"{name} is ignored: without guidance above {above:g} it has no part in the image"
    if given.get("cfg_end") not in (None, 1) and not model.is_guided(guidance):
        yield "cfg_end is ignored: the steps have no second pass for guidance, of which it says when to end"
    if given.get("image_strength") and model.sees_image:
        yield "image_strength is ignored: the model sees the image in every step, and starts from noise"
    elif given.get("image_strength") and "image_path" in all_of_them and all_of_them["image_path"] is None:
        yield "image_strength is ignored: there is no image_path, of which it says how much to keep"


def checked(function: F) -> F:
    """A method whose arguments are what `CHECKS` has for their names; those that are to be a `bool` are switches.

    Raises:
        UsageError: (when it is called) one is not; it is named.
    """
    signature = inspect.signature(function)
    checks = {name: CHECKS[name] for name in signature.parameters if name in CHECKS}
    for name, parameter in signature.parameters.items():
        if parameter.annotation in _BY_TYPE:
            checks[name] = _BY_TYPE[parameter.annotation]

    @functools.wraps(function)
    def method(*args: Any, **kwargs: Any) -> Any:
        # What is missing or beyond is Python's own affair, and told by it.
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)
        for name in checks.keys() & bound.arguments.keys():
            bound.arguments[name] = checks[name](bound.arguments[name], name)
        if function.__name__ == "generate_image":
            given = bound.arguments.copy()
            bound.apply_defaults()
            for line in without_effect(given.pop("self"), given, bound.arguments):
                log.warning("%s", line)
        return function(*bound.args, **bound.kwargs)

    return cast(F, method)
