"""What numpy computes in MLX's place on a CPU: equal to MLX's, with its gradients, and within its room."""

from __future__ import annotations

import ast
import ctypes
import os
import re
import subprocess
import sys
import threading
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from mflux import backend, cpu
from mflux.backend import mx, nn, tree_flatten
from mflux.checkpoints.quantization import Quantization, QuantizedEmbedding, QuantizedLinear, make_room, pack, planned
from mflux.cpu import blas, convolutions, products, work
from mflux.models.common import pipeline
from mflux.models.common.config import ModelConfig
from mflux.models.common.lora.adapters import Adapter, LowRank, wrap
from mflux.models.common.networks import layers
from mflux.models.flux.variants.txt2img.flux import Flux1

pytestmark = pytest.mark.skipif(backend.has_gpu(), reason="a GPU keeps to MLX")

SOURCE = Path(backend.__file__).parent


@pytest.fixture(autouse=True)
def seeded():
    mx.random.seed(7)


@pytest.fixture(params=[1, 3])
def workers(request, monkeypatch):
    monkeypatch.setattr(work, "threads", lambda: request.param)


@pytest.fixture
def counted(monkeypatch):
    """How often numpy had work to share."""
    calls = []
    share = work.share

    def counting(part, rows, step, **options):
        calls.append((rows, step))
        share(part, rows, step, **options)

    monkeypatch.setattr(work, "share", counting)
    return calls


def error(ours: mx.array, theirs: mx.array) -> float:
    difference, whole = (np.asarray(x, dtype=np.float64) for x in (ours - theirs, theirs))
    return float(np.linalg.norm(difference) / np.linalg.norm(whole))


# What MLX's products may differ by: its own BLAS adds one to the other, thousands of them.
EXACT = 1e-5


# ---- memory


