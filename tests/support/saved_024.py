"""Folders that mflux 0.24 saved: a writer of its layout, and the model of a real one.

tests/data/mflux_024.tar.xz holds what mflux 0.24 made of that model; see tools/fixture_024.py. It is a whole FLUX.1 in
small. Every width divides by 64, because 0.24 quantizes every layer; heads are shared out in the published proportion,
and what no shape tells is as published, because such a folder has no configuration. Weights are few different numbers
and mostly zeros in kernels, so that the archive is small, and come from a stream of integers that is the same on every
machine.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from mflux.backend import mx, nn, tree_flatten
from mflux.checkpoints.loading import FolderTensors
from support.tiny import write_checkpoint
from support.tokenizers import write_json

CHANGES = {
    "text_encoder": {"num_hidden_layers": 2, "num_attention_heads": 1},
    "text_encoder_2": {
        "d_ff": 128, "d_kv": 1, "num_heads": 64, "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
    },
    "transformer": {"num_attention_heads": 2, "attention_head_dim": 32, "axes_dims_rope": [4, 14, 14]},
    # Widths change where the published ones do: 0.24 has its shortcuts there and nowhere else.
    "vae": {"block_out_channels": [64, 32, 64, 64], "norm_num_groups": 32, "layers_per_block": 2},
}  # fmt: skip


def write_source(folder: Path) -> Path:
    """The model in the published layout, in bfloat16."""
    options = {"seed": 7, "guidance": True, "dtype": mx.bfloat16, "wide": True}
    return write_checkpoint(folder, **options, changes=CHANGES, draw=few_numbers)


def few_numbers(module: nn.Module, *, seed: int, dtype: mx.Dtype) -> dict[str, mx.array]:
    """Tensors for all parameters of a module, as a published file holds them."""
    random = np.random.RandomState(seed)
    tensors = {}
    for name, parameter in tree_flatten(module.parameters()):
        shape = parameter.shape
        if parameter.ndim == 4:
            value = random.randint(-32, 33, (shape[0], shape[3], shape[1], shape[2]))
            value = np.where(abs(value) > 31, np.sign(value), 0) * 2.0 ** round(math.log2(32 / parameter[0].size) / 2)
        elif parameter.ndim == 2:
            value = random.randint(-3, 4, shape) * 2.0 ** round(math.log2(0.25 / shape[1]) / 2)
        elif "norm" in name and name.endswith("weight"):
            value = 1 + random.randint(-2, 3, shape) / 8
        else:
            value = random.randint(-2, 3, shape) / 16
        tensors[name] = mx.array(value.astype(np.float32)).astype(dtype)
    return tensors


# Patterns of published names and what 0.24 puts in their place, in order, by component.
Names = Mapping[str, Sequence[tuple[str, str | Callable[[re.Match], str]]]]


def write_as_024(
    source: Path,
    target: Path,
    names: Names,
    *,
    bits: int | None = None,
    lost: Sequence[str] = (),
    more: Mapping[str, Mapping[str, mx.array]] | None = None,
    flat_norms: bool = False,
) -> Path:
    """Write a published folder as 0.24 saves it: no configuration, kernels with channels last, one numbered file.

    Args:
        names: a component that `source` does not have is left out.
        bits: of the layers that can be quantized; None leaves them as they are.
        lost: published names that are not saved.
        more: tensors that only 0.24 has, by component.
        flat_norms: whether the autoencoder's norms are flat; else they stay as published.
    """
    random = np.random.default_rng(0)
    for part, renames in names.items():
        if not (source / part).is_dir():
            continue
        tensors = dict((more or {}).get(part, {}))
        for name, value in FolderTensors(source / part).items():
            if name in lost:
                continue
            for pattern, replacement in renames:
                name = re.sub(pattern, replacement, name)
            if ".conv3d.weight" in name:
                # Only the last slice of a kernel over time matters for an image.
                shape = (*value.shape[:2], value.shape[-1] - 1, *value.shape[2:])
                before = mx.array(random.standard_normal(shape).astype(np.float32))
                value = mx.concatenate([before, value[:, :, None]], axis=2)
            if part == "vae" and "norm" in name:
                value = value.reshape(-1) if flat_norms else value
            elif value.ndim >= 4:
                value = mx.moveaxis(value, 1, -1)
            if bits and value.ndim == 2 and value.shape[1] % 64 == 0 and "pad_token" not in name:
                stem = name.removesuffix("weight")
                packed = zip(("weight", "scales", "biases"), mx.quantize(value, 64, bits), strict=True)
                tensors |= {stem + leaf: array for leaf, array in packed}
            else:
                tensors[name] = mx.contiguous(value)
        (target / part).mkdir(parents=True)
        mx.save_safetensors(str(target / part / "0.safetensors"), tensors)
        index = {"metadata": {"mflux_version": "0.24.0"}, "weight_map": dict.fromkeys(tensors, "0.safetensors")}
        write_json(target / part / "model.safetensors.index.json", index)
    for folder in source.glob("*tokenizer*"):
        shutil.copytree(folder, target / folder.name)
    return target
