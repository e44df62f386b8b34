"""Noise levels, and the loss of flow matching.

Lipman et al. 2022 (arxiv.org/abs/2210.02747), Liu et al. 2022 (2209.03003), Esser et al. 2024 (2403.03206): between an
image x and noise n lies z = (1 - sigma) x + sigma n, and the model learns the velocity n - x there.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any, cast

from mflux.backend import mx
from mflux.models.common.training.spec import TrainingLoopSpec

_LARGEST_SEED = 2**32 - 1


def noisy(clean: mx.array, noise: mx.array, sigmas: mx.array) -> mx.array:
    """Images (B, …) with as much noise over each as its level (B,) says, float32."""
    sigma = sigmas.reshape(-1, *[1] * (clean.ndim - 1))
    return (1 - sigma) * clean + sigma * noise


def losses(velocity: mx.array, clean: mx.array, noise: mx.array) -> mx.array:
    """The loss of each image, (B,) float32: the mean over its numbers of the squared error of a velocity (B, …)."""
    error = velocity.astype(mx.float32) - (noise - clean)
    return mx.square(error).reshape(len(error), -1).mean(axis=-1)


def draw(
    rng: random.Random, loop: TrainingLoopSpec, config: Any, shape: Sequence[int], *, continuous: bool
) -> tuple[float, mx.array]:
    """A noise level, and noise (1, …) float32, for one image.

    Numbers are drawn in mflux 0.24's order, so that a seed has its levels and its noise.

    Args:
        config: the image's `Config`, whose schedule has the levels of the steps.
        continuous: whether to take any level instead of those of the steps.
    """
    time_seed, noise_seed = rng.randint(0, _LARGEST_SEED), rng.randint(0, _LARGEST_SEED)
    low, steps = loop.timestep_low, config.num_inference_steps
    high = steps if loop.timestep_high is None else loop.timestep_high
    if loop.timestep_type in (None, "uniform"):
        key = mx.random.key(time_seed)
        part = float(mx.random.uniform(key=key)) if continuous else None
        step = int(cast(int, mx.random.randint(low, high, [], key=key).item()))
    else:
        part = _part(rng, str(loop.timestep_type))
        step = min(max(low + int(part * (high - low)), low), high - 1)
    if continuous:
        assert part is not None
        sigma = shifted(1 - (low + part * (high - low)) / steps, config.model_config)
    else:
        sigma = float(config.scheduler.sigmas[step])
    noise = mx.random.normal(tuple(shape), mx.bfloat16, key=mx.random.key(noise_seed))
    # No noise at all teaches nothing, and no step begins there.
    return max(sigma, 1e-4), noise.astype(mx.float32)


def _part(rng: random.Random, kind: str) -> float:
    """Where in the schedule, from 0 (pure noise) to 1: "content" is near the beginning, "style" near the end."""
    if kind == "sigmoid":
        return 1 / (1 + math.exp(-rng.gauss(0, 1)))
    return rng.random() ** 3 if kind == "content" else 1 - rng.random() ** 3


def shifted(sigma: float, model: Any) -> float:
    """A level as the reference's table for training has it: moved by the checkpoint's fixed shift; one that depends on
    the image's size is for generating."""
    if model.requires_sigma_shift or model.sigma_shift == 1:
        return sigma
    return float(model.sigma_shift * sigma / (1 + (model.sigma_shift - 1) * sigma))
