"""From LoRA files to adapters of a model's layers, whatever tool wrote them.

The name of a tensor says which layer it belongs to and which part of an adapter it is. Parts are named alike for all
models (`_PARTS`); how layers are named is data of the model's family (`Spelling`). Both are settled, and every shape is
checked, before a tensor is read.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mflux.backend import mx, nn
from mflux.checkpoints.folders import read_json
from mflux.checkpoints.loading import finite, not_finite
from mflux.checkpoints.readers.opening import Checkpoint, open_checkpoint
from mflux.checkpoints.readers.safetensors import SafetensorsFile
from mflux.errors import CheckpointError
from mflux.models.common.lora.adapters import (
    Adapter,
    Difference,
    Kronecker,
    LowRank,
    Rows,
    linear_layers,
    merged,
    merged_bias,
    norm_layers,
    wrap,
)
from mflux.models.common.lora.peft_patterns import Pattern
from mflux.text import shown, some
from mflux.utils.strict_json import parse

log = logging.getLogger(__name__)

# Part → how names end that hold it. PEFT may put an adapter's name before ".weight".
_PARTS = {
    "down": r"\.(lora_A((?!\.bias$)\.\w+)*|lora_down(\.weight)?|lora(_linear_layer)?\.down\.weight|down\.weight)",
    "up": r"\.(lora_B((?!\.bias$)\.\w+)*|lora_up(\.weight)?|lora(_linear_layer)?\.up\.weight|up\.weight)",
    "bias": r"\.lora_B(\.\w+)*\.bias",
    "alpha": r"\.alpha",
    "diff": r"\.diff",
    "diff_b": r"\.diff_b",
    "magnitude": r"\.dora_scale",
    "w1": r"\.lokr_w1",
    "w1_a": r"\.lokr_w1_a",
    "w1_b": r"\.lokr_w1_b",
    "w2": r"\.lokr_w2",
    "w2_a": r"\.lokr_w2_a",
    "w2_b": r"\.lokr_w2_b",
    "t2": r"\.lokr_t2",
}
_PATTERNS = {part: re.compile(rf"(.+?)(?:{ending})") for part, ending in _PARTS.items()}
_PEFT_MAGNITUDE = re.compile(r"\.lora_magnitude_vector(\.|$)")
_DOTTED_FACTOR = re.compile(r"\.lora\.(down|up)\.weight$")
_PEFT_FACTOR = re.compile(r"\.lora_[AB](\.|$)")
# One for each layer is usual.
_MOST_PATTERNS = 4096
_PEFT_METADATA = "lora_adapter_metadata"


@dataclass(frozen=True)
class Spelling:
    """One way in which files name the layers of a component.

    Attributes:
        component: whose layers: "transformer", "text_encoder".
        prefixes: what may stand before a name.
        table: name in the file → the layers whose rows it holds, one below the other; `{i}` stands for a block's
            number. Without a table the layers' own names are meant.
        joint: what stands between the parts of a name instead of a dot.
        swapped: layers whose two halves of rows are the other way round in the file.
        repeats: whether files in which factors are called `.lora.down` and `.lora.up` have these names beside the
            layers' own ones, for the same changes: then the others hold.
    """

    component: str
    prefixes: tuple[str, ...]
    table: Mapping[str, tuple[str, ...]] | None = None
    joint: str = "."
    swapped: tuple[str, ...] = ()
    repeats: bool = False


@dataclass(frozen=True)
class LoraNames:
    """The names that LoRA files have for a family's layers.

    Attributes:
        spellings: how files name the layers.
        layouts: an example of a name for each layout, for the sentence that says what is known.
    """

    spellings: tuple[Spelling, ...]
    layouts: Mapping[str, str]


@dataclass(frozen=True)
class Target:
    """What a name in a file stands for: layers of a component, and which of its rows each has; None is all of them.

    `shape` is that of a matrix (out, in), or of a norm's weights (n,).
    """

    component: str
    parts: tuple[tuple[str, Rows | None], ...]
    shape: tuple[int, ...]
    repeats: bool = False


class Loras:
    """The LoRA files of a pipeline, matched with its layers.

    Args:
        paths: LoRA files (or folders that hold one) on this disk.
        scales: one for each.
        spellings: how files name the layers.
        layouts: an example of a name for each layout, for the sentence that says what is known.
        modules: the components, not quantized; nothing of them is computed.

    Raises:
        CheckpointError: a file is damaged, fits no layer, or asks for what is not built.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        scales: Sequence[float],
        *,
        spellings: Sequence[Spelling],
        layouts: Mapping[str, str],
        modules: Mapping[str, nn.Module],
    ):
        layers = {component: linear_layers(module) | norm_layers(module) for component, module in modules.items()}
        biased = {
            component: {path for path, layer in module.named_modules() if "bias" in layer}
            for component, module in modules.items()
        }
        names = spelled(spellings, layers)
        self._adapters: dict[str, dict[str, list[Adapter]]] = {component: {} for component in modules}
        for path, scale in zip(paths, scales, strict=True):
            for (component, layer), adapter in read_lora(Path(path), scale, names, layouts).items():
                if adapter.read_bias is not None and layer not in biased[component]:
                    raise CheckpointError(f"{path} changes the bias of {layer}, which has none in this model")
                self._adapters[component].setdefault(layer, []).append(adapter)

    def apply(self, component: str, load: Callable[..., nn.Module], *, bake: bool, to_save: bool = False) -> nn.Module:
        """Load a component with its adapters.

        Args:
            component: a key of `modules`.
            load: loads it; called with `adjust`, see `checkpoints.loading.fill`.
            bake: add the adapters to the weights where these have full precision; layers that are stored quantized,
                or all layers without it, compute them in each step.
            to_save: all must be baked.

        Raises:
            CheckpointError: the component is to be saved, and stored quantized.
        """
        adapters = self._adapters.get(component, {})
        # Norms and biases are never stored quantized, and nothing is gained by computing beside them.
        whole = bake or to_save
        baked: set[tuple[str, str]] = set()

        def adjust(name: str, value: mx.array) -> mx.array:
            layer, _, leaf = name.rpartition(".")
            if layer not in adapters or leaf not in ("weight", "bias"):
                return value
            if leaf == "weight" and value.ndim > 1 and not whole:
                return value
            baked.add((layer, leaf))
            return (merged if leaf == "weight" else merged_bias)(value, adapters[layer])

        module = load(adjust if adapters else None)
        rest = [
            layer
            for layer, found in adapters.items()
            if (layer, "weight") not in baked and any(adapter.read is not None for adapter in found)
        ]
        if rest and to_save:
            raise CheckpointError(
                f"LoRAs cannot be added to {component}: its weights are stored quantized; save from a model in full "
                "precision"
            )
        for layer in rest:
            wrap(module, layer, adapters[layer], bias=(layer, "bias") not in baked)
        if bake and rest:
            log.info("%s: its weights are stored quantized, so LoRAs are computed in each step", component)
        return module


