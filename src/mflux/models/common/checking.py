"""Whether a model is whole, found out offline and without reading its numbers, by the code that loads it.

A pipeline is made as for a picture; each of its components is built and compared with its tensors, name by name and
shape by shape. Beside that every weights file's header and every index is looked at, also those that no component
reads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mflux import hub
from mflux.checkpoints.folders import read_json, shards_of, weight_files
from mflux.checkpoints.loading import load_component
from mflux.checkpoints.published import PublishedFolder
from mflux.checkpoints.readers.plain import naming_the_copy
from mflux.checkpoints.readers.safetensors import read_header
from mflux.errors import CheckpointError, DownloadError, MfluxError, ModelConfigError
from mflux.hub.cache import Broken, broken_entries, cache_folder, repository_in_cache
from mflux.models.common.config.model_config import ModelConfig, built_key, is_builtin, key_of
from mflux.models.common.family import Component, families, load_object
from mflux.models.common.model import open_folder
from mflux.models.common.pipeline import Pipeline
from mflux.models.common.registry import MODELS
from mflux.models.common.saved_model import FILE_NAME, recorded_base_model
from mflux.text import some
from mflux.utils.paths import snapshot_in, user_path

_SENDS_NOTHING = "a check sends nothing: draw with it once, which fetches it"
# What mflux 0.24 wrote into its files' headers.
_MARKS_024 = ("mflux_version", "quantization_level")
_INDEX = ".safetensors.index.json"


@dataclass
class Report:
    """What a check found.

    Attributes:
        model: the built-in model that it is, or the family; None where nothing tells.
        root: the folder or file that was looked at, None where there is none.
        holder: the folder of Hugging Face's cache that it lies in, if it does.
        layout: "mflux" where mflux saved it, else "safetensors", "gguf" or "torch"; None where there are no weights.
        holds: what a single file holds, in words.
        size: bytes of all weights.
        problems: sentences, each of which keeps the model from being drawn with.
        broken: what is wrong in the cache.
    """

    model: str | None = None
    root: Path | None = None
    holder: Path | None = None
    layout: str | None = None
    holds: str | None = None
    size: int = 0
    problems: list[str] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.problems and not any(entry.is_fault for entry in self.broken)


def check_model(reference: str, base_model: str | None = None) -> Report:
    """Check a model.

    Args:
        reference: a folder or file, a built-in model's name, or a repository in Hugging Face's cache.
        base_model: which built-in model it derives from, where nothing else tells.

    Raises:
        DownloadError: there is no such folder, and nothing of such a repository in the cache.
        ModelConfigError: `base_model` is none.
        UsageError: the model is known, but this version draws with none of its kind.
    """
    with hub.offline(_SENDS_NOTHING):
        root, repository = _root(reference)
        report = Report(root=root, holder=repository_in_cache(root) if root else _holder(repository))
        if report.holder is not None:
            report.broken = broken_entries(report.holder)
        if root is None:
            if not report.broken:
                raise DownloadError(f"{repository} is not in the cache, and {_SENDS_NOTHING}")
            report.problems.append(f"{repository} is not in the cache, or nothing says which of its snapshots to take")
            return report
        problems = [*_loading_problems(report, root, reference, base_model), *_file_problems(report, root)]
        # What is broken in the cache says it already.
        told = [str(entry) for entry in report.broken]
        report.problems = [
            problem
            for problem in dict.fromkeys(problems)
            if not any(problem.startswith(one.partition("; fetch it again")[0]) for one in told)
        ]
    return report


def _root(reference: str) -> tuple[Path | None, str]:
    """The folder or file to look at, and the repository that it is, or would be, a copy of."""
    path = user_path(reference)
    # pathlib's own test raises for a name that is too long.
    try:
        if path.exists():
            return snapshot_in(path), reference
    except OSError as error:
        raise DownloadError(f"cannot look for {path}: {error.strerror or error}") from None
    if is_builtin(reference):
        name = MODELS[key_of(reference)]["model_name"]
        if name == "demo":
            from mflux.demo import checkpoint_folder

            return checkpoint_folder(), name
    elif reference.count("/") == 1 and reference[0] not in "./~":
        name = reference
    else:
        # Says what is wrong with it.
        return hub.resolve_model(reference, ["*"]), reference
    return hub.cached_copy(name), name


def _holder(repository: str) -> Path | None:
    folder = cache_folder() / f"models--{repository.partition('@')[0].replace('/', '--')}"
    return repository_in_cache(folder) if folder.is_dir() else None


# ---- what loading would complain of


def _loading_problems(report: Report, root: Path, reference: str, base_model: str | None) -> Iterator[str]:
    for family in families().values():
        for title, is_one in family.single:
            try:
                if load_object(is_one)(root):
                    report.model = title
                    return
            except MfluxError as error:
                report.model = title
                yield str(error)
                return
    key, model = _told(root, reference, base_model)
    if key is None:
        return
    report.model = model
    model_path = None if is_builtin(reference) else reference
    family = families()[MODELS[key]["family"]]
    pipeline_class: type[Pipeline] = family.pipeline_class(key)
    config = ModelConfig.from_name(reference if model_path is None else str(root), key)
    pipeline, failure = None, None
    try:
        pipeline = pipeline_class(model_path=model_path, model_config=config)
    except MfluxError as error:
        failure = error
    problems = [*_component_problems(pipeline, pipeline_class, root, config)] if root.is_dir() else []
    yield from problems
    # What is missing is said more exactly by then.
    if failure is not None and not (problems and isinstance(failure, DownloadError)):
        yield str(failure)


def _told(root: Path, reference: str, base_model: str | None) -> tuple[str | None, str | None]:
    """The model to load it as, as a key of the registry, and what to call it. As loading tells it: by what is said, by
    its record, by its name; where these say nothing, by what its transformer calls itself."""
    base_model = base_model or recorded_base_model(str(root))
    try:
        key = built_key(reference, base_model)
        return key, key
    except ModelConfigError:
        if base_model is not None:
            raise
    try:
        kind = read_json(root / "transformer" / "config.json").get("_class_name")
    except CheckpointError:
        return None, None
    for family in families().values():
        if any(component.published_class == kind for component in family.components):
            general: type[Pipeline] = load_object(family.pipelines[0])
            return general.default_model, family.title
    return None, None


def _component_problems(
    pipeline: Pipeline | None, pipeline_class: type[Pipeline], root: Path, config: ModelConfig
) -> Iterator[str]:
    """What is wrong with each component, also where the pipeline itself cannot be made."""
    try:
        overrides = {"transformer": config.transformer_overrides}
        folder = pipeline.folder if pipeline else open_folder(root, pipeline_class.family, overrides=overrides)
    except MfluxError as error:
        yield str(error)
        return
    for component in pipeline_class.components:
        if pipeline is None and component.repository is not None and not folder.has(component.folder):
            continue
        try:
            place = folder if pipeline is None else pipeline.folder_of(component)
            _check_component(component, place)
        except MfluxError as error:
            yield str(error)


def _check_component(component: Component, folder: PublishedFolder) -> None:
    """Load a component as `Pipeline.load` does, without its numbers."""
    kind = component.module_class()
    load_component(
        getattr(kind, "stored_class", kind),
        folder.root / component.folder,
        config=folder.config(component.folder),
        tensors=folder.tensors(component.folder),
        read=False,
    )


# ---- files, whoever reads them


def _file_problems(report: Report, root: Path) -> Iterator[str]:
    if root.is_file():
        yield from _alone(report, root)
        return
    sizes, marked = {}, (root / FILE_NAME).is_file()
    for path in _below(root, "*.safetensors"):
        try:
            with naming_the_copy(path):
                _, metadata = read_header(path)
            marked = marked or any(mark in metadata for mark in _MARKS_024)
            found = path.stat()
            sizes[found.st_dev, found.st_ino] = found.st_size
        except CheckpointError as error:
            yield str(error)
    if (root / "config.json").exists():
        try:
            read_json(root / "config.json")
        except CheckpointError as error:
            yield str(error)
    indexes = list(_below(root, f"*{_INDEX}"))
    for index in indexes:
        yield from _index_problems(index, is_needed=report.model is None)
    report.size += sum(sizes.values())
    if sizes:
        report.layout = "mflux" if marked else "safetensors"
    elif not indexes and report.model is None:
        yield f"{root} holds no weights, no .safetensors file: fetch them, or name a folder that has them"


def _alone(report: Report, path: Path) -> Iterator[str]:
    """A single file: of safetensors, or of PyTorch, which is read as far as its table of tensors."""
    from mflux.checkpoints.readers.gguf import GgufFile
    from mflux.checkpoints.readers.opening import open_checkpoint
    from mflux.checkpoints.readers.safetensors import SafetensorsFile
    from mflux.models.common.on_disk import described

    try:
        report.size = path.stat().st_size
        checkpoint = open_checkpoint(path)
        kinds = {SafetensorsFile: "safetensors", GgufFile: "gguf"}
        report.layout = kinds.get(type(checkpoint.files[0]), "torch")
        report.holds = described(path)
    except CheckpointError as error:
        yield str(error)


def _index_problems(index: Path, *, is_needed: bool) -> Iterator[str]:
    """Where an index and its shards disagree.

    `is_needed`: whether shards that are all missing are a fault; a folder in the cache holds indexes of variants that
    nobody fetched.
    """
    try:
        table = shards_of(index)
        shards = set(table.values())
        # pathlib's own test raises for a name that is too long.
        there = any(os.path.exists(index.parent / name) for name in shards)  # noqa: PTH110
        if not is_needed and shards and not there:
            return
        wrong = []
        for shard in weight_files(index):
            names, _ = read_header(shard)
            wrong += [name for name, file in table.items() if file == shard.name and name not in names]
        if wrong:
            yield f"{index} names tensors that its shards do not hold ({some(wrong)}): fetch the folder again"
    except CheckpointError as error:
        yield str(error)


def _below(root: Path, pattern: str) -> Iterator[Path]:
    """Files of that kind in a folder and in those up to two levels below it, as models have them."""
    for level in ("", "*/", "*/*/"):
        yield from sorted(root.glob(level + pattern))
