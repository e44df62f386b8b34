"""The base of all component configurations: a frozen dataclass read from a component's own `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from mflux.errors import CheckpointError


@dataclass(frozen=True)
class ComponentConfig:
    """Fields carry the file's names and the published model's values as defaults; keys that the model does not use are
    left alone. A subclass checks in `check` that it can build what the values ask for."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: object = "config.json") -> Self:
        """Build from a parsed `config.json`.

        Raises:
            CheckpointError: a value asks for something that this class cannot build, or has the wrong type.
        """
        known = {field.name for field in fields(cls)}
        chosen = {name: _frozen(value) for name, value in values.items() if name in known}
        try:
            config = cls(**chosen)
            problem = config.check()
        except (TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise CheckpointError(f"{source} makes no sense for {cls.__name__}: {error}") from None
        if problem:
            raise CheckpointError(f"{source}: {problem}")
        return config

    def check(self) -> str | None:
        """What this configuration asks for that cannot be built, as the rest of a sentence, or None."""
        return None


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