def spelled(spellings: Sequence[Spelling], layers: Mapping[str, Mapping[str, tuple[int, ...]]]) -> dict[str, Target]:
    """Every name that a file may have for a layer, or for several. Where spellings collide, the first one holds."""
    names: dict[str, Target] = {}
    for spelling in spellings:
        own = layers.get(spelling.component, {})
        table = spelling.table
        if table is None:
            table = {layer: (layer,) for layer in own}
            # Files of some versions of transformers leave this out.
            table |= {layer.removeprefix("text_model."): (layer,) for layer in own}
        for name, targets in table.items():
            for number in _blocks(own) if "{i}" in name else (0,):
                concrete = [target.replace("{i}", str(number)) for target in targets]
                if not all(target in own for target in concrete):
                    continue
                parts: list[tuple[str, Rows | None]] = []
                start = 0
                for layer in concrete:
                    stop = start + own[layer][0]
                    middle = (start + stop) // 2
                    parts.append(
                        (layer, ((middle, stop), (start, middle)) if layer in spelling.swapped else ((start, stop),))
                    )
                    start = stop
                if len(parts) == 1 and concrete[0] not in spelling.swapped:
                    parts = [(concrete[0], None)]
                shape = (start, *own[concrete[0]][1:])
                target = Target(spelling.component, tuple(parts), shape, spelling.repeats)
                written = name.replace("{i}", str(number)).replace(".", spelling.joint)
                for prefix in spelling.prefixes:
                    names.setdefault(prefix + written, target)
    return names


