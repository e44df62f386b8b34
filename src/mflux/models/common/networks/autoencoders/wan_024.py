"""Wan's autoencoder as Qwen-Image has it in other layouts: folders that mflux 0.24 or earlier saved, and Wan's own file
(ComfyUI's `qwen_image_vae.safetensors`)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from mflux.backend import mx
from mflux.checkpoints.renamed import Names, Place, Renamed, by_patterns, where

# A level of the autoencoder's encoder has so many residual blocks, in all releases; the published names count through.
_BLOCKS = 2
NAMES: Names = by_patterns(
    (r"\.conv3d\.", "."),
    (r"\.resample_conv\.", ".resample.1."),
    (r"\.skip_conv\.", ".conv_shortcut."),
    (r"^decoder\.up_block(\d+)\.", r"decoder.up_blocks.\1."),
    (r"\.(norm|norm1|norm2|norm_out)\.weight$", r".\1.gamma"),
    *(
        (rf"^encoder\.down_blocks\.{level}\.{part}\.", f"encoder.down_blocks.{(_BLOCKS + 1) * level + place}.")
        for level in range(4)
        for place, part in enumerate([*(rf"resnets\.{block}" for block in range(_BLOCKS)), r"downsamplers\.0"])
    ),
)


def config(tensors: Renamed) -> dict[str, Any]:
    """What the shapes tell."""
    base = tensors.rows("encoder.conv_in.bias")
    levels = tensors.count(r"decoder\.up_blocks\.(\d+)\.")
    widths = [
        tensors.rows(f"encoder.down_blocks.{(_BLOCKS + 1) * level}.conv1.bias") // base for level in range(levels)
    ]
    return {
        "_class_name": "AutoencoderKLQwenImage",
        "base_dim": base,
        "z_dim": tensors.rows("post_quant_conv.bias"),
        "dim_mult": widths,
        "num_res_blocks": _BLOCKS,
        "attn_scales": [],
        "temperal_downsample": [
            f"encoder.down_blocks.{(_BLOCKS + 1) * level + _BLOCKS}.time_conv.weight" in tensors
            for level in range(levels - 1)
        ],
        "input_channels": tensors.rows("decoder.conv_out.bias"),
    }


def with_axes(name: str, value: mx.array) -> mx.array:
    """Norms of the autoencoder were flattened."""
    if name.endswith(".gamma") and value.ndim == 1:
        return value.reshape(-1, *[1] * (2 if ".attentions." in name else 3))
    return value


def _file(names: Iterable[str]) -> dict[str, Place]:
    """The names of Wan's authors. Levels of the decoder are three residual blocks and what enlarges, but the last."""
    each = _BLOCKS + 2

    def up(name: str) -> str:
        if (found := re.match(r"decoder\.upsamples\.(\d+)\.(residual|shortcut|resample|time_conv)\.", name)) is None:
            return name
        level, place = divmod(int(found[1]), each)
        inner = "upsamplers.0" if found[2] in ("resample", "time_conv") else f"resnets.{place}"
        return f"decoder.up_blocks.{level}.{inner}.{name.split('.', 3)[3]}"

    here = {up(name): name for name in names}
    leaves = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}
    found = by_patterns(
        (r"^conv1\.", "quant_conv."),
        (r"^conv2\.", "post_quant_conv."),
        (r"^(en|de)coder\.conv1\.", r"\1coder.conv_in."),
        (r"\.head\.0\.", ".norm_out."),
        (r"\.head\.2\.", ".conv_out."),
        (r"^encoder\.downsamples\.", "encoder.down_blocks."),
        (r"\.middle\.0\.", ".mid_block.resnets.0."),
        (r"\.middle\.1\.", ".mid_block.attentions.0."),
        (r"\.middle\.2\.", ".mid_block.resnets.1."),
        *((rf"\.{re.escape(theirs)}\.", f".{ours}.") for theirs, ours in leaves.items()),
        (r"\.shortcut\.", ".conv_shortcut."),
    )(here)
    return {ours: Place(here[place.name]) for ours, place in (found or {}).items()}


SINGLE_FILE: Names = where(r"^decoder\.upsamples\.", _file)
