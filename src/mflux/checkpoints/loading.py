"""From a folder in the published layout to a module with its weights, strictly.

A module's attributes carry the published names, so no mapping stands between file and module. Two things follow from
a module's type instead, here and nowhere else: convolution kernels are stored with their channels first and MLX wants
them last (a convolution that takes less than its kernel in the file says so itself, with `from_published`), and a
class may declare differences as data (`FileDifferences`).
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from mflux.backend import compute_dtype, has_gpu, mx, nn, settle_compiling, tree_flatten, tree_unflatten
from mflux.checkpoints.folders import read_json, weight_files
from mflux.checkpoints.late import LateLinear, late_layers
from mflux.checkpoints.quantization import Quantization, divides, inferred, layers, make_room, pack, planned
from mflux.checkpoints.stored.opened import open_container, understood
from mflux.checkpoints.stored.tensors import Understood, spec
from mflux.errors import CheckpointError
from mflux.text import count, shown, some

log = logging.getLogger(__name__)
# Tensors are read together up to so many bytes, and the next batch begins while one is read: MLX reads several at once,
# and beside the result no more than two batches are in memory.
TOGETHER = 32_000_000
Adjust = Callable[[str, mx.array], mx.array]
Turn = Callable[[mx.array], mx.array]
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class FileDifferences:
    """Where a class's published files differ from its attributes, as data.

    Attributes:
        ignored: patterns of names that files may hold and the module does not need ("position_ids").
        tied: parameter → the name in the file that also fills it ("lm_head.weight": "embed_tokens.weight").
        optional_prefix: a prefix that published files have and re-saved ones may lack ("text_model.").
    """

    ignored: tuple[str, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    optional_prefix: str = ""


class FolderTensors(Understood):
    """The tensors of a folder: one safetensors file, the shards that an index names, or the files that are given, of
    whichever kind they are.

    Args:
        packs: False gives dense what the files store in other ways than mflux does.
    """

    def __init__(self, folder: str | Path, files: Sequence[Path] | None = None, *, packs: bool = True):
        self.folder = Path(folder)
        paths = files or weight_files(self.folder, (".safetensors",))
        self.files = {path: open_container(path) for path in paths}
        found = understood(list(self.files.values()), files[0] if files else self.folder, packs=packs)
        super().__init__(found.stored, found.plain, packs=packs, source=found.source)


def load_component(
    module_class: type[Module],
    folder: str | Path,
    *,
    dtype: mx.Dtype | None = None,
    quantize: int | None = None,
    keep_dtypes: bool = False,
    adjust: Adjust | None = None,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, mx.array] | None = None,
    read: bool = True,
    late: bool = False,
    divide: Callable[[nn.Module, Mapping[str, mx.array]], Mapping[str, mx.array]] | None = None,
) -> Module:
    """Build a component from its own `config.json` and fill it, tensor by tensor.

    Args:
        module_class: an `nn.Module` whose constructor takes a `config_class` instance; it may have `differences`.
        folder: holds `config.json` and safetensors, sharded or not, quantized (by mflux) or not.
        dtype: compute in this dtype; by default as `backend.compute_dtype` says.
        quantize: bits to quantize linear layers and embeddings to, one by one while they are read. A folder that is
            quantized already stays as it is.
        keep_dtypes: leave floats as they are stored, to save them again.
        adjust: changes tensors on the way, see `fill`.
        config: what `config.json` would say, for a folder without one.
        tensors: the folder's tensors, where they have other names in it than published ones.
        read: False only finds out whether they fit; the module stays without its numbers.
        late: see `fill`.
        divide: makes the module that was built a part of itself, and gives the part's tensors.

    Raises:
        CheckpointError: a file is damaged, a tensor is missing, left over, or of another shape than the config says.
        UsageError: MLX has no such number of bits.
    """
    folder = Path(folder)
    wanted = Quantization.asked(quantize)
    values = read_json(folder / "config.json") if config is None else config
    tensors = FolderTensors(folder) if tensors is None else tensors
    module = build(module_class, values, tensors, source=folder / "config.json")
    if divide is not None:
        tensors = divide(module, tensors)
    stored = None if Quantization.is_mixed(values) else Quantization.stored(values, folder / "config.json")
    if not read:
        fit(module, tensors, source=folder, stored=stored)
        return module
    fill(
        module,
        tensors,
        source=folder,
        dtype=dtype,
        quantization=wanted,
        stored=stored,
        keep_dtypes=keep_dtypes,
        adjust=adjust,
        late=late,
    )
    return module


def build(
    module_class: type[Module], values: Mapping[str, Any] | object, names: Iterable[str], *, source: object
) -> Module:
    """A component with arrays of its own, none of them computed, for weights that are still to be read.

    Args:
        module_class: an `nn.Module` whose constructor takes a `config_class` instance.
        values: what its `config.json` says, or the `config_class` instance made from it.
        names: of its tensors, which bound what is built.
        source: the `config.json`, for messages.

    Raises:
        CheckpointError: the configuration makes no sense, or asks for more than there are tensors for.
    """
    # MLX's modules know nothing of configurations.
    made: Any = module_class
    config: Any = made.config_class.from_dict(values, source=source) if isinstance(values, Mapping) else values
    if problem := config.beyond(names):
        raise CheckpointError(
            f"{source} does not fit the weights beside it: {problem}; "
            "fetch it again, or take the config.json that belongs to these weights"
        )
    try:
        return made(config)
    except (ArithmeticError, ValueError, TypeError, LookupError, RuntimeError, MemoryError) as error:
        raise CheckpointError(
            f"{source} makes no sense for {module_class.__name__}: no layer can be built of its sizes "
            f"({shown(str(error) or type(error).__name__, 200)})"
        ) from None


def fill(
    module: nn.Module,
    tensors: Mapping[str, mx.array],
    *,
    source: object,
    dtype: mx.Dtype | None = None,
    quantization: Quantization | None = None,
    stored: Quantization | None = None,
    keep_dtypes: bool = False,
    adjust: Adjust | None = None,
    late: bool = False,
) -> None:
    """Give every parameter of `module` its tensor, and make sure that every tensor found its parameter.

    Tensors are read, turned to MLX's layout, and quantized or cast in small batches, so that beside the result no more
    than two of these are in memory, or one large tensor.

    Args:
        module: filled in place. Layers that the tensors hold quantized, or that are to be quantized, are exchanged in
            it for quantized ones.
        tensors: by their names in the file.
        source: where they come from, for messages.
        dtype, keep_dtypes: as for `load_component`.
        quantization: for linear layers and embeddings whose width it divides; the others are kept and counted. Tensors
            that are quantized already stay as they are.
        stored: what the tensors are said to be quantized to, if anything is said; they must agree.
        adjust: called with the name of each parameter that is stored in floating point, and its tensor in MLX's
            layout; what it returns takes the tensor's place, and is quantized or cast like it.
        late: leave the weights of `late_layers` in their file: a `LateLinear` takes the place of each.

    Raises:
        CheckpointError: a tensor is damaged, missing, left over, of another shape than the module's parameter, or
            holds numbers that are not finite.
    """
    settle_compiling()
    whole_layers = layers(module)
    put_off = late_layers(module) if late else {}
    packed, parameters, plan = _settled(module, tensors, source, stored)
    if quantization is not None and packed:
        # A few layers may have more, see `planned`.
        bits = Counter(found.bits for found in packed.values()).most_common(1)[0][0]
        if bits != quantization.bits:
            log.warning("%s is stored in %d bits: it stays so, not in %d", source, bits, quantization.bits)
        quantization = None
    # Scales of eleven digits: bfloat16 would cost some, and float32 would only be larger.
    linear = [path for path in packed if isinstance(whole_layers[path], nn.Linear)]
    factors = [f"{path}.{leaf}" for path in linear for leaf in ("scales", "biases") if f"{path}.{leaf}" in plan]
    sixteen = {name for name in factors if spec(tensors, plan[name]).dtype == mx.float16}
    turns, kind = layout_turns(module), type(module)
    to_pack: dict[str, Quantization] = {}
    if quantization is not None:
        whole = layers(module)
        fitting = planned(module, quantization)
        make_room(module, fitting)
        to_pack = {f"{path}.weight": found for path, found in fitting.items()}
        narrow = [path for path, one in whole.items() if not divides(one.weight.shape[-1], quantization.group_size)]
        numbers = Counter(found.bits for found in fitting.values()) or {quantization.bits: 0}
        for bits, number in sorted(numbers.items()):
            log.info("quantize %d layers to %d bits%s", number, bits, _kept(len(narrow), quantization))

    def cast_to(name: str, value: mx.array) -> mx.array:
        if not keep_dtypes and mx.issubdtype(value.dtype, mx.floating) and name not in sixteen:
            value = value.astype(dtype or compute_dtype(value.dtype))
        return value

    def store(name: str, value: mx.array) -> None:
        value = cast_to(name, value)
        _assign(module, name, value)
        pending.append(_Read(key, value))

    def prepared(name: str, key: str, value: mx.array, expected: mx.array) -> mx.array:
        """A tensor in MLX's layout, adjusted."""
        value = _fitting(kind, source, key, value, expected, turns.get(name))
        if adjust is not None and mx.issubdtype(value.dtype, mx.floating):
            # What is packed is rounded first, as it would be between being saved and loaded.
            kept = value.dtype if keep_dtypes or name in to_pack else dtype or compute_dtype(value.dtype)
            value = adjust(name, value).astype(kept)
        return value

    def read(layer: nn.Module, names: dict[str, str]) -> nn.Module:
        """A copy of a layer that was put off, with its weights. It knows nothing of the module, which may be gone."""
        layer, batch = copy(layer), []
        for name, key in names.items():
            leaf = name.rpartition(".")[2]
            value = layer[leaf] = cast_to(name, prepared(name, key, tensors[key], layer[leaf]))
            batch.append(_Read(key, value))
        _begin(batch, source)
        _finish(batch, source)
        return layer

    # By now some may have become quantized ones.
    now = dict(module.named_modules()) if put_off else {}
    for path in put_off:
        layer = now[path]
        names = {name: plan.pop(name) for name in list(plan) if name.rpartition(".")[0] == path}
        for name, key in names.items():
            _fitting(kind, source, key, spec(tensors, key), parameters[name], None)
        layer.eval()
        layer.freeze()
        read_it = LateLinear(partial(read, layer, names), packed=path in packed)
        module.update_modules(tree_unflatten([(path, read_it)]))

    # Quantizing takes longer than reading, and gains nothing from large batches.
    together = TOGETHER // 4 if to_pack else TOGETHER
    pending: list[_Read] = []
    ahead: list[_Read] = []
    to_read = 0
    for name, key in plan.items():
        value = tensors[key]
        if to_read + value.nbytes > together:
            _begin(pending, source)
            _finish(ahead, source)
            if to_read > together:
                # A single large tensor: nothing else is read beside it.
                _finish(pending, source)
            ahead, pending = pending, []
            to_read = 0
        to_read += value.nbytes
        value = prepared(name, key, value, parameters[name])
        if name in to_pack:
            for leaf, array in pack(value, to_pack[name]).items():
                store(name.removesuffix("weight") + leaf, array)
        else:
            # Without a copy of its own a transposed kernel would be laid out anew in every convolution.
            store(name, mx.contiguous(value) if name in turns else value)
    _begin(pending, source)
    _finish(ahead + pending, source)
    module.eval()
    module.freeze()


