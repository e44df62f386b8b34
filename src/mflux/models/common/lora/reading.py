"""From LoRA files to adapters of a model's layers, whatever tool wrote them.

The name of a tensor says which layer it belongs to and which part of an adapter it is. Parts are named alike for all
models (`entry`); how layers are named is data of the model's family (`names`). Both are settled, and every shape is
checked, before a tensor is read.
"""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mflux.backend import mx, nn
from mflux.checkpoints.late import LateLinear
from mflux.checkpoints.readers.opening import open_checkpoint
from mflux.errors import CheckpointError
from mflux.models.common.lora import peft
from mflux.models.common.lora.adapters import Adapter, linear_layers, merged, merged_bias, norm_layers, put_on, wrap
from mflux.models.common.lora.entry import Entry, other_kind, parse_name
from mflux.models.common.lora.names import Spelling, Target, spelled
from mflux.text import shown, some

log = logging.getLogger(__name__)

_DOTTED_FACTOR = re.compile(r"\.lora\.(down|up)\.weight$")


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

    @classmethod
    def none(cls) -> Loras:
        """No files, for adapters that come from elsewhere."""
        return cls([], [], spellings=(), layouts={}, modules={})

    def behind(self, component: str, adapters: Mapping[str, Adapter]) -> Loras:
        """These, after further adapters of a component's layers."""
        found = copy.copy(self)
        own = self._adapters.get(component, {})
        both = {layer: [*([adapters[layer]] if layer in adapters else ()), *own.get(layer, ())]
                for layer in adapters.keys() | own.keys()}  # fmt: skip
        found._adapters = self._adapters | {component: both}
        return found

    def of(self, component: str) -> Mapping[str, Sequence[Adapter]]:
        """A component's adapters, by the paths of its layers."""
        return self._adapters.get(component, {})

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
        if not (bake or to_save):
            module = load(None)
            put_on(module, adapters)
            return module
        baked: set[tuple[str, str]] = set()

        def adjust(name: str, value: mx.array) -> mx.array:
            layer, _, leaf = name.rpartition(".")
            if layer not in adapters or leaf not in ("weight", "bias"):
                return value
            baked.add((layer, leaf))
            return (merged if leaf == "weight" else merged_bias)(value, adapters[layer])

        module = load(adjust if adapters else None)
        late = {path: layer for path, layer in module.named_modules() if isinstance(layer, LateLinear)}
        # Added when they are read, which is still to come.
        baked |= {(path, "bias") for path in late}
        baked |= {(path, "weight") for path, layer in late.items() if not layer.packed}
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
        stem, part = parse_name(name)
        if stem is not None and part is not None and stem in names:
            if part in groups.setdefault(stem, {}):
                raise CheckpointError(f"{path} holds {stem} twice: as {shown(groups[stem][part])} and as {shown(name)}")
            groups[stem][part] = name
        else:
            left.append(name)
    for stem in [stem for stem, parts in groups.items() if not parts.keys() - {"alpha", "magnitude", "bias"}]:
        left += groups.pop(stem).values()
    others = {kind: name for name in reversed(list(file)) if (kind := other_kind(name)) is not None}
    if others:
        kinds = some([f"{kind} ({shown(name)})" for kind, name in others.items()], 3)
        raise CheckpointError(
            f"{path} holds {kinds}, which this version does not apply: take a LoRA, LoHa, LoKr or DoRA of it"
        )
    if not groups:
        examples = "; ".join(f"{layout}: {name}" for layout, name in layouts.items())
        raise CheckpointError(
            f"{path} changes no layer of this model: its names are like {some(sorted(file), 3)}, and known are those "
            f"of {examples}: take a LoRA that was made for this model"
        )
    settings = peft.settings_of(path, file)
    adapters: dict[tuple[str, str], Adapter] = {}
    sources: dict[tuple[str, str], str] = {}
    # A layer may stand in a file twice, as diffusers names it and as kohya does; diffusers takes its own names then.
    for stem in sorted(groups, key=lambda stem: (names[stem].repeats, not stem.startswith("transformer."))):
        target = names[stem]
        entry = Entry(path, file, stem, groups[stem], target, settings)
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
