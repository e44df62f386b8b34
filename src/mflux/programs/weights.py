"""mflux 0.24's way to a model's stored tensors, as a thin view of the folder: for programs that read weights.

What comes out are the tensors as they are stored: by their published names, or in a folder that mflux 0.24 saved by the
names that it saves. Nothing is read until it is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mflux.backend import mx, tree_unflatten
from mflux.checkpoints.loading import FolderTensors
from mflux.checkpoints.saved_by_024 import FolderOf024
from mflux.errors import CheckpointError, UsageError
from mflux.hub import resolve_model
from mflux.models.common.family import Component, Family, families
from mflux.models.common.model import open_folder, resolve
from mflux.text import shown, written
from mflux.utils.values import path

# mflux 0.24's names for components that have others here.
_NAMES = {"t5_text_encoder": "t5_encoder", "clip_text_encoder": "clip_encoder"}
# Family → what its tokenizers are called, and where they lie.
_TOKENIZERS = {
    "flux": {"clip": "tokenizer", "t5": "tokenizer_2"},
    "flux2": {"qwen3": "tokenizer"},
    "flux3": {"qwen3_vl": "text_encoder"},
    "qwen": {"qwen": "tokenizer"},
    "z_image": {"z_image": "tokenizer"},
    "anima": {"qwen3": "tokenizer", "t5": "tokenizer_2"},
    "fibo": {"fibo": "tokenizer"},
    "seedvr2": {},
    "ernie_image": {"ernie": "tokenizer"},
    "krea2": {"qwen3vl": "tokenizer"},
    "ideogram4": {"ideogram4": "tokenizer"},
}


class ComponentDefinition:
    """A part of a model, as mflux 0.24 defines it; one of a program's own is a folder of safetensors.

    Args:
        name: mflux 0.24's name for it.
        hf_subdir: its folder.
        model_attr: the attribute of a model's object that it is.
        changes: what mflux 0.24 does to its tensors; what loads such a component says that it is not here.
        family, part: what it is here.
    """

    def __init__(
        self,
        name: str,
        hf_subdir: str,
        *,
        model_attr: str | None = None,
        family: Family | None = None,
        part: Component | None = None,
        **changes: Any,
    ):
        self.name, self.hf_subdir, self.model_attr = name, hf_subdir, model_attr
        self.family, self.part = family, part
        self.changes = {what: value for what, value in changes.items() if value is not None}


@dataclass(frozen=True)
class TokenizerDefinition:
    """A tokenizer of a model, and its folder."""

    name: str
    hf_subdir: str


@dataclass
class MetaData:
    """To how many bits the first component that says it is quantized."""

    quantization_level: int | None = None
    mflux_version: str | None = None


@dataclass
class LoadedWeights:
    """Tensors of components, each nested by the parts of their names; a component is an attribute as well."""

    components: dict[str, Any]
    meta_data: MetaData

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "components":
            raise AttributeError(name)
        return self.components.get(name)

    def num_transformer_blocks(self, component_name: str = "transformer") -> int:
        """How many double blocks a transformer has."""
        return len((self.components.get(component_name) or {}).get("transformer_blocks", ()))

    def num_single_transformer_blocks(self, component_name: str = "transformer") -> int:
        """How many single blocks."""
        return len((self.components.get(component_name) or {}).get("single_transformer_blocks", ()))


class _WeightDefinition:
    """Base of the tables that mflux 0.24 had for each family."""

    family_name: ClassVar[str]

    @classmethod
    def _family(cls) -> Family:
        return families()[cls.family_name]

    @classmethod
    def get_components(cls) -> list[ComponentDefinition]:
        """The family's components."""
        family = cls._family()
        return [
            ComponentDefinition(
                _NAMES.get(part.name, part.name), part.folder, model_attr=part.name, family=family, part=part
            )
            for part in family.components
        ]

    @classmethod
    def get_tokenizers(cls) -> list[TokenizerDefinition]:
        """Its tokenizers."""
        return [TokenizerDefinition(*entry) for entry in _TOKENIZERS[cls.family_name].items()]

    @classmethod
    def get_download_patterns(cls) -> list[str]:
        """Which files of a repository hold its components."""
        return [f"{part.folder}/*.{ending}" for part in cls._family().components for ending in ("safetensors", "json")]


class FluxWeightDefinition(_WeightDefinition):
    family_name = "flux"


class Flux2KleinWeightDefinition(_WeightDefinition):
    family_name = "flux2"


