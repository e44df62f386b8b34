"""A LoRA under the names that other programs have for its layers.

Where one of their matrices holds what are several layers here, one below the other, their factors become one pair: A's
stand one below the other, B's on the diagonal. The product is the same, at the sum of the ranks;
where layers have different strengths, these are multiplied into B.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from mflux.backend import mx
from mflux.checkpoints.readers.opening import open_checkpoint
from mflux.checkpoints.writing import SafetensorsWriter
from mflux.errors import UsageError
from mflux.models.common.lora import peft
from mflux.models.common.lora.entry import parse_name
from mflux.models.common.lora.names import LoraNames
from mflux.text import shown

log = logging.getLogger(__name__)

LAYOUTS = ("comfyui", "kohya")
_OURS = ("transformer.", "diffusion_model.", "base_model.model.", "")


@dataclass(frozen=True)
class _Change:
    """Factors of a layer, (rank, in) and (out, rank), and by what their product is multiplied."""

    down: mx.array
    up: mx.array
    strength: float


def relaid(source: Path, destination: Path, layout: str, names: LoraNames, *, force: bool = False) -> Path:
    """Write a LoRA with diffusers' names under those of ComfyUI's or kohya's.

    Raises:
        CheckpointError: the file cannot be read.
        UsageError: it holds something else than a LoRA's two factors, or has other names already.
        OutputError: the destination cannot be written.
    """
    changes, kind = _read(source)
    joint, prefix, ends = (
        ("_", "lora_unet_", ("lora_down", "lora_up"))
        if layout == "kohya"
        else (".", "diffusion_model.", ("lora_A", "lora_B"))
    )
    tensors: dict[str, mx.array] = {}
    for name, change in _named(changes, names).items():
        stem = prefix + name.replace(".", joint)
        for end, value in zip(ends, (change.down, change.up), strict=True):
            tensors[f"{stem}.{end}.weight"] = value.astype(kind)
        tensors[f"{stem}.alpha"] = mx.array(change.strength * len(change.down), mx.float32)
    specs = {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    with SafetensorsWriter(destination, specs, metadata={"format": "pt"}, overwrite=force) as writer:
        for name, value in tensors.items():
            writer.write(name, value)
    log.info("%d layers under %d names", len(changes), len(tensors) // 3)
    return destination


def _read(source: Path) -> tuple[dict[str, _Change], mx.Dtype]:
    file = open_checkpoint(source)
    settings = peft.settings_of(source, file)
    parts: dict[str, dict[str, str]] = {}
    for name in file:
        stem, part = parse_name(name)
        if stem is None or part not in ("down", "up", "alpha"):
            raise UsageError(
                f"{source} holds {shown(name)}: only a LoRA's two factors can have other names, no DoRA or LoKr"
            )
        parts.setdefault(stem, {})[part] = name
    changes, kinds = {}, set()
    for stem, found in parts.items():
        path = stem
        for prefix in _OURS:
            if stem.startswith(prefix):
                path = stem[len(prefix) :]
                break
        if not {"down", "up"} <= found.keys():
            raise UsageError(f"{source} is incomplete: {shown(stem)} has one factor of two")
        down, up = file[found["down"]], file[found["up"]]
        if down.ndim != 2 or up.ndim != 2 or len(down) != up.shape[1]:
            raise UsageError(f"{source}: the factors of {shown(stem)} are no matrices of one rank")
        kinds.add(down.dtype)
        if "alpha" in found:
            strength = cast(float, file[found["alpha"]].astype(mx.float32).item()) / len(down)
        else:
            strength = peft.strength(stem, "transformer", len(down), settings, kronecker=False)
        changes[path] = _Change(down.astype(mx.float32), up.astype(mx.float32), strength)
    return changes, kinds.pop() if len(kinds) == 1 else mx.float32


def _named(changes: Mapping[str, _Change], names: LoraNames) -> dict[str, _Change]:
    """The changes by the names that others have for them."""
    left, found = dict(changes), {}
    for theirs, ours in names.native.items():
        pattern = re.compile(re.escape(ours[0]).replace(r"\{i\}", r"(\d+)"))
        blocks = (
            {match[1] for path in changes for one in ours if (match := _match(one, path))} if pattern.groups else {""}
        )
        for block in sorted(blocks, key=lambda block: int(block or 0)):
            paths = [one.replace("{i}", block) for one in ours]
            parts = [left.pop(path, None) for path in paths]
            if any(part is not None for part in parts):
                joined = parts[0] if len(parts) == 1 else _joined(paths, parts, names)
                assert joined is not None
                if paths[0] in names.swapped:
                    half = len(joined.up) // 2
                    joined = _Change(joined.down, mx.concatenate([joined.up[half:], joined.up[:half]]), joined.strength)
                found[theirs.replace("{i}", block)] = joined
    strange = [path for path in left if path.startswith("lora_") or any(_match(one, path) for one in names.native)]
    if strange:
        raise UsageError(f"{shown(strange[0])} is another program's name already: take the file with diffusers' names")
    return found | left


def _match(pattern: str, path: str) -> re.Match[str] | None:
    return re.fullmatch(re.escape(pattern).replace(r"\{i\}", r"(\d+)"), path)


def _joined(paths: list[str], parts: list[_Change | None], names: LoraNames) -> _Change:
    """Changes of layers that are one matrix, one below the other; a layer without one is not changed."""
    present = [part for part in parts if part is not None]
    width, rank = present[0].down.shape[1], sum(len(part.down) for part in present)
    strengths = {part.strength for part in present}
    strength = strengths.pop() if len(strengths) == 1 else 1.0
    rows, start = [], 0
    for path, part in zip(paths, parts, strict=True):
        times = next((number for end, number in names.heights.items() if path.endswith(end)), 1)
        if part is None:
            rows.append(mx.zeros((times * width, rank)))
            continue
        up = part.up if part.strength == strength else part.up * part.strength
        after = rank - start - up.shape[1]
        rows.append(mx.pad(up, [(0, 0), (start, after)]))
        start += up.shape[1]
    return _Change(mx.concatenate([part.down for part in present]), mx.concatenate(rows), strength)