def _blocks(layers: Mapping[str, Any]) -> range:
    numbers = [int(step) for layer in layers for step in layer.split(".") if step.isdigit()]
    return range(max(numbers, default=-1) + 1)


def read_lora(
    path: Path, scale: float, names: Mapping[str, Target], layouts: Mapping[str, str]
) -> dict[tuple[str, str], Adapter]:
    """A file's adapters by component and layer.

    Raises:
        CheckpointError: see `Loras`.
    """
    if not math.isfinite(scale):
        raise CheckpointError(f"the scale of {path} is {scale}: give a number")
    file = open_checkpoint(path)
    groups: dict[str, dict[str, str]] = {}
    left = []
    for name in file:
        if _PEFT_MAGNITUDE.search(name):
            raise _dora(path)
        stem, part = _parse(name)
        if stem is not None and part is not None and stem in names:
            if part in groups.setdefault(stem, {}):
                raise CheckpointError(f"{path} holds {stem} twice: as {shown(groups[stem][part])} and as {shown(name)}")
            groups[stem][part] = name
        else:
            left.append(name)
    for stem in [stem for stem, parts in groups.items() if not parts.keys() - {"alpha", "magnitude", "bias"}]:
        left += groups.pop(stem).values()
    if not groups:
        examples = "; ".join(f"{layout}: {name}" for layout, name in layouts.items())
        raise CheckpointError(
            f"{path} changes no layer of this model: its names are like {some(sorted(file), 3)}, and known are those "
            f"of {examples}: take a LoRA that was made for this model"
        )
    settings = _peft_settings(path, file)
    adapters: dict[tuple[str, str], Adapter] = {}
    sources: dict[tuple[str, str], str] = {}
    # A layer may stand in a file twice, as diffusers names it and as kohya does; diffusers takes its own names then.
    for stem in sorted(groups, key=lambda stem: (names[stem].repeats, not stem.startswith("transformer."))):
        target = names[stem]
        entry = _Entry(path, file, stem, groups[stem], target, settings)
        for layer, rows in target.parts:
            place = target.component, layer
            if place in adapters:
                repeated = target.repeats and any(_DOTTED_FACTOR.search(name) for name in groups[stem].values())
                if not repeated and (not sources[place].startswith("transformer.") or stem.startswith("transformer.")):
                    raise CheckpointError(f"{path} changes the layer {layer} twice: as {sources[place]} and as {stem}")
                left += [name for name in groups[stem].values() if name not in left]
                continue
            sources[place] = stem
            adapters[place] = entry.adapter(scale, rows)
    if left:
        log.warning(
            "%s: %d of %d tensors belong to no layer: %s", path.name, len(left), len(file), some(sorted(left), 3)
        )
    log.info("LoRA %s: %d layers, scale %g", path.name, len(adapters), scale)
    return adapters


def _parse(name: str) -> tuple[str | None, str | None]:
    """The layer's name as it is written, and the part."""
    for part, pattern in _PATTERNS.items():
        if match := pattern.fullmatch(name):
            return match[1], part
    return None, None


