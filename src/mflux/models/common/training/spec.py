"""What a configuration of `mflux-train` may say, checked before anything is loaded.

Loads no MLX, so that `--dry-run` answers at once. The keys are mflux 0.24's; those that are new say so in
docs/training.md.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mflux.errors import OutputError, UsageError
from mflux.models.common.config.model_config import built_key, is_builtin
from mflux.models.common.family import Command, Trained, families, family_of, trained
from mflux.models.common.saved_model import recorded_base_model
from mflux.models.common.training.data import Dataset, DataSpec, Found, Iterator, fingerprint, look_through
from mflux.text import shown
from mflux.utils.paths import is_file, is_folder, read_bounded, user_path
from mflux.utils.scale_factor import GRID
from mflux.utils.strict_json import NotJSON, parse
from mflux.utils.typed_json import Wrong, checked_fields
from mflux.utils.values import LARGEST_SEED, QUANTIZE_CHOICES

if TYPE_CHECKING:
    from mflux.models.common.training.checkpoint import Checkpoint

T = TypeVar("T")

OPTIMIZERS = ("Adam", "AdamW", "Adafactor", "Lion")
# What each takes beside the rate, and of which kind.
OPTIMIZER_PARAMS: dict[str, dict[str, str]] = {
    "Adam": {"betas": "betas", "eps": "above", "bias_correction": "switch"},
    "AdamW": {"betas": "betas", "eps": "above", "weight_decay": "number", "bias_correction": "switch"},
    "Adafactor": {
        "eps": "two", "clip_threshold": "above", "decay_rate": "real", "beta_1": "part", "weight_decay": "number",
        "scale_parameter": "switch", "relative_step": "switch", "warmup_init": "switch",
    },
    "Lion": {"betas": "betas", "weight_decay": "number"},
}  # fmt: skip
TIMESTEP_TYPES = ("uniform", "sigmoid", "content", "style")
TIMESTEP_GRIDS = ("steps", "continuous")
ADAPTER_DTYPES = ("float32", "bfloat16")
SCHEDULES = ("cosine",)
_LARGEST_CONFIGURATION = 4_000_000
# Configurations up to mflux 0.16, and what took the place of their keys.
_OF_016 = {
    "examples": "data (a folder with images and captions)",
    "instrumentation": "monitoring",
    "save": "checkpoint",
    "width": "max_resolution",
    "height": "max_resolution",
}
_INSTEAD_IN_MONITORING = {
    "validation_prompt": "preview*.txt in the data's folder",
    "validation_prompt_file": "preview*.txt in the data's folder",
    "validation_image": "preview.png beside preview.txt in the data's folder",
    "validation_width": "preview_width",
    "validation_height": "preview_height",
    "preview_prompt": "preview*.txt in the data's folder",
    "preview_prompt_file": "preview*.txt in the data's folder",
    "preview_image": "preview.png beside preview.txt in the data's folder",
}


@dataclass
class TrainingLoopSpec:
    """Epochs, batches, and which noise levels are learned.

    Attributes:
        timestep_low, timestep_high: the first step of the schedule that is learned, and the first behind the last; 0 is
            pure noise, and None means all.
        timestep_type: how often each is; None is as "uniform".
        timestep_grid: whether levels are those of the schedule's "steps", or any ("continuous"); None leaves it to the
            model.
    """

    num_epochs: int = field(metadata={"least": 1})
    batch_size: int = field(metadata={"least": 1})
    timestep_low: int = 0
    timestep_high: int | None = None
    timestep_type: str | None = None
    timestep_grid: str | None = None


@dataclass
class OptimizerSpec:
    """How factors are changed.

    Attributes:
        learning_rate: None only for Adafactor, which then has one of its own.
        lr_warmup_steps, lr_total_steps: counted as the optimizer's steps.
        optimizer_params: further arguments of the optimizer.
        max_grad_norm: the longest that all gradients together may be; None for any.
        gradient_accumulation_steps: batches that one step of the optimizer learns from.
    """

    name: str
    learning_rate: float | None
    lr_schedule: str | None = None
    lr_warmup_steps: int = 0
    lr_total_steps: int | None = field(default=None, metadata={"least": 1})
    optimizer_params: dict[str, Any] = field(default_factory=dict)
    max_grad_norm: float | None = None
    gradient_accumulation_steps: int = field(default=1, metadata={"least": 1})


@dataclass
class CheckpointSpec:
    """Where and how often a run is written down.

    Attributes:
        save_frequency: in batches.
        keep: how many of the newest checkpoints stay; None for all.
    """

    save_frequency: int = field(metadata={"least": 1})
    output_path: str
    keep: int | None = field(default=None, metadata={"least": 1})


@dataclass
class StatisticsSpec:
    """Where the losses up to now are read from; mflux 0.24's, at its path."""

    state_path: str | None = None


