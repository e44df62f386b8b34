"""What the arguments of all families' classes may be, by their names: one table, looked at before anything else.

A class's own checks, of bounds and of what goes together, come after. Where several things are meant, one counts as a
list of one: of a text, each letter would be one otherwise.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from mflux.utils import values

Check = Callable[[Any, str], Any]
F = TypeVar("F", bound=Callable[..., Any])


def _optional(check: Check) -> Check:
    return lambda value, name: None if value is None else check(value, name)


_PATH, _PATHS, _REALS, _TEXT = (_optional(check) for check in (values.path, values.paths, values.reals, values.text))
CHECKS: Mapping[str, Check] = {
    "model_path": _optional(values.name),
    "lora_paths": _optional(values.texts_or_paths),
    "lora_scales": _REALS,
    "paths": _optional(values.texts_or_paths),
    "scales": _REALS,
    "bake_lora": values.switch,
    "bake": values.switch,
    "negative_prompt": _TEXT,
    "concept": _TEXT,
    "scheduler": _TEXT,
    "image_path": _PATH,
    "left_image_path": _PATH,
    "right_image_path": _PATH,
    "masked_image_path": _PATH,
    "depth_image_path": _PATH,
    "controlnet_image_path": _PATH,
    "image_paths": _PATHS,
    "redux_image_paths": _PATHS,
    "redux_image_strengths": _REALS,
    "base_path": values.path,
}


def checked(function: F) -> F:
    """A method whose arguments are what `CHECKS` has for their names.

    Raises:
        UsageError: (when it is called) one is not; it is named.
    """
    signature = inspect.signature(function)
    names = [name for name in signature.parameters if name in CHECKS]
    if not names:
        return function

    @functools.wraps(function)
    def method(*args: Any, **kwargs: Any) -> Any:
        # What is missing or beyond is Python's own affair, and told by it.
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)
        for name in names:
            if name in bound.arguments:
                bound.arguments[name] = CHECKS[name](bound.arguments[name], name)
        return function(*bound.args, **bound.kwargs)

    return cast(F, method)