KEEPING = """
import resource
from pathlib import Path
from mflux.backend import mx
from mflux.models.common.memory import give_back_memory, keeping_memory
def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    mx.eval(mx.ones((25_000_000,)))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
new_pages(), give_back_memory()
before, always = held(), new_pages()
with keeping_memory():
    first, *others = (new_pages() for _ in range(6))  # small blocks may have settled where the first was
    inside = held() - before
print(always, first, others[-1], new_pages(), inside / 1e6, (held() - before) / 1e6)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library than glibc")
def test_kept_memory_is_used_again_and_given_back():
    found = subprocess.run([sys.executable, "-c", KEEPING], check=True, capture_output=True, text=True).stdout
    always, first, later, afterwards, inside, outside = map(float, found.split())
    assert min(always, first, afterwards) > 5 * later  # few where pages are huge
    assert inside > 90
    assert outside < 10


class Steps:
    def __init__(self, seen: list[str]):
        self.seen = seen

    def call_in_loop(self, **_: object) -> None:
        self.seen.append("step")


@pytest.mark.parametrize("count", [1, 3])
def test_memory_is_kept_from_the_second_step_to_the_last(count, monkeypatch):
    seen = []

    @contextmanager
    def keeping():
        seen.append("keep")
        yield
        seen.append("give back")

    monkeypatch.setattr(pipeline, "keeping_memory", keeping)
    flux = Flux1(model_config=ModelConfig.from_name("demo"))
    flux.callbacks.register(Steps(seen))
    flux.generate_image(seed=1, prompt="a red circle", num_inference_steps=count, width=64, height=64)
    assert seen == (["step"] if count == 1 else ["step", "keep", "step", "step", "give back"])


# ---- activations


PLAIN = {
    "silu": nn.silu,
    "swish": nn.silu,
    "gelu": nn.gelu,
    "gelu_new": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "quick_gelu": lambda x: x * mx.sigmoid(1.702 * x),
}


def test_every_activation_is_compared():
    assert set(PLAIN) | {"relu"} == set(layers.ACTIVATIONS)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("shape", [(work.LEAST,), (3, 301, 150), (2, 1, 1, 70_001)], ids=str)
def test_an_activation_equals_mlx(name, shape, workers, counted):
    x = 4 * mx.random.normal(shape)
    assert error(layers.ACTIVATIONS[name](x), PLAIN[name](x)) < 1e-6
    assert counted


@pytest.mark.parametrize("name", PLAIN)
def test_a_part_of_an_array_and_values_at_the_ends(name, counted):
    x = 4 * mx.random.normal((3, 300, 301))
    x[0, 0, 20:26] = mx.array([0.0, -0.0, 1e4, -1e4, 60.0, -60.0])
    part = x[..., 17:217]
    assert error(layers.ACTIVATIONS[name](part), PLAIN[name](part)) < 1e-6
    turned = x.swapaxes(1, 2)
    assert error(layers.ACTIVATIONS[name](turned), PLAIN[name](turned)) < 1e-6
    assert np.isfinite(np.asarray(layers.ACTIVATIONS[name](x))).all()
    assert len(counted) == 3


@pytest.mark.parametrize("name", PLAIN)
def test_gradients_and_transforms_of_an_activation(name, counted):
    ours, plain = layers.ACTIVATIONS[name], PLAIN[name]
    x = mx.random.normal((300, 301))

    def gradient(function):
        return mx.grad(lambda x: (mx.square(function(2 * x))).sum())(x)

    assert error(gradient(ours), gradient(plain)) < 1e-5
    assert counted
    assert error(mx.compile(ours)(x), plain(x)) < 1e-6
    assert error(mx.vmap(ours)(x), plain(x)) < 1e-6


def test_what_is_small_or_not_float32_stays_with_mlx(counted):
    for x in (mx.ones((2, 3)), mx.ones((300, 300), mx.bfloat16), mx.ones((300, 300), mx.float16)):
        assert layers.silu(x).dtype == x.dtype
    assert not counted


def test_a_result_does_not_keep_what_it_was_made_of():
    x = mx.random.normal((1000, 1000))
    mx.eval(x)
    before = mx.get_active_memory()
    for _ in range(4):
        x = layers.silu(x)
    assert mx.get_active_memory() - before < x.nbytes / 2


# ---- norms and modulation


def norms(channels: int) -> dict:
    """Each function of x alone, numpy's and MLX's."""
    weight, bias, gate = mx.random.normal((3, channels))
    shift, scale = mx.random.normal((2, 2, 1, channels))
    eps = 1e-5

    def plain(x, weight=None, bias=None):
        return mx.fast.layer_norm(x, weight, bias, eps)

    rms, whole, bare = (kind(channels, eps=eps) for kind in (layers.RMSNorm, layers.LayerNorm, layers.LayerNorm))
    rms.weight, whole.weight, whole.bias = weight, weight, bias
    bare = layers.LayerNorm(channels, eps=eps, affine=False)
    return {
        "RMS norm": (rms, lambda x: mx.fast.rms_norm(x, weight, eps)),
        "layer norm": (whole, lambda x: plain(x, weight, bias)),
        "layer norm without weights": (bare, plain),
        "layer norm, the function": (lambda x: layers.layer_norm(x, eps), plain),
        "RMS norm, the function": (lambda x: layers.rms_norm(x, eps), lambda x: mx.fast.rms_norm(x, None, eps)),
        "modulate": (
            lambda x: layers.modulate(x, shift, scale, eps),
            lambda x: plain(x) * (1 + scale) + shift,
        ),
        "modulate, one for all": (
            lambda x: layers.modulate(x, shift[:1], scale[:1], eps),
            lambda x: plain(x) * (1 + scale[:1]) + shift[:1],
        ),
        "residual": (lambda x: layers.residual(x, scale, 2 * x), lambda x: x + scale * (2 * x)),
        "residual, one for all": (lambda x: layers.residual(x, gate, 2 * x), lambda x: x + gate * (2 * x)),
        "residual, 1": (lambda x: layers.residual(x, 1, 2 * x), lambda x: 3 * x),
        "SwiGLU": (lambda x: layers.silu_times(x, 2 * x), lambda x: nn.silu(x) * (2 * x)),
    }


@pytest.mark.parametrize("name", norms(8))
def test_norms_equal_mlx(name, workers, counted):
    ours, plain = norms(96)[name]
    x = 3 + 4 * mx.random.normal((2, 1001, 96))
    assert error(ours(x), plain(x)) < 1e-6
    assert bool(counted) == (name != "residual, 1")
    part = mx.random.normal((2, 1001, 300))[..., 7:103]
    assert error(ours(part), plain(part)) < 1e-6

    def gradient(function):
        return mx.grad(lambda x: (function(x) ** 3).sum())(x)

    assert error(gradient(ours), gradient(plain)) < 1e-5
    assert error(mx.compile(ours)(x), plain(x)) < 1e-6


def test_a_norm_of_heads_beside_each_other(counted):
    norm = layers.RMSNorm(64)
    norm.weight = mx.random.normal((64,))
    x = layers.split_heads(mx.random.normal((2, 300, 4 * 64)), 4)
    assert error(norm(x), mx.fast.rms_norm(x, norm.weight, norm.eps)) < 1e-6
    assert counted


def test_what_differs_from_row_to_row_stays_with_mlx(counted):
    x, shift, scale = mx.random.normal((3, 1, 1000, 96))
    wanted = mx.fast.layer_norm(x, None, None, 1e-6) * (1 + scale) + shift
    assert error(layers.modulate(x, shift, scale), wanted) < 1e-6
    assert error(layers.residual(x, scale, shift), x + scale * shift) < 1e-6
    assert not counted


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("error")
def test_what_is_not_a_number_stays_none_without_a_warning(bad, workers):
    x = mx.random.normal((1, 1000, 96))
    x[0, 500, 3] = bad
    out = np.asarray(layers.RMSNorm(96)(x)), np.asarray(layers.LayerNorm(96)(x))
    assert all(not np.isfinite(y[0, 500]).all() and np.isfinite(np.delete(y, 500, axis=1)).all() for y in out)


# ---- rotary positions


@pytest.mark.parametrize("shape, places", [((1, 4, 300, 64), (300, 32)), ((2, 4, 300, 64), (2, 1, 300, 32))], ids=str)
def test_turned_pairs_equal_mlx(shape, places, workers, counted):
    angles = 9 * mx.random.normal(places)
    rotary = mx.cos(angles), mx.sin(angles)
    x = mx.random.normal(shape)
    for y in (x, mx.contiguous(x.swapaxes(1, 2)).swapaxes(1, 2)):
        assert error(layers.rotate_pairs(y, rotary), layers._rotate_pairs(y, *rotary)) < 1e-6
    assert counted

    def gradient(function):
        return mx.grad(lambda x: (function(x) ** 3).sum())(x)

    ours = gradient(lambda x: layers.rotate_pairs(x, rotary))
    assert error(ours, gradient(lambda x: layers._rotate_pairs(x, *rotary))) < 1e-5


# ---- attention


def masks(batch: int, heads: int, length: int, keys: int) -> dict:
    seen = mx.random.uniform(shape=(length, keys)) > 0.3
    seen[3] = False  # sees nothing: the mean of all
    return {
        "none": None,
        "causal": "causal",
        "seen": seen,
        "seen, a batch": mx.random.uniform(shape=(batch, 1, length, keys)) > 0.3,
        "added": mx.random.normal((batch, heads, length, keys)),
        "added, half": mx.random.normal((batch, 1, 1, keys)).astype(mx.bfloat16),
    }


@pytest.mark.parametrize("bytes_at_once", [work.ROOM, 4 * 3 * 257 * 300, 4 * 70 * 300, 4], ids=str)
@pytest.mark.parametrize("key_heads", [6, 2, 1])
def test_attention_equals_mlx(bytes_at_once, key_heads, monkeypatch, workers):
    monkeypatch.setattr(work, "ROOM", bytes_at_once)
    batch, heads, length, keys = (2, 6, 257, 300) if bytes_at_once > 4 else (1, 6, 33, 400)
    q = mx.random.normal((batch, heads, length, 64))
    k = mx.random.normal((batch, key_heads, keys, 64))
    v = mx.random.normal((batch, key_heads, keys, 48))
    assert cpu.attention_serves(q, k, v)
    for name, mask in masks(batch, heads, length, keys).items():
        plain = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.2, mask=mask)
        assert error(layers.attention(q, k, v, scale=0.2, mask=mask), plain) < 1e-6, name


def test_fewer_keys_than_queries_and_causal():
    q, k = mx.random.normal((1, 2, 400, 32)), mx.random.normal((1, 2, 500, 32))
    plain = mx.fast.scaled_dot_product_attention(q, k, k, scale=0.3, mask="causal")
    assert error(cpu.attention(q, k, k, 0.3, "causal"), plain) < 1e-6


@pytest.mark.parametrize("key_heads", [6, 2])
@pytest.mark.parametrize("bytes_at_once", [4 << 20, 1 << 16])
def test_gradients_of_attention(key_heads, bytes_at_once, counted, monkeypatch):
    """With keys that several heads share, all masks, and few rows at a time."""
    monkeypatch.setattr(work, "ROOM", bytes_at_once)
    q = mx.random.normal((2, 6, 130, 32))
    k, v = mx.random.normal((2, key_heads, 150, 32)), mx.random.normal((2, key_heads, 150, 24))

    def gradients(function):
        with cpu.first_order():
            return mx.grad(lambda q, k, v: mx.square(function(q, k, v)).sum(), argnums=(0, 1, 2))(q, k, v)

    for name, mask in masks(2, 6, 130, 150).items():
        ours = gradients(lambda q, k, v, mask=mask: layers.attention(q, k, v, scale=0.2, mask=mask))
        plain = gradients(
            lambda q, k, v, mask=mask: mx.fast.scaled_dot_product_attention(q, k, v, scale=0.2, mask=mask)
        )
        assert max(error(a, b) for a, b in zip(ours, plain, strict=True)) < 1e-5, name
    assert counted


def test_what_a_gradient_was_computed_from_is_let_go():
    """Of a chain of layers only what went in is kept, not all that a gradient passed."""
    weights = [mx.random.normal((256, 256)) / 16 for _ in range(12)]
    x = mx.random.normal((2000, 256))
    mx.eval(weights, x)

    def loss(x):
        for weight in weights:
            x = layers.gelu_approx(cpu.product(x, weight, frozen=True))
        return x.sum()

    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with cpu.first_order():
        mx.eval(mx.grad(loss)(x))
    # A few arrays a layer; all that the gradients passed would be twice as many.
    assert mx.get_peak_memory() - before < 5 * len(weights) * x.nbytes


def test_gradients_of_attention_with_a_mask_of_numbers(counted):
    q, k, v = (mx.random.normal((1, 4, 200, 32)) for _ in range(3))
    mask = mx.random.normal((200, 200))

    def gradients(function):
        return mx.grad(lambda q, k, v: mx.square(function(q, k, v)).sum(), argnums=(0, 1, 2))(q, k, v)

    ours = gradients(lambda q, k, v: layers.attention(q, k, v, scale=0.2, mask=mask))
    plain = gradients(lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=0.2, mask=mask))
    assert counted
    assert max(error(a, b) for a, b in zip(ours, plain, strict=True)) < 1e-5


def test_scores_are_never_all_there():
    q, k, v = (mx.random.normal((1, 8, 1500, 16)) for _ in range(3))
    mx.eval(q, k, v)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(layers.attention(q, k, v))
    scores = 4 * 8 * 1500**2
    # Scores in their room, the scaled queries, and the result with a part of it.
    assert mx.get_peak_memory() - before < work.ROOM + 4 * q.nbytes < scores / 3


# ---- products and convolutions


@pytest.mark.parametrize("shape", [(1, 40, 96), (3, 17, 96), (1, 1, 9600), (200, 96)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_linear_layer_equals_mlx(shape, bias, frozen, workers, monkeypatch):
    layer = layers.Linear(shape[-1], 70, bias=bias)
    plain = nn.Linear(shape[-1], 70, bias=bias)
    plain.update(layer.parameters())
    if frozen:
        layer.freeze()
    x = mx.random.normal(shape)
    calls = []
    multiply = products.multiply
    monkeypatch.setattr(products, "multiply", lambda *args: calls.append(args) or multiply(*args))
    assert error(layer(x), plain(x)) < EXACT
    assert len(calls) == 1
    wider = mx.random.normal((*shape[:-1], 3 * shape[-1]))[..., shape[-1] : 2 * shape[-1]]
    assert error(layer(wider), plain(wider)) < EXACT
    assert error(mx.compile(layer)(x), plain(x)) < EXACT

    def gradients(module, x):
        def loss(parameters, x):
            module.update(parameters)
            return (module(x) ** 3).sum()

        found = mx.grad(loss, argnums=(0, 1) if not frozen else 1)(module.parameters(), x)
        return [value for _, value in tree_flatten(found)]

    calls.clear()
    ours, theirs = (gradients(module, x) for module in (layer, plain))
    # Of what is frozen no gradient is computed.
    assert len(calls) == (2 if frozen else 3)
    assert all(error(one, two) < 1e-5 for one, two in zip(ours, theirs, strict=True))

    def twice(module):
        return mx.grad(lambda x: mx.square(mx.grad(lambda x: (module(x) ** 3).sum())(x)).sum())(x)

    assert error(twice(layer), twice(plain)) < 1e-5


def test_a_product_is_the_same_bits_on_any_number_of_threads():
    code = (
        "import numpy as np; from mflux import cpu; from mflux.backend import mx; mx.random.seed(1)\n"
        "x, w = mx.random.normal((1, 333, 520)), mx.random.normal((1111, 520))\n"
        "p = cpu.product(x, w); q = p[..., :512].reshape(1, 333, 4, 128).swapaxes(1, 2)\n"
        "a = cpu.attention(q, q, q, 0.1, None)\n"
        "c = cpu.convolution(x.reshape(1, 333, 20, 26), w[:, : 9 * 26].reshape(-1, 3, 3, 26), None, (1, 1), (1, 1))\n"
        "z = cpu.quantized_product(x[..., :512], *mx.quantize(w[:, :512]), 64, 4)\n"
        "import hashlib; print([hashlib.sha256(np.asarray(y).tobytes()).hexdigest() for y in (p, a, c, z)])"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads},
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout
        for threads in ("1", "2", "2")
    }
    assert len(found) == 1


def test_a_tied_head_equals_mlx():
    ours, plain = layers.Embedding(900, 64), nn.Embedding(900, 64)
    plain.update(ours.parameters())
    x = mx.random.normal((1, 20, 64))
    assert error(ours.as_linear(x), plain.as_linear(x)) < EXACT
    ids = mx.array([[3, 899]])
    assert mx.array_equal(ours(ids), plain(ids))


CONVOLUTIONS = {
    "3 x 3": {"kernel_size": 3, "padding": 1},
    "without a bias": {"kernel_size": 3, "padding": 1, "bias": False},
    "halving": {"kernel_size": 3, "stride": 2, "padding": 1},
    "patches": {"kernel_size": 5, "stride": 5},
    "1 x 1": {"kernel_size": 1},
    "the whole image": {"kernel_size": (21, 33)},
    "oblong": {"kernel_size": (2, 5), "stride": (3, 1), "padding": (0, 2)},
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("positions", [512, 16, 1])
def test_a_convolution_equals_mlx(name, positions, workers, counted, monkeypatch):
    monkeypatch.setattr(convolutions, "_POSITIONS", positions)
    ours, plain = (kind(7, 19, **CONVOLUTIONS[name]) for kind in (layers.Conv2d, nn.Conv2d))
    plain.update(ours.parameters())
    x = mx.random.normal((2, 21, 33, 7))
    assert error(ours(x), plain(x)) < EXACT
    assert counted
    part = mx.random.normal((2, 21, 40, 9))[:, :, 3:36, 1:8]
    assert error(ours(part), plain(part)) < EXACT
    assert error(mx.compile(ours)(x), plain(x)) < EXACT
    found = (mx.grad(lambda x, module=module: (module(x) ** 3).sum())(x) for module in (ours, plain))
    assert error(*found) < 1e-5


def test_a_convolution_s_windows_are_never_all_there():
    layer, x = layers.Conv2d(32, 4, 3, padding=1), mx.random.normal((1, 512, 512, 32))
    mx.eval(x, layer.parameters())
    tracemalloc.start()
    result = layer(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < result.nbytes + work.threads() * 4 * 4 * work.BLOCK < 9 * x.nbytes / 10


# ---- quantized layers


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_a_quantized_product_equals_the_dense_one(bits, group_size, monkeypatch, workers, counted):
    weight = mx.random.normal((999, 640))
    packed = mx.quantize(weight, group_size, bits)
    dense = mx.dequantize(*packed, group_size, bits)
    x = mx.random.normal((2, 7, 640))
    monkeypatch.setattr(work, "ROOM", 4 * 640 * 200)
    # Not equal to the last bit everywhere: a product in parts may be summed in another order.
    assert error(cpu.quantized_product(x, *packed, group_size, bits), x @ dense.T) < EXACT
    assert counted == [(999, 200)]
    ours = mx.grad(lambda x: mx.square(cpu.quantized_product(x, *packed, group_size, bits)).sum())(x)
    assert error(ours, mx.grad(lambda x: mx.square(x @ dense.T).sum())(x)) < 1e-5


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(2048, 1024)
        self.layers = [nn.Linear(1024, 4096), nn.Linear(4096, 1024, bias=False)]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
        return x


def quantized(net: Net, bits: int) -> tuple[Net, Net]:
    """A net with quantized layers, and one with the same weights, dense."""
    mx.eval(net.parameters())
    plan = planned(net, Quantization(bits))
    found = {path: pack(dict(net.named_modules())[path].weight, of) for path, of in plan.items()}
    for path, of in plan.items():
        parts = [found[path][name] for name in ("weight", "scales", "biases")]
        dict(net.named_modules())[path].weight = mx.dequantize(*parts, of.group_size, of.bits)
    small = Net()
    small.update(net.parameters())
    make_room(small, plan)
    for path, parts in found.items():
        layer = dict(small.named_modules())[path]
        assert type(layer) is (QuantizedEmbedding if path == "embed" else QuantizedLinear)
        for name, value in parts.items():
            layer[name] = value
    mx.eval(net.parameters(), small.parameters())
    return net, small


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_quantized_layers_equal_dense_ones(bits, rows, counted):
    dense, small = quantized(Net(), bits)
    x = mx.random.normal((1, rows, 1024))
    assert error(small(x), dense(x)) < EXACT
    assert error(small.embed.as_linear(x), dense.embed.as_linear(x)) < EXACT
    assert bool(counted) == (rows > 1)
    ids = mx.array([[3, 2047]])
    assert error(small.embed(ids), dense.embed(ids)) < EXACT


def test_a_lora_beside_a_quantized_layer(counted):
    dense, small = quantized(Net(), 4)
    up, down = 0.1 * mx.random.normal((4096, 8)), 0.1 * mx.random.normal((8, 1024))
    for net in (dense, small):
        wrap(net, "layers.0", [Adapter(1.0, 1.0, lambda: (LowRank(down, up), None))])
    x = mx.random.normal((1, 20, 1024))
    assert error(small(x), dense(x)) < EXACT
    assert counted


def test_the_dense_weight_is_never_all_there(monkeypatch):
    """Memory of a pass: the packed layers, a block of one, and activations."""
    monkeypatch.setattr(work, "ROOM", 1 << 20)
    _, small = quantized(Net(), 4)
    x = mx.random.normal((1, 8, 1024))
    mx.eval(x)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(small(x))
    dense = 4 * 1024 * 4096
    assert mx.get_peak_memory() - before < work.ROOM + 6 * 4 * 8 * 4096 < dense / 8


# ---- threads


def test_threads_are_as_many_as_blas_may_have(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = work.threads()
    assert 1 <= cores <= os.cpu_count()
    for asked, given in (("1", 1), ("0", 1), ("1000", cores), ("four", cores)):
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        assert work.threads() == given


def test_an_error_in_a_thread_is_not_lost(monkeypatch):
    monkeypatch.setattr(work, "threads", lambda: 2)
    threads = blas.library() and blas.library().threads()

    def fail(start, stop):
        raise FloatingPointError(f"{start}")

    with pytest.raises(FloatingPointError):
        work.share(fail, 10, 1)
    with pytest.raises(FloatingPointError):
        work.share(fail, 10, 1, multiplies=True)
    assert blas.library() is None or blas.library().threads() == threads


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_has_threads_of_its_own():
    code = (
        "import os, sys; from mflux.cpu import work; work.threads = lambda: 2\n"
        "part = lambda start, stop: None\n"
        "work.share(part, 10, 1, multiplies=True)\n"
        "child = os.fork()\n"
        "if not child: work.share(part, 10, 1, multiplies=True); os._exit(7)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 7


# ---- everything takes this way


def test_models_take_what_computes_from_the_layers():
    """Else it is slow on a CPU. Autoencoders' convolutions are computed by kernels of their own."""
    slow = re.compile(
        r"(nn\.(silu|gelu|gelu_approx|SiLU|GELU|RMSNorm\(.*|LayerNorm\(.*|Linear\(.*|Embedding\(.*|Conv\dd\(.*)"
        r"|mx\.fast\.(scaled_dot_product_attention|rms_norm|layer_norm)"
        r"|mx\.(matmul|addmm|inner|tensordot|conv\dd|conv_general|quantized_matmul)|.* @ .*)$",
        re.DOTALL,
    )
    kept = {
        "models/seedvr2/colour.py": "numpy's",
        "models/common/networks/vision.py": "a kernel that holds its weights, as they are named",
    }
    found = set()
    for path in (SOURCE / "models").rglob("*.py"):
        place = path.relative_to(SOURCE).as_posix()
        if "autoencoders" in path.parts or path.name == "layers.py" or place in kept:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Attribute, ast.Call, ast.BinOp)) and slow.match(ast.unparse(node)):
                if isinstance(node, ast.BinOp) and not isinstance(node.op, ast.MatMult):
                    continue
                found.add(f"{place}:{node.lineno} {ast.unparse(node)}")
    assert not found


