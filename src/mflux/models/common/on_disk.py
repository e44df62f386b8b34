"""What a file or folder is that is no model by itself, as a person would say it. Reads first bytes and headers only."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mflux.checkpoints.folders import SUFFIXES, read_json
from mflux.checkpoints.readers.gguf import MAGIC
from mflux.checkpoints.readers.plain import HEAD, open_file, what_else
from mflux.errors import CheckpointError, UsageError
from mflux.models.common.family import families, load_object
from mflux.models.common.registry import MODELS
from mflux.text import shown, some
from mflux.utils.paths import is_file, is_folder, snapshot_in, user_path

# First bytes → what begins so. RIFF and ISO media say further on what they are.
_MAGIC = (
    (b"\x89PNG", "a picture (PNG)"), (b"\xff\xd8\xff", "a picture (JPEG)"), (b"GIF8", "a picture (GIF)"),
    (b"BM", "a picture (BMP)"), (b"II*\0", "a picture (TIFF)"), (b"MM\0*", "a picture (TIFF)"),
    (b"\x1f\x8b", "an archive (gzip)"), (b"7z\xbc\xaf", "an archive (7z)"),
    (b"Rar!", "an archive (RAR)"), (b"%PDF", "a PDF"), (b"\x93NUMPY", "an array of numpy's"),
)  # fmt: skip
_PICTURE = "a picture"
_MODEL = "a folder of a model in the diffusers layout, a repository (org/name), or a name that mflux --help lists"
# What stands in the names of an adapter's tensors → what the adapter is called.
_ADAPTERS = {
    r"\.hada_(w[12]_[ab]|t[12])$": "a LoHa",
    r"\.lokr_w[12](_[ab])?$": "a LoKr",
    r"\.(b?oft_\w+|oft_diag)(\.|$)": "an OFT",
    r"\.(a1|a2|b1|b2)\.weight$": "a GLoRA",
    r"\.(ia3_l(\.|$)|on_input$)": "an (IA)³",
    r"\.(lora_[AB]|lora_(down|up)|lora\.(down|up))(\.|$)": "a LoRA",
}


# Models of other kinds, by names of their tensors.
_OTHER_MODELS = {
    "a checkpoint of Stable Diffusion 3": r"(^|\.)joint_blocks\.0\.",
    "a checkpoint of SDXL": r"(^|\.)(label_emb\.0\.0|conditioner\.embedders\.1)\.",
    "a checkpoint of Stable Diffusion 1 or 2": r"(^|\.)input_blocks\.0\.0\.weight$",
    "a ControlNet": r"(^|\.)(controlnet_|control_model|zero_convs|input_hint_block)",
    "a language model": r"^(blk\.\d+\.attn_q|model\.layers\.\d+\.self_attn\.q_proj|token_embd)\.",
}


def kind_on_disk(name: str | os.PathLike[str]) -> str | None:
    """What lies under a model's name here and how to go on from there, as a sentence; None if nothing does."""
    try:
        path = snapshot_in(user_path(name))
        if is_folder(path):
            what, remedy = _folder(path)
        elif is_file(path):
            what, remedy = _file(path)
        else:
            return None
    except UsageError as error:
        # Or it is what no path can be.
        return str(error) if is_folder(name) else None
    except (CheckpointError, OSError) as error:
        return str(error)
    return f"{shown(path, 300)} {what}: {remedy}"


def _file(path: Path) -> tuple[str, str]:
    with open_file(path) as file:
        head = file.read(HEAD)
    if other := what_else(head):
        what, _, remedy = other.partition(": ")
        return what, remedy or f"give {_MODEL}"
    if kind := _kind(head):
        if kind.startswith(_PICTURE):
            return f"is {kind}, no model", "a picture to start from is said with --image (image_path in Python)"
        return f"is {kind}", f"give {_MODEL}"
    if head[8:9] == b"{" or head.startswith(MAGIC) or head[:2] == b"PK" or head[:1] == b"\x80":
        return _weights(path)
    if head.isascii():
        return "is a text file, no model", f"give {_MODEL}"
    return "is no file of weights that is known", f"give {_MODEL}"