class Flux3KleinWeightDefinition(_WeightDefinition):
    family_name = "flux3"


class QwenWeightDefinition(_WeightDefinition):
    family_name = "qwen"


class ZImageWeightDefinition(_WeightDefinition):
    family_name = "z_image"


class FIBOWeightDefinition(_WeightDefinition):
    family_name = "fibo"


class AnimaWeightDefinition(_WeightDefinition):
    family_name = "anima"


class SeedVR2WeightDefinition(_WeightDefinition):
    family_name = "seedvr2"


class ErnieWeightDefinition(_WeightDefinition):
    family_name = "ernie_image"


class Krea2WeightDefinition(_WeightDefinition):
    family_name = "krea2"


class Ideogram4WeightDefinition(_WeightDefinition):
    family_name = "ideogram4"


class WeightLoader:
    @staticmethod
    def load(
        weight_definition: Any,
        model_path: str | None = None,
        download_patterns: list[str] | None = None,
    ) -> LoadedWeights:
        """All components of a model.

        Args:
            weight_definition: a family's, or a program's own, with `get_components` and `get_download_patterns`.
            model_path: a folder, or a repository, which is downloaded.
            download_patterns: which files of a repository a definition of one's own needs; a family's knows them.

        Raises:
            UsageError: no `model_path`.
            DownloadError: it cannot be had.
            CheckpointError: it is damaged.
        """
        if model_path is None:
            raise UsageError("WeightLoader.load needs model_path: a model's folder, or a repository as org/name")
        parts: list[ComponentDefinition] = weight_definition.get_components()
        _refuse_changes(*parts)
        if isinstance(weight_definition, type) and issubclass(weight_definition, _WeightDefinition):
            family = weight_definition._family()
            root = resolve(str(model_path), list(family.components), family.beside)
        else:
            patterns = download_patterns or weight_definition.get_download_patterns()
            weights = [pattern for pattern in patterns if pattern.endswith(".safetensors")]
            root = resolve_model(str(model_path), patterns, required=weights)
        loaded = [WeightLoader.load_single_local(part, root) for part in parts]
        levels = [one.meta_data.quantization_level for one in loaded]
        level = next((level for level in levels if level is not None), None)
        return LoadedWeights({name: tree for one in loaded for name, tree in one.components.items()}, MetaData(level))

    @staticmethod
    def load_single(component: ComponentDefinition, repo_id: str, file_pattern: str = "*.safetensors") -> LoadedWeights:
        """One component of a repository or folder; `file_pattern` is taken for compatibility.

        Raises:
            DownloadError: it cannot be had.
            CheckpointError: it is damaged.
        """
        _refuse_changes(component)
        if component.family is None or component.part is None:
            raise UsageError(f"{component.name}: what it is of says get_components() of a weight definition")
        return WeightLoader.load_single_local(component, resolve(repo_id, [component.part], component.family.beside))

    @staticmethod
    def load_single_local(component: ComponentDefinition, root_path: Path | str) -> LoadedWeights:
        """One component of a model's folder: `components[component.name]` are its tensors.

        Raises:
            CheckpointError: it is not there, or damaged.
            UsageError: it is a definition that changes its tensors.
        """
        _refuse_changes(component)
        root = path(root_path, "root_path")
        if component.family is None:
            return LoadedWeights({component.name: _nested(FolderTensors(root / component.hf_subdir))}, MetaData())
        folder = open_folder(root, component.family)
        if not folder.has(component.hf_subdir):
            raise CheckpointError(
                f"{root} holds no {component.hf_subdir or component.name}: it has to be a model's folder"
            )
        stored = folder.stored(component.hf_subdir)
        tensors: Mapping[str, mx.array] = folder.tensors(component.hf_subdir)
        if isinstance(folder, FolderOf024):
            tensors = folder.as_stored(component.hf_subdir)
        return LoadedWeights({component.name: _nested(tensors)}, MetaData(stored.bits if stored else None))


def _refuse_changes(*components: ComponentDefinition) -> None:
    for component in components:
        if not isinstance(component, ComponentDefinition):
            raise UsageError(
                f"{shown(written(component), 60)} is no ComponentDefinition: get_components() of a weight definition "
                "gives some"
            )
        if component.changes:
            raise UsageError(
                f"the component {component.name} is defined with {', '.join(component.changes)}: tensors are given as "
                "they are stored here, so leave that out and rename them yourself"
            )


def _nested(tensors: Mapping[str, mx.array]) -> Any:
    return tree_unflatten([(name, tensors[name]) for name in tensors])
