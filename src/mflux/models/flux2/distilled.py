"""Whether a FLUX.2 klein was distilled to few steps, so that guidance is in it already. Loads nothing heavy."""

from __future__ import annotations

from pathlib import Path

from mflux.checkpoints.folders import read_json

_KV_PIPELINE = "Flux2KleinKVPipeline"


def is_distilled(folder: Path | None, key: str) -> bool:
    """What the folder's `model_index.json` says, or where it says nothing, the model's key in the registry."""
    settings = _index(folder)
    said = settings.get("is_distilled")
    if isinstance(said, bool):
        return said
    return settings.get("_class_name") == _KV_PIPELINE or "base" not in key


def keeps_references(folder: Path | None, supports_kv_cache: bool) -> bool:
    """Whether the model was trained to find the keys and values of its references where the first step left them."""
    return supports_kv_cache or _index(folder).get("_class_name") == _KV_PIPELINE


def _index(folder: Path | None) -> dict:
    path = None if folder is None else folder / "model_index.json"
    return read_json(path) if path is not None and path.is_file() else {}
