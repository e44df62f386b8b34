"""The KL autoencoder of FLUX.1, FLUX.2 and Z-Image in other layouts: folders that mflux 0.24 or earlier saved, and the
authors' single file (`ae.safetensors`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mflux.backend import mx
from mflux.checkpoints.renamed import Names, Patterns, Place, Renamed, by_patterns, where

NAMES: Patterns = ((r"\.(conv_in|conv_out)\.conv2d\.", r".\1."), (r"\.conv_norm_out\.norm\.", ".conv_norm_out."))
SQUARE = (("decoder.mid_block.attentions.0.to_q", "decoder.mid_block.attentions.0.to_q.bias"),)

_MIDDLE = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "norm": "group_norm"}


def _single_file(names: Iterable[str]) -> dict[str, Place]:
    """The authors' names; their decoder counts its levels from the outside."""
    names = list(names)
    levels = len({name.split(".")[2] for name in names if name.startswith("decoder.up.")})

    def up(name: str) -> str:
        _, _, level, rest = name.split(".", 3)
        return f"decoder.up_blocks.{levels - 1 - int(level)}.{rest}"

    counted = {name: up(name) if name.startswith("decoder.up.") else name for name in names}
    found = by_patterns(
        (r"^encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1."),
        (r"_blocks\.(\d+)\.block\.(\d+)\.", r"_blocks.\1.resnets.\2."),
        (r"_blocks\.(\d+)\.(down|up)sample\.", r"_blocks.\1.\2samplers.0."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"\.norm_out\.", ".conv_norm_out."),
        (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
        (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
        *((rf"\.mid\.attn_1\.{theirs}\.", f".mid_block.attentions.0.{ours}.") for theirs, ours in _MIDDLE.items()),
    )(counted.values())
    by_new = {new: old for old, new in counted.items()}
    return {ours: Place(by_new[place.name]) for ours, place in (found or {}).items()}


SINGLE_FILE: Names = where(r"^decoder\.up\.\d", _single_file)


def as_matrix(name: str, value: mx.array) -> mx.array:
    """The authors' attention has convolutions of one pixel where ours has matrices."""
    return value.reshape(value.shape[:2]) if ".attentions." in name and value.ndim == 4 else value


def config(tensors: Renamed) -> dict[str, Any]:
    """As FLUX.1 has it, whose scale no shape tells."""
    return shape(tensors) | {"_class_name": "AutoencoderKL", "scaling_factor": 0.3611, "shift_factor": 0.1159}


def shape(tensors: Renamed) -> dict[str, Any]:
    """What the shapes tell of an autoencoder of KL's kind."""
    levels = tensors.count(r"encoder\.down_blocks\.(\d+)\.")
    return {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors.rows("decoder.conv_out.bias"),
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
        "block_out_channels": [
            tensors.rows(f"encoder.down_blocks.{level}.resnets.0.conv1.bias") for level in range(levels)
        ],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": tensors.count(r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "norm_num_groups": 32,
        "act_fn": "silu",
        "mid_block_add_attention": True,
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
    }