@dataclass
class BlockRange:
    """Numbers of blocks: from `start` to before `end`, or `indices`."""

    start: int | None = None
    end: int | None = None
    indices: list[int] | None = None

    def get_blocks(self) -> list[int]:
        if self.indices is not None:
            return list(self.indices)
        if self.start is not None and self.end is not None:
            return list(range(self.start, self.end))
        raise UsageError('blocks: say "start" and "end", or "indices"')


@dataclass
class LoraTargetSpec:
    """Layers that are trained.

    Attributes:
        module_path: a linear layer of the transformer; `{block}` stands for the numbers of `blocks`.
        rank: of the two factors.
        blocks: None where the path has no `{block}`; "all" for all there are.
        alpha: what is learned counts alpha / rank; None is the rank.
    """

    module_path: str
    rank: int
    blocks: BlockRange | str | None = None
    alpha: float | None = None


@dataclass
class LoraLayersSpec:
    """All layers that are trained.

    Attributes:
        use_rslora: what is learned counts alpha / √rank, so that a higher rank learns as fast.
        use_dora: the lengths of the weights' rows are learned beside the factors.
    """

    targets: list[LoraTargetSpec]
    state_path: str | None = None
    use_rslora: bool = False
    use_dora: bool = False


@dataclass
class MonitoringSpec:
    """What is looked at meanwhile; frequencies are in batches.

    Attributes:
        held_out: images with captions that are not learned from; their loss is looked at beside the others'.
    """

    plot_frequency: int
    generate_image_frequency: int
    preview_prompts: list[str]
    preview_prompt_names: list[str]
    preview_width: int = 1024
    preview_height: int = 1024
    preview_images: list[Path] | None = None
    smooth_loss: bool = False
    smooth_loss_window: int = 5
    held_out: list[DataSpec] = field(default_factory=list)


@dataclass
class _Monitoring:
    """The same as a configuration says it; `held_out` is a folder there."""

    generate_image_frequency: int = field(metadata={"least": 1})
    plot_frequency: int = field(default=20, metadata={"least": 1})
    preview_width: int = field(default=1024, metadata={"least": GRID, "most": 16384})
    preview_height: int = field(default=1024, metadata={"least": GRID, "most": 16384})
    smooth_loss: bool = False
    smooth_loss_window: int = field(default=5, metadata={"least": 1})
    held_out: str | None = None


@dataclass
class _Target:
    module_path: str
    rank: int = field(metadata={"least": 1})
    blocks: dict[str, Any] | str | None = None
    alpha: float | None = None


@dataclass
class _Blocks:
    start: int | None = None
    end: int | None = None
    indices: list[int] | None = None


@dataclass
class _Layers:
    targets: list[Any] | None = None
    use_rslora: bool = False
    use_dora: bool = False


@dataclass
class _Assistant:
    path: str
    scale: float = 1.0


@dataclass
class _Top:
    """All keys of a configuration; sections are looked at by themselves."""

    model: str
    data: str
    seed: int = field(metadata={"most": LARGEST_SEED})
    steps: int = field(metadata={"least": 1, "most": 10_000})
    training_loop: dict[str, Any]
    optimizer: dict[str, Any]
    checkpoint: dict[str, Any]
    model_path: str | None = None
    base_model: str | None = None
    guidance: float | None = field(default=None, metadata={"least": 0})
    quantize: int | None = None
    max_resolution: int | None = field(default=None, metadata={"least": 1})
    low_ram: bool = False
    cache_limit_gb: float | None = None
    gradient_checkpointing: bool = False
    monitoring: dict[str, Any] | None = None
    lora_layers: dict[str, Any] | None = None
    adapter_dtype: str | None = None
    assistant_lora: str | dict[str, Any] | None = None
    vae_tile_size: int | None = field(default=None, metadata={"least": 128, "most": 16384})