def _kind(head: bytes) -> str | None:
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "a picture (WebP)"
    if head[4:8] == b"ftyp":
        return "a picture (AVIF or HEIC)" if head[8:12] in (b"avif", b"heic", b"mif1", b"heix") else "a film"
    return next((kind for magic, kind in _MAGIC if head.startswith(magic)), None)


def _weights(path: Path) -> tuple[str, str]:
    from mflux.checkpoints.loading import FolderTensors

    names = list(FolderTensors(path.parent, [path]))
    if kind := adapter_kind(names):
        return f"is {kind}, no model", "name it with --lora (lora_paths in Python), beside the model it was made for"
    if found := in_one_file(path):
        parts = " and ".join(part.replace("_", " ") for part in found.parts)
        if "transformer" in found.parts:
            return f"is a {parts} of {found.title} in one file", _say(list(found.keys))
        return (
            f"is a {parts} of {found.title} in one file, no whole model",
            "say it with --vae or --text-encoder, beside a model",
        )
    for known, pattern in _OTHER_MODELS.items():
        if any(re.search(pattern, name) for name in names):
            return f"is {known}", "mflux --help lists the models that are built"
    if not names:
        return "holds no tensors", "fetch it again"
    return (
        f"holds {len(names)} tensors, whose names ({some(sorted(names), 3)}) belong to no model that is built",
        f"give {_MODEL}",
    )


def adapter_kind(names: Iterable[str]) -> str | None:
    """What a file with tensors of these names is called if it is an adapter, such as "a LoHa"."""
    found = {kind for name in names for part, kind in _ADAPTERS.items() if re.search(part, name)}
    return next((kind for kind in _ADAPTERS.values() if kind in found), None)


@dataclass(frozen=True)
class InOneFile:
    """What a file of weights is.

    Attributes:
        title: the family.
        parts: its components that are in the file, by their folders.
        keys: the registry's models that it may be, the likeliest first; of the family where it holds no transformer.
        config: what the transformer's `config.json` would say; empty without one.
    """

    title: str
    parts: tuple[str, ...]
    keys: tuple[str, ...]
    config: Mapping[str, Any]


def in_one_file(path: Path) -> InOneFile | None:
    """What a file of weights is whose tensors tell it; None where none of a family's components is in it.

    Raises:
        CheckpointError: it is damaged, or packed in a way that is not read.
    """
    from mflux.checkpoints.loading import FolderTensors
    from mflux.checkpoints.published import Layout

    tensors = FolderTensors(path.parent, [path])
    found: InOneFile | None = None
    for family in families().values():
        if family.layout is None:
            continue
        layout: Layout = load_object(family.layout)
        configs = {part: layout.settings_in(part, tensors) for part in layout.files}
        parts = tuple(part for part, config in configs.items() if config is not None)
        if not parts:
            continue
        config = configs.get("transformer") or {}
        keys = tuple(layout.models(config)) if layout.models and config else tuple(_keys(family.title))
        # Several families share text encoders and autoencoders.
        if "transformer" in parts or found is None:
            found = InOneFile(family.title, parts, keys, config)
        if "transformer" in parts:
            break
    return found


def described(path: Path) -> str:
    """What a file of weights holds, for people: which parts of what, how stored, how many numbers.

    Raises:
        CheckpointError: it is damaged, or packed in a way that is not read.
    """
    from math import prod

    from mflux.checkpoints.loading import FolderTensors

    tensors = FolderTensors(path.parent, [path], packs=False)
    found = in_one_file(path)
    what = "tensors that belong to no model that is built"
    if kind := adapter_kind(tensors):
        what = kind
    elif found is not None:
        what = f"{' and '.join(part.replace('_', ' ') for part in found.parts)} of {found.title}"
        if "transformer" in found.parts:
            what += f" ({' or '.join(found.keys[:3])})"
    count: Counter[str] = Counter()
    bits = 0.0
    for name in tensors:
        one, told = tensors.stored.get(name), tensors.spec(name)
        numbers = prod(told.shape)
        count[one.kind if one else str(told.dtype).rpartition(".")[2]] += numbers
        bits += numbers * (one.bits if one else 8 * told.dtype.size)
    every = sum(count.values())
    if found is not None and any(name.endswith(".scales") for name in tensors):
        return f"{what}, quantized by mflux"
    kinds = some([kind for kind, _ in count.most_common()], 4)
    return f"{what}; {every / 1e9:,.3g} G parameters as {kinds}, {bits / max(every, 1):.3g} bits each"


