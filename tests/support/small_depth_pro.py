"""A small Depth Pro of random weights, laid out as published; no torch is needed to make it."""

from __future__ import annotations

import json

import numpy as np
from safetensors.numpy import save_file

from mflux.backend import nn, tree_flatten
from mflux.models.common.controls.depth_pro.network import DepthProConfig, DepthProForDepthEstimation


def vit(hidden_size: int, heads: int) -> dict:
    return {
        "model_type": "dinov2", "hidden_size": hidden_size, "num_attention_heads": heads, "num_hidden_layers": 2,
        "image_size": 16, "patch_size": 4, "mlp_ratio": 2, "use_mask_token": False,
    }  # fmt: skip


TINY = {
    "model_type": "depth_pro", "patch_size": 16, "fusion_hidden_size": 8, "intermediate_hook_ids": [1, 0],
    "intermediate_feature_dims": [8, 8], "scaled_images_feature_dims": [12, 10, 6], "use_fov_model": True,
    "patch_model_config": vit(16, 4), "image_model_config": vit(12, 2), "fov_model_config": vit(8, 2),
}  # fmt: skip


def published(network: nn.Module, seed: int) -> dict[str, np.ndarray]:
    """Random tensors for every parameter, laid out as published files lay them out."""
    random = np.random.default_rng(seed)
    kernels = {}
    for path, module in network.named_modules():
        if isinstance(module, nn.ConvTranspose2d):
            kernels[path + ".weight"] = (3, 0, 1, 2)
        elif isinstance(module, nn.Conv2d):
            kernels[path + ".weight"] = (0, 3, 1, 2)
    tensors = {}
    for name, value in tree_flatten(network.parameters()):
        shape = [value.shape[axis] for axis in kernels.get(name, range(value.ndim))]
        spread = 1.2 / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.1
        tensor = random.normal(1.0 if "norm" in name and name.endswith("weight") else 0.0, spread, shape)
        tensors[name] = tensor.astype(np.float32)
    # A positive depth and a plausible angle, so that metres follow.
    tensors["head.layers.4.weight"] *= 0.1
    tensors["head.layers.4.bias"][:] = 1.5
    if "fov_model.head.layers.4.bias" in tensors:
        tensors["fov_model.head.layers.4.bias"][:] = 55
    return tensors


def write_model(folder, config=TINY, **changes):
    folder.mkdir(exist_ok=True)
    config = {**config, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    network = DepthProForDepthEstimation(DepthProConfig.from_dict(config))
    save_file(published(network, seed=3), folder / "model.safetensors")
    return folder
