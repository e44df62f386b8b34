"""Folders that mflux 0.24 or earlier saved, as if they were published.

Such a folder has no configuration, tensor names of its own, numbered files, and kernels as MLX lays them out. What a
family's names and configurations are is its own data (`Layout024`); the rest is the same for all and stands here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from mflux.backend import mx
from mflux.checkpoints.loading import FolderTensors
from mflux.checkpoints.published import PublishedFolder
from mflux.checkpoints.quantization import Quantization, inferred
from mflux.errors import CheckpointError

# Patterns and what they become, applied in order.
Renames = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Layout024:
    """What a family's folders look like. Components are named by their folders.

    Attributes:
        title: the family, for messages.
        names: theirs → ours; a name that no pattern fits is the published one already.
        configs: what `config.json` would say, from the tensors. A shape that is missing or makes no sense may raise
            KeyError, IndexError or ZeroDivisionError.
        scheduler: what `scheduler_config.json` would say, from the transformer's configuration.
        model_index: what `model_index.json` would say.
        square: layers whose input is as wide as a vector, and that vector: from these the bits of a quantized folder
            follow, since a vector is never quantized.
        left_out: a pattern of names, which are not translated yet, that hold nothing a published file has.
        zeros: vectors that some versions lost → the matrix that has as many rows; they are zero.
        reshape: changes a tensor by its published name, once its kernel's axes are in place.
    """

    title: str
    names: Mapping[str, Renames]
    configs: Mapping[str, Callable[[Tensors024], dict[str, Any]]]
    scheduler: Callable[[Mapping[str, Any]], dict[str, Any]]
    model_index: Mapping[str, Any]
    square: Sequence[tuple[str, str]] = field(default=())
    left_out: str | None = None
    zeros: Mapping[str, str] = field(default_factory=dict)
    reshape: Callable[[str, mx.array], mx.array] | None = None

    def open(self, root: Path) -> FolderOf024 | None:
        """The folder, or None if mflux 0.24 did not write it."""
        part = root / "transformer"
        written = not (part / "config.json").is_file() and (
            (part / "model.safetensors.index.json").is_file() or (part / "0.safetensors").is_file()
        )
        return FolderOf024(root, self) if written else None


class FolderOf024(PublishedFolder):
    """A model that mflux 0.24 or earlier saved, as if it were published."""

    def __init__(self, root: Path, layout: Layout024):
        super().__init__(root)
        self.layout = layout

    def config(self, part: str) -> dict[str, Any]:
        try:
            # What a shape tells is truer than what a name says.
            return {**self.overrides.get(part, {}), **self.layout.configs[part](self.tensors(part))}
        except (KeyError, IndexError, ZeroDivisionError) as error:
            raise CheckpointError(
                f"{self.root / part} holds no {part} of {self.layout.title} as mflux 0.24 saves it ({error} is missing "
                "or makes no sense): fetch it again, or take a model in the diffusers layout"
            ) from None

    def tensors(self, part: str) -> Tensors024:
        return Tensors024(self.root / part, part, self.layout)

    def lacking(self) -> dict[str, dict[str, Any]]:
        return {"model_index.json": dict(self.layout.model_index), "scheduler/scheduler_config.json": self.scheduler()}

    def scheduler(self) -> dict[str, Any]:
        return self.layout.scheduler(self.config("transformer"))

    def stored(self, part: str) -> Quantization | None:
        return self.tensors(part).quantization


class Shapes(Mapping[str, mx.array]):
    """Tensors by their published names, and what their shapes tell of a configuration."""

    # What the layers are quantized to, if at all.
    quantization: Quantization | None = None

    def rows(self, name: str) -> int:
        return self[name].shape[0]

    def width(self, layer: str) -> int:
        """How many weights a row of a layer has, quantized or not."""
        columns = self[f"{layer}.weight"].shape[-1]
        return columns * 32 // self.quantization.bits if f"{layer}.scales" in self else columns

    def count(self, pattern: str) -> int:
        """How many numbers occur where `pattern` has a group."""
        return len({match[1] for name in self if (match := re.match(pattern, name))})


class PlainTensors(Shapes):
    """Tensors as they are."""

    def __init__(self, tensors: Mapping[str, mx.array]):
        self._tensors = tensors

    def __getitem__(self, name: str) -> mx.array:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Tensors024(Shapes):
    """Tensors with mflux 0.24's names and layout as a mapping with the published ones, read when they are asked for."""

    def __init__(self, folder: Path, part: str, layout: Layout024):
        # Early versions wrote no index; their files are numbered.
        numbered = sorted(
            (path for path in folder.glob("*.safetensors") if path.stem.isdecimal()), key=lambda path: int(path.stem)
        )
        has_index = (folder / "model.safetensors.index.json").is_file()
        self._tensors = FolderTensors(folder, None if has_index or not numbered else numbered)
        self._square, self._reshape = layout.square, layout.reshape
        renames = layout.names.get(part, ())
        left_out = re.compile(layout.left_out) if layout.left_out else None
        self._theirs = {
            _translated(name, renames): name for name in self._tensors if not (left_out and left_out.match(name))
        }
        self._zeros = {
            name: rows for name, rows in layout.zeros.items() if name not in self._theirs and rows in self._theirs
        }

    def __getitem__(self, name: str) -> mx.array:
        if name in self._zeros:
            return mx.zeros(self.rows(self._zeros[name]))
        value = self._tensors[self._theirs[name]]
        # Kernels have four axes or five, and nothing else has.
        value = mx.moveaxis(value, -1, 1) if value.ndim in (4, 5) else value
        return value if self._reshape is None else self._reshape(name, value)

    def __iter__(self) -> Iterator[str]:
        return iter([*self._theirs, *self._zeros])

    def __len__(self) -> int:
        return len(self._theirs) + len(self._zeros)

    @property
    def quantization(self) -> Quantization | None:
        """What the layers are quantized to, as far as the shape of a square one tells."""
        for weight, rows in self._square:
            if f"{weight}.scales" in self and f"{weight}.weight" in self and rows in self:
                width = self[rows].shape[0]
                return inferred(width, self[f"{weight}.weight"].shape, self[f"{weight}.scales"].shape)
        return None


@cache
def _translated(name: str, renames: Renames) -> str:
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name
