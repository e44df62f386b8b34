"""The layers that are trained, and the file that they become.

Hu et al. 2021 (arxiv.org/abs/2106.09685): y = W x + s · B (A x) with s = alpha / rank; Kalajdzievski 2023 (2312.03732,
rsLoRA): s = alpha / √rank; Liu et al. 2024 (2402.09353, DoRA): rows of W + s · B A have lengths that are learned.

PEFT's names and its orientation, and its settings in the header: diffusers and PEFT read the file as it is, and
generate with the same s.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mflux.backend import mx, nn
from mflux.checkpoints.writing import SafetensorsWriter
from mflux.errors import CheckpointError, UsageError
from mflux.models.common.lora.adapters import LoraLinear, dense
from mflux.models.common.networks.layers import product
from mflux.models.common.training.spec import LoraTargetSpec
from mflux.text import shown, some
from mflux.utils.version_util import VersionUtil

# Where a configuration names no layers.
DEFAULT_RANK = 4
_MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True)
class Layer:
    """A layer that is to be trained.

    Attributes:
        path: from the transformer on.
        rank, alpha: of the two factors.
        stabilised: whether what is learned counts alpha / √rank.
        magnitudes: whether the lengths of the rows are learned as well.
    """

    path: str
    rank: int
    alpha: float
    stabilised: bool = False
    magnitudes: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.stabilised else self.rank)


class TrainedLinear(nn.Module):
    """A linear layer, quantized or not, that stays as it is, and beside it the two factors.

    These are float32, whatever the layer computes in, and are rounded to what comes in where they are multiplied, so
    that what goes out has the layer's dtype; their gradients are float32 again.
    """

    def __init__(self, linear: Any, layer: Layer, shape: tuple[int, ...], key: mx.array):
        super().__init__()
        out, width = shape
        self.linear = linear
        bound = 1 / math.sqrt(width)
        self.lora_A = mx.random.uniform(-bound, bound, (layer.rank, width), key=key)
        self.lora_B = mx.zeros((out, layer.rank))
        self._scale = layer.scale
        self.leaves: tuple[str, ...] = ("lora_A", "lora_B")
        if layer.magnitudes:
            if isinstance(linear, LoraLinear):
                raise UsageError(
                    f"lora_layers: use_dora cannot learn the lengths of {layer.path}, beside which another LoRA "
                    'stands: leave it out, or say "assistant_lora": null'
                )
            # Of the rows as they are; what they are divided by follows from this and the factors.
            self._squares = mx.square(dense(linear)).sum(axis=1)
            self.lora_magnitude_vector = mx.sqrt(self._squares)
            self.leaves += (_MAGNITUDE,)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.linear(x)
        change = self._scale * product(product(x, self.lora_A.astype(x.dtype)), self.lora_B.astype(x.dtype))
        if len(self.leaves) == 2:
            return y + change.astype(y.dtype)
        factors = (self.lora_magnitude_vector / self._lengths()).astype(y.dtype)
        bias = self.linear.get("bias")
        plain = y if bias is None else y - bias
        return y + (factors - 1) * plain + factors * change.astype(y.dtype)

    def _lengths(self) -> mx.array:
        """Of the rows of W + s · B A, (out,), without writing these down; to a gradient they are constant, as the paper
        has it (section 4.3)."""
        a, b = mx.stop_gradient(self.lora_A), mx.stop_gradient(self.lora_B)
        along = self.linear(a)
        if (bias := self.linear.get("bias")) is not None:
            along = along - bias
        mixed = (along.T.astype(mx.float32) * b).sum(axis=1)
        own = (product(b, product(a, a)) * b).sum(axis=1)
        squares = self._squares + 2 * self._scale * mixed + self._scale**2 * own
        return mx.stop_gradient(mx.sqrt(mx.maximum(squares, mx.finfo(mx.float32).eps)))


# ---- which


def expand_module_paths(target: LoraTargetSpec, blocks: Mapping[str, int] | None = None) -> list[str]:
    """The layers that a target names, one for each of its blocks.

    Args:
        blocks: how many there are of each list of blocks, by its path: what "all" needs.
    """
    if target.blocks is None:
        return [target.module_path]
    if isinstance(target.blocks, str):
        place = target.module_path.partition(".{block}")[0]
        numbers = list(range((blocks or {}).get(place, 0)))
    else:
        numbers = target.blocks.get_blocks()
    return [target.module_path.replace("{block}", str(number)) for number in numbers]


def _patterns(shapes: Mapping[str, tuple[int, ...]], usual: Sequence[str]) -> list[str]:
    """The layers that are usually trained, a block's number left open."""
    ends = tuple(f".{end}" for end in usual)
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".{block}.", path, count=1) for path in shapes if path.endswith(ends)))


