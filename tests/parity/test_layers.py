"""Positions and sinusoids that several transformers share, against diffusers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed, get_timestep_embedding
from support.reference import COMPONENT, normal, relative_error
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from mflux.backend import mx
from mflux.models.common.networks.layers import (
    inverse_frequencies,
    rotary_embedding,
    rotate_halves,
    rotate_pairs,
    waves,
)

AXES = [4, 6, 6]
IDS = np.array([[0, 0, 0], [1, 5, 2], [7, 0, 300], [513, 2, 9]])


@pytest.mark.parametrize("theta", [256.0, 10_000.0])
def test_pairs_turn_as_in_diffusers(theta):
    x = normal(1, 2, 3, len(IDS), sum(AXES))
    parts = [
        get_1d_rotary_pos_embed(
            channels, torch.tensor(IDS[:, axis]), theta, repeat_interleave_real=True, use_real=True,
            freqs_dtype=torch.float64,
        )
        for axis, channels in enumerate(AXES)
    ]  # fmt: skip
    theirs = apply_rotary_emb(torch.tensor(x), tuple(torch.cat(values, dim=-1) for values in zip(*parts, strict=True)))
    rotary = rotary_embedding(mx.array(IDS), AXES, theta)
    assert relative_error(rotate_pairs(mx.array(x), rotary), theirs) <= COMPONENT
    assert relative_error(rotate_halves(mx.array(x), rotary), theirs) > 0.1


@pytest.mark.parametrize("theta", [500.0, 1e6])
def test_halves_turn_as_in_transformers(theta):
    x, positions = normal(1, 2, 3, 9, 16), np.arange(9) * 20
    angles = torch.tensor(positions)[:, None] / theta ** (torch.arange(0, 16, 2) / 16)
    angles = torch.cat([angles, angles], dim=-1)[None]
    theirs, _ = apply_rotary_pos_emb(torch.tensor(x), torch.tensor(x), angles.cos(), angles.sin())
    angles = mx.array(positions)[:, None].astype(mx.float32) * inverse_frequencies(16, theta)
    rotary = mx.cos(angles), mx.sin(angles)
    assert relative_error(rotate_halves(mx.array(x), rotary), theirs) <= COMPONENT
    assert relative_error(rotate_pairs(mx.array(x), rotary), theirs) > 0.1


@pytest.mark.parametrize("channels", [256, 10])
@pytest.mark.parametrize("sin_first", [False, True])
def test_waves(channels, sin_first):
    values = np.array([0.0, 1.0, 333.25, 1000.0], np.float32)
    theirs = get_timestep_embedding(
        torch.tensor(values), channels, flip_sin_to_cos=not sin_first, downscale_freq_shift=0
    )
    assert relative_error(waves(mx.array(values), channels, sin_first=sin_first), theirs) <= COMPONENT


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_turning_keeps_the_dtype_and_is_computed_in_float32(dtype):
    x = mx.array(normal(1, 1, 2, len(IDS), sum(AXES))).astype(dtype)
    rotary = rotary_embedding(mx.array(IDS), AXES)
    for rotate in (rotate_pairs, rotate_halves):
        turned = rotate(x, rotary)
        assert turned.dtype == dtype
        assert mx.array_equal(turned, rotate(x.astype(mx.float32), rotary).astype(dtype))