class _Entry:
    """The tensors of one name in a file, checked against what the name stands for."""

    def __init__(
        self,
        path: Path,
        file: Checkpoint,
        stem: str,
        parts: dict[str, str],
        target: Target,
        settings: Mapping[str, Mapping[str, Any]],
    ):
        self.path = path
        self.file = file
        self.parts = parts
        self.target = target
        self.stem = stem
        self.shapes = {part: self._shape(name) for part, name in parts.items()}
        self.kronecker = any(part[0] in "wt" for part in parts)
        self.has_product = self.kronecker or not parts.keys().isdisjoint(("down", "up", "diff"))
        self.strength = 1.0
        if "diff" in parts:
            self._check_difference()
        elif self.has_product:
            self._check_is_matrix()
            rank = self._check_kronecker() if self.kronecker else self._check_low_rank()
            self.strength = self._strength(rank, settings)
        self._check_magnitude()
        self._check_bias()

    def adapter(self, scale: float, rows: Rows | None) -> Adapter:
        def read() -> tuple[LowRank | Kronecker | Difference, mx.array | None]:
            if "diff" in self.parts:
                return Difference(self._tensor("diff").reshape(self.target.shape), rows), None
            product: Kronecker | LowRank
            if self.kronecker:
                product = Kronecker(self._factor("w1"), self._factor("w2"), rows)
            else:
                product = LowRank(self._matrix("down"), self._matrix("up"), rows)
            magnitude = None
            if "magnitude" in self.parts:
                magnitude = self._tensor("magnitude").astype(mx.float32).reshape(self.magnitude_shape)
                if rows is not None and magnitude.shape[1] == 1:
                    magnitude = mx.concatenate([magnitude[start:stop] for start, stop in rows])
            return product, magnitude

        def read_bias() -> mx.array:
            strengths = {"bias": self.strength, "diff_b": 1.0}
            parts = [
                strength * self._tensor(part).astype(mx.float32)
                for part, strength in strengths.items()
                if part in self.parts
            ]
            bias = sum(parts[1:], start=parts[0])
            return bias if rows is None else mx.concatenate([bias[start:stop] for start, stop in rows])

        has_bias = "bias" in self.parts or "diff_b" in self.parts
        return Adapter(scale, self.strength, read if self.has_product else None, read_bias if has_bias else None)

    # ---- what is checked before anything is read

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = self.file.describe(name).shape
        if shape is None:
            raise CheckpointError(f"{self.path}: {name} is no plain tensor: turn the file with mflux-convert")
        return shape

    def _flat(self, part: str) -> tuple[int, int]:
        """A matrix's shape; kernels of 1 × 1 convolutions count as matrices."""
        shape = self.shapes[part]
        if len(shape) < 2 or not all(shape):
            raise CheckpointError(
                f"{self.path}: {self.parts[part]} has the shape {shown(list(shape))}, and is no matrix"
            )
        return shape[0], math.prod(shape[1:])

    def _check_difference(self) -> None:
        """The whole change of the weights, beside which there can be no other."""
        if beside := self.parts.keys() - {"diff", "diff_b", "alpha"}:
            raise CheckpointError(
                f"{self.path} changes {self.stem} twice: as {self.parts['diff']} and as {self.parts[min(beside)]}"
            )
        shape = self.shapes["diff"]
        if len(self.target.shape) == 2:
            shape = self._flat("diff")
        if shape != self.target.shape:
            raise CheckpointError(
                f"{self.path} does not fit this model: {self.parts['diff']} has the shape {shown(list(shape))}, and "
                f"here it is {list(self.target.shape)}"
            )

    def _check_is_matrix(self) -> None:
        if len(self.target.shape) != 2:
            raise CheckpointError(f"{self.path} changes {self.stem} by factors, and here that is a norm")

    def _check_low_rank(self) -> int:
        for part, other in (("down", "up"), ("up", "down")):
            if part not in self.parts:
                have = self.parts[other]
                raise CheckpointError(f"{self.path} is incomplete: it has {have} without its {part} part")
        if "magnitude" in self.parts and any(_PEFT_FACTOR.search(name) for name in self.parts.values()):
            raise _dora(self.path)
        (rank, width), (height, inner) = self._flat("down"), self._flat("up")
        if rank != inner:
            raise CheckpointError(
                f"{self.path} is damaged: {self.parts['down']} has the rank {rank} and {self.parts['up']} {inner}"
            )
        self._check_shape((height, width))
        return rank

    def _check_kronecker(self) -> int | None:
        rank = None
        sides = []
        for side in ("w1", "w2"):
            if side in self.parts:
                sides.append(self._flat(side))
                continue
            if f"{side}_a" not in self.parts or f"{side}_b" not in self.parts:
                raise CheckpointError(f"{self.path} is incomplete: {self.stem} has no lokr_{side}, nor its two factors")
            (height, inner), (rank, width) = self._flat(f"{side}_a"), self._flat(f"{side}_b")
            if side == "w2" and "t2" in self.parts:
                # Here the first factor lies on its side.
                shape = self.shapes["t2"]
                inner, height = height, inner
                if len(shape) < 2 or shape[:2] != (inner, rank):
                    raise CheckpointError(f"{self.path} is damaged: {self.parts['t2']} does not fit its factors")
                width *= math.prod(shape[2:])
            elif inner != rank:
                raise CheckpointError(f"{self.path} is damaged: the factors of {self.stem}'s {side} do not fit")
            sides.append((height, width))
        self._check_shape((sides[0][0] * sides[1][0], sides[0][1] * sides[1][1]))
        return rank

    def _check_shape(self, shape: tuple[int, int]) -> None:
        if shape != self.target.shape:
            raise CheckpointError(
                f"{self.path} does not fit this model: {self.stem} changes a matrix of {shape[0]} × {shape[1]}, and "
                f"here it has {self.target.shape[0]} × {self.target.shape[1]}"
            )

    def _check_magnitude(self) -> None:
        if "magnitude" not in self.parts:
            return
        height, width = self.target.shape
        shape = self.shapes["magnitude"]
        if math.prod(shape) == height and (len(shape) < 2 or shape[0] == height):
            self.magnitude_shape = (height, 1)
        elif math.prod(shape) == width and len(self.target.parts) == 1:
            self.magnitude_shape = (1, width)
        elif math.prod(shape) == width:
            raise CheckpointError(
                f"{self.path}: {self.parts['magnitude']} scales the columns of several layers at once, which is not "
                "built: take a version of this LoRA without DoRA"
            )
        else:
            raise CheckpointError(
                f"{self.path}: {self.parts['magnitude']} has the shape {shown(list(shape))} for a matrix of "
                f"{height} × {width}"
            )

    def _check_bias(self) -> None:
        for part in ("bias", "diff_b"):
            if part in self.parts and self.shapes[part] != self.target.shape[:1]:
                raise CheckpointError(
                    f"{self.path}: {self.parts[part]} has the shape {shown(list(self.shapes[part]))} for a layer of "
                    f"{self.target.shape[0]} outputs"
                )

    def _strength(self, rank: int | None, settings: Mapping[str, Mapping[str, Any]]) -> float:
        if "alpha" not in self.parts:
            strength = _peft_strength(self, rank, settings)
        elif rank is None:
            # Both factors of a Kronecker product in full: LyCORIS takes alpha for the rank then.
            return 1.0
        else:
            if math.prod(self.shapes["alpha"]) != 1:
                raise CheckpointError(f"{self.path}: {self.parts['alpha']} is not one number")
            strength = cast(float, self.file[self.parts["alpha"]].astype(mx.float32).item()) / rank
        if not math.isfinite(strength):
            raise CheckpointError(f"{self.path}: the strength of {self.stem} is not a finite number")
        return strength

    # ---- reading

    def _tensor(self, part: str) -> mx.array:
        """A tensor as the file has it.

        Raises:
            CheckpointError: some of its numbers are not finite.
        """
        name = self.parts[part]
        value = self.file[name]
        if not finite(value, self.path):
            raise CheckpointError(not_finite(self.path, name, "this LoRA"))
        return value

    def _matrix(self, part: str) -> mx.array:
        return self._tensor(part).reshape(self._flat(part))

    def _factor(self, side: str) -> mx.array:
        """w1 or w2, multiplied out of its own factors if need be, in float32."""
        if side in self.parts:
            return self._matrix(side).astype(mx.float32)
        a, b = (self._matrix(f"{side}_{half}").astype(mx.float32) for half in "ab")
        if side == "w1" or "t2" not in self.parts:
            return a @ b
        core = self._tensor("t2").astype(mx.float32)
        inner, outer = core.shape[:2]
        # Over both ranks: aᵀ · core · b, with the kernel's places, which a linear layer counts to its inputs, last.
        w2 = mx.einsum("ijk,ip,jr->prk", core.reshape(inner, outer, -1), a, b)
        return w2.reshape(w2.shape[0], -1)