def chosen(
    targets: Sequence[LoraTargetSpec] | None,
    usual: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    spelled: Mapping[str, str],
    **kind: bool,
) -> list[Layer]:
    """The layers that are trained, checked against the architecture, in its order.

    Args:
        targets: what a configuration names; None for the usual ones.
        usual: ends of paths.
        shapes: all linear layers of the transformer.
        spelled: other names of layers that are taken as well, by these.
        kind: what all of them are, see `Layer`.

    Raises:
        UsageError: there is no such layer, or one is named twice.
    """
    if targets is None:
        ends = tuple(f".{end}" for end in usual)
        return [Layer(path, DEFAULT_RANK, DEFAULT_RANK, **kind) for path in shapes if path.endswith(ends)]
    counts: dict[str, int] = {}
    for path in shapes:
        for found in re.finditer(r"\.(\d+)(?=\.|$)", path):
            place = path[: found.start()]
            counts[place] = max(counts.get(place, 0), int(found[1]) + 1)
    layers: dict[str, Layer] = {}
    for target in targets:
        paths = expand_module_paths(target, counts)
        if not paths:
            raise UsageError(
                f"lora_layers: {shown(target.module_path)} names no block of this model, which has "
                f"{some(_patterns(shapes, usual), 6)}: name these, or leave targets out for them"
            )
        for given in paths:
            path = given if given in shapes else spelled.get(given, given)
            if path not in shapes:
                raise UsageError(f"lora_layers: this model has no linear layer {shown(given)}{_nearest(path, shapes)}")
            if path in layers:
                raise UsageError(f"lora_layers: {path} is named twice")
            if target.rank > min(shapes[path]):
                raise UsageError(
                    f"lora_layers: a rank of {target.rank} is more than {path} has, {shapes[path][0]} × "
                    f"{shapes[path][1]}: {min(shapes[path])} is all of it"
                )
            alpha = target.rank if target.alpha is None else target.alpha
            layers[path] = Layer(path, target.rank, alpha, **kind)
    return [layers[path] for path in shapes if path in layers]


def _nearest(path: str, shapes: Mapping[str, Any]) -> str:
    import difflib

    near = difflib.get_close_matches(path, shapes, n=1)
    return f": did you mean {near[0]}?" if near else f": there are {some(shapes, 3)}"


# ---- where


def get_at_path(root: Any, path: str) -> Any:
    """What a dotted path leads to, through attributes, tables and lists."""
    for step in path.split("."):
        root = root[int(step)] if isinstance(root, (list, tuple)) else root[step]
    return root


def set_at_path(root: Any, path: str, value: Any) -> None:
    """Put something where a dotted path leads to."""
    above, _, last = path.rpartition(".")
    parent = get_at_path(root, above) if above else root
    parent[int(last) if isinstance(parent, list) else last] = value


def inject(
    transformer: nn.Module, layers: Iterable[Layer], shapes: Mapping[str, tuple[int, ...]], seed: int
) -> dict[str, TrainedLinear]:
    """Put factors beside layers; returns what stands there now, by path. B is nothing, so that nothing changes yet."""
    layers = list(layers)
    keys: Any = mx.random.split(mx.random.key(seed), len(layers)) if layers else []
    found = {}
    for layer, key in zip(layers, keys, strict=True):
        linear = get_at_path(transformer, layer.path)
        if not isinstance(linear, (nn.Linear, nn.QuantizedLinear, LoraLinear)):
            raise UsageError(f"lora_layers: {layer.path} is a {type(linear).__name__} here, and no linear layer")
        found[layer.path] = TrainedLinear(linear, layer, shapes[layer.path], key)
        set_at_path(transformer, layer.path, found[layer.path])
    mx.eval([module.parameters() for module in found.values()])
    return found


def inject_lora_targets(transformer: nn.Module, targets: Sequence[LoraTargetSpec]) -> None:
    """Put factors beside the layers that targets name; mflux 0.24's, for its programs."""
    from mflux.models.common.lora.adapters import linear_layers

    shapes = linear_layers(transformer)
    inject(transformer, chosen(targets, (), shapes, {}), shapes, seed=0)


