"""LoRA files for the tests of families, and what diffusers makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from mflux.backend import nn, tree_flatten
from support.reference import as_numpy

Shapes = dict[str, tuple[int, int]]


def linear_shapes(model: torch.nn.Module) -> Shapes:
    """The layers of a reference module, and the shapes of their matrices."""
    return {name: tuple(part.weight.shape) for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}


def low_rank(
    layers: Shapes, down: str = "lora_A", up: str = "lora_B", *, rank: int = 3, alpha: float | None = None
) -> dict[str, torch.Tensor]:
    """Random factors for layers of these shapes (out, in): the same for the same shapes, whatever their names."""
    generator = torch.Generator().manual_seed(11)
    factors = {}
    for name, (height, width) in layers.items():
        factors[f"{name}.{down}.weight"] = torch.randn(rank, width, generator=generator) / width**0.5
        factors[f"{name}.{up}.weight"] = torch.randn(height, rank, generator=generator)
        if alpha is not None:
            factors[f"{name}.alpha"] = torch.tensor(alpha)
    return factors


def written(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return path


def fused(reference, file: Path, scale: float) -> dict[str, np.ndarray]:
    """The weights of a reference pipeline's transformer with a LoRA added to them."""
    reference.load_lora_weights(str(file))
    reference.fuse_lora(lora_scale=scale)
    return {
        name.replace(".base_layer", ""): value.detach().numpy()
        for name, value in reference.transformer.state_dict().items()
        if "lora_" not in name
    }


def flat(module: nn.Module) -> dict[str, np.ndarray]:
    """All parameters of one of our modules, by name."""
    return {name: as_numpy(value) for name, value in tree_flatten(module.parameters())}
