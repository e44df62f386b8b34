"""How LoRA files name a model's layers: data of the model's family, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mflux.models.common.lora.adapters import Rows

# What may stand before a layer's name, in the files of one tool or another; the same for all families. Behind those
# of the second kind the parts of a name are joined by underscores.
DOTTED = (
    "transformer.", "", "base_model.model.", "base_model.model.transformer.", "diffusion_model.",
    "model.diffusion_model.", "lycoris.", "lycoris_.", "lora_unet.", "base_model.model.diffusion_model.",
    "model.transformer.", "transformer.module.", "conditional_transformer.", "pipe.dit.",
    "unet.", "model.", "net.", "module.", "_orig_mod.",
)  # fmt: skip
JOINED = ("lora_unet_", "lora_transformer_", "lycoris_", "lycoris__", "lora_dit_")


@dataclass(frozen=True)
class Spelling:
    """One way in which files name the layers of a component.

    Attributes:
        component: whose layers: "transformer", "text_encoder".
        prefixes: what may stand before a name; None: `DOTTED` or `JOINED`.
        table: name in the file → the layers whose rows it holds, one below the other; `{i}` stands for a block's
            number. Without a table the layers' own names are meant.
        joint: what stands between the parts of a name instead of a dot.
        swapped: layers whose two halves of rows are the other way round in the file.
        repeats: whether files in which factors are called `.lora.down` and `.lora.up` have these names beside the
            layers' own ones, for the same changes: then the others hold.
    """

    component: str
    prefixes: tuple[str, ...] | None = None
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
        native: what ComfyUI and kohya's scripts have for these layers, where that is not their own names: name →
            layers, as in `Spelling.table`, and those of `swapped` the other way round.
        heights: ends of layers' paths, each with how many times as high as wide its matrix is; others in one matrix
            with them are square.
    """

    spellings: tuple[Spelling, ...]
    layouts: Mapping[str, str]
    native: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    swapped: tuple[str, ...] = ()
    heights: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """What a name in a file stands for: layers of a component, and which of its rows each has; None is all of them.

    `shape` is that of a matrix (out, in), or of a norm's weights (n,).
    """

    component: str
    parts: tuple[tuple[str, Rows | None], ...]
    shape: tuple[int, ...]
    repeats: bool = False


def spelled(spellings: Sequence[Spelling], layers: Mapping[str, Mapping[str, tuple[int, ...]]]) -> dict[str, Target]:
    """Every name that a file may have for a layer, or for several. Where spellings collide, the first one holds."""
    names: dict[str, Target] = {}
    for spelling in spellings:
        own = layers.get(spelling.component, {})
        prefixes = spelling.prefixes
        if prefixes is None:
            prefixes = DOTTED if spelling.joint == "." else JOINED
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
                for prefix in prefixes:
                    names.setdefault(prefix + written, target)
    return names


def _blocks(layers: Mapping[str, Any]) -> range:
    numbers = [int(step) for layer in layers for step in layer.split(".") if step.isdigit()]
    return range(max(numbers, default=-1) + 1)