@dataclass
class TrainingSpec:
    """One run, settled.

    Attributes:
        model, model_path, base_model: as `--model`, and where its weights are taken from.
        data: the images in the order in which they count; `data_root` is their folder.
        vae_tile_size: pixels of the tiles that the autoencoder takes an image in; None for whole images, or with
            `low_ram` for 512.
        assistant_lora: a LoRA that stands beside while training, and its scale.
        lora_layers: None for the layers that a model is usually trained on, with rank 4.
        configuration: what was read, with the data's folder as it is; a checkpoint holds it.
        resumed: the checkpoint that the run goes on from.
    """

    model: str
    model_path: str | None
    seed: int
    steps: int
    guidance: float
    quantize: int | None
    training_loop: TrainingLoopSpec
    optimizer: OptimizerSpec
    checkpoint: CheckpointSpec
    monitoring: MonitoringSpec | None
    lora_layers: LoraLayersSpec | None
    statistics: StatisticsSpec | None
    data: list[DataSpec]
    is_edit: bool = False
    max_resolution: int | None = None
    data_root: str | None = None
    config_path: str | None = None
    checkpoint_path: str | None = None
    low_ram: bool = False
    cache_limit_gb: float | None = None
    gradient_checkpointing: bool = False
    base_model: str | None = None
    adapter_dtype: str | None = None
    assistant_lora: tuple[str, float] | None = None
    vae_tile_size: int | None = None
    configuration: dict[str, Any] = field(default_factory=dict, repr=False)
    resumed: Checkpoint | None = field(default=None, repr=False, compare=False)

    @cached_property
    def key(self) -> str:
        """The model's key in the registry."""
        return built_key(self.model, self.base_model)

    @cached_property
    def trained(self) -> Trained:
        """How the model is trained.

        Raises:
            UsageError: it is not.
        """
        found = trained(self.key, pairs=self.is_edit)
        if found is None:
            models = [key for one in families().values() for kind in one.training for key in kind.models
                      if kind.pairs == self.is_edit]  # fmt: skip
            what = "LoRAs that edit, from pairs of images," if self.is_edit else "LoRAs"
            raise UsageError(f"{what} cannot be trained for {self.key} in this version: there are {', '.join(models)}")
        return found

    @property
    def command(self) -> Command:
        """What generates with the LoRA."""
        return family_of(self.key).command(self.trained.command)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What tells the data from others'."""
        return fingerprint(self.data, Path(self.data_root or "."), is_edit=self.is_edit)

    # ---- from a file

    @staticmethod
    def resolve(
        config_path: str | Path | None, resume_path: str | Path | None, *, create_output_dir: bool = True
    ) -> TrainingSpec:
        """What a configuration, or a checkpoint to go on from, says; exactly one of them.

        Args:
            create_output_dir: whether the folder that the run writes to is made.

        Raises:
            UsageError: it says something that makes no sense, or both are given, or none.
            CheckpointError: the checkpoint is damaged.
            ImageError: an image of the data cannot be read.
        """
        if (config_path is None) == (resume_path is None):
            raise UsageError("give --config FILE to begin, or --resume CHECKPOINT.zip to go on: one of them")
        if config_path is not None:
            path = user_path(config_path)
            return TrainingSpec.from_conf(read_configuration(path), path, create_output_dir=create_output_dir)
        from mflux.models.common.training.checkpoint import Checkpoint

        assert resume_path is not None
        return TrainingSpec.from_checkpoint(Checkpoint(user_path(resume_path)), create_output_dir=create_output_dir)

    @staticmethod
    def from_checkpoint(checkpoint: Checkpoint, *, create_output_dir: bool = True) -> TrainingSpec:
        """The run that a checkpoint goes on with; it writes to the folder that the checkpoint lies in.

        Raises:
            UsageError: its configuration makes no sense.
            CheckpointError: its data are gone, or others.
        """
        config = checkpoint.configuration | {"data": str(checkpoint.data_root())}
        if isinstance(config.get("checkpoint"), Mapping):
            config["checkpoint"] = config["checkpoint"] | {"output_path": str(checkpoint.output_folder())}
        spec = TrainingSpec.from_conf(config, None, False, create_output_dir=create_output_dir)
        checkpoint.check(spec)
        # What needs no model is looked at now.
        checkpoint.losses()
        Iterator.from_dict(checkpoint.iterator(), Dataset(spec.data))
        spec.checkpoint_path, spec.resumed = str(checkpoint.path), checkpoint
        return spec

    @staticmethod
    def from_conf(
        config: Mapping[str, Any],
        config_path: str | Path | None,
        new_folder: bool = True,
        *,
        create_output_dir: bool = True,
    ) -> TrainingSpec:
        """What a configuration says.

        Args:
            config: the JSON object.
            config_path: where it was read: a relative folder of data lies beside it.
            new_folder: whether the run must have a folder of its own.
            create_output_dir: as for `resolve`.

        Raises:
            UsageError: it makes no sense.
            ImageError: an image of the data cannot be read.
        """
        spec = _settled(config, None if config_path is None else Path(config_path).absolute())
        spec.checkpoint.output_path = str(_output_folder(spec.checkpoint.output_path, new=new_folder))
        if create_output_dir:
            make_folder(Path(spec.checkpoint.output_path))
        return spec

    def to_json(self) -> str:
        """All of it, for a person to read."""
        plain = asdict(replace(self, resumed=None, configuration={}))
        return json.dumps(plain, indent=4, default=str)


