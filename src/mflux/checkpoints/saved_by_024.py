"""Folders that mflux 0.24 or earlier saved, as if they were published.

Such a folder has no configuration, tensor names of its own, numbered files, and kernels as MLX lays them out. What a
family's names and configurations are is its own data (`Layout`); the rest is the same for all and stands here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mflux.backend import mx
from mflux.checkpoints.loading import FolderTensors
from mflux.checkpoints.published import Layout, PublishedFolder
from mflux.checkpoints.quantization import Quantization
from mflux.checkpoints.renamed import Renamed, by_patterns
from mflux.errors import CheckpointError


def open_folder(
    root: Path,
    layout: Layout,
    *,
    files: Mapping[str, Path] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    packs: bool = True,
) -> PublishedFolder:
    """A model's folder, of whichever layout it is; the arguments are those of `PublishedFolder`."""
    part = root / layout.lies_in.get("transformer", "transformer")
    written = not (part / "config.json").is_file() and (
        (part / "model.safetensors.index.json").is_file() or (part / "0.safetensors").is_file()
    )
    kind = FolderOf024 if layout.names and written else PublishedFolder
    return kind(root, layout, files=files, overrides=overrides, packs=packs)


class FolderOf024(PublishedFolder):
    """A model that mflux 0.24 or earlier saved, as if it were published."""

    def has(self, part: str) -> bool:
        return super().has(self._holder(part)) or part in self.files

    def _holder(self, part: str) -> str:
        """The folder that a component lies in."""
        return self.layout.lies_in.get(part, part)

    def place_of(self, part: str) -> Path:
        return self.files.get(part, self.root / self._holder(part))

    def config(self, part: str) -> dict[str, Any]:
        if part in self.files:
            return super().config(part)
        try:
            told = self.layout.configs[part](self.tensors(part))
        except (KeyError, IndexError, ZeroDivisionError) as error:
            raise CheckpointError(
                f"{self.root / self._holder(part)} holds no {part} of {self.layout.title} as mflux 0.24 saves it "
                f"({error} is missing or makes no sense): fetch it again, or take a model in the diffusers layout"
            ) from None
        said = self.overrides.get(part, {})
        # What a shape tells is truer than what a name says.
        return {name: value for name, value in said.items() if self.layout.takes_overrides or name in told} | told

    def tensors(self, part: str) -> Renamed:
        if part in self.files:
            return super().tensors(part)
        folder, layout = self.root / self._holder(part), self.layout
        tensors = self.as_stored(part)
        places = (layout.names.get(part) or by_patterns())(tensors) or {}
        zeros = {name: rows for name, rows in layout.zeros.items() if name not in places and rows in places}
        places |= {name: places[rows] for name, rows in zeros.items()}

        def change(name: str, value: mx.array) -> mx.array:
            if name in zeros:
                return mx.zeros(value.shape[0])
            # Kernels have four axes or five, and nothing else has.
            value = mx.moveaxis(value, -1, 1) if value.ndim in (4, 5) else value
            return value if layout.reshape is None else layout.reshape(name, value)

        return Renamed(tensors, places, source=folder, square=layout.square, change=change)

    def as_stored(self, part: str) -> FolderTensors:
        """A component's tensors by the names that mflux 0.24 gave them, and as it laid them out."""
        folder = self.root / self._holder(part)
        # Early versions wrote no index; their files are numbered.
        numbered = sorted(
            (path for path in folder.glob("*.safetensors") if path.stem.isdecimal()), key=lambda path: int(path.stem)
        )
        has_index = (folder / "model.safetensors.index.json").is_file()
        return FolderTensors(folder, None if has_index or not numbered else numbered)

    def lacking(self) -> dict[str, dict[str, Any]]:
        return self.missing()

    def scheduler(self) -> dict[str, Any]:
        said = self.layout.scheduler(self) if self.layout.scheduler else {}
        return {**said, **self.overrides.get("scheduler", {})}

    def stored(self, part: str) -> Quantization | None:
        return self.tensors(part).quantization
