"""A model that is loaded by stages: its folder, its components, its LoRAs.

Generating an image, checking a folder and saving a model all start from here; what lies between a prompt and an image
is in `pipeline.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Self

from mflux.backend import has_gpu, mx, named_arrays, nn
from mflux.checkpoints import saved_by_024
from mflux.checkpoints.loading import Adjust, FolderTensors, build, load_component
from mflux.checkpoints.published import Alone, Layout, PublishedFolder
from mflux.checkpoints.quantization import Quantization, planned
from mflux.checkpoints.saving import copy_beside, estimated_bytes, new_folder, save_component, size_of, write_json
from mflux.chips import HALF
from mflux.errors import CheckpointError, UsageError
from mflux.hub import resolve_model
from mflux.models.common.arguments import checked
from mflux.models.common.component_config import ComponentConfig
from mflux.models.common.config.model_config import (
    AVAILABLE_MODELS,
    ModelConfig,
    check_is_somewhere,
    check_model_config,
)
from mflux.models.common.family import STAGES, Component, Family, families, load_object
from mflux.models.common.lora.adapters import Adapter, put_on, take_off
from mflux.models.common.lora.library import find_loras
from mflux.models.common.lora.names import LoraNames
from mflux.models.common.lora.reading import Loras
from mflux.models.common.memory import Encoded, Keep, LazyComponent, give_back_memory, is_loaded, release, timed
from mflux.models.common.networks.divided import divide
from mflux.models.common.networks.interiors import compute_in
from mflux.models.common.networks.modulation import layers_changed
from mflux.models.common.on_disk import kind_on_disk
from mflux.models.common.saved_model import FILE_NAME, record
from mflux.text import shown, with_article
from mflux.utils.paths import is_file, is_folder, user_path

log = logging.getLogger(__name__)


class Model:
    """Base of the classes that generate. Components are attributes that load when they are first read.

    Args:
        quantize: 3, 4, 5, 6 or 8 bits for the weights of linear layers and embeddings, quantized while they load.
        model_path: a folder or Hugging Face repository to take the weights from instead of the model's own; or one
            component in one safetensors file, with names that the family's `Layout` knows: all else then comes from the
            model's own repository.
        lora_paths: LoRAs to apply one after the other: files, names from LORA_LIBRARY_PATH, or files on Hugging Face,
            see `find_lora`.
        lora_scales: how much of each: 0 is nothing, 1 (where none is given) as it was trained.
        bake_lora: add them to the weights while these load; weights that are stored quantized stay as they are, and
            LoRAs are computed beside them in each step.
        model_config: which model; the class's `default_model` by default.
        text_encoder_paths: text encoders to take instead of the model's own, each a file, a folder with its
            `config.json`, or a Hugging Face repository that is one.
        vae_path: an autoencoder to take instead, likewise.
        compute_precision: what attention and feed-forwards compute in, of a model whose family may (`Family.float16`):
            `mx.float16`; or `mx.bfloat16`, which leaves them as the weights are stored. Without it, weights in bfloat16
            are computed in float16 on the chips that `chips.HALF` has, and where values turn out too large for it, in
            bfloat16 from then on.

    Attributes:
        family: the family whose table describes the model.
        components: the family's, and what a subclass adds to them. Each has a `LazyComponent` of its name, which a
            subclass declares with the component's type.
        default_model: a key of the registry.
        repository: where the weights come from that no `model_path` names, if not from the model's own repository.
        latents: channels of the latents, pixels along a side of each, and channels of a token that the transformer
            takes (None: the class checks them itself), which a folder's parts must agree on.
        keep: which components stay in memory past their stage.
        narrows: whether it computes in float16 where nobody asked for it.
        vae_full_precision: encode and decode in float32, whatever the weights are stored in, and the whole image at
            once.
        works_ahead: whether what modulates is worked out before the first step, its weights read for that and let go;
            training has them in each step, for a gradient passes through them.
        divides: whether the class's transformer can be divided among several processes.
        divided_among: the processes that it is divided among when it is loaded; None: this one has all of it.

    Raises:
        DownloadError: the weights cannot be had.
        CheckpointError: the folder is not a model of this kind, or a LoRA is not for this model.
        UsageError: no such number of bits, no such precision, or more scales than LoRAs.
    """

    # What an object has that a program puts together of another one's parts, as mflux 0.24 let it: it makes one with
    # `Class.__new__(Class)`, and sets what generating needs. There is no folder, so it lets go of no part.
    prompt_cache: dict[Any, Any]
    keep = Keep()
    model_path: str | None = None
    text_encoder_paths: list[str] | None = None
    vae_path: str | None = None
    lora_paths: list[str] | None = None
    lora_scales: list[float] | None = None
    bake_lora = True
    bits: int | None = None
    vae_full_precision = False
    works_ahead = True
    divides: ClassVar[bool] = False
    divided_among: Any = None

    family: ClassVar[Family]
    components: ClassVar[tuple[Component, ...]] = ()
    default_model: ClassVar[str]
    repository: ClassVar[str | None] = None
    latents: ClassVar[tuple[int, int, int | None] | None] = None
    narrows: ClassVar[bool] = True
    compute_precision: mx.Dtype | None = None
    _too_narrow = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("mflux."):
            for method in ("__init__", "generate_image"):
                if method in cls.__dict__:
                    setattr(cls, method, checked(cls.__dict__[method]))
        if "family" in cls.__dict__ and "components" not in cls.__dict__:
            cls.components = cls.family.components
        for component in cls.components:
            lazy: LazyComponent[nn.Module] = LazyComponent(partial(_load, component))
            lazy.__set_name__(cls, component.name)
            setattr(cls, component.name, lazy)

    @checked
    def __init__(
        self,
        quantize: int | None = None,
        model_path: str | None = None,
        lora_paths: list[str] | None = None,
        lora_scales: list[float] | None = None,
        bake_lora: bool = True,
        model_config: ModelConfig | None = None,
        *,
        text_encoder_paths: list[str] | None = None,
        vae_path: str | None = None,
        compute_precision: mx.Dtype | None = None,
    ):
        if compute_precision is not None and compute_precision not in (mx.float16, mx.bfloat16):
            raise UsageError(
                f"compute_precision is {shown(compute_precision, 60)}: it is mx.float16, mx.bfloat16 or None"
            )
        if compute_precision is not None and not self.family.float16:
            raise UsageError(f"{self.family.title} has no compute_precision (--compute-precision): leave it out")
        self.compute_precision = compute_precision
        if model_config is not None:
            check_model_config(model_config)
        asked = Quantization.asked(quantize)
        self._packs = asked is None
        # Found before the model is, which may be a long download.
        loras = find_loras(lora_paths, lora_scales)
        self.registered = model_config or ModelConfig.from_name(self.default_model)
        self._folders: dict[str, PublishedFolder] = {}
        # What does not come from the model's folder, and where it comes from.
        self._sources: dict[str, str] = {}
        # Components that are one file elsewhere.
        self._files: dict[str, Path] = {}
        self.text_encoder_paths, self.vae_path = text_encoder_paths, vae_path
        for name in text_encoder_paths or ():
            self._take_part(name, [one for one in self.components if "text_encoder" in one.folder])
        if vae_path is not None:
            self._take_part(vae_path, [one for one in self.components if one.folder == "vae"])
        self.root = self.resolve_folder(model_path, self.registered)
        overrides = {"transformer": self.registered.transformer_overrides}
        self.folder = open_folder(self.root, self.family, overrides=overrides, files=self._files, packs=self._packs)
        self.check_folder()
        self._check_headers()
        self.model_path = model_path
        self.model_config = self.registered.with_scheduler(self.folder.scheduler())
        stored = self.folder_of(self.component("transformer")).stored("transformer")
        # What the images say: a folder that is quantized stays as it is, whatever is asked for.
        self.bits = stored.bits if stored else asked.bits if asked else None
        self._quantize = quantize
        self.prompt_cache = Encoded()
        self._take_loras(*loras, bake_lora)
        if not bake_lora and not self.lora_paths:
            log.warning("bake_lora (--no-bake-lora) is ignored: there is no LoRA")
        self.opened()

    def _take_part(self, name: str, fitting: list[Component]) -> None:
        """Take a component from elsewhere.

        Args:
            name: a file, a folder or a repository.
            fitting: the components that it may be.

        Raises:
            DownloadError: it cannot be had.
            CheckpointError: it is none of them.
        """
        layout, path = layout_of(self.family), user_path(name)
        what = " or ".join(component.folder.replace("_", " ") for component in fitting) or "such part"
        if is_file(path):
            tensors = FolderTensors(path.parent, [path])
            fits = [
                one for one in fitting
                if one.folder in layout.files and layout.settings_in(one.folder, tensors) is not None
            ]  # fmt: skip
            if not fits:
                raise CheckpointError(
                    f"{shown(path, 300)} holds no {what} of {self.family.title}, or none whose names are known: take "
                    "another file, or a folder with its config.json"
                )
            for component in fits:
                self._files[component.folder] = path
                self._sources[component.folder] = name
            return
        found: list[tuple[Component, PublishedFolder]] = []
        for component in fitting:
            root = resolve(name, [replace(component, folder="")], ())
            folder = Alone(root, packs=self._packs)
            if _is_one(component, folder):
                found.append((component, folder))
        if len(found) != 1:
            raise CheckpointError(f"{shown(name, 300)} holds no {what} of {self.family.title}: take another")
        component, place = found[0]
        self._folders[component.name] = place
        self._sources[component.folder] = name

    def opened(self) -> None:
        """Read what a class needs beside its components, once the folder is known to be sound."""

    @classmethod
    def from_name(cls, model_name: str, quantize: int | None = None) -> Self:
        """A built-in model by its name or alias."""
        return cls(model_config=ModelConfig.from_name(model_name), quantize=quantize)

    @cached_property
    def registered(self) -> ModelConfig:
        """The model as the registry has it; `model_config` has the checkpoint's schedule."""
        return self.model_config

    @property
    def folder_root(self) -> Path | None:
        """The model's folder; None for an object that a program put together."""
        return vars(self).get("root")

    @property
    def key(self) -> str:
        """The registry's name of this model, or of the one it derives from."""
        return key_in_registry(self.model_config)

    # ---- the folder

    def resolve_folder(self, model_path: str | None, model_config: ModelConfig) -> Path:
        """The folder with the model's components, downloaded if need be.

        Raises:
            DownloadError: it cannot be had.
        """
        if model_path is None and model_config.model_name == "demo":
            from mflux.demo import checkpoint_folder

            return checkpoint_folder()
        name = self.source(model_path, model_config)
        parts = [component for component in self.own_components() if component.folder not in self._files]
        layout = layout_of(self.family)
        split = {} if layout.split is None else layout.split(key_in_registry(model_config))
        split = {part.folder: split[part.folder] for part in parts if part.folder in split}
        files = tuple(dict.fromkeys(split.values()))
        root = resolve(name, parts, self.family.beside, split=files, lies_in=layout.lies_in)
        there = {part: root / file for part, file in split.items() if is_file(root / file)}
        self._files = {part: file for part, file in there.items() if not is_folder(root / part)} | self._files
        return root

    def source(self, model_path: str | None, model_config: ModelConfig) -> str:
        """The folder or repository to look in. Where `model_path` is one component in a file, that is noted, and it is
        the model's own for all else."""
        if model_path is None:
            return self.repository or model_config.model_name
        layout = layout_of(self.family)
        found = layout.parts_in(model_path)
        if not found:
            return model_path
        for part, file in found.items():
            # Says what is wrong with the file before all else is downloaded.
            PublishedFolder(file.parent, replace(layout, published=None), files={part: file}).config(part)
        # What was given for a part alone is meant.
        self._files = found | self._files
        return self.repository or model_config.base_model or model_config.model_name

    def own_components(self) -> list[Component]:
        """Those that the model's folder has to have."""
        elsewhere = self._folders
        return [one for one in self.components if one.repository is None and one.name not in elsewhere]

    def check_folder(self) -> None:
        """
        Raises:
            CheckpointError: the folder holds a model of another kind, or parts of different ones.
        """
        for component in self.components:
            if component.published_class and component.repository is None and self.folder.has(component.folder):
                kind = self.folder_of(component).config(component.folder).get("_class_name", component.published_class)
                if kind != component.published_class:
                    raise CheckpointError(
                        f"{self.root} holds {with_article(shown(kind, 60))}, not "
                        f"{self.family.title}'s {component.name}: {_who_draws(kind)}"
                    )
        if self.latents is not None:
            self._check_latents(*self.latents)

    def _check_headers(self) -> None:
        """Look at what the files of weights say of themselves: a cut one is told now, and not when its turn comes. Text
        encoders come first in any case, or not at all where the prompt is encoded already.

        Raises:
            CheckpointError: one is damaged, or there are none.
        """
        for component in self.components:
            place = self._folders.get(component.name, self.folder)
            if component.stage != "encode" and place.has(component.folder):
                place.tensors(component.folder)

    def _check_latents(self, channels: int, side: int, token: int | None) -> None:
        taken = self.transformer_settings().get("in_channels", token)
        vae = self.configuration("vae")
        if (*vae.latents, taken if token else None) == (channels, side, token):
            return
        has, pixels = vae.latents
        also, ours = (f" and a transformer that takes {shown(taken, 60)}", f", {token} a token") if token else ("", "")
        raise CheckpointError(
            f"{self.root} holds an autoencoder with {has} latent channels for every {pixels} pixels of a side{also}; "
            f"{self.family.title}'s has {channels} for every {side}{ours}: put the folders of one model there"
        )

    def component(self, name: str) -> Component:
        """One of `components`, by name."""
        return next(component for component in self.components if component.name == name)

    def folder_of(self, component: Component) -> PublishedFolder:
        """Where a component lies: in the model's folder, or where that has none, in a repository of its own.

        Raises:
            DownloadError: the repository cannot be had.
        """
        if component.name in self._folders:
            return self._folders[component.name]
        if component.repository is None or self.folder.has(component.folder):
            return self.folder
        name = getattr(self.model_config, component.repository, None) or component.repository
        return self.elsewhere(component, name, at_root=component.at_root)

    def elsewhere(self, component: Component, name: str, *, at_root: bool) -> PublishedFolder:
        """A folder or repository with a component that does not lie in the model's folder.

        Args:
            at_root: whether its files lie there without a folder of their own.

        Raises:
            DownloadError: it cannot be had.
        """
        if component.name not in self._folders:
            root = resolve(name, [replace(component, folder="") if at_root else component], component.beside)
            kind = Alone if at_root else PublishedFolder
            self._folders[component.name] = kind(root, packs=self._packs)
            self._sources[component.folder] = name
        return self._folders[component.name]

    def transformer_settings(self) -> dict[str, Any]:
        """The transformer's `config.json`."""
        component = self.component("transformer")
        return self.folder_of(component).config(component.folder)

    def configuration(self, name: str) -> Any:
        """A component's configuration, a `ComponentConfig`, without loading it.

        Raises:
            CheckpointError: it asks for something that cannot be built.
        """
        component = self.component(name)
        if self.folder_root is None:
            return getattr(self, name).config
        folder = self.folder_of(component)
        source = folder.root / component.folder / "config.json"
        config_class: type[ComponentConfig] = component.module_class().config_class
        return config_class.from_dict(folder.config(component.folder), source=source)

    def encoded_from(self) -> list[Path]:
        """The files and folders that what encoders make of a prompt follows from: theirs, and the tokenizers'."""
        encoders = [one for one in self.components if one.stage == "encode"]
        places = [self.folder_of(one).place_of(one.folder) for one in encoders]
        beside = [self.folder_of(one).root / name for one in encoders for name in one.beside]
        return [*places, *beside, *(self.root / name for name in self.family.beside), self.root / FILE_NAME]

    # ---- components

    def load(self, component: Component, *, keep_dtypes: bool = False) -> nn.Module:
        """A component, filled from its folder, with its LoRAs.

        Raises:
            UsageError: the object was put together by a program, and has none.
        """
        if self.folder_root is None:
            raise UsageError(
                f"this {type(self).__name__} was put together without a {component.name}, and has no folder to load it "
                f"from: hand it over, or make it with {type(self).__name__}(…)"
            )
        folder = self.folder_of(component)
        part = component.folder
        module_class = component.module_class()
        if keep_dtypes:
            # What a class leaves out because no image needs it belongs into a folder that others read as well.
            module_class = getattr(module_class, "saved_class", module_class)
        dtype = getattr(mx, component.dtype) if component.dtype and has_gpu() else None
        among = self.divided_among if component.name == "transformer" else None
        full = self.vae_full_precision and component.name == "vae"
        load = partial(
            load_component,
            module_class,
            folder.root / part,
            dtype=mx.float32 if full and not keep_dtypes else dtype,
            quantize=self._quantize,
            keep_dtypes=keep_dtypes and dtype is None,
            config=folder.config(part),
            tensors=self.tensors_of(component, to_save=keep_dtypes),
            # What is to be saved has to be there.
            late=component.stage == "denoise" and not keep_dtypes and self.works_ahead,
            divide=None if among is None or keep_dtypes else lambda module, tensors: divide(module, tensors, among),
        )

        def loaded(adjust: Adjust | None = None) -> nn.Module:
            module: nn.Module = load(adjust=adjust)
            if component.stage == "denoise" and not keep_dtypes and self.computes_in_float16(module):
                compute_in(module, mx.float16)
            return module

        loras = self.loras_of(component, to_save=keep_dtypes)
        return loaded() if loras is None else loras.apply(part, loaded, bake=self._bakes, to_save=keep_dtypes)

    def computes_in_float16(self, module: nn.Module | None = None) -> bool:
        """Whether attention and feed-forwards compute in float16 though their weights are stored otherwise.

        Args:
            module: the part in question, as it was loaded; without it, whether any may.
        """
        if self.compute_precision is not None:
            return self.compute_precision == mx.float16
        by_itself = self.family.float16 and self.narrows and self.works_ahead and HALF.applies
        # Of several processes one might find float16 too narrow, and another not.
        is_alone = self.divided_among is None and getattr(self, "shares_guidance", None) is None
        if not (by_itself and is_alone) or self._too_narrow:
            return False
        return module is None or any(value.dtype == mx.bfloat16 for _, value in named_arrays(module.parameters()))

    def tensors_of(self, component: Component, *, to_save: bool) -> Mapping[str, mx.array]:
        """What a component is filled from, by its published names."""
        return self.folder_of(component).tensors(component.folder)

    def loras_of(self, component: Component, *, to_save: bool) -> Loras | None:
        """What is added to its layers."""
        return self._loras

    @checked
    def set_loras(self, paths: list[str] | None, scales: list[float] | None = None, bake: bool = True) -> None:
        """Apply other LoRAs than before, or none.

        Components whose weights hold LoRAs, or are to hold some, are loaded anew when they are needed. Without `bake`
        LoRAs are taken off and put on beside weights that stay; of those that were let go of after they had done their
        work, what a LoRA changes is read again.

        Args:
            paths, scales, bake: as `lora_paths`, `lora_scales` and `bake_lora`.

        Raises:
            DownloadError: a LoRA cannot be had.
            CheckpointError: it is not for this model.
            UsageError: more scales than LoRAs.
        """
        bakes, before = self._bakes, self._adapters()
        self._take_loras(*find_loras(paths, scales), bake)
        after = self._adapters()
        for component in self.components:
            old, new = before.get(component.name), after.get(component.name)
            if not (old or new):
                continue
            if component.stage == "encode":
                self.prompt_cache.clear()
            if not is_loaded(self, component.name):
                continue
            if (old and bakes) or (new and self._bakes):
                release(self, component.name)
                continue
            module = getattr(self, component.name)
            try:
                take_off(module)
                put_on(module, new or {})
            except BaseException:
                # Loaded anew it has what it should have, or says why not.
                release(self, component.name)
                raise
            layers_changed(module)

    @property
    def _bakes(self) -> bool:
        """Whether what is added to layers goes into their weights."""
        return self.bake_lora or self._loras is None

    def _adapters(self) -> dict[str, Mapping[str, Sequence[Adapter]]]:
        """What is added to the layers of each component that LoRAs may change."""
        loras = {one.name: self.loras_of(one, to_save=False) for one in self.components if one.lora}
        return {name: found.of(self.component(name).folder) for name, found in loras.items() if found is not None}

    def _take_loras(self, names: list[str], files: list[Path], scales: list[float], bake: bool) -> None:
        # As they were asked for: what an image says of them means the same on another machine.
        loras = self._match_loras(files, scales) if files else None
        self.lora_paths = names or None
        self.lora_scales = scales or None
        self.bake_lora = bake
        self._lora_files = files
        self._loras = loras

    def _match_loras(self, files: list[Path], scales: list[float]) -> Loras:
        if self.family.lora is None:
            raise UsageError(f"{self.family.title} takes no LoRAs: leave lora_paths (--lora) out")
        modules = {}
        for component in self.components:
            if component.lora:
                # Its arrays are never computed: only the layers' names and shapes are needed.
                folder, part = self.folder_of(component), component.folder
                modules[part] = build(
                    component.module_class(),
                    folder.config(part),
                    folder.tensors(part),
                    source=folder.root / part / "config.json",
                )
        names: LoraNames = load_object(self.family.lora)
        return Loras(files, scales, spellings=names.spellings, layouts=names.layouts, modules=modules)

    def make_room_for(self, stage: str) -> None:
        """Release the components that `keep` does not hold past the beginning of a stage."""
        if self.folder_root is None:
            return
        later = STAGES[STAGES.index(stage) + 1 :]
        if stage == "encode" and not self.keep.transformer:
            self.release_stages(*later)
        elif stage == "decode" and not self.keep.for_next_image:
            self.release_stages("encode", "denoise")

    def release_encoders(self, *names: str) -> None:
        """Release text encoders that have done their work, unless they are to be kept."""
        if not self.keep.text_encoders and self.folder_root is not None:
            release(self, *(name for name in names if is_loaded(self, name)))

    def release_stages(self, *stages: str) -> None:
        """Release every loaded component of these stages."""
        names = [component.name for component in self.components if component.stage in stages]
        release(self, *(name for name in names if is_loaded(self, name)))

    def loaded(self) -> dict[str, nn.Module]:
        """The components that are in memory, by name; asking loads none."""
        names = [component.name for component in self.components]
        return {name: getattr(self, name) for name in names if is_loaded(self, name)}

    def named_modules(self) -> list[tuple[str, Any]]:
        """All modules of the loaded components with their paths, as MLX's modules have it."""
        modules: list[tuple[str, Any]] = [("", self)]
        for name, component in self.loaded().items():
            modules += [(f"{name}.{path}" if path else name, module) for path, module in component.named_modules()]
        return modules

    def parameters(self) -> dict[str, Any]:
        """The parameters of the loaded components, nested by name."""
        return {name: component.parameters() for name, component in self.loaded().items()}

    def named_parameters(self) -> Iterator[tuple[str, mx.array]]:
        """The parameters of the loaded components with their paths."""
        yield from named_arrays(self.parameters())

    @property
    def state(self) -> dict[str, Any]:
        """As `parameters`; nothing here is trained."""
        return self.parameters()

    @property
    def training(self) -> bool:
        return False

    def train(self, mode: bool = True) -> Self:
        """Returns itself: nothing here behaves otherwise in training."""
        return self

    def eval(self) -> Self:
        """As `train`."""
        return self

    def freeze(self, **_: Any) -> Self:
        """Returns itself: components are frozen from the start."""
        return self

    # ---- saving

    @checked
    def save_model(self, base_path: str) -> None:
        """Write the model to a folder in the published layout, quantized if it is, with its LoRAs in the weights.

        Components are released, then loaded, written and released one after the other. Floats keep the dtype that
        they were stored in. The folder takes its name when all is written; otherwise there is none.

        Args:
            base_path: the folder, which must not exist or must be empty.

        Raises:
            OutputError: it exists, cannot be written, or the disk has too little room.
            CheckpointError: there are LoRAs, and the weights are stored quantized.
        """
        self.release_stages(*STAGES)
        wanted = Quantization.asked(self._quantize)
        needed = sum(self._estimated_bytes(part, wanted) for part in self.components)
        with new_folder(user_path(base_path), needed=needed) as target:
            for part in self.components:
                with timed(f"save {part.folder}") as note:
                    component = self.load(part, keep_dtypes=True)
                    config = self.folder_of(part).config(part.folder)
                    size = save_component(component, target / part.folder, config, stem=part.stem)
                    note.append(f"{size / 1e9:.2f} GB")
                    del component
                    give_back_memory()
                    copy_beside(self.folder_of(part).root, target, part.beside)
            self.copy_beside(target)
            for path, content in self.folder.lacking().items():
                write_json(target / path, content)
            content = record(
                key=self.key,
                source=self.model_path,
                root=self.root,
                bits=self.bits,
                size=size_of(target),
                loras=list(zip(self.lora_paths or (), self.lora_scales or (), self._lora_files, strict=True)),
                sources={
                    part.folder: (self._sources[part.folder], self.folder_of(part).root)
                    for part in self.components
                    if part.folder in self._sources
                },
            )
            write_json(target / FILE_NAME, content)

    def copy_beside(self, target: Path) -> None:
        """Copy what a model needs beside its components into a folder that is being saved."""
        copy_beside(self.root, target, self.family.beside)

    def _estimated_bytes(self, part: Component, wanted: Quantization | None) -> int:
        folder = self.folder_of(part)
        tensors = folder.tensors(part.folder)
        if wanted is None:
            return estimated_bytes(tensors, None)
        source = folder.root / part.folder / "config.json"
        kind = part.module_class()
        module = build(getattr(kind, "saved_class", kind), folder.config(part.folder), tensors, source=source)
        return estimated_bytes(tensors, wanted, planned(module, wanted))


