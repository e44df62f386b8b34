"""Where FIBO-VLM's weights come from."""

from __future__ import annotations

from pathlib import Path

from mflux.backend import mx
from mflux.checkpoints.folders import read_json
from mflux.checkpoints.loading import FolderTensors, load_component
from mflux.errors import CheckpointError
from mflux.hub import resolve_model
from mflux.models.common.networks.qwen3_vl import Qwen3VLConfig, Qwen3VLForConditionalGeneration

# What to fetch of a repository, and what it must have.
_PATTERNS = (
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_REQUIRED = ("config.json", "*.safetensors", "tokenizer_config.json")

_EMBEDDING, _HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


def locate(name_or_path: str | Path) -> Path:
    """The folder of a model, fetched if need be.

    Raises:
        DownloadError: there is none, or it cannot be fetched.
    """
    return resolve_model(name_or_path, _PATTERNS, required=_REQUIRED)


def read_config(folder: Path) -> Qwen3VLConfig:
    """
    Raises:
        CheckpointError: it is missing, damaged, or not that of a Qwen3-VL model.
    """
    path = folder / "config.json"
    return Qwen3VLConfig.from_dict(read_json(path), source=path)


def end_ids(folder: Path) -> list[int]:
    """The tokens that end an answer, as generation_config.json says, if there is one."""
    path = folder / "generation_config.json"
    ids = read_json(path).get("eos_token_id") if path.is_file() else None
    return [token for token in (ids if isinstance(ids, list) else [ids]) if isinstance(token, int)]


def load(folder: Path, *, quantize: int | None = None) -> Qwen3VLForConditionalGeneration:
    """The model with its weights, quantized to so many bits while they are read.

    Raises:
        CheckpointError: a file is damaged or does not fit config.json.
    """
    check_head(folder)
    return load_component(Qwen3VLForConditionalGeneration, folder, quantize=quantize)


def check(path: Path) -> bool:
    """Whether a folder holds a model that can be FIBO-VLM; its numbers are not read.

    Raises:
        CheckpointError: it does, and something is wrong with it.
    """
    try:
        if not path.is_dir() or read_json(path / "config.json").get("model_type") != "qwen3_vl":
            return False
    except CheckpointError:
        # What is damaged is told by whoever looks at files alone.
        return False
    load_component(Qwen3VLForConditionalGeneration, path, read=False)
    return True


def check_head(folder: Path) -> None:
    """Where the head is tied to the token embedding and the file holds both, make sure that they are the same.

    Raises:
        CheckpointError: they differ, so config.json is wrong.
    """
    if not read_config(folder).tie_word_embeddings:
        return
    tensors = FolderTensors(folder)
    if _HEAD not in tensors or _EMBEDDING not in tensors:
        return
    if not mx.array_equal(tensors[_HEAD], tensors[_EMBEDDING]).item():
        raise CheckpointError(
            f"{folder}: config.json ties the head to the embedding, but {_HEAD} differs from {_EMBEDDING}: "
            'set "tie_word_embeddings" to false in config.json'
        )