def fit(
    module: nn.Module, tensors: Mapping[str, mx.array], *, source: object, stored: Quantization | None = None
) -> None:
    """Find out whether `fill` would take these tensors, as far as it can be told without reading their numbers.

    Raises:
        CheckpointError: as `fill`.
    """
    _, parameters, plan = _settled(module, tensors, source, stored)
    turns = layout_turns(module)
    for name, key in plan.items():
        _fitting(type(module), source, key, spec(tensors, key), parameters[name], turns.get(name))


def _settled(
    module: nn.Module, tensors: Mapping[str, mx.array], source: object, stored: Quantization | None
) -> tuple[dict[str, Quantization], dict[str, mx.array], dict[str, str]]:
    """What is packed, with room made for it in the module; the parameters; and which tensor fills which of them."""
    packed = _packed_layers(module, tensors, source, stored)
    make_room(module, packed)
    parameters = dict(tree_flatten(module.parameters()))
    return packed, parameters, match(module, parameters, tensors, source=source)


def _fitting(
    kind: type[nn.Module],
    source: object,
    key: str,
    value: mx.array,
    expected: mx.array,
    turn: Turn | None,
) -> mx.array:
    """A tensor in MLX's layout.

    Raises:
        CheckpointError: it does not fit the parameter that it is for.
    """
    if turn and (value.ndim == expected.ndim or turn is not _channels_last):
        value = turn(value)
    if value.shape != expected.shape:
        turned = " (as MLX lays them out)" if turn else ""
        raise _misfit(
            kind, source, f"{key} has the shape {shown(list(value.shape))} instead of {list(expected.shape)}{turned}"
        )
    if not mx.issubdtype(value.dtype, mx.floating) and mx.issubdtype(expected.dtype, mx.floating):
        raise _misfit(kind, source, f"{key} holds {value.dtype} where floating-point numbers belong")
    return value