# ---- training


class Block(nn.Module):
    """Everything that numpy would compute in a transformer's block."""

    def __init__(self):
        super().__init__()
        self.norm = layers.RMSNorm(96, 1e-6)
        self.qkv = nn.Linear(96, 3 * 96)
        self.out = nn.Linear(96, 96)

    def __call__(self, x: mx.array) -> mx.array:
        q, k, v = (part[:, None] for part in mx.split(self.qkv(self.norm(x)), 3, axis=-1))
        seen = layers.attention(q, k, v)[:, 0]
        return layers.residual(x, mx.ones((1, 1, 96)), layers.ACTIVATIONS["gelu"](self.out(seen)))


def test_lazily_a_checkpointed_block_has_its_gradient(counted):
    block, x = Block(), mx.random.normal((1, 800, 96))
    mx.eval(block.parameters(), x)

    def gradient(run) -> dict[str, mx.array]:
        def loss(parameters):
            block.update(parameters)
            return mx.square(run(run(x))).mean()

        found = mx.grad(loss)(block.trainable_parameters())
        mx.eval(found)
        return dict(tree_flatten(found))

    expected = gradient(block)
    assert counted
    counted.clear()
    with cpu.lazily():
        found = gradient(nn.utils.checkpoint(block))
        assert not counted
        # Nothing is computed, and so nothing kept, before it is asked for.
        before = mx.get_active_memory()
        result = block(x)
        assert mx.get_active_memory() - before < x.nbytes
    assert found.keys() == expected.keys()
    assert all(error(value, expected[name]) < 1e-4 for name, value in found.items())
    assert error(result, block(x)) < 1e-5


