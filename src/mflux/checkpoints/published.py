"""A model's folder: the published layout, and how files in another one look like it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mflux.backend import mx
from mflux.checkpoints.folders import read_json
from mflux.checkpoints.loading import FolderTensors
from mflux.checkpoints.quantization import Quantization
from mflux.checkpoints.readers.gguf import MAGIC
from mflux.checkpoints.readers.plain import open_file
from mflux.checkpoints.readers.zip_records import LOCAL_MAGIC
from mflux.checkpoints.renamed import Names, Renamed, renamed
from mflux.checkpoints.stored.tensors import Chosen
from mflux.errors import CheckpointError
from mflux.utils.paths import is_file, user_path


@dataclass(frozen=True)
class Layout:
    """How a family's files look where they do not look as published, as data. Components are named by their folders.

    Attributes:
        title: the family, for messages.
        configs: what `config.json` would say, from the tensors. A shape that is missing or makes no sense may raise
            KeyError, IndexError or ZeroDivisionError.
        files: components that may be one file without a configuration, and how its names become the published ones.
        config_optional: those of them that may lie in the model's folder without a configuration as well.
        published: the files in a model's own folder that are such components, from the folder and the component's
            settings in the registry.
        wanted: what such a file is called, for the message that it is missing.
        names: how the names that mflux 0.24 saves become the published ones; a component that is not here has them.
        has_schedule: whether a published model has a `scheduler_config.json`; else the registry has its schedule.
        scheduler: what `scheduler_config.json` would say of a folder that mflux 0.24 saved, or of files without one;
            None if there is none.
        model_index: what `model_index.json` would say.
        square: see `Renamed`.
        zeros: vectors that some versions lost → the matrix that has as many rows; they are zero.
        reshape: changes a tensor by its published name, once its kernel's axes are in place.
        told_beside: components of whose configuration a part stands elsewhere, in `overrides`.
        takes_overrides: whether what the registry says of a transformer are settings of its `config.json`, also where
            no shape tells them.
        changes: component → what changes a tensor of its single file, by its published name.
        lies_in: components that mflux 0.24 saved in another folder than their own, and in which: {"transformer": ""}.
        split: the files of a model's own repository that are its components, by the model's key in the registry, where
            it is published so.
        inside: a component's names in a file that holds several begin with one of these.
        models: which of the family's models a transformer may be, from its configuration, the likeliest first.
    """

    title: str
    configs: Mapping[str, Callable[[Renamed], dict[str, Any]]] = field(default_factory=dict)
    files: Mapping[str, Names] = field(default_factory=dict)
    config_optional: tuple[str, ...] = ()
    published: Callable[[Path, Mapping[str, Any]], dict[str, Path]] | None = None
    wanted: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, Names] = field(default_factory=dict)
    scheduler: Callable[[PublishedFolder], Mapping[str, Any]] | None = None
    model_index: Mapping[str, Any] = field(default_factory=dict)
    square: Sequence[tuple[str, str]] = ()
    zeros: Mapping[str, str] = field(default_factory=dict)
    reshape: Callable[[str, mx.array], mx.array] | None = None
    told_beside: tuple[str, ...] = ()
    takes_overrides: bool = True
    has_schedule: bool = True
    lies_in: Mapping[str, str] = field(default_factory=dict)
    split: Callable[[str], Mapping[str, str]] | None = None
    inside: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    models: Callable[[Mapping[str, Any]], tuple[str, ...]] | None = None
    changes: Mapping[str, Callable[[str, mx.array], mx.array]] = field(default_factory=dict)

    def parts_in(self, path: str | Path) -> dict[str, Path]:
        """The components that a path's file is or holds, each with the file; none if it is no file of weights, or none
        may be.

        A file of names that are not known counts as the first that may be one, which then says what is missing.
        """
        file = user_path(path)
        if not self.files or not is_file(file) or not _may_hold_weights(file):
            return {}
        try:
            tensors = FolderTensors(file.parent, [file])
        except CheckpointError:
            # Read again, and says so.
            return {next(iter(self.files)): file}
        found = [part for part in self.files if self.settings_in(part, tensors) is not None]
        return dict.fromkeys(found or [next(iter(self.files))], file)

    def settings_in(self, part: str, tensors: Mapping[str, mx.array]) -> dict[str, Any] | None:
        """What the `config.json` of a component says that is among these tensors of one file; None if it is not."""
        try:
            return self.configs[part](self.renamed(part, self.chosen(part, tensors), ""))
        except (KeyError, IndexError, ZeroDivisionError, CheckpointError):
            return None

    def chosen(self, part: str, tensors: Mapping[str, mx.array]) -> Mapping[str, mx.array]:
        """Those tensors of a file that belong to a component, without the prefix that says so."""
        for prefix in self.inside.get(part, ()):
            names = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
            if names:
                return Chosen(tensors, names)
        others = tuple(prefix for other, known in self.inside.items() if other != part for prefix in known)
        if others and any(name.startswith(others + _BESIDE) for name in tensors):
            return Chosen(tensors, {name: name for name in tensors if not name.startswith(others + _BESIDE)})
        return tensors

    def renamed(self, part: str, tensors: Mapping[str, mx.array], source: object) -> Renamed:
        """A component's tensors in one file, by their published names."""
        change = self.changes.get(part)
        return renamed(tensors, self.files[part], source=source, square=self.square, change=change)