def _is_one(component: Component, folder: PublishedFolder) -> bool:
    """Whether a folder is a component: by what its configuration says, or by whether its tensors fit."""
    config = folder.config("")
    if component.published_class and "_class_name" in config:
        return bool(component.published_class == config["_class_name"])
    try:
        load_component(component.module_class(), folder.root, config=config, tensors=folder.tensors(""), read=False)
    except CheckpointError:
        return False
    return True


def _load(component: Component, model: Model) -> nn.Module:
    return model.load(component)


def key_in_registry(model_config: ModelConfig) -> str:
    """The registry's name of a model. Its aliases tell: several models share a repository."""
    return next(key for key, model in AVAILABLE_MODELS.items() if model.aliases == model_config.aliases)


def layout_of(family: Family) -> Layout:
    """How a family's files look where they do not look as published."""
    layout: Layout = load_object(family.layout) if family.layout else Layout(family.title)
    return layout


def open_folder(root: Path, family: Family, **options: Any) -> PublishedFolder:
    """A model's folder, of whichever layout it is; `options` as `PublishedFolder` has them."""
    return saved_by_024.open_folder(root, layout_of(family), **options)


def resolve(
    name: str,
    components: list[Component],
    beside: tuple[str, ...],
    *,
    split: tuple[str, ...] = (),
    lies_in: Collection[str] = (),
) -> Path:
    """The folder of a model in the published layout or in mflux 0.24's, downloaded if need be.

    Args:
        split: the files that are its components where it is published without folders for them.
        lies_in: components that mflux 0.24 saved with another one.

    Raises:
        DownloadError: it cannot be had.
        ModelConfigError: the name is no folder's and no repository's.
    """
    check_is_somewhere(name)
    here = user_path(name) if str(name).strip() else Path()
    if is_file(here):
        raise CheckpointError(str(kind_on_disk(here)))
    # Most repositories also hold the transformer as one file in another layout.
    parts = [f"{component.folder}/" if component.folder else "" for component in components]
    files = [entry if "." in entry else f"{entry}/*" for entry in beside]
    files += [f"{part}*{ending}" for part in parts for ending in (".json", ".safetensors")]
    files += split

    def required(settings: str, parts: list[str]) -> list[str]:
        return [f"{part}{file}" for part in parts for file in (settings, "*.safetensors")]

    # What mflux 0.24 saved has no configurations.
    saved = [part for part in parts if part.rstrip("/") not in lies_in]
    alternatives = [required("model.safetensors.index.json", saved), *([list(split)] if split else [])]
    root = resolve_model(name, files, required=required("config.json", parts), alternatives=alternatives)
    is_split = any(is_file(root / file) for file in split)
    if is_folder(here) and all(parts) and not is_split and not any(is_folder(root / part) for part in parts):
        raise CheckpointError(str(kind_on_disk(root)))
    return root


def _who_draws(kind: str) -> str:
    """Which command draws with a component of that published class, as the end of a sentence."""
    for family in families().values():
        if any(component.published_class == kind for component in family.components) and family.commands:
            command = family.commands[0]
            key = next(key for key in command.models if key != "demo")
            return f"mflux-{command.name} --base-model {key} draws with it"
    return "this version does not build it, mflux --help lists those that are"
