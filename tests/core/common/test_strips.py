"""Feature maps in strips of rows: what the whole picture gives, in less memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from mflux.backend import mx, nn, tree_map
from mflux.cpu import convolutions, work
from mflux.models.common.networks.autoencoders import budget, kernels, strips
from mflux.models.common.networks.autoencoders.kernels import OnCPU, OnGPU, attention
from mflux.models.common.networks.autoencoders.kl import AutoencoderKL
from mflux.models.common.networks.autoencoders.strips import Map
from mflux.models.common.networks.autoencoders.wan import AutoencoderWan

KL = {
    "block_out_channels": [32, 64, 64, 96], "latent_channels": 4, "norm_num_groups": 8,
    "use_quant_conv": True, "use_post_quant_conv": True,
}  # fmt: skip
WAN = {"base_dim": 8, "z_dim": 4, "latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.7, 1.1, 2.0]}
AUTOENCODERS = {
    "kl": (AutoencoderKL, KL),
    "kl without attention": (AutoencoderKL, KL | {"mid_block_add_attention": False, "layers_per_block": 1}),
    "wan 2.1": (AutoencoderWan, WAN),
    "wan 2.2": (AutoencoderWan, WAN | {
        "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "decoder_base_dim": 16,
    }),
}  # fmt: skip
# Bytes of a strip: a row at a time, a few, many, all.
HEIGHTS = (1, 2**12, 2**15, 2**40)
SIZES = ((2, 5, 3), (1, 1, 1), (1, 4, 7))


@pytest.fixture(params=["cpu", "gpu"])
def kind(request, monkeypatch):
    """Both ways to compute, whichever this machine would take; MLX's own also runs on a CPU."""
    chosen = OnGPU if request.param == "gpu" else OnCPU
    monkeypatch.setattr(strips, "kernels", lambda dtype: chosen)
    monkeypatch.setattr(kernels, "kernels", lambda dtype: chosen)
    monkeypatch.setattr(chosen, "strip_bytes", chosen.strip_bytes)
    return chosen


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def randomized(module: nn.Module) -> nn.Module:
    rng = np.random.default_rng(1)

    def random(value: mx.array) -> mx.array:
        scale = 0.3 if value.ndim == 1 else (value.size / value.shape[0]) ** -0.5
        return mx.array(rng.normal(size=value.shape).astype(np.float32) * scale)

    module.update(tree_map(random, module.parameters()))
    return module


def conv(inputs: int, outputs: int, size: int = 3, **settings) -> nn.Conv2d:
    return randomized(nn.Conv2d(inputs, outputs, size, **settings))


def error(found: mx.array, expected: mx.array) -> float:
    assert found.shape == expected.shape
    return np.linalg.norm(np.array(found - expected)) / np.linalg.norm(np.array(expected))


def plain(layer: nn.Conv2d, x: mx.array, *, stride: int = 1, padding: int = 1) -> mx.array:
    y = mx.conv2d(x, layer.weight, stride=stride, padding=padding)
    return y + layer.bias if "bias" in layer else y


def doubled(x: mx.array) -> mx.array:
    return mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2)


# ---- layers beside MLX's

CONVOLUTIONS = {
    "3 x 3": conv(40, 48),
    "3 x 3 without bias": conv(40, 48, bias=False),
    "of few channels": conv(3, 40),
    "to few channels": conv(40, 3),
    "of few to few": conv(4, 4),
}


@pytest.mark.parametrize("height", HEIGHTS)
@pytest.mark.parametrize("shape", [(1, 12, 10), (2, 6, 4), (1, 7, 5), (1, 1, 1)])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name, shape, height, kind):
    layer, kind.strip_bytes = CONVOLUTIONS[name], height
    x = normal(*shape, layer.weight.shape[-1])
    assert error(Map.of(x).conv(layer).array(), plain(layer, x)) < 1e-6
    assert error(Map.of(x).double(layer).array(), plain(layer, doubled(x))) < 1e-6
    if shape[1] % 2 == 0:
        padded = mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)])
        assert error(Map.of(x).halve(layer).array(), plain(layer, padded, stride=2, padding=0)) < 1e-6


@pytest.mark.parametrize("bias", [True, False])
def test_one_by_one(bias, kind):
    kind.strip_bytes = 1
    layer, x = conv(12, 20, 1, bias=bias), normal(2, 5, 6, 12)
    assert error(Map.of(x).conv(layer).array(), plain(layer, x, padding=0)) < 1e-6


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("height", HEIGHTS)
@pytest.mark.parametrize("affine", [False, True])
def test_group_norm_counts_the_whole_picture(affine, height, silu, kind):
    """Rows differ in mean and spread by far, as do pictures, so that a strip's own statistics would show."""
    kind.strip_bytes = height
    layer = nn.GroupNorm(4, 24, eps=1e-6, affine=affine, pytorch_compatible=True)
    layer = randomized(layer) if affine else layer
    x = normal(2, 33, 6, 24) * mx.arange(1, 34).reshape(1, -1, 1, 1) + mx.array([5.0, 300.0]).reshape(2, 1, 1, 1)
    expected = layer(x)
    found = Map.of(x).group_norm(layer, silu=silu).array()
    assert error(found, nn.silu(expected) if silu else expected) < 1e-5