def weights_of(trained: Mapping[str, TrainedLinear]) -> dict[str, mx.array]:
    """The factors under PEFT's names, without a component."""
    return {_named(path, leaf): layer[leaf] for path, layer in trained.items() for leaf in layer.leaves}


def _named(path: str, leaf: str) -> str:
    return f"{path}.{leaf}" if leaf == _MAGNITUDE else f"{path}.{leaf}.weight"


def put_weights(trained: Mapping[str, TrainedLinear], weights: Mapping[str, mx.array]) -> None:
    """The way back."""
    for path, layer in trained.items():
        for leaf in layer.leaves:
            layer[leaf] = weights[_named(path, leaf)]


def check_weights(trained: Mapping[str, TrainedLinear], weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The same factors in float32.

    Raises:
        CheckpointError: some are missing, left over, of another shape, or not finite.
    """
    own = weights_of(trained)
    if lacking := own.keys() - weights.keys():
        raise CheckpointError(f"LoRA weights are missing: {some(sorted(lacking), 3)}")
    if strange := weights.keys() - own.keys():
        raise CheckpointError(f"LoRA weights belong to no layer that is trained: {some(sorted(strange), 3)}")
    for name, value in own.items():
        if weights[name].shape != value.shape:
            raise CheckpointError(f"{name} has the shape {list(weights[name].shape)} instead of {list(value.shape)}")
        if not mx.isfinite(weights[name]).all().item():
            raise CheckpointError(f"{name} holds numbers that are not finite")
    return {name: weights[name].astype(mx.float32) for name in own}


# ---- the file


def metadata(
    layers: Sequence[Layer], *, component: str = "transformer", model: str, beside: Iterable[str] = ()
) -> dict[str, str]:
    """The header's text: PEFT's settings, so that whoever reads the file draws with alpha / rank.

    No more of them than every reader knows: PEFT refuses what is new to it. Most layers' rank and alpha stand once, the
    others in patterns, which are anchored: PEFT matches the end of a name.

    Args:
        beside: the linear layers that the component has, for where PEFT would take one's name for the end of another's.
    """
    trained = {layer.path for layer in layers}
    taken = [path for path in beside if path not in trained and path.endswith(tuple(f".{one}" for one in trained))]
    modules: Any = sorted(trained)
    if taken:
        modules = f"^(?:{'|'.join(map(re.escape, modules))})$"
    ranks, alphas = [layer.rank for layer in layers], [layer.alpha for layer in layers]
    rank, alpha = max(set(ranks), key=ranks.count), max(set(alphas), key=alphas.count)
    settings: dict[str, Any] = {
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {_pattern(layer): layer.rank for layer in layers if layer.rank != rank},
        "alpha_pattern": {_pattern(layer): _plain(layer.alpha) for layer in layers if layer.alpha != alpha},
        "target_modules": modules,
    }
    settings |= {"use_rslora": True} if any(layer.stabilised for layer in layers) else {}
    settings |= {"use_dora": True} if any(layer.magnitudes for layer in layers) else {}
    named = {f"{component}.{name}": value for name, value in settings.items()}
    return {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(named, sort_keys=True),
        "mflux_version": VersionUtil.get_mflux_version(),
        "model": model,
    }


def _pattern(layer: Layer) -> str:
    return f"^{re.escape(layer.path)}$"


def _plain(alpha: float) -> float:
    return int(alpha) if alpha == int(alpha) else alpha


def save(
    path: Path,
    weights: Mapping[str, mx.array],
    layers: Sequence[Layer],
    *,
    prefix: str,
    model: str,
    beside: Iterable[str] = (),
    overwrite: bool = True,
) -> None:
    """Write an adapter's file, whole or not at all.

    Args:
        weights: under PEFT's names, in the dtype that the file is to have.
        beside: see `metadata`.
        prefix: what stands before the names: "transformer", or "diffusion_model", which ComfyUI knows as well.

    Raises:
        OutputError: it cannot be written.
    """
    named = {f"{prefix}.{name}": value for name, value in weights.items()}
    specs = {name: (value.dtype, tuple(value.shape)) for name, value in named.items()}
    about = metadata(layers, model=model, beside=beside)
    with SafetensorsWriter(path, specs, metadata=about, overwrite=overwrite) as writer:
        for name, value in named.items():
            writer.write(name, value)