def read_configuration(path: Path) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        UsageError: there is none.
    """
    if not is_file(path):
        raise UsageError(f"there is no configuration {path}: give --config a JSON file (docs/training.md has one)")
    try:
        content = read_bounded(path, _LARGEST_CONFIGURATION)
        if len(content) > _LARGEST_CONFIGURATION:
            raise UsageError(f"{path} is too large for a configuration")
        config = parse(content, repeated=False)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror})") from None
    except NotJSON as error:
        raise UsageError(f"the configuration {path} {error}") from None
    if not isinstance(config, dict):
        raise UsageError(f"the configuration {path} is no JSON object")
    return config


def make_folder(path: Path) -> None:
    """
    Raises:
        OutputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write to {path}: {error.strerror or error}") from None


def _output_folder(asked: str, *, new: bool) -> Path:
    path = user_path(asked)
    if new and is_folder(path):
        path = path.with_name(f"{path.name}_{datetime.datetime.now():%Y%m%d_%H%M%S}")
    elif is_file(path):
        raise UsageError(f"checkpoint: output_path: {path} is a file: give a folder")
    # Told before the data are encoded, and by --dry-run, which makes no folder.
    above = next(parent for parent in (path.absolute(), *path.absolute().parents) if os.path.lexists(parent))
    if not is_folder(above) or not os.access(above, os.W_OK):
        why = "is no folder" if not is_folder(above) else "cannot be written to"
        raise UsageError(f"checkpoint: output_path: {above} {why}: give another folder")
    return path