@pytest.mark.parametrize("silu", [False, True])
def test_rms_norm(silu, kind):
    kind.strip_bytes = 1
    weight, x = normal(12), normal(2, 5, 6, 12) * 10
    x[0, 0, 0] = 0
    expected = mx.fast.rms_norm(x, weight, 1e-24)
    assert error(Map.of(x).rms_norm(weight, 1e-24, silu=silu).array(), nn.silu(expected) if silu else expected) < 1e-6


def test_silu_of_large_values(kind):
    x = mx.array([-2.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 2.0]).reshape(1, 1, 1, 7)
    weight = mx.full(7, 1e30)
    expected = nn.silu(mx.fast.rms_norm(x, weight, 1e-24))
    found = Map.of(x).rms_norm(weight, 1e-24, silu=True).array()
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("scores", [1, 500, 2**30])
@pytest.mark.parametrize("batch", [1, 2])
def test_attention_over_some_queries_at_a_time(batch, scores, kind, monkeypatch):
    monkeypatch.setattr(kernels, "_SCORES", scores)
    q, k, v = (normal(batch, 23, 16, seed=seed) * 5 for seed in range(3))
    expected = mx.softmax(q @ k.swapaxes(1, 2) / 4, axis=-1) @ v
    assert error(attention(q, k, v), expected) < 1e-6


# ---- the executor


@pytest.mark.parametrize("height", HEIGHTS)
def test_rows_that_several_layers_read_at_different_places(height, kind):
    """A sum of branches that look 0, 1 and 4 rows ahead, all of one map that is not stored."""
    kind.strip_bytes = height
    layer, other = conv(8, 8), conv(8, 8)
    x = normal(1, 13, 6, 8)
    whole = plain(layer, x)
    expected = whole + plain(other, whole)
    branch = whole
    for _ in range(4):
        branch = plain(other, branch)
    first = Map.of(x).conv(layer)
    second = first
    for _ in range(4):
        second = second.conv(other)
    assert error((first + first.conv(other) + second).array(), expected + branch) < 1e-6


def test_a_map_is_made_once_in_a_pass_however_many_read_it(kind):
    kind.strip_bytes = 1
    rows = []

    def noted(x):
        rows.append(x.shape[1])
        return x * 2

    x = normal(1, 9, 4, 8)
    made = Map.of(x).rearranged(noted)
    layer = conv(8, 8)
    rows.clear()
    assert error((made + made.conv(layer)).array(), 2 * x + plain(layer, 2 * x)) < 1e-6
    assert sum(rows) == 9


