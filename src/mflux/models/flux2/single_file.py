"""A transformer in one file with Black Forest Labs' names, as their repositories hold it beside the folders.

The names are those that LoRAs have for the layers (`lora_names.BLACK_FOREST_LABS`); norms come in addition.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mflux.backend import mx
from mflux.checkpoints.loading import FolderTensors
from mflux.checkpoints.published import PublishedFolder
from mflux.checkpoints.quantization import Quantization
from mflux.checkpoints.saved_by_024 import Shapes
from mflux.errors import CheckpointError
from mflux.models.flux2.layouts import transformer_config
from mflux.models.flux2.lora_names import BLACK_FOREST_LABS, SWAPPED
from mflux.utils.paths import user_path

_DOUBLE, _SINGLE = "transformer_blocks.{i}", "single_transformer_blocks.{i}"
_NAMES = BLACK_FOREST_LABS | {
    "double_blocks.{i}.img_attn.norm.query_norm": (f"{_DOUBLE}.attn.norm_q",),
    "double_blocks.{i}.img_attn.norm.key_norm": (f"{_DOUBLE}.attn.norm_k",),
    "double_blocks.{i}.txt_attn.norm.query_norm": (f"{_DOUBLE}.attn.norm_added_q",),
    "double_blocks.{i}.txt_attn.norm.key_norm": (f"{_DOUBLE}.attn.norm_added_k",),
    "single_blocks.{i}.norm.query_norm": (f"{_SINGLE}.attn.norm_q",),
    "single_blocks.{i}.norm.key_norm": (f"{_SINGLE}.attn.norm_k",),
}
# As ComfyUI and others save it.
_PREFIX = re.compile(r"^(model\.)?diffusion_model\.")
_BLOCK = re.compile(r"^(double_blocks|single_blocks)\.(\d+)\.")


class SingleFile(Shapes):
    """The tensors of such a file as a mapping with the published names, read when they are asked for.

    Names that the table does not know stay as they are, for the loader to complain of.
    """

    def __init__(self, tensors: Mapping[str, mx.array]):
        self._tensors = tensors
        # Ours → theirs, which of how many equal parts of its rows, and whether its halves are exchanged.
        self._places: dict[str, tuple[str, int, int, bool]] = {}
        for name in tensors:
            layer, _, leaf = _PREFIX.sub("", name).rpartition(".")
            block = _BLOCK.match(layer)
            targets = _NAMES.get(_BLOCK.sub(r"\1.{i}.", layer))
            if targets is None:
                self._places[name] = name, 0, 1, False
                continue
            for part, target in enumerate(targets):
                ours = f"{target.replace('{i}', block[2] if block else '')}.{'weight' if leaf == 'scale' else leaf}"
                self._places[ours] = name, part, len(targets), target in SWAPPED

    def __getitem__(self, name: str) -> mx.array:
        theirs, part, parts, swapped = self._places[name]
        value = self._tensors[theirs]
        if swapped:
            shift, scale = mx.split(value, 2)
            return mx.concatenate([scale, shift])
        return value if parts == 1 else mx.split(value, parts)[part]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class WithTransformer(PublishedFolder):
    """A model's folder with a transformer of one file in the place of its own."""

    def __init__(self, folder: PublishedFolder, file: Path):
        super().__init__(folder.root)
        self._folder = folder
        self._file = file
        tensors = FolderTensors(file.parent, [file])
        if not any(_BLOCK.match(_PREFIX.sub("", name)) for name in tensors):
            raise CheckpointError(
                f"{file} holds no FLUX.2 transformer with Black Forest Labs' names (double_blocks.0.…): give such a "
                "file, or the folder of a whole model"
            )
        self._transformer = SingleFile(tensors)

    def has(self, part: str) -> bool:
        return part == "transformer" or self._folder.has(part)

    def config(self, part: str) -> dict[str, Any]:
        if part != "transformer":
            return self._folder.config(part)
        try:
            return transformer_config(self._transformer)
        except (KeyError, IndexError, ZeroDivisionError) as error:
            raise CheckpointError(f"{self._file} is not a whole FLUX.2 transformer: {error} is missing") from None

    def tensors(self, part: str) -> Mapping[str, mx.array]:
        return self._transformer if part == "transformer" else self._folder.tensors(part)

    def lacking(self) -> dict[str, dict[str, Any]]:
        return self._folder.lacking()

    def scheduler(self) -> dict[str, Any]:
        return self._folder.scheduler()

    def stored(self, part: str) -> Quantization | None:
        return None if part == "transformer" else self._folder.stored(part)


def transformer_file(path: str | Path) -> Path | None:
    """The file that a path names, or None if it names no safetensors file."""
    file = user_path(path)
    return file if file.suffix == ".safetensors" and file.is_file() else None
