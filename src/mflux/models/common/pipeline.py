"""What all pipelines share: the tools between a prompt and a picture.

A family's class keeps its own `generate_image`, which reads from top to bottom; nothing here calls it. What stands
here is the same for all: loading by stages, LoRAs, saving, the denoising loop, decoding.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from mflux.backend import has_gpu, mx, nn, tree_flatten
from mflux.callbacks.callback_registry import CallbackRegistry
from mflux.checkpoints import saved_by_024
from mflux.checkpoints.loading import build, load_component
from mflux.checkpoints.published import Alone, Layout, PublishedFolder
from mflux.checkpoints.quantization import Quantization
from mflux.checkpoints.saving import copy_beside, estimated_bytes, new_folder, save_component, size_of, write_json
from mflux.errors import CheckpointError, MfluxError, NotBuiltError, UsageError
from mflux.hub import resolve_model
from mflux.models.common.component_config import ComponentConfig
from mflux.models.common.config.config import Config
from mflux.models.common.config.model_config import AVAILABLE_MODELS, ModelConfig, check_is_somewhere
from mflux.models.common.family import STAGES, Component, Family, families, found
from mflux.models.common.latent_creator.latent_creator import LatentCreator
from mflux.models.common.lora.library import find_lora, settle_scales
from mflux.models.common.lora.names import LoraNames
from mflux.models.common.lora.reading import Loras
from mflux.models.common.memory import Part, give_back_memory, is_loaded, keeping_memory, release, timed
from mflux.models.common.networks.autoencoders import tiling
from mflux.models.common.noise import check_seed
from mflux.models.common.room import check_room
from mflux.models.common.saved_model import FILE_NAME, record
from mflux.models.common.tokenizers.checks import check_prompt
from mflux.utils.exceptions import StopImageGenerationException
from mflux.utils.generated_image import GeneratedImage
from mflux.utils.image_util import ImageUtil
from mflux.utils.paths import user_path

log = logging.getLogger(__name__)

# Predicts the velocity noise - picture of latents at a noise level: (latents, sigma) → an array of the latents' shape.
Velocity = Callable[[mx.array, mx.array], mx.array]


class Pipeline:
    """Base of the classes that draw. Components are attributes that load when they are first read.

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

    Attributes:
        family: what a subclass draws with.
        components: the family's, and what a subclass adds to them.
        latent_creator: has `create_noise`, `pack_latents` and `unpack_latents`, see `FluxLatentCreator`.
        default_model: a key of the registry.
        repository: where the weights come from that no `model_path` names, if not from the model's own repository.
        default_scheduler: what `generate_image` takes where nothing is said.

    Raises:
        DownloadError: the weights cannot be had.
        CheckpointError: the folder is not a model of this kind, or a LoRA is not for this model.
        UsageError: no such number of bits, or more scales than LoRAs.
    """

    family: ClassVar[Family]
    components: ClassVar[tuple[Component, ...]] = ()
    latent_creator: ClassVar[type]
    default_model: ClassVar[str]
    repository: ClassVar[str | None] = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "family" in cls.__dict__ and "components" not in cls.__dict__:
            cls.components = cls.family.components
        for component in cls.components:
            part = Part(partial(_load, component))
            part.__set_name__(cls, component.name)
            setattr(cls, component.name, part)

    def __init__(
        self,
        quantize: int | None = None,
        model_path: str | None = None,
        lora_paths: list[str] | None = None,
        lora_scales: list[float] | None = None,
        bake_lora: bool = True,
        model_config: ModelConfig | None = None,
    ):
        wanted = Quantization.asked(quantize)
        scales = settle_scales(lora_scales, len(lora_paths or ()))
        # Found before the model is, which may be a long download.
        self._lora_files = [find_lora(str(path)) for path in lora_paths or ()]
        model_config = model_config or ModelConfig.from_name(self.default_model)
        self._folders: dict[str, PublishedFolder] = {}
        # What does not come from the model's folder, and where it comes from.
        self._sources: dict[str, str] = {}
        # Components that are one file elsewhere.
        self._files: dict[str, Path] = {}
        self.root = self.resolve_folder(model_path, model_config)
        overrides = {"transformer": model_config.transformer_overrides}
        self.folder = open_folder(self.root, self.family, overrides=overrides, files=self._files)
        self.check_folder()
        self.model_path = model_path
        self.model_config = model_config.with_scheduler(self.folder.scheduler())
        stored = self.folder_of(self.component("transformer")).stored("transformer")
        # What the pictures say: a folder that is quantized stays as it is, whatever is asked for.
        self.bits = stored.bits if stored else wanted.bits if wanted else None
        self._quantize = quantize
        # As they were asked for: what a picture says of them means the same on another machine.
        self.lora_paths = [str(path) for path in lora_paths or ()] or None
        self.lora_scales = scales or None
        self.bake_lora = bake_lora
        self._loras = self._match_loras(self._lora_files, scales) if self._lora_files else None
        self.tiling_config: tiling.TilingConfig | None = None
        self.callbacks = CallbackRegistry()
        self.prompt_cache: dict[Any, Any] = {}
        # The policy of memory: what stays past its stage. A program that changes its prompt often may keep the text
        # encoders, and has no loading between prompts.
        self.keep_text_encoders = False
        # With little memory the transformer makes room when another prompt is to be encoded,
        self.keep_transformer = True
        # and before the last picture is decoded.
        self.is_last_picture = False
        # Encode and decode in float32, whatever the weights are stored in, and the whole picture at once.
        self.vae_full_precision = False

    @classmethod
    def from_name(cls, model_name: str, quantize: int | None = None) -> Pipeline:
        """A built-in model by its name or alias."""
        return cls(model_config=ModelConfig.from_name(model_name), quantize=quantize)

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
        return resolve(name, parts, self.family.beside)

    def source(self, model_path: str | None, model_config: ModelConfig) -> str:
        """The folder or repository to look in. Where `model_path` is one component in a file, that is noted, and it is
        the model's own for all else."""
        if model_path is None:
            return self.repository or model_config.model_name
        single = layout_of(self.family).component_in(model_path)
        if single is None:
            return model_path
        self._files.update([single])
        return self.repository or model_config.base_model or model_config.model_name

    def own_components(self) -> list[Component]:
        """Those that the model's folder has to have."""
        return [component for component in self.components if component.repository is None and not component.optional]

    def check_folder(self) -> None:
        """
        Raises:
            CheckpointError: the folder holds a model of another kind.
        """
        for component in self.components:
            if component.published_class and component.repository is None and self.folder.has(component.folder):
                kind = self.folder.config(component.folder).get("_class_name", component.published_class)
                if kind != component.published_class:
                    raise CheckpointError(
                        f"{self.root} holds a {kind}, not a {self.family.title} {component.name}: {_who_draws(kind)}"
                    )

    def component(self, name: str) -> Component:
        """One of `components`, by name."""
        return next(component for component in self.components if component.name == name)

    def folder_of(self, component: Component) -> PublishedFolder:
        """Where a component lies: in the model's folder, or where that has none, in a repository of its own.

        Raises:
            DownloadError: the repository cannot be had.
        """
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
            self._folders[component.name] = Alone(root) if at_root else PublishedFolder(root)
            self._sources[component.folder] = name
        return self._folders[component.name]

    # ---- components

    def load(self, component: Component, *, keep_dtypes: bool = False) -> nn.Module:
        """A component, filled from its folder, with its LoRAs."""
        folder = self.folder_of(component)
        part = component.folder
        module_class = component.module_class()
        if keep_dtypes:
            # What a class leaves out because no picture needs it belongs into a folder that others read as well.
            module_class = getattr(module_class, "whole", module_class)
        dtype = getattr(mx, component.dtype) if component.dtype and has_gpu() else None
        full = self.vae_full_precision and component.name == "vae"
        load = partial(
            load_component,
            module_class,
            folder.root / part,
            dtype=mx.float32 if full and not keep_dtypes else dtype,
            quantize=self._quantize,
            keep_dtypes=keep_dtypes and dtype is None,
            config=folder.config(part),
            tensors=folder.tensors(part),
        )
        if self._loras is None:
            return load()
        return self._loras.apply(part, lambda adjust: load(adjust=adjust), bake=self.bake_lora, to_save=keep_dtypes)

    def _match_loras(self, files: list[Path], scales: list[float]) -> Loras:
        if self.family.lora is None:
            raise UsageError(f"{self.family.title} takes no LoRAs: leave lora_paths (--lora) out")
        modules = {}
        for component in self.components:
            if component.lora:
                # Its arrays are never computed: only the layers' names and shapes are wanted.
                folder, part = self.folder_of(component), component.folder
                modules[part] = build(
                    component.module_class(),
                    folder.config(part),
                    folder.tensors(part),
                    source=folder.root / part / "config.json",
                )
        names: LoraNames = found(self.family.lora)
        return Loras(files, scales, spellings=names.spellings, layouts=names.layouts, modules=modules)

    def enter(self, stage: str) -> None:
        """Make room for a stage, as far as `keep_transformer` and `is_last_picture` ask for it."""
        later = STAGES[STAGES.index(stage) + 1 :]
        if stage == "encode" and not self.keep_transformer:
            self.release_stages(*later)
        elif stage == "decode" and self.is_last_picture:
            self.release_stages("encode", "denoise")

    def encoded(self, *names: str) -> None:
        """Let go of text encoders that have done their work, unless they are to be kept."""
        if not self.keep_text_encoders:
            release(self, *(name for name in names if is_loaded(self, name)))

    def release_stages(self, *stages: str) -> None:
        """Let go of every loaded component of these stages."""
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
        yield from tree_flatten(self.parameters())

    @property
    def state(self) -> dict[str, Any]:
        """As `parameters`; nothing here is trained."""
        return self.parameters()

    @property
    def training(self) -> bool:
        return False

    def freeze(self, **_: Any) -> Pipeline:
        """Returns itself: components are frozen from the start."""
        return self

    # ---- the stages of a picture

    def settings(self, *, seed: int, prompt: str, **settings: Any) -> Config:
        """How one picture is to be made, from `generate_image`'s arguments, all of them checked before any work.

        Raises:
            UsageError: one is of the wrong type, or makes no sense, or there is no memory for such a size.
        """
        check_seed(seed)
        check_prompt(prompt)
        config = Config(model_config=self.model_config, **settings)
        check_room(self.configuration("transformer"), config.width, config.height)
        return config

    def configuration(self, name: str) -> ComponentConfig:
        """A component's configuration, without loading it.

        Raises:
            CheckpointError: it asks for something that cannot be built.
        """
        component = self.component(name)
        folder = self.folder_of(component)
        source = folder.root / component.folder / "config.json"
        return component.module_class().config_class.from_dict(folder.config(component.folder), source=source)

    def start(self, config: Config, noise: mx.array) -> mx.array:
        """The latents to start from: noise, or the source picture with as much noise over it as its step has."""
        if config.image_path is None or config.init_time_step == 0:
            return noise
        sigma = config.scheduler.sigmas[config.init_time_step]
        clean = self.encode_image(config.image_path, config.height, config.width)
        return LatentCreator.add_noise_by_interpolation(clean, noise, sigma)

    def encode_image(self, image: Any, height: int, width: int) -> mx.array:
        """A picture, resized, as latents like those that denoising works on, float32."""
        picture = ImageUtil.scale_to_dimensions(ImageUtil.load_image(image), width, height)
        return self.encode_pixels(ImageUtil.to_array(picture))

    def encode_pixels(self, pixels: mx.array) -> mx.array:
        """The same of pixels (1, 3, H, W), -1 to 1, whose sides are multiples of 16."""
        latents = tiling.encode(self.vae, pixels, self.tiling_config).astype(mx.float32)
        packed = self.latent_creator.pack_latents(latents, *pixels.shape[-2:])
        mx.eval(packed)
        return packed

    def denoise(
        self,
        config: Config,
        latents: mx.array,
        velocity: Velocity,
        *,
        seed: int,
        prompt: str,
        after_step: Callable[[mx.array, int], mx.array] | None = None,
        **images: Any,
    ) -> mx.array:
        """Take the steps from noise to picture.

        Args:
            config: with the schedule and its steps.
            latents: what to start from, float32.
            velocity: the model; its prediction is taken as float32.
            seed, prompt: for the callbacks.
            after_step: changes the latents after a step: called with them and the step's number.
            images: for the callbacks: `canny_image`, `depth_image`, `control_images`.

        Raises:
            StopImageGenerationException: Ctrl-C, or a callback, stopped it.
            MfluxError: the latents are no longer finite.
        """
        scheduler = config.scheduler
        sigmas = scheduler.sigmas
        context = self.callbacks.start(seed=seed, prompt=prompt, config=config)
        try:
            context.before_loop(latents, **images)
            with ExitStack() as steps:
                for number, step in enumerate(config.time_steps):
                    if number == 1:  # what the first step loads stays where it is
                        steps.enter_context(keeping_memory())
                    try:
                        sigma = sigmas[step]
                        prediction = velocity(scheduler.scale_model_input(latents, step), sigma).astype(mx.float32)
                        before = latents
                        latents = scheduler.step(noise=prediction, timestep=step, latents=before)
                        if after_step is not None:
                            latents = after_step(latents, step)
                        mx.eval(latents)
                        if not mx.isfinite(latents).all().item():
                            raise not_finite(f"the latents after step {step + 1} of {config.num_inference_steps}")
                        context.in_loop(step, latents, denoised=before - sigma * prediction)
                    except KeyboardInterrupt as interrupt:
                        context.interruption(step, latents)
                        raise StopImageGenerationException(
                            f"stopped at step {step + 1} of {config.num_inference_steps}",
                            # A command's process is ended by other signals as well, see `cli.process.Ended`.
                            exit_code=getattr(interrupt, "status", 130),
                        ) from None
            context.after_loop(latents)
        finally:
            config.close()
        return latents

    def decode(self, latents: mx.array, config: Config) -> mx.array:
        """Latents as a picture (1, 3, H, W), about -1 to 1.

        Raises:
            MfluxError: it holds numbers that are not finite.
        """
        unpacked = self.latent_creator.unpack_latents(latents, config.height, config.width)
        decoded = tiling.decode(self.vae, unpacked, None if self.vae_full_precision else self.tiling_config)
        mx.eval(decoded)
        if not mx.isfinite(decoded).all().item():
            raise not_finite("what the autoencoder makes of the latents")
        return decoded

    def picture(
        self,
        config: Config,
        latents: mx.array,
        *,
        seed: int,
        prompt: str,
        parameters: Mapping[str, Any] | None = None,
        **about: Any,
    ) -> GeneratedImage:
        """Decode, and note how the picture was made.

        Args:
            parameters: settings beyond those that all pictures have; None and False are left out.
            about: further arguments of `ImageUtil.to_image`.
        """
        self.enter("decode")
        with timed("decode"):
            decoded = self.decode(latents, config)
        return self.finished(config, decoded, seed=seed, prompt=prompt, parameters=parameters, **about)

    def finished(
        self,
        config: Config,
        decoded: mx.array,
        *,
        seed: int,
        prompt: str,
        parameters: Mapping[str, Any] | None = None,
        **about: Any,
    ) -> GeneratedImage:
        """What has been decoded, (1, 3, H, W), as a picture that knows how it was made; see `picture`."""
        parameters = {"vae_full_precision": self.vae_full_precision} | dict(parameters or {})
        unusual = {name: value for name, value in parameters.items() if value not in (None, False)}
        if config.scheduler_name not in ("linear", "LinearScheduler"):
            unusual.setdefault("scheduler", config.scheduler_name)
        if self.lora_paths and not self.bake_lora:
            unusual["bake_lora"] = False
        image = ImageUtil.to_image(
            decoded_latents=decoded,
            config=config,
            seed=seed,
            prompt=prompt,
            quantization=self.bits,
            generation_time=time.perf_counter() - config.started,
            **{"image_path": config.image_path, "image_strength": config.image_strength} | about,
            generation_parameters=unusual,
            lora_paths=self.lora_paths,
            lora_scales=self.lora_scales,
        )
        image.model_path = self.model_path
        return image

    # ---- saving

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
        parts = [part for part in self.components if not part.optional or self.folder.has(part.folder)]
        wanted = Quantization.asked(self._quantize)
        needed = sum(
            estimated_bytes(
                self.folder_of(part).tensors(part.folder), wanted, getattr(part.module_class(), "least_bits", None)
            )
            for part in parts
        )
        with new_folder(user_path(base_path), needed=needed) as target:
            for part in parts:
                with timed(f"save {part.folder}") as note:
                    component = self.load(part, keep_dtypes=True)
                    config = self.folder_of(part).config(part.folder)
                    size = save_component(component, target / part.folder, config, stem=part.stem)
                    note.append(f"{size / 1e9:.2f} GB")
                    del component
                    give_back_memory()
                    copy_beside(self.folder_of(part).root, target, part.beside)
            copy_beside(self.root, target, self.family.beside)
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
                    for part in parts
                    if part.folder in self._sources
                },
            )
            write_json(target / FILE_NAME, content)