def _settled(config: Mapping[str, Any], path: Path | None) -> TrainingSpec:
    if old := [key for key in ("examples", "instrumentation", "save", "width", "height") if key in config]:
        instead = ", ".join(f"{_OF_016[key]} for {key}" for key in old)
        raise UsageError(f"this configuration is one of mflux 0.16 or older: say {instead} (docs/training.md)")
    top = _section(_Top, config, "")
    if top.quantize not in (None, *QUANTIZE_CHOICES):
        raise UsageError(f"quantize is {top.quantize}: it is {', '.join(map(str, QUANTIZE_CHOICES))} or null")
    _above(top.cache_limit_gb, "cache_limit_gb")
    _one_of(top.adapter_dtype, ADAPTER_DTYPES, "adapter_dtype")
    loop = _section(TrainingLoopSpec, top.training_loop, "training_loop")
    _one_of(loop.timestep_type, TIMESTEP_TYPES, "training_loop: timestep_type")
    _one_of(loop.timestep_grid, TIMESTEP_GRIDS, "training_loop: timestep_grid")
    high = top.steps if loop.timestep_high is None else loop.timestep_high
    if not loop.timestep_low < high <= top.steps:
        raise UsageError(
            f"training_loop: timestep_low is {loop.timestep_low} and timestep_high {high}: low < high, "
            f"and high at most steps, which is {top.steps}"
        )
    checkpoint = _section(CheckpointSpec, top.checkpoint, "checkpoint")
    layers = None if top.lora_layers is None else _layers(top.lora_layers)
    monitoring = _monitoring(top.monitoring)
    # What is quick to check was first.
    base_model = top.base_model or recorded_base_model(top.model)
    key = built_key(top.model, base_model)
    root = _data_folder(top.data, path)
    found = look_through(root, max_resolution=top.max_resolution, previews=monitoring is not None)
    held_out = _held_out(monitoring, path, found, top.max_resolution)
    configuration = dict(config) | {"data": str(root)}
    if monitoring is not None and monitoring.held_out is not None:
        configuration["monitoring"] = dict(config["monitoring"]) | {"held_out": monitoring.held_out}
    optimizer = _optimizer(top.optimizer, len(found.items), loop)
    spec = TrainingSpec(
        model=top.model,
        model_path=top.model_path or (None if is_builtin(top.model) else top.model),
        seed=top.seed,
        steps=top.steps,
        guidance=0.0 if top.guidance is None else float(top.guidance),
        quantize=top.quantize,
        training_loop=loop,
        optimizer=optimizer,
        checkpoint=checkpoint,
        monitoring=None if monitoring is None else _with_previews(monitoring, found, held_out),
        lora_layers=layers,
        statistics=StatisticsSpec(),
        data=found.items,
        is_edit=found.is_edit,
        max_resolution=top.max_resolution,
        data_root=str(root),
        config_path=None if path is None else str(path),
        low_ram=top.low_ram,
        cache_limit_gb=top.cache_limit_gb,
        gradient_checkpointing=top.gradient_checkpointing,
        base_model=base_model,
        adapter_dtype=top.adapter_dtype,
        vae_tile_size=top.vae_tile_size,
        configuration=configuration,
    )
    spec.key = key
    usual = spec.trained.assistant
    if "assistant_lora" in config:
        spec.assistant_lora = _assistant(top.assistant_lora)
    elif usual is not None:
        spec.assistant_lora = usual, 1.0
    return spec


def _section(kind: type[T], table: Any, name: str) -> T:
    """A section as its dataclass; `name` is said in front of what is wrong with it."""
    at = f"{name}: " if name else ""
    if not isinstance(table, Mapping):
        raise UsageError(f"{name} is {shown(repr(table), 60)}, and has to be an object")
    try:
        values = checked_fields(kind, table, strict=True)
        return kind(**{key: list(value) if isinstance(value, tuple) else value for key, value in values.items()})
    except Wrong as wrong:
        raise UsageError(f"{at}{wrong}") from None
    except TypeError:
        required = [one.name for one in fields(kind) if one.default is MISSING and one.default_factory is MISSING]  # type: ignore[arg-type]
        lacking = ", ".join(key for key in required if key not in table)
        raise UsageError(f"{at}it lacks {lacking} (docs/training.md has an example)") from None


def _one_of(value: str | None, known: tuple[str, ...], name: str) -> None:
    if value is not None and value not in known:
        raise UsageError(f"{name} is {shown(repr(value), 60)}: it is {', '.join(known)} or null")


def _above(value: float | None, name: str) -> None:
    if value is not None and not value > 0:
        raise UsageError(f"{name} is {value}: it has to be above 0")


def _data_folder(data: str, path: Path | None, key: str = "data") -> Path:
    root = user_path(data)
    if not root.is_absolute():
        if path is None:
            raise UsageError(
                f"{key}: {shown(data)} is relative, and there is no file beside which it lies: give it whole"
            )
        root = path.parent / root
    return root.resolve()