# What a checkpoint holds beside its components.
_BESIDE = ("text_encoders.", "cond_stage_model.", "conditioner.", "first_stage_model.", "model_ema.")


def _may_hold_weights(file: Path) -> bool:
    with open_file(file) as opened:
        head = opened.read(9)
    return (
        head.startswith((MAGIC, LOCAL_MAGIC, b"\x80")) or head[8:] == b"{" or file.suffix in (".safetensors", ".gguf")
    )


class PublishedFolder:
    """A model in the diffusers layout: a configuration beside each component's weights.

    Components are named by their folders: "text_encoder_2".

    Args:
        root: the model's folder.
        layout: which components may be single files, and how these look; none by default.
        files: component → the one file that holds it, where that lies elsewhere.
        overrides: settings of a component that only its model's name tells, where the folder has no configuration.
        packs: False gives dense what a file stores in other ways than mflux does, for whoever packs it anew.
    """

    def __init__(
        self,
        root: Path,
        layout: Layout | None = None,
        *,
        files: Mapping[str, Path] | None = None,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        packs: bool = True,
    ):
        self.packs = packs
        self.root = root
        self.layout = layout or Layout("")
        self.overrides = dict(overrides or {})
        self.files = dict(files or {})
        if self.layout.published is not None:
            there = self.layout.published(root, self.overrides.get("transformer", {}))
            self.files = {part: file for part, file in there.items() if not (root / part).is_dir()} | self.files

    def has(self, part: str) -> bool:
        """Whether the component is there."""
        return part in self.files or (self.root / part).is_dir()

    def place_of(self, part: str) -> Path:
        """The file or folder that a component is read from."""
        return self.files.get(part, self.root / part)

    def config(self, part: str) -> dict[str, Any]:
        """What the `config.json` of a component says, or the shapes of its tensors where it may have none."""
        path = self.root / part / "config.json"
        more = self.overrides.get(part, {}) if part in self.layout.told_beside else {}
        if not self._by_shape(part):
            return {**read_json(path), **more}
        try:
            return {**self.layout.configs[part](self.tensors(part)), **more}
        except (KeyError, IndexError, ZeroDivisionError) as error:
            raise CheckpointError(
                f"{self.files.get(part, path.parent)} holds no {part} of {self.layout.title} ({error} is missing or "
                "makes no sense), and there is no config.json beside it: take another file"
            ) from None

    def tensors(self, part: str) -> Renamed:
        """A component's tensors, by their published names and in the published layout."""
        file = self.files.get(part)
        if file is None and part in self.layout.wanted and not (self.root / part).is_dir():
            raise CheckpointError(
                f"{self.root} holds no {part} of {self.layout.title}: put {self.layout.wanted[part]} there, or a "
                f"folder {part} with its config.json"
            )
        found: Mapping[str, mx.array] = FolderTensors(self.root / part, [file] if file else None, packs=self.packs)
        if part not in self.layout.files:
            return Renamed(found)
        if file is not None:
            found = self.layout.chosen(part, found)
        return self.layout.renamed(part, found, file or self.root / part)

    def lacking(self) -> dict[str, dict[str, Any]]:
        """The settings that a published model has and this folder does not, by their paths."""
        if self.layout.published is None:
            return {}
        return {path: content for path, content in self.missing().items() if not is_file(self.root / path)}

    def missing(self) -> dict[str, dict[str, Any]]:
        """What these settings would say, by the layout and by what is known of the model."""
        index = {**self.layout.model_index, **self.overrides.get("model_index", {})}
        contents = {"model_index.json": index, "scheduler/scheduler_config.json": self.scheduler()}
        return {path: dict(content) for path, content in contents.items() if content}

    def scheduler(self) -> dict[str, Any]:
        """What `scheduler_config.json` says."""
        path = self.root / "scheduler" / "scheduler_config.json"
        if not is_file(path) and (self.layout.published is not None or not self.layout.has_schedule):
            # A model that is files may have no such settings.
            return dict(self.layout.scheduler(self)) if self.layout.scheduler else {}
        return read_json(path)

    def stored(self, part: str) -> Quantization | None:
        """What a component is quantized to, if at all."""
        if self._by_shape(part):
            return self.tensors(part).quantization
        return Quantization.stored(self.config(part), self.root / part / "config.json")

    def _by_shape(self, part: str) -> bool:
        optional = part in self.layout.config_optional and not is_file(self.root / part / "config.json")
        return part in self.files or optional


class Alone(PublishedFolder):
    """A repository that is one component, without a folder for it."""

    def has(self, part: str) -> bool:
        return True

    def place_of(self, part: str) -> Path:
        return self.root

    def config(self, part: str) -> dict[str, Any]:
        return super().config("")

    def tensors(self, part: str) -> Renamed:
        return super().tensors("")