def key_in_registry(model_config: ModelConfig) -> str:
    """The registry's name of a model. Its aliases tell: several models share a repository."""
    return next(key for key, model in AVAILABLE_MODELS.items() if model.aliases == model_config.aliases)


def _load(component: Component, pipeline: Pipeline) -> nn.Module:
    return pipeline.load(component)


def refuse_pid(decode: bool, degrade_sigma: float) -> None:
    """
    Raises:
        NotBuiltError: PiD was asked for.
    """
    if decode or degrade_sigma:
        raise NotBuiltError("PiD decoding is not built yet in this version: leave pid_decode (--pid-decode) out")


def layout_of(family: Family) -> Layout:
    """How a family's files look where they do not look as published."""
    return found(family.layout) if family.layout else Layout(family.title)


def open_folder(root: Path, family: Family, **options: Any) -> PublishedFolder:
    """A model's folder, of whichever layout it is; `options` as `PublishedFolder` has them."""
    return saved_by_024.open_folder(root, layout_of(family), **options)


def resolve(name: str, components: list[Component], beside: tuple[str, ...]) -> Path:
    """The folder of a model in the published layout or in mflux 0.24's, downloaded if need be.

    Raises:
        DownloadError: it cannot be had.
        ModelConfigError: the name is no folder's and no repository's.
    """
    check_is_somewhere(name)
    # Most repositories also hold the transformer as one file in another layout.
    parts = [f"{component.folder}/" if component.folder else "" for component in components]
    files = [entry if "." in entry else f"{entry}/*" for entry in beside]
    files += [f"{part}*{ending}" for part in parts for ending in (".json", ".safetensors")]

    def required(settings: str) -> list[str]:
        return [f"{part}{file}" for part in parts for file in (settings, "*.safetensors")]

    # What mflux 0.24 saved has no configurations.
    saved_by_024 = required("model.safetensors.index.json")
    return resolve_model(name, files, required=required("config.json"), alternatives=[saved_by_024])


def _who_draws(kind: str) -> str:
    """Which command draws with a component of that published class, as the end of a sentence."""
    for family in families().values():
        if any(component.published_class == kind for component in family.components) and family.commands:
            return f"mflux-{family.commands[0].name} draws with it"
    return "another command draws with it"


def not_finite(what: str) -> MfluxError:
    """The error that what was computed is no picture, and what may help."""
    return MfluxError(
        f"{what} hold numbers that are not finite, so there is no picture: take another copy of the weights, or "
        "--quantize with more bits, or another LoRA scale"
    )
