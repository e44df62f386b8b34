"""A model's folder: the published layout, and how folders in another one look like it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mflux.backend import mx
from mflux.checkpoints.folders import read_json
from mflux.checkpoints.loading import FolderTensors
from mflux.checkpoints.quantization import Quantization


class PublishedFolder:
    """A model in the diffusers layout: a configuration beside each component's weights.

    Components are named by their folders: "text_encoder_2". A folder in another layout is a subclass.

    Attributes:
        overrides: settings of a component that only its model's name tells, where the folder has no configuration.
    """

    def __init__(self, root: Path):
        self.root = root
        self.overrides: dict[str, Mapping[str, Any]] = {}

    def has(self, part: str) -> bool:
        """Whether the component is there."""
        return (self.root / part).is_dir()

    def config(self, part: str) -> dict[str, Any]:
        """What the `config.json` of a component says."""
        return read_json(self.root / part / "config.json")

    def tensors(self, part: str) -> Mapping[str, mx.array]:
        """A component's tensors, by their published names and in the published layout."""
        return FolderTensors(self.root / part)

    def lacking(self) -> dict[str, dict[str, Any]]:
        """The settings that a published model has and this folder does not, by their paths."""
        return {}

    def scheduler(self) -> dict[str, Any]:
        """What `scheduler_config.json` says."""
        return read_json(self.root / "scheduler" / "scheduler_config.json")

    def stored(self, part: str) -> Quantization | None:
        """What a component is quantized to, if at all."""
        return Quantization.stored(self.config(part), self.root / part / "config.json")


class Alone(PublishedFolder):
    """A repository that is one component, without a folder for it."""

    def has(self, part: str) -> bool:
        return True

    def config(self, part: str) -> dict[str, Any]:
        return super().config("")

    def tensors(self, part: str) -> Mapping[str, mx.array]:
        return super().tensors("")