def _monitoring(table: Any) -> _Monitoring | None:
    if table is None:
        return None
    if isinstance(table, Mapping) and (old := [key for key in table if key in _INSTEAD_IN_MONITORING]):
        raise UsageError(f"monitoring: {old[0]} is not known any more: {_INSTEAD_IN_MONITORING[old[0]]} took its place")
    found = _section(_Monitoring, table, "monitoring")
    if found.smooth_loss and found.smooth_loss_window < 2:
        raise UsageError("monitoring: smooth_loss_window has to be 2 or more")
    found.preview_width, found.preview_height = (
        side // GRID * GRID for side in (found.preview_width, found.preview_height)
    )
    return found


def _held_out(
    monitoring: _Monitoring | None, path: Path | None, found: Found, max_resolution: int | None
) -> list[DataSpec]:
    """The images that are not learned from; the folder's name becomes a whole one."""
    if monitoring is None or monitoring.held_out is None:
        return []
    key = "monitoring: held_out"
    root = _data_folder(monitoring.held_out, path, key)
    monitoring.held_out = str(root)
    try:
        held = look_through(root, max_resolution=max_resolution)
    except UsageError as error:
        raise UsageError(str(error).replace("data", key, 1)) from None
    if held.is_edit != found.is_edit:
        kinds = [("single images", "pairs")[one.is_edit] for one in (held, found)]
        raise UsageError(f"{key}: {root} holds {kinds[0]}, and {kinds[1]} are learned from: give such as well")
    learned = {item.image.resolve() for item in found.items}
    if both := [item.image.name for item in held.items if item.image.resolve() in learned]:
        raise UsageError(f"{key}: {both[0]} is learned from as well: give images of a folder of their own")
    return held.items


def _with_previews(monitoring: _Monitoring, found: Found, held_out: list[DataSpec]) -> MonitoringSpec:
    prompts = found.previews
    images = [image for _, image in prompts.values() if image is not None]
    return MonitoringSpec(
        **vars(monitoring) | {"held_out": held_out},
        preview_prompts=[prompt for prompt, _ in prompts.values()],
        preview_prompt_names=list(prompts),
        preview_images=images or None,
    )


def _optimizer(table: Any, images: int, loop: TrainingLoopSpec) -> OptimizerSpec:
    spec = _section(OptimizerSpec, table, "optimizer")
    names = {name.lower(): name for name in OPTIMIZERS}
    if spec.name.lower() not in names:
        raise UsageError(f"optimizer: name is {shown(repr(spec.name), 60)}: it is {', '.join(OPTIMIZERS)}")
    spec.name = names[spec.name.lower()]
    if spec.learning_rate is None and spec.name != "Adafactor":
        raise UsageError(f"optimizer: learning_rate is null, which only Adafactor takes: {spec.name} needs a number")
    _above(spec.learning_rate, "optimizer: learning_rate")
    _above(spec.max_grad_norm, "optimizer: max_grad_norm")
    _one_of(spec.lr_schedule, SCHEDULES, "optimizer: lr_schedule")
    spec.optimizer_params = _params(spec.name, spec.optimizer_params)
    if spec.learning_rate is None and (spec.lr_schedule or spec.lr_warmup_steps):
        raise UsageError("optimizer: lr_schedule and lr_warmup_steps need a learning_rate")
    if spec.lr_schedule == "cosine" and spec.lr_total_steps is None:
        spec.lr_total_steps = optimizer_steps(images, loop, spec.gradient_accumulation_steps)
    if spec.lr_schedule == "cosine" and spec.lr_warmup_steps >= (spec.lr_total_steps or 0):
        raise UsageError(
            f"optimizer: lr_warmup_steps is {spec.lr_warmup_steps}, and lr_total_steps {spec.lr_total_steps}: the rate "
            "would never be reached"
        )
    return spec


