"""What a command is going to generate, settled: everything that needs no weights, and no argv any more."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mflux.cli.parser.parsers import Said
from mflux.models.common.family import load_object


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Checked arguments for a class and its `generate_image`; `Generate.settle` makes it, `Generate.images` follows it.

    Attributes:
        pipeline: the class, "package.module:Class".
        constructor: its arguments.
        images: for each image the arguments of `generate_image`, without the prompt.
        words: the prompt as it was said; None where the command takes none.
        prompt: what the class takes: the same text, or what makes it of the words, called when nothing is loaded.
        options: all options, for what surrounds the images: where they go, how much memory may be used.
        said: who chose them.
    """

    pipeline: str
    constructor: Mapping[str, Any]
    images: tuple[Mapping[str, Any], ...]
    words: str | None
    prompt: str | Callable[[], str] | None = field(compare=False)
    options: argparse.Namespace = field(compare=False, repr=False)
    said: Said = field(compare=False, repr=False)

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for plans that one loaded model serves."""
        return self.pipeline, *((name, _hashable(value)) for name, value in sorted(self.constructor.items()))

    def load(self) -> Any:
        """Open the model; its components are read when they are needed."""
        return load_object(self.pipeline)(**self.constructor)


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value
