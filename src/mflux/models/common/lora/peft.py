"""What PEFT says of a LoRA beside its tensors: alpha and ranks, in the file's header or in `adapter_config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mflux.checkpoints.folders import read_json
from mflux.checkpoints.readers.opening import Checkpoint
from mflux.checkpoints.readers.safetensors import SafetensorsFile
from mflux.errors import CheckpointError
from mflux.models.common.lora.peft_patterns import Pattern
from mflux.text import shown
from mflux.utils.strict_json import parse

Settings = Mapping[str, Mapping[str, Any]]
# One for each layer is usual.
_MOST_PATTERNS = 4096
_METADATA = "lora_adapter_metadata"


def settings_of(path: Path, file: Checkpoint) -> dict[str, dict[str, Any]]:
    """PEFT's settings by component ("" for a file about one), from the file's header or from beside it."""
    opened = file.files[0]
    text = opened.metadata.get(_METADATA) if isinstance(opened, SafetensorsFile) else None
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


def strength(stem: str, component: str, rank: int | None, settings: Settings, *, kronecker: bool) -> float:
    """alpha / rank, or alpha / √rank (rsLoRA, arxiv.org/abs/2312.03732); 1 without settings.

    A Kronecker product's rank is that of the settings: unlike LyCORIS, PEFT divides by it where both factors are whole.
    """
    found = settings.get(component) or settings.get("") or {}
    name = "alpha" if kronecker else "lora_alpha"
    if found.get(name) is None or (kronecker and found.get("r") is None):
        return 1.0
    layer = stem.removeprefix("base_model.model.").removeprefix(f"{component}.")

    def of_layer(default: str, patterns: str) -> float:
        return next((value for pattern, value in found[patterns].items() if pattern.matches(layer)), found[default])

    alpha = of_layer(name, "alpha_pattern")
    divisor = of_layer("r", "rank_pattern") if kronecker else rank
    if divisor is None or not divisor > 0:
        return math.inf
    return alpha / (math.sqrt(divisor) if found.get("use_rslora") else divisor)