@pytest.mark.parametrize("height", HEIGHTS)
def test_pixels_that_become_channels_and_back(height, kind):
    kind.strip_bytes = height

    def gathered(x):
        batch, rows, columns, channels = x.shape
        x = x.reshape(batch, rows // 2, 2, columns // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(batch, rows // 2, columns // 2, -1)

    def spread(x):
        batch, rows, columns, channels = x.shape
        x = x.reshape(batch, rows, columns, 2, 2, channels // 4).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(batch, rows * 2, columns * 2, -1)

    x, layer = normal(2, 10, 6, 3), conv(3, 3)
    assert np.array_equal(Map.of(x).rearranged(gathered, taken=2).array(), gathered(x))
    both = Map.of(x).rearranged(gathered, taken=2).rearranged(spread, given=2)
    assert error(both.conv(layer).array(), plain(layer, x)) < 1e-6


def test_what_is_stored_uses_up_what_it_is_made_of(kind):
    layer, x = conv(8, 8), normal(1, 6, 4, 8)
    kept = Map.of(x)
    stored = kept.conv(layer).store(keep=True)
    assert error(stored.array(keep=True), plain(layer, x)) < 1e-6
    once = kept.conv(layer).store()
    with pytest.raises(RuntimeError, match="used up"):
        kept.array()
    assert error(once.array(), plain(layer, x)) < 1e-6


def test_maps_of_different_shapes_are_not_added():
    with pytest.raises(ValueError, match="cannot be added"):
        Map.of(normal(1, 2, 2, 4)) + Map.of(normal(1, 2, 2, 8))


# ---- whole autoencoders


@pytest.mark.parametrize("room", [budget.ROOM, 0])
@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoders_in_strips_equal_the_whole(name, room, kind, monkeypatch):
    """The whole is one strip of MLX's own layers, which the families' tests compare with the reference. Without room
    nothing is stored for a norm: every map is made again from the last that a block stored."""
    cls, settings = AUTOENCODERS[name]
    vae = randomized(cls(cls.config_class.from_dict(settings)))
    scale = vae.spatial_scale
    for batch, height, width in SIZES:
        latents, image = normal(batch, 4, height, width), normal(batch, 3, scale * height, scale * width)
        with monkeypatch.context() as patch:
            patch.setattr(strips, "kernels", lambda dtype: OnGPU)
            patch.setattr(OnGPU, "strip_bytes", 2**40)
            decoded, encoded = vae.decode(latents), vae.encode(image)
        monkeypatch.setattr(budget, "ROOM", room)
        for kind.strip_bytes in (1, 2**14, 2**40):
            assert error(vae.decode(latents), decoded) < 2e-6
            assert error(vae.encode(image), encoded) < 2e-6


@pytest.mark.parametrize(
    "name, wider, limit",
    [
        ("kl", {"block_out_channels": [64, 64, 64, 64]}, 2.6),
        ("wan 2.1", {"base_dim": 48}, 0.9),
        ("wan 2.2", {"decoder_base_dim": 64, "dim_mult": [1, 1, 1, 1]}, 1.1),
    ],
)
def test_memory_is_that_of_few_maps(name, wider, limit, monkeypatch):
    """Counted in maps of the last level, of which the whole picture took five and more."""
    monkeypatch.setattr(strips, "kernels", lambda dtype: OnCPU)
    monkeypatch.setattr(OnCPU, "strip_bytes", 2**16)
    # What threads work in does not grow with the image.
    monkeypatch.setattr(work, "ROOM", 2**15)
    monkeypatch.setattr(work, "BLOCK", 2**12)
    monkeypatch.setattr(convolutions, "_POSITIONS", 64)
    cls, settings = AUTOENCODERS[name]
    vae = randomized(cls(cls.config_class.from_dict(settings | wider)))
    latents = normal(1, 4, 320 // vae.spatial_scale, 320 // vae.spatial_scale)
    mx.eval(vae.parameters(), latents)
    channels = vae.decoder.conv_out.weight.shape[-1]
    widest = 4 * channels * (320 // getattr(vae.config, "patch", 1)) ** 2
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    tracemalloc.start()
    mx.eval(vae.decode(latents))
    peak = tracemalloc.get_traced_memory()[1] + mx.get_peak_memory() - before
    tracemalloc.stop()
    assert peak < limit * widest


def test_16_bit_floats_are_left_to_mlx():
    assert kernels.kernels(mx.bfloat16) is OnGPU
    layer, x = conv(8, 8), normal(1, 6, 4, 8)
    expected = plain(layer, x)
    layer.set_dtype(mx.bfloat16)
    found = Map.of(x.astype(mx.bfloat16)).conv(layer).array()
    assert found.dtype == mx.bfloat16
    assert error(found.astype(mx.float32), expected) < 2e-2


def test_a_gpu_need_not_wait_for_a_strip(monkeypatch):
    """The next one is on its way before one is waited for, and a norm's statistics are looked at once, at the end."""
    told: list[str] = []
    numbers: dict[int, int] = {}
    kept: list[mx.array] = []

    def begun(x: mx.array) -> mx.array:
        numbers[id(x)] = len(numbers)
        kept.append(x)
        told.append(f"begin {numbers[id(x)]}")
        return x

    monkeypatch.setattr(kernels.OnGPU, "begun", staticmethod(begun))
    monkeypatch.setattr(kernels.OnGPU, "evaluate", staticmethod(lambda x: told.append(f"wait {numbers[id(x)]}")))
    monkeypatch.setattr(kernels.OnGPU, "strip_bytes", 2 * 8 * 16 * 2)
    x = mx.random.normal((1, 8, 8, 16), key=mx.random.key(1)).astype(mx.bfloat16)
    made = strips.Map.of(x)._each(lambda rows: rows)
    waits = []
    monkeypatch.setattr(mx, "eval", lambda *arrays: waits.append(arrays))
    made._count_moments()
    assert told == ["begin 0", "begin 1", "wait 0", "begin 2", "wait 1", "begin 3", "wait 2"]
    # Where there is memory for all of them, they are all on their way.
    told.clear(), numbers.clear()
    with monkeypatch.context() as patch:
        patch.setattr(budget, "has_gpu", lambda: True)
        made._count_moments()
    assert told == ["begin 0", "begin 1", "begin 2", "begin 3"]
    assert not waits


@pytest.mark.parametrize(
    ("told", "expected"), [({}, 900 * 10**6), ({"max_recommended_working_set_size": 96 << 30}, 12 << 30)]
)
def test_room_follows_from_a_gpu_s_memory(monkeypatch, told, expected):
    assert budget.room() == budget.ROOM
    monkeypatch.setattr(budget, "has_gpu", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: told)
    assert budget.room() == expected