class _Read:
    """A tensor on its way from a file, and whether all its numbers are finite."""

    def __init__(self, name: str, value: mx.array):
        self.name = name
        self.value = value
        self._probe = None
        if mx.issubdtype(value.dtype, mx.floating) and (has_gpu() or value.dtype != mx.float32):
            # A sum is finite only if all its terms are. On a CPU it would keep the next batch waiting.
            self._probe = mx.isfinite(mx.sum(value.astype(mx.float32)))

    @property
    def arrays(self) -> list[mx.array]:
        return [self.value] if self._probe is None else [self.value, self._probe]

    def is_finite(self) -> bool:
        if not mx.issubdtype(self.value.dtype, mx.floating):
            return True
        if self._probe is not None:
            found = self._probe.item()
        else:
            import numpy as np

            # On this thread, while MLX reads the next batch on its own.
            flat = (
                np.frombuffer(memoryview(cast(Any, self.value)).cast("B"), np.float32)
                if self.value.size
                else np.zeros(1)
            )
            with np.errstate(all="ignore"):
                found = np.isfinite(np.dot(flat, flat))
        # Large numbers overflow together.
        return bool(found) or bool(mx.all(mx.isfinite(self.value)).item())


def _begin(batch: list[_Read], source: object) -> None:
    _evaluate(mx.async_eval, batch, source)


