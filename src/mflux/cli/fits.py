"""`mflux doctor --plan MODEL`: what a model takes on disk and in memory, and which machine that fits."""

from __future__ import annotations

from typing import Any

from mflux.errors import UsageError
from mflux.text import size
from mflux.utils.paths import user_path
from mflux.utils.values import QUANTIZE_CHOICES

# What is said of every model, at 1024 × 1024 pixels.
BITS = (None, 8, 4)
ALL = "all"


def plans(model: str, base_model: str | None = None) -> dict[str, list[dict[str, Any]]]:
    """What a model takes with each number of bits, by its name; of `all`, of every model, with `BITS`.

    Args:
        model: a built-in model's name, a folder with one, a repository, or "all".

    Raises:
        UsageError: there is no such model, or it is not built.
    """
    from mflux.checkpoints.readers.plain import read_json
    from mflux.models.common.config.model_config import built_key
    from mflux.models.common.family import built
    from mflux.models.common.footprint import components
    from mflux.models.common.saved_model import recorded_base_model

    if model == ALL:
        return {key: _rows(key, BITS) for key in built() if key != "demo"}
    key = built_key(model, base_model or recorded_base_model(model))
    if key == "demo":
        raise UsageError("the model demo comes with mflux and fits everywhere: name another one")
    configs = {
        part.folder: read_json(path)
        for part in components(key)
        if (path := user_path(model) / part.folder / "config.json").is_file()
    }
    return {key: _rows(key, (None, *QUANTIZE_CHOICES[::-1]), configs)}


def _rows(key: str, bits: tuple[int | None, ...], configs: Any = None) -> list[dict[str, Any]]:
    from mflux.models.common.footprint import footprint
    from mflux.models.common.room import fits_here

    found = [footprint(key, number, configs=configs) for number in bits]
    return [
        {"bits": one.bits, "disk": one.disk, "peak": one.peak, "stage": one.stage, "mac": one.mac,
         "fits_here": fits_here(one.peak)}
        for one in found
    ]  # fmt: skip


def describe(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The lines that a person reads: a table for one model, and for all of them the one of docs/memory.md."""
    if len(found) > 1:
        heads = [f"{'bf16' if bits is None else f'-q {bits}'}: disk, peak GB, Mac" for bits in BITS]
        return [
            f"| model | {' | '.join(heads)} |",
            f"|---|{'---|' * len(heads)}",
            *(f"| {key} | {' | '.join(map(_cell, rows))} |" for key, rows in found.items()),
        ]
    ((key, rows),) = found.items()
    lines = [f"{key}, 1024 x 1024 pixels", f"{'bits':>6}{'on disk':>10}{'memory':>10}  fits a Mac with  fits here"]
    for row in rows:
        mac = "none of these" if row["mac"] is None else f"{row['mac']} GB"
        here = "yes" if row["fits_here"] else "no"
        lines.append(f"{row['bits']:>6}{size(row['disk']):>10}{size(row['peak']):>10}  {mac:15}  {here}")
    return lines


def _cell(row: dict[str, Any]) -> str:
    mac = "–" if row["mac"] is None else f"{row['mac']} GB"
    return f"{row['disk'] / 1e9:.1f}, {row['peak'] / 1e9:.1f}, {mac}"