def test_lazily_ends_with_its_block_and_is_a_thread_s_own(counted):
    x = mx.random.normal((300, 301))
    with pytest.raises(RuntimeError, match="stop"), cpu.lazily():
        assert not cpu.serves(x) and not cpu.quantized_serves(x, mx.zeros((301, 999), mx.uint32), 4, "affine")
        raise RuntimeError("stop")
    assert cpu.serves(x) and cpu.quantized_serves(x, mx.zeros((301, 999), mx.uint32), 4, "affine")


# ---- numpy's BLAS


class FakeBlas:
    """What a library of some build answers."""

    def __init__(self, *names: str):
        for name in names:
            setattr(self, name, lambda *given: b"OpenBLAS 0.3.31  USE64BITINT DYNAMIC_ARCH Haswell MAX_THREADS=64")


@pytest.mark.parametrize("pattern", blas._NAMES)
def test_numpy_s_openblas_is_found_under_the_names_of_its_build(pattern, monkeypatch):
    names = (pattern.format(what) for what in ("get_config", "get_num_threads", "set_num_threads"))
    found = FakeBlas()
    for name in names:
        setattr(found, name, type("Function", (), {"__call__": FakeBlas("x").x})())
    monkeypatch.setattr(blas.ctypes, "CDLL", lambda path: found)
    monkeypatch.setattr(blas, "library", blas.library.__wrapped__)
    assert blas.name() == "numpy's OpenBLAS 0.3.31 (Haswell)"
    assert blas.is_fast()