def _finish(batch: list[_Read], source: object) -> None:
    """Wait for a batch, and look at its numbers.

    Raises:
        CheckpointError: some are not finite, or the file became shorter.
    """
    _evaluate(mx.eval, batch, source)
    for tensor in batch:
        if not tensor.is_finite():
            raise CheckpointError(not_finite(source, tensor.name, "these weights"))


def finite(value: mx.array, source: object) -> bool:
    """Whether all numbers of one tensor are finite; it is read for that.

    Raises:
        CheckpointError: its file ended early.
    """
    tensor = _Read("", value)
    _evaluate(mx.eval, [tensor], source)
    return tensor.is_finite()


def not_finite(source: object, name: str, what: str) -> str:
    """The sentence about a tensor with numbers that are not finite."""
    return (
        f"{source}: {shown(name)} holds numbers that are not finite (NaN or infinity), which would make every picture "
        f"black: fetch it again, or take another version of {what}"
    )


def _evaluate(evaluate: Callable[..., None], batch: list[_Read], source: object) -> None:
    try:
        evaluate([tensor.arrays for tensor in batch])
    except RuntimeError as error:
        if "[read]" not in str(error):
            raise
        raise CheckpointError(f"{source}: a file ended early while it was read; fetch it again") from None


def _kept(number: int, quantization: Quantization) -> str:
    if not number:
        return ""
    return f", keep {number} whose width {quantization.group_size} does not divide"


def _packed_layers(
    module: nn.Module, tensors: Mapping[str, mx.array], source: object, said: Quantization | None
) -> dict[str, Quantization]:
    """The layers that the tensors hold quantized, by path, and to what, as their shapes tell."""
    prefix = getattr(module, "differences", FileDifferences()).optional_prefix
    found = {}
    for path, layer in layers(module).items():
        name = next((name for name in (path, path.removeprefix(prefix)) if f"{name}.scales" in tensors), None)
        if name is None or f"{name}.weight" not in tensors:
            continue
        scales = spec(tensors, f"{name}.scales")
        shapes = spec(tensors, f"{name}.weight").shape, scales.shape
        quantization = inferred(layer.weight.shape[-1], *shapes, floats=scales.dtype == mx.uint8)
        if quantization is None:
            raise _misfit(
                type(module),
                source,
                f"{name} holds quantized weights of the shape {shown(list(shapes[0]))} with scales of the shape "
                f"{shown(list(shapes[1]))}, which do not make rows of {layer.weight.shape[-1]}",
            )
        if said is not None and quantization != said:
            raise _misfit(
                type(module),
                source,
                f"{name} holds weights of {quantization.bits} bits in groups of {quantization.group_size}, not "
                f"{said.bits} in groups of {said.group_size}",
            )
        found[path] = quantization
    return found