def models_of(name: str | os.PathLike[str]) -> tuple[str, ...]:
    """The registry's models that a file's tensors, or a folder's transformer, may be, the likeliest first; none where
    nothing lies there, or it tells nothing."""
    try:
        path = snapshot_in(user_path(name))
        if is_file(path):
            found = in_one_file(path)
            return found.keys if found is not None and "transformer" in found.parts else ()
        config = path / "transformer" / "config.json"
        return _models_of_config(read_json(config)) if is_file(config) else ()
    except (CheckpointError, UsageError, OSError):
        return ()


def _models_of_config(config: Mapping[str, Any]) -> tuple[str, ...]:
    for family in families().values():
        classes = {component.published_class for component in family.components if component.folder == "transformer"}
        if family.layout is not None and config.get("_class_name") in classes - {""}:
            models = load_object(family.layout).models
            return tuple(models(config)) if models else ()
    return ()


def _folder(path: Path) -> tuple[str, str]:
    entries = sorted(entry.name for entry in path.iterdir())
    if not entries:
        return "is an empty folder", f"give {_MODEL}"
    for part in ("transformer", "unet"):
        config = path / part / "config.json"
        if is_file(config) and isinstance(kind := read_json(config).get("_class_name"), str):
            return _of_class(kind)
    if is_file(path / "model_index.json") and isinstance(
        kind := read_json(path / "model_index.json").get("_class_name"), str
    ):
        return _of_class(kind)
    if is_file(path / "adapter_config.json"):
        return "holds a LoRA of PEFT's, no model", "name it with --lora (lora_paths in Python), beside a model"
    if is_file(path / "config.json"):
        config_of = read_json(path / "config.json")
        architectures = config_of.get("architectures") or [config_of.get("model_type")]
        kind = config_of.get("_class_name") or (architectures[0] if isinstance(architectures, list) else None)
        if isinstance(kind, str) and is_file(path.parent / "model_index.json"):
            return f"is one component of a model ({shown(kind)})", f"give the whole folder, {path.parent}"
        if isinstance(kind, str):
            return _of_class(kind)
    inner = [name for name in entries if name.startswith("models--")]
    if inner:
        return "is a cache of Hugging Face's with several repositories", f"give one of them, as {path / inner[0]}"
    files = [path / name for name in entries if is_file(path / name)]
    weights = [file for file in files if file.suffix in (*SUFFIXES, ".gguf")]
    if len(weights) == 1 and weights[0].suffix != ".bin":
        what, remedy = _file(weights[0])
        return f"holds {weights[0].name}, which {what}", remedy
    if weights:
        kinds = sorted({file.suffix for file in weights})
        return f"holds {len(weights)} {some(kinds)} files and no model in the diffusers layout", "give one of the files"
    deeper = [name for name in entries if is_file(path / name / "model_index.json")]
    if deeper:
        return "is no model itself", f"give the folder in it that is one, {path / deeper[0]}"
    if set(entries) <= {
        "transformer",
        "vae",
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "scheduler",
    }:
        return "is a model without configurations or weights", "fetch it again"
    return f"is no model: it holds {some(entries, 3, counted=True)}", f"give {_MODEL}"


def _of_class(kind: str) -> tuple[str, str]:
    for family in families().values():
        titles = {component.published_class for component in family.components if component.stage == "denoise"} - {""}
        stem = {re.sub(r"Transformer2DModel$", "", title) for title in titles}
        if kind in titles or any(re.match(rf"{one}(Img2Img|Inpaint|Edit\w*)?Pipeline$", kind) for one in stem if one):
            return f"holds a model of {family.title} ({shown(kind)}), and its name does not tell which", _say(
                _keys(family.title)
            )
    return (
        f"holds a model of another kind ({shown(kind)}), which this version does not build",
        "mflux --help lists the models that are built",
    )


def _keys(title: str) -> list[str]:
    family = next(family for family in families().values() if family.title == title)
    return list(dict.fromkeys(key for command in family.commands for key in command.models if key != "demo"))


def _say(keys: list[str]) -> str:
    short = [key for key in keys if "controlnet" not in key and "custom_transformer_model" not in MODELS[key]]
    return f"say which model it derives from with --base-model, one of {', '.join(short or keys)}"
