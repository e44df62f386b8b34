"""What a GPU computes in fewer passes over memory gives what plain operations give: `fused`, and layers built on it."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from support.graph import way_of_a_gpu

from mflux import chips, cpu, fused
from mflux.backend import mx, nn
from mflux.checkpoints.quantization import QuantizedLinear
from mflux.models.common.networks import layers
from mflux.models.common.networks.autoencoders.kernels import OnGPU
from mflux.models.common.networks.layers import Linear, RMSNorm, Turns

DTYPES = [mx.bfloat16, mx.float16, mx.float32]
BATCH, TOKENS, HEADS, HEAD = 1, 40, 3, 16
WIDTH = HEADS * HEAD

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(params=[True, False], ids=["as a GPU", "on a CPU"])
def way(request):
    if not request.param:
        yield
        return
    with way_of_a_gpu():
        yield


def drawn(dtype: mx.Dtype, *shape: int, seed: int = 0) -> mx.array:
    return (2 * mx.random.normal(shape, key=mx.random.key(seed))).astype(dtype)


def equal(found: mx.array, expected: mx.array) -> bool:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    return bool(mx.array_equal(found, expected).item())


def near(found: mx.array, expected: mx.array, dtype: mx.Dtype, roundings: float) -> bool:
    """As near as so many roundings of the largest number leave it."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    one, other = (np.array(value.astype(mx.float32)) for value in (found, expected))
    return bool(np.abs(one - other).max() <= roundings * mx.finfo(dtype).eps * np.abs(other).max())


@each_dtype
@pytest.mark.parametrize("transposed", [True, False])
def test_turns(way, dtype, transposed):
    x = drawn(dtype, BATCH, TOKENS, HEADS, HEAD).transpose(0, 2, 1, 3)
    x = x if transposed else mx.contiguous(x)
    angles = drawn(mx.float32, TOKENS, HEAD // 2, seed=1)
    cos, sin = mx.cos(angles), mx.sin(angles)
    even, odd = x.astype(mx.float32)[..., 0::2], x.astype(mx.float32)[..., 1::2]
    plain = mx.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape).astype(dtype)
    assert equal(layers.rotate_pairs(x, Turns((cos, sin))), plain)
    assert equal(layers.rotate_pairs(x, (cos, sin)), plain)


@each_dtype
def test_norm_of_heads(way, dtype):
    norm, x = RMSNorm(HEAD, eps=1e-6), drawn(dtype, BATCH, TOKENS, WIDTH)
    norm.weight = drawn(dtype, HEAD, seed=1)
    assert equal(layers.normed_heads(norm, x, HEADS), norm(layers.split_heads(x, HEADS)))


def test_norm_of_heads_where_numpy_computes():
    norm, x = RMSNorm(64, eps=1e-6), drawn(mx.float32, 2, 700, 8 * 64)
    norm.weight = drawn(mx.float32, 64, seed=1)
    if not cpu.serves(x):
        pytest.skip("numpy computes nothing where there is a GPU")
    heads = layers.normed_heads(norm, x, 8)
    assert equal(heads, norm(layers.split_heads(x, 8)))
    angles = drawn(mx.float32, 700, 32, seed=2)
    turns = Turns((mx.cos(angles), mx.sin(angles)))
    assert equal(layers.rotate_pairs(heads, turns), layers.rotate_pairs(mx.contiguous(heads), turns))


@each_dtype
@pytest.mark.parametrize("batch", [1, 2])
def test_modulation_within_the_norm(way, dtype, batch):
    x = drawn(dtype, batch, TOKENS, WIDTH)
    shift, scale = (drawn(dtype, batch, 1, WIDTH, seed=seed) for seed in (1, 2))
    plain = mx.fast.layer_norm(x, None, None, 1e-6) * (1 + scale) + shift
    assert equal(layers.modulate(x, shift, scale), plain)


@each_dtype
def test_a_norm_s_weights_and_the_condition_s(way, dtype):
    norm, x = RMSNorm(WIDTH, eps=1e-5), drawn(dtype, BATCH, TOKENS, WIDTH)
    norm.weight, scale = drawn(dtype, WIDTH, seed=1), drawn(dtype, BATCH, 1, WIDTH, seed=2)
    # The weights' product is rounded and not the norm's.
    assert near(layers.normed_and_scaled(norm, x, scale), norm(x) * scale, dtype, 2)
    assert equal(layers.normed_and_scaled(norm, x, 1), norm(x))


@each_dtype
def test_chains(way, dtype):
    x, y, gate = (
        drawn(dtype, BATCH, TOKENS, WIDTH),
        drawn(dtype, BATCH, TOKENS, WIDTH, seed=1),
        drawn(dtype, 1, 1, WIDTH),
    )
    assert equal(layers.residual(x, gate, y), x + gate * y)
    assert equal(layers.residual(x, 1, y), x + y)
    assert equal(layers.silu_times(x, y), nn.silu(x) * y)
    assert equal(layers.quick_gelu(x), x * mx.sigmoid(1.702 * x))


