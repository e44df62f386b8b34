"""One run without its loop and files: data that are encoded, layers that are trained, gradients and steps."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mflux.backend import mx, named_arrays
from mflux.checkpoints.loading import build
from mflux.checkpoints.readers.opening import open_checkpoint
from mflux.checkpoints.writing import SafetensorsWriter
from mflux.cpu import first_order
from mflux.errors import DownloadError, UsageError
from mflux.models.common.config.config import Config
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.family import STAGES, load_object
from mflux.models.common.lora.adapters import linear_layers
from mflux.models.common.lora.library import find_lora
from mflux.models.common.memory import give_back_memory, is_loaded, timed
from mflux.models.common.networks.autoencoders.tiling import TilingConfig
from mflux.models.common.training import lora, objective
from mflux.models.common.training.adapter import TrainingAdapter
from mflux.models.common.training.data import DataItem
from mflux.models.common.training.estimate import check_memory
from mflux.models.common.training.optimizer import Optimizer
from mflux.models.common.training.recompute import forget, remember
from mflux.models.common.training.spec import DataSpec, TrainingSpec
from mflux.text import count
from mflux.utils.atomic_files import Temporary

# Prompts that are encoded in one visit.
_VISIT = 16
_CLEAN = "clean_latents"


class TrainingSession:
    """A model with layers that are trained, and the data that it learns from.

    Text encoders and the autoencoder are loaded for the data, one after the other, and released; the transformer stays,
    frozen but for the new layers.

    Args:
        spec: the run. Nothing is written for it but, with `low_ram`, encoded data to a folder of its own, until
            `close`.

    Attributes:
        items: the data in their order. Latents and conditions may be replaced between steps.
        layers: what is trained.
        optimizer: changes the factors, see `apply`.

    Raises:
        UsageError: a layer does not exist, or there is no memory for the model.
        CheckpointError: the model's folder is not one of this family.
        DownloadError: the model cannot be had.
    """

    def __init__(self, spec: TrainingSpec):
        self.spec = spec
        if spec.cache_limit_gb is not None:
            mx.set_cache_limit(int(spec.cache_limit_gb * 1e9))
        tile = spec.vae_tile_size or (512 if spec.low_ram else None)
        self.tiling = TilingConfig(vae_decode_tile_size=tile) if tile else None
        self._store: Temporary | None = None
        self._blocks: dict[str, list[Any]] = {}
        self._configs: dict[tuple[int, int], Config] = {}
        self.pipeline = self.open_pipeline(assistant=True)
        self.pipeline.works_ahead = False
        self.adapter: TrainingAdapter = load_object(spec.trained.adapter)(self.pipeline)
        self.shapes = self._shapes()
        said = spec.lora_layers
        self.layers = lora.chosen(
            None if said is None else said.targets or None,
            self.adapter.targets,
            self.shapes,
            self.spelled(),
            stabilised=said is not None and said.use_rslora,
            magnitudes=said is not None and said.use_dora,
        )
        if not self.layers:
            raise UsageError("there is no layer to train: name some in lora_layers")
        held_out = spec.monitoring.held_out if spec.monitoring is not None else []
        for item in (*spec.data, *held_out):
            self.adapter.check(self.adapter.words(item.prompt))
        check_memory(self)
        try:
            encoded = self._encoded([*spec.data, *held_out])
            self.items: Sequence[DataItem] = encoded[: len(spec.data)]
            self.held_out: Sequence[DataItem] = encoded[len(spec.data) :]
            self._load()
            self.optimizer = Optimizer(spec.optimizer, self.lora_weights())
        except BaseException:
            self.close()
            raise

    def open_pipeline(self, *, assistant: bool = False, adapter: Path | None = None) -> Any:
        """The model, nothing of it loaded: with the LoRA that stands beside while training, or with a trained one."""
        spec = self.spec
        loras = [(str(adapter), 1.0)] if adapter is not None else []
        if assistant and spec.assistant_lora is not None:
            path, scale = spec.assistant_lora
            try:
                find_lora(path)
            except DownloadError as error:
                raise DownloadError(
                    f'{error}; in the configuration, "assistant_lora": null trains without it'
                ) from None
            loras.append((path, scale))
        given = (
            {"lora_paths": [path for path, _ in loras], "lora_scales": [scale for _, scale in loras]} if loras else {}
        )
        pipeline = load_object(spec.command.pipeline)(
            quantize=spec.quantize,
            model_path=spec.model_path,
            model_config=ModelConfig.from_name(spec.model, spec.base_model),
            **given,
        )
        pipeline.tiling_config = self.tiling
        return pipeline

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The linear layers of the transformer, without its weights."""
        component = self.pipeline.component("transformer")
        folder, part = self.pipeline.folder_of(component), component.folder
        config = folder.config(part)
        source = folder.root / part / "config.json"
        return linear_layers(build(component.module_class(), config, folder.tensors(part), source=source))

    def spelled(self) -> dict[str, str]:
        """Other names of layers, each with its own."""
        from mflux.models.common.lora.names import Spelling, spelled

        table = Spelling("transformer", ("",), table=self.adapter.spelled)
        found = spelled([table], {"transformer": self.shapes})
        return {name: target.parts[0][0] for name, target in found.items() if len(target.parts) == 1}

    # ---- data

    def _encoded(self, specs: Sequence[DataSpec]) -> Sequence[DataItem]:
        pipeline = self.pipeline
        items: list[DataItem] = []
        if self.spec.low_ram:
            parent = Path(self.spec.checkpoint.output_path)
            self._store = Temporary(parent if parent.is_dir() else Path(tempfile.gettempdir()), is_folder=True)
        conditions: dict[str, Any] = {}
        with timed(f"encode {count(specs, 'image')} and captions"):
            pipeline.keep = replace(pipeline.keep, text_encoders=True)
            prompts = list(dict.fromkeys(spec.prompt for spec in specs))
            for start in range(0, len(prompts), _VISIT):
                some = prompts[start : start + _VISIT]
                for prompt, encoded in zip(some, pipeline.encode_prompts(*map(self.adapter.words, some)), strict=True):
                    conditions[prompt] = self._put_away(f"c{len(conditions)}", self.adapter.condition(encoded))
                pipeline.prompt_cache.clear()
            pipeline.keep = replace(pipeline.keep, text_encoders=False)
            pipeline.release_stages("encode")
            for number, spec in enumerate(specs):
                arrays = {_CLEAN: self.adapter.latents(spec.image, spec.width, spec.height)}
                arrays |= {} if spec.input_image is None else self.adapter.beside(spec.input_image)
                kept, cond = self._put_away(f"{number:07d}", arrays), conditions[spec.prompt]
                if isinstance(kept, Path):
                    items.append(StoredItem(number, spec, (cond, kept)))
                else:
                    clean, cond = kept.pop(_CLEAN), cond | kept
                    items.append(DataItem(number, spec.prompt, spec.image, clean, cond, spec.width, spec.height))
            pipeline.release_stages(*STAGES)
        give_back_memory()
        return items

    def _put_away(self, name: str, arrays: dict[str, mx.array]) -> dict[str, mx.array] | Path:
        """Arrays, computed; with `low_ram` the file that they lie in."""
        mx.eval(arrays)
        if self._store is None:
            return arrays
        path = self._store.path / f"{name}.safetensors"
        with SafetensorsWriter(path, {key: (one.dtype, tuple(one.shape)) for key, one in arrays.items()}) as writer:
            for key, one in arrays.items():
                writer.write(key, one)
        return path

    # ---- layers

    def _load(self) -> None:
        """Load the transformer, freeze it, and put new layers in."""
        transformer = self.pipeline.transformer
        transformer.freeze()
        self._trained = lora.inject(transformer, self.layers, self.shapes, self.spec.seed)
        if self.spec.gradient_checkpointing:
            self._blocks = forget(transformer, self.adapter.blocks)

    def lora_weights(self) -> dict[str, mx.array]:
        """The factors under PEFT's names, without a component: `….lora_A.weight` (rank, in), `….lora_B.weight` (out,
        rank), float32."""
        return lora.weights_of(self._trained)

    def set_lora_weights(self, weights: Mapping[str, mx.array]) -> None:
        """Go on from other factors: the same names, all of them.

        Raises:
            CheckpointError: some are missing, left over, of another shape, or not finite.
        """
        lora.put_weights(self._trained, lora.check_weights(self._trained, weights))

    @property
    def trainable(self) -> int:
        """How many numbers are trained."""
        numbers = 0
        for layer in self.layers:
            out, width = self.shapes[layer.path]
            numbers += layer.rank * (out + width) + (out if layer.magnitudes else 0)
        return numbers

    # ---- steps

    def config_of(self, item: DataItem) -> Config:
        """How an image of this one's size is generated; its schedule has the noise levels."""
        size = item.width, item.height
        if size not in self._configs:
            spec = self.spec
            self._configs[size] = self.pipeline.settings(
                seed=0, prompt=item.prompt, num_inference_steps=spec.steps, width=size[0], height=size[1],
                guidance=spec.guidance,
            )  # fmt: skip
            _ = self._configs[size].scheduler
        return self._configs[size]

    @property
    def continuous(self) -> bool:
        """Whether noise levels are drawn from all there are."""
        asked = self.spec.training_loop.timestep_grid
        return self.spec.trained.continuous if asked is None else asked == "continuous"

    def loss(self, items: Sequence[DataItem], sigmas: Sequence[float], noise: Sequence[mx.array]) -> mx.array:
        """The loss alone, as `loss_and_gradients` has it."""
        total = mx.array(0.0)
        for group in self._groups(items):
            total = total + self._loss_of([(items[n], float(sigmas[n]), noise[n]) for n in group]) / len(items)
            mx.eval(total)
        return total

    def loss_and_gradients(
        self, items: Sequence[DataItem], sigmas: Sequence[float], noise: Sequence[mx.array]
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """The mean over the images of each one's loss, and its gradients under the factors' names, before clipping.

        Args:
            items: some of `items`; images of one size go through the model together.
            sigmas: a noise level for each.
            noise: for each what lies over it, of the shape of its `clean_latents`.
        """
        weights = self.lora_weights()
        total, gradients = mx.array(0.0), {name: mx.zeros_like(value) for name, value in weights.items()}
        try:
            for group in self._groups(items):
                some = [(items[number], float(sigmas[number]), noise[number]) for number in group]

                def of(values: dict[str, mx.array], some: Sequence[Any] = some) -> mx.array:
                    lora.put_weights(self._trained, values)
                    return self._loss_of(some) / len(items)

                with first_order():
                    loss, found = mx.value_and_grad(of)(weights)
                total = total + loss
                gradients = {name: value + found[name] for name, value in gradients.items()}
                mx.eval(total, gradients)
                del loss, found
        finally:
            lora.put_weights(self._trained, weights)
        return total, gradients

    def _groups(self, items: Sequence[DataItem]) -> Iterable[list[int]]:
        """Numbers of images that go through the model together."""
        if not self.adapter.stacks or self.spec.low_ram:
            return [[number] for number in range(len(items))]
        groups: dict[Any, list[int]] = {}
        for number, item in enumerate(items):
            shapes = tuple(sorted((name, value.shape) for name, value in item.cond.items()))
            groups.setdefault((item.width, item.height, item.clean_latents.shape, shapes), []).append(number)
        return groups.values()

    def _loss_of(self, some: Sequence[tuple[DataItem, float, mx.array]]) -> mx.array:
        """The sum of the losses of images of one size."""
        clean = mx.concatenate([item.clean_latents for item, _, _ in some]).astype(mx.float32)
        noise = mx.concatenate([one for _, _, one in some]).astype(mx.float32)
        levels = mx.array([sigma for _, sigma, _ in some], mx.float32)
        cond = {name: mx.concatenate([item.cond[name] for item, _, _ in some]) for name in some[0][0].cond}
        latents = objective.noisy(clean, noise, levels)
        velocity = self.adapter.velocity(self.config_of(some[0][0]), latents, levels, cond)
        return objective.losses(velocity, clean, noise).sum()

    def apply(self, gradients: Mapping[str, mx.array]) -> bool:
        """Clip the gradients, and take one step of the optimizer.

        Returns:
            False where they are not finite: then nothing has changed.
        """
        changed = self.optimizer.apply(self.lora_weights(), gradients)
        if changed is not None:
            lora.put_weights(self._trained, changed)
        return changed is not None

    # ---- what comes of it

    def save_adapter(self, path: str | Path, *, dtype: mx.Dtype = mx.float32) -> None:
        """Write the LoRA as diffusers, PEFT and mflux read it.

        Raises:
            OutputError: it cannot be written.
        """
        weights = {name: value.astype(dtype) for name, value in self.lora_weights().items()}
        lora.save(Path(path), weights, self.layers, **self.about)

    @property
    def about(self) -> dict[str, Any]:
        """What an adapter's file is told of itself, see `lora.save`."""
        return {"prefix": self.adapter.prefix, "model": self.spec.model, "beside": self.shapes}

    @property
    def adapter_dtype(self) -> mx.Dtype:
        """What the run's last file is written in: as asked for, or as the model's own weights are."""
        if self.spec.adapter_dtype is not None:
            return {"float32": mx.float32, "bfloat16": mx.bfloat16}[self.spec.adapter_dtype]
        component = self.pipeline.component("transformer")
        tensors = self.pipeline.folder_of(component).tensors(component.folder)
        kinds = [tensors.spec(name).dtype for name in tensors]
        return max((mx.float32, mx.bfloat16), key=lambda dtype: kinds.count(dtype))

    def preview(self, prompt: str, image: Path | None, width: int, height: int) -> Any:
        """What `mflux-generate` draws with the LoRA as it is now, with the run's seed, steps and guidance.

        The transformer makes room for it, and is loaded again.
        """
        weights, state = self.lora_weights(), self.optimizer.state()
        parent = Path(self.spec.checkpoint.output_path)
        place = Temporary(parent if parent.is_dir() else Path(tempfile.gettempdir()), is_folder=True)
        try:
            self._release()
            path = place.path / "adapter.safetensors"
            named = {name: value.astype(self.adapter_dtype) for name, value in weights.items()}
            lora.save(path, named, self.layers, **self.about)
            pipeline = self.open_pipeline(adapter=path)
            pipeline.keep = replace(pipeline.keep, transformer=False, for_next_image=False)
            drawn = pipeline.generate_image(
                seed=self.spec.seed,
                prompt=prompt,
                num_inference_steps=self.spec.steps,
                width=width,
                height=height,
                guidance=self.spec.guidance,
                **load_object(self.spec.trained.adapter)(pipeline).preview(image),
            )
            pipeline.release_stages(*STAGES)
            return drawn
        finally:
            place.discard()
            self.reload()
            lora.put_weights(self._trained, weights)
            self.optimizer.put(state)

    @property
    def has_layers(self) -> bool:
        """Whether the transformer is loaded, as it is not while a preview is generated."""
        return bool(self._trained)

    def reload(self) -> None:
        """Load the transformer again, with new layers."""
        self._release()
        self._load()

    def _release(self) -> None:
        if is_loaded(self.pipeline, "transformer"):
            remember(self.pipeline.transformer, self._blocks)
        self._trained = {}
        self.pipeline.release_stages(*STAGES)

    def close(self) -> None:
        """Let go of what was put on the disk."""
        if self._store is not None:
            self._store.discard()
            self._store = None

    def resident_bytes(self) -> int:
        """What the model takes now."""
        return sum(value.nbytes for _, value in named_arrays(self.pipeline.parameters()))


class StoredItem(DataItem):
    """An image whose latents and conditions lie on the disk, and are read when they are asked for; what is put in their
    place stays in memory."""

    def __init__(self, number: int, spec: DataSpec, parts: Sequence[Path]):
        self._parts = parts
        super().__init__(number, spec.prompt, spec.image, None, None, spec.width, spec.height)  # type: ignore[arg-type]

    def _read(self) -> dict[str, mx.array]:
        return {name: file[name] for file in map(open_checkpoint, self._parts) for name in file}

    @property
    def clean_latents(self) -> mx.array:
        return self._read()[_CLEAN] if self._clean is None else self._clean

    @clean_latents.setter
    def clean_latents(self, value: mx.array) -> None:
        self._clean = value

    @property
    def cond(self) -> dict[str, mx.array]:
        if self._cond is not None:
            return self._cond
        return {name: value for name, value in self._read().items() if name != _CLEAN}

    @cond.setter
    def cond(self, value: dict[str, mx.array]) -> None:
        self._cond = value