# ---- what PEFT says beside the tensors


def _peft_settings(path: Path, file: Checkpoint) -> dict[str, dict[str, Any]]:
    """PEFT's settings by component ("" for a file about one), from the file's header or from beside it."""
    opened = file.files[0]
    text = opened.metadata.get(_PEFT_METADATA) if isinstance(opened, SafetensorsFile) else None
    source: object = path
    try:
        if text is not None:
            values = parse(text)
        else:
            beside = (path if path.is_dir() else path.parent) / "adapter_config.json"
            if not beside.is_file() or not (path.is_dir() or path.name.startswith("adapter_model")):
                return {}
            source, values = beside, read_json(beside)
        settings: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            component, _, setting = name.rpartition(".")
            settings.setdefault(component, {})[setting] = value
        for entry in settings.values():
            for setting in ("lora_alpha", "alpha", "r"):
                if entry.get(setting) is not None:
                    entry[setting] = float(entry[setting])
            for setting in ("alpha_pattern", "rank_pattern"):
                entry[setting] = _patterns(entry.get(setting) or {}, setting, source)
    except (ValueError, TypeError, AttributeError, ArithmeticError):
        raise CheckpointError(f"{source}: the settings that PEFT wrote of this LoRA make no sense") from None
    return settings


def _patterns(table: Mapping[str, Any], setting: str, source: object) -> dict[Pattern, float]:
    if len(table) > _MOST_PATTERNS:
        raise CheckpointError(
            f"{source}: its {setting} has {len(table):,} entries, and at most {_MOST_PATTERNS:,} can be"
        )
    found = {}
    for text, number in table.items():
        try:
            found[Pattern(text)] = float(number)
        except ValueError as error:
            raise CheckpointError(
                f"{source}: its {setting} has {shown(text, 60)}, which {shown(error)}: write the layer's name there"
            ) from None
    return found