def optimizer_steps(images: int, loop: TrainingLoopSpec, accumulated: int) -> int:
    """How often the optimizer changes the factors in a whole run."""
    return -(-(-(-images // loop.batch_size) * loop.num_epochs) // accumulated)


def _params(name: str, params: Mapping[str, Any]) -> dict[str, Any]:
    import difflib

    known, found = OPTIMIZER_PARAMS[name], {}
    for key, value in params.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            meant = f": did you mean {near[0]}?" if near else f": there are {', '.join(known)}"
            raise UsageError(f"optimizer: optimizer_params: {name} has no {shown(key, 60)}{meant}")
        if not _fits(value, known[key]):
            raise UsageError(f"optimizer: optimizer_params: {key} is {shown(repr(value), 60)}, which makes no sense")
        found[key] = list(value) if isinstance(value, (list, tuple)) else value
    return found


def _fits(value: Any, kind: str) -> bool:
    def number(one: Any) -> bool:
        return isinstance(one, (int, float)) and not isinstance(one, bool)

    if kind == "switch":
        return isinstance(value, bool)
    if kind in ("betas", "two"):
        most = 1 if kind == "betas" else float("inf")
        return isinstance(value, (list, tuple)) and len(value) == 2 and all(number(x) and 0 <= x < most for x in value)
    if kind == "part":
        return value is None or (number(value) and 0 <= value < 1)
    return number(value) and (kind == "real" or (value > 0 if kind == "above" else value >= 0))


def _layers(table: Any) -> LoraLayersSpec:
    layers = _section(_Layers, table, "lora_layers")
    if layers.targets is not None and not layers.targets:
        raise UsageError("lora_layers: targets is empty: name a layer, or leave targets out for the usual ones")
    targets = [_target(target, f"lora_layers: targets[{n}]") for n, target in enumerate(layers.targets or ())]
    return LoraLayersSpec(targets, use_rslora=layers.use_rslora, use_dora=layers.use_dora)


def _target(table: Any, name: str) -> LoraTargetSpec:
    target = _section(_Target, table, name)
    _above(target.alpha, f"{name}: alpha")
    if not all(target.module_path.split(".")):
        raise UsageError(f"{name}: module_path is {shown(repr(target.module_path), 80)}, which names no layer")
    has_place = "{block}" in target.module_path
    blocks: BlockRange | str | None = None
    if isinstance(target.blocks, str):
        if target.blocks != "all":
            raise UsageError(f'{name}: blocks is {shown(repr(target.blocks), 60)}: it is an object, or "all"')
        blocks = target.blocks
    elif target.blocks is not None:
        said = _section(_Blocks, target.blocks, f"{name}: blocks")
        blocks = BlockRange(said.start, said.end, said.indices)
        if (blocks.start is None) != (blocks.end is None) or (blocks.start is None) == (blocks.indices is None):
            raise UsageError(f'{name}: blocks: say "start" and "end", or "indices"')
        if not blocks.get_blocks():
            raise UsageError(f"{name}: blocks names no block")
    if has_place != (blocks is not None):
        what = "has {block} and no blocks" if has_place else "has blocks, and its module_path no {block}"
        raise UsageError(f"{name} {what}: they belong together")
    return LoraTargetSpec(target.module_path, target.rank, blocks, target.alpha)


def _assistant(said: str | dict[str, Any] | None) -> tuple[str, float] | None:
    if said is None:
        return None
    found = _section(_Assistant, {"path": said} if isinstance(said, str) else said, "assistant_lora")
    return found.path, found.scale


def check_resumes(path: Path, model: str | None, base_model: str | None, quantize: int | None) -> None:
    """
    Raises:
        UsageError: a run that goes on is asked to be another.
    """
    asked = {"--model": model, "--base-model": base_model, "--quantize": quantize}
    if given := [option for option, value in asked.items() if value is not None]:
        raise UsageError(f"{given[0]} would change what {path} goes on with: leave it out, or begin with --config")


__all__ = [
    "BlockRange",
    "CheckpointSpec",
    "DataSpec",
    "LoraLayersSpec",
    "LoraTargetSpec",
    "MonitoringSpec",
    "OptimizerSpec",
    "StatisticsSpec",
    "TrainingLoopSpec",
    "TrainingSpec",
]