def match(module: nn.Module, parameters: Iterable[str], names: Iterable[str], *, source: object) -> dict[str, str]:
    """Which name of the file fills which parameter; both sides must come out even.

    Raises:
        CheckpointError: lists the parameters that nothing fills and the names that nothing takes.
    """
    differences: FileDifferences = getattr(module, "differences", FileDifferences())
    names, parameters = list(names), list(parameters)
    keys = set(names)
    prefix = differences.optional_prefix
    if prefix and not any(name.startswith(prefix) for name in names):
        plan = {parameter: parameter.removeprefix(prefix) for parameter in parameters}
    else:
        plan = {parameter: parameter for parameter in parameters}
    for parameter, other in differences.tied.items():
        if parameter in plan and plan[parameter] not in keys:
            plan[parameter] = plan.get(other, other)
    missing = [parameter for parameter, name in plan.items() if name not in keys]
    taken = set(plan.values())
    ignored = [re.compile(pattern) for pattern in differences.ignored]
    left = [name for name in names if name not in taken and not any(p.search(_whole(name)) for p in ignored)]
    if missing or left:
        problems = []
        if missing:
            problems.append(f"{count(missing, 'tensor')} missing ({some(missing)})")
        if left:
            problems.append(f"{count(left, 'tensor')} left over ({some(left)})")
        raise _misfit(type(module), source, " and ".join(problems))
    return plan


def _whole(name: str) -> str:
    """The name of the weight that a part of a quantized layer belongs to."""
    stem, _, leaf = name.rpartition(".")
    return f"{stem}.weight" if leaf in ("scales", "biases") else name


def _misfit(kind: type[nn.Module], source: object, what: str) -> CheckpointError:
    return CheckpointError(
        f"{source} does not fit the {getattr(kind, 'stored_class', kind).__name__} of its config.json: {what}; "
        "fetch it again, or take the config.json that belongs to these weights"
    )


def layout_turns(module: nn.Module) -> dict[str, Turn]:
    """For each convolution kernel of `module`, how the published layout becomes MLX's channels-last one."""
    turns: dict[str, Turn] = {}
    for path, child in module.named_modules():
        if isinstance(child, nn.ConvTranspose2d):
            turn: Turn = _io_to_o_i
        elif isinstance(child, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            turn = getattr(child, "from_published", _channels_last)
        else:
            continue
        turns[f"{path}.weight" if path else "weight"] = turn
    return turns


def published_turns(module: nn.Module) -> dict[str, Turn]:
    """For each convolution kernel of `module`, the way back from MLX's layout to the published one."""
    back: dict[Turn, Turn] = {_channels_last: _channels_second, _io_to_o_i: _o_i_to_io}
    return {name: back.get(turn, _channels_second) for name, turn in layout_turns(module).items()}


def _channels_last(kernel: mx.array) -> mx.array:
    """OI… → O…I."""
    return mx.moveaxis(kernel, 1, -1)


def _io_to_o_i(kernel: mx.array) -> mx.array:
    """Transposed convolutions: IOHW → OHWI."""
    return kernel.transpose(1, 2, 3, 0)


def _channels_second(kernel: mx.array) -> mx.array:
    """O…I → OI…."""
    return mx.moveaxis(kernel, -1, 1)


def _o_i_to_io(kernel: mx.array) -> mx.array:
    """Transposed convolutions: OHWI → IOHW."""
    return kernel.transpose(3, 0, 1, 2)


def _assign(module: nn.Module, name: str, value: mx.array) -> None:
    *path, leaf = name.split(".")
    target: Any = module
    for step in path:
        target = target[int(step)] if isinstance(target, (list, tuple)) else target[step]
    if isinstance(target, list):
        target[int(leaf)] = value
    else:
        target[leaf] = value
