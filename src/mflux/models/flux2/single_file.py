"""A transformer in one file with Black Forest Labs' names, as their repositories hold it beside the folders.

The names are those that LoRAs have for the layers (`lora_names.BLACK_FOREST_LABS`); norms come in addition.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from mflux.backend import mx
from mflux.models.flux2.lora_names import BLACK_FOREST_LABS, SWAPPED

_DOUBLE, _SINGLE = "transformer_blocks.{i}", "single_transformer_blocks.{i}"
_NAMES = BLACK_FOREST_LABS | {
    "double_blocks.{i}.img_attn.norm.query_norm": (f"{_DOUBLE}.attn.norm_q",),
    "double_blocks.{i}.img_attn.norm.key_norm": (f"{_DOUBLE}.attn.norm_k",),
    "double_blocks.{i}.txt_attn.norm.query_norm": (f"{_DOUBLE}.attn.norm_added_q",),
    "double_blocks.{i}.txt_attn.norm.key_norm": (f"{_DOUBLE}.attn.norm_added_k",),
    "single_blocks.{i}.norm.query_norm": (f"{_SINGLE}.attn.norm_q",),
    "single_blocks.{i}.norm.key_norm": (f"{_SINGLE}.attn.norm_k",),
}
# As ComfyUI saves it.
_PREFIX = "model.diffusion_model."
_BLOCK = re.compile(r"^(double_blocks|single_blocks)\.(\d+)\.")


class SingleFile(Mapping[str, mx.array]):
    """The tensors of such a file as a mapping with the published names, read when they are asked for.

    Names that the table does not know stay as they are, for the loader to complain of.
    """

    def __init__(self, tensors: Mapping[str, mx.array]):
        self._tensors = tensors
        # Ours → theirs, which of how many equal parts of its rows, and whether its halves are exchanged.
        self._places: dict[str, tuple[str, int, int, bool]] = {}
        for name in tensors:
            layer, _, leaf = name.removeprefix(_PREFIX).rpartition(".")
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


def is_single_file(names: Mapping[str, object]) -> bool:
    """Whether tensors have Black Forest Labs' names."""
    return any(_BLOCK.match(name.removeprefix(_PREFIX)) for name in names)