@pytest.mark.parametrize(
    "built, name, fast",
    [
        ({"name": "mkl-dynamic-ilp64-seq", "found": True}, "mkl-dynamic-ilp64-seq", True),
        ({"name": "accelerate", "found": True}, "accelerate", True),
        ({"name": "blas", "found": True}, "blas", False),
        ({"name": "none", "found": False}, "no BLAS", False),
        ({}, "no BLAS", False),
    ],
)
def test_another_numpy_s_blas_is_told_and_computes_as_well(built, name, fast, monkeypatch):
    monkeypatch.setattr(blas, "library", lambda: None)
    monkeypatch.setattr(np, "show_config", lambda mode: {"Build Dependencies": {"blas": built}})
    assert (blas.name(), blas.is_fast()) == (name, fast)
    # It cannot be told to keep to a thread, so one of ours asks for everything.
    threads = set()
    work.share(lambda start, stop: threads.add(threading.get_ident()), 50, 1, multiplies=True)
    assert threads == {threading.get_ident()}
    x, weight = mx.random.normal((1, 700, 96)), mx.random.normal((800, 96))
    assert error(cpu.product(x, weight), x @ weight.T) < 1e-6


@pytest.mark.skipif(blas.library() is None, reason="numpy has another BLAS")
def test_how_many_threads_a_product_takes_is_as_before(monkeypatch):
    found, seen = blas.library(), []
    before = found.threads()
    with blas.alone() as is_told:
        assert is_told and found.threads() == 1
        with blas.alone():
            assert found.threads() == 1
        assert found.threads() == 1
    assert found.threads() == before
    monkeypatch.setattr(work, "threads", lambda: 2)
    work.share(lambda start, stop: seen.append(found.threads()), 10, 1, multiplies=True)
    assert set(seen) == {1} and found.threads() == before


@pytest.mark.parametrize("first", ["mlx.core", "numpy", "torch", "mflux.backend"])
def test_the_order_of_imports_does_not_matter(first):
    pytest.importorskip(first)
    code = (
        f"import {first}\nfrom mflux import cpu\nfrom mflux.backend import mx\nimport numpy as np\n"
        "x, w = np.random.default_rng(0).normal(size=(2, 300, 400)).astype(np.float32)\n"
        "calls = []; matmul = np.matmul; np.matmul = lambda *a, **k: calls.append(1) or matmul(*a, **k)\n"
        "y = cpu.product(mx.array(x), mx.array(w)); print(len(calls), np.allclose(np.asarray(y), x @ w.T, atol=1e-3))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert (done.stdout, done.stderr) == ("1 True\n", "")