def _peft_strength(entry: _Entry, rank: int | None, settings: Mapping[str, Mapping[str, Any]]) -> float:
    """alpha / rank, or alpha / √rank (rsLoRA, arxiv.org/abs/2312.03732); 1 without settings.

    A Kronecker product's rank is that of the settings: unlike LyCORIS, PEFT divides by it where both factors are whole.
    """
    component = entry.target.component
    found = settings.get(component) or settings.get("") or {}
    name = "alpha" if entry.kronecker else "lora_alpha"
    if found.get(name) is None or (entry.kronecker and found.get("r") is None):
        return 1.0
    layer = entry.stem.removeprefix("base_model.model.").removeprefix(f"{component}.")

    def of_layer(default: str, patterns: str) -> float:
        return next((value for pattern, value in found[patterns].items() if pattern.matches(layer)), found[default])

    alpha = of_layer(name, "alpha_pattern")
    divisor = of_layer("r", "rank_pattern") if entry.kronecker else rank
    if divisor is None or not divisor > 0:
        return math.inf
    return alpha / (math.sqrt(divisor) if found.get("use_rslora") else divisor)


def _dora(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is a DoRA in PEFT's layout, which is not built in this version: take a plain LoRA, or a DoRA in "
        "LyCORIS' layout"
    )