@each_dtype
def test_what_an_autoencoder_normalises_with(dtype):
    x = drawn(dtype, 2, 5, 7, 12)
    factor, offset = (drawn(mx.float32, 2, 1, 1, 12, seed=seed) for seed in (1, 2))
    plain = (factor * x + offset).astype(dtype)
    kernels = OnGPU.affine, np.array(factor[:, 0, 0]), np.array(offset[:, 0, 0])
    assert equal(kernels[0](x, *kernels[1:], False), plain)
    assert equal(kernels[0](x, *kernels[1:], True), nn.silu(plain))
    mean, squares = OnGPU.moments(x + 3)
    wide = np.array((x + 3).astype(mx.float32)).astype(float)
    assert np.allclose(np.array(mean), wide.mean(axis=(1, 2)), rtol=1e-5)
    assert np.allclose(np.array(squares), 35 * wide.var(axis=(1, 2)), rtol=1e-4)


@each_dtype
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_of_parts(way, dtype, bias):
    layer = Linear(3 * WIDTH, WIDTH, bias=bias)
    layer.weight = 0.1 * drawn(mx.float32, WIDTH, 3 * WIDTH, seed=2)
    layer.set_dtype(dtype)
    parts = drawn(dtype, BATCH, TOKENS, WIDTH), drawn(dtype, BATCH, TOKENS, 2 * WIDTH, seed=1)
    # Between the two products the sum is rounded once more; in float32 terms are added up in another order.
    plain = layer(mx.concatenate(list(parts), axis=-1))
    assert near(layers.product_of_parts(layer, *parts), plain, dtype, 8 if dtype == mx.float32 else 2)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("unpacked", [False, True])
def test_a_packed_product_of_parts(way, bits, unpacked, monkeypatch):
    """Cut between groups, where there are rows enough; rounded once more for each further part."""
    monkeypatch.setattr("mflux.checkpoints.quantization._ROWS_WORTH_A_CUT", TOKENS)
    if unpacked:
        monkeypatch.setattr(chips.Rule, "applies", True)
        monkeypatch.setattr(chips, "UNPACKED", replace(chips.UNPACKED, rows=TOKENS))
    layer = QuantizedLinear(192, 24, bits=bits)
    layer.set_dtype(mx.bfloat16)
    layer.bias = drawn(mx.bfloat16, 24, seed=5)
    few = drawn(mx.bfloat16, BATCH, TOKENS // 2, 64), drawn(mx.bfloat16, BATCH, TOKENS // 2, 128, seed=1)
    parts = drawn(mx.bfloat16, BATCH, TOKENS, 64), drawn(mx.bfloat16, BATCH, TOKENS, 128, seed=1)
    odd = drawn(mx.bfloat16, BATCH, TOKENS, 32), drawn(mx.bfloat16, BATCH, TOKENS, 160, seed=1)
    for given, cut in ((parts, True), (few, False), (odd, False)):
        plain = layer(mx.concatenate(list(given), axis=-1))
        found = layers.product_of_parts(layer, *given)
        assert near(found, plain, mx.bfloat16, 3)
        if layers.has_gpu() and not unpacked:
            # (Unpacking has some of its own.)
            graph = io.StringIO()
            mx.export_to_dot(graph, layers.product_of_parts(layer, *given))
            assert ("Concatenate" in graph.getvalue()) != cut


def test_a_packed_layer_of_parts(way):
    layer = nn.QuantizedLinear.from_linear(nn.Linear(192, 32), 64, 4)
    parts = drawn(mx.float32, BATCH, TOKENS, 64), drawn(mx.float32, BATCH, TOKENS, 128, seed=1)
    assert equal(layers.product_of_parts(layer, *parts), layer(mx.concatenate(list(parts), axis=-1)))


# The shapes of what each takes, as a step and an autoencoder have them; the first is that of what it gives.
CHAINS: dict[str, Callable[[int], list[tuple[int, ...]]]] = {
    "silu_times": lambda rows: [(1, rows, 8)] * 2,
    "quick_gelu": lambda rows: [(1, rows, 8)],
    "add_gated": lambda rows: [(1, rows, 8), (1, 1, 8), (1, rows, 8)],
    "turn": lambda rows: [(1, 3, rows, 4, 2)] * 2 + [(rows, 4, 2)] * 2,
    "affine": lambda rows: [(2, rows, 5, 8), (2, 1, 1, 8), (2, 1, 1, 8)],
    "affine_silu": lambda rows: [(2, rows, 5, 8), (2, 1, 1, 8), (2, 1, 1, 8)],
    "squared_distance": lambda rows: [(2, rows, 5, 8), (2, 1, 1, 8)],
}


@pytest.mark.parametrize("name", CHAINS)
@each_dtype
def test_a_chain_is_one_kernel_and_traced_once(name, dtype):
    """With MLX's compiler, as on a GPU; nothing is computed, which on a CPU would start g++."""
    chain = getattr(fused, name)
    traces = []
    again = fused.Chain(lambda *arrays: traces.append(1) or chain.plain(*arrays))
    fused.Chain.all.remove(again)
    mx.enable_compile()
    try:
        for rows in (40, 56):
            text, shapes = io.StringIO(), CHAINS[name](rows)
            found = again(*(mx.zeros(shape, dtype) for shape in shapes))
            assert found.shape == shapes[0]
            mx.export_to_dot(text, found)
            made = [line for line in text.getvalue().splitlines() if "label" in line and "Full" not in line]
            assert sum("Compiled" in line for line in made) == 1, text.getvalue()
    finally:
        mx.disable_compile()
    assert len(traces) == 1
