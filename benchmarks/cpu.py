"""What numpy does for MLX on a CPU: elementwise work, attention, quantized products, and a transformer's blocks.

    python benchmarks/cpu.py [--repeats 5] [--tokens 512] [--bits 4] [--only NAME]

Each piece of work is done in turn by MLX alone, as mflux does it, and by torch where torch is installed; the shortest
of all repetitions counts, because other programs can only lengthen one. Ratios are what to compare between machines.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

try:
    import torch
except ImportError:
    torch = None

from mflux import cpu
from mflux.backend import mx, nn, tree_flatten
from mflux.checkpoints.quantization import Quantization, make_room, pack, planned
from mflux.models.common.networks import layers
from mflux.models.common.networks.mmdit import SingleTransformerBlock, TransformerBlock

Work = dict[str, Callable[[], object]]
HEADS, HEAD, WIDTH = 24, 128, 3072


def least(work: Work, repeats: int) -> dict[str, float]:
    """The least seconds of each, all of them in turn."""
    found = {name: float("inf") for name in work}
    for step in work.values():
        step()
    for _ in range(repeats):
        for name, step in work.items():
            start = time.perf_counter()
            step()
            found[name] = min(found[name], time.perf_counter() - start)
    return found


def drawn(*shape: int, scale: float = 1.0) -> mx.array:
    x = scale * mx.random.normal(shape, key=mx.random.key(sum(shape)))
    mx.eval(x)
    return x


def evaluated(function: Callable[..., mx.array], *arguments) -> Callable[[], object]:
    return lambda: mx.eval(function(*arguments))


def in_torch(function: Callable, *arrays: mx.array) -> Work:
    if torch is None:
        return {}
    tensors = [torch.tensor(np.array(x)) for x in arrays]

    def step():
        with torch.no_grad():
            return function(*tensors)

    return {"torch": step}


def elementwise(tokens: int) -> dict[str, Work]:
    x = drawn(tokens, 4 * WIDTH)
    q = drawn(1, HEADS, tokens, HEAD)
    angles = drawn(tokens, HEAD // 2)
    rotary = mx.cos(angles), mx.sin(angles)
    mx.eval(rotary)
    named = {
        f"GELU (tanh form) of {tokens} × {4 * WIDTH}": (nn.gelu_approx, layers.gelu_approx),
        f"GELU (exact) of {tokens} × {4 * WIDTH}": (nn.gelu, layers.gelu),
        f"SiLU of {tokens} × {4 * WIDTH}": (nn.silu, layers.silu),
    }
    of_torch = [
        lambda t: torch.nn.functional.gelu(t, approximate="tanh"),
        lambda t: torch.nn.functional.gelu(t),
        lambda t: torch.nn.functional.silu(t),
    ]
    found = {
        name: {"MLX": evaluated(plain, x), "mflux": evaluated(ours, x)} | in_torch(theirs, x)
        for (name, (plain, ours)), theirs in zip(named.items(), of_torch, strict=True)
    }
    found[f"rotary turn of {HEADS} × {tokens} × {HEAD}"] = {
        "MLX": evaluated(layers._rotate_pairs, q, *rotary),
        "mflux": evaluated(layers.rotate_pairs, q, rotary),
    } | in_torch(
        lambda t, c, s: torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2))) * torch.complex(c, s)),
        q,
        *rotary,
    )
    return found | norms(tokens)


def norms(tokens: int) -> dict[str, Work]:
    x, y = drawn(1, tokens, WIDTH), drawn(1, tokens, WIDTH)
    shift, scale = drawn(1, 1, WIDTH), drawn(1, 1, WIDTH)
    heads = layers.split_heads(x, HEADS)
    norm = layers.RMSNorm(HEAD)
    mx.eval(heads, norm.parameters())
    of_torch = torch and torch.nn.functional

    def plain(x, shift, scale):
        return mx.fast.layer_norm(x, None, None, 1e-6) * (1 + scale) + shift

    return {
        f"layer norm, scale and shift of {tokens} × {WIDTH}": {
            "MLX": evaluated(plain, x, shift, scale),
            "mflux": evaluated(layers.modulate, x, shift, scale),
        }
        | in_torch(lambda t, s, f: of_torch.layer_norm(t, (WIDTH,), eps=1e-6) * (1 + f) + s, x, shift, scale),
        f"RMS norm of {tokens} × {HEADS} heads of {HEAD}": {
            "MLX": evaluated(lambda x: mx.fast.rms_norm(x, norm.weight, norm.eps), heads),
            "mflux": evaluated(norm, heads),
        }
        | in_torch(lambda t, w: of_torch.rms_norm(t, (HEAD,), w, norm.eps), heads, norm.weight),
        f"x + gate · y of {tokens} × {WIDTH}": {
            "MLX": evaluated(lambda x, gate, y: x + gate * y, x, scale, y),
            "mflux": evaluated(layers.residual, x, scale, y),
        }
        | in_torch(lambda x, gate, y: x + gate * y, x, scale, y),
        f"SiLU · y of {tokens} × {WIDTH}": {
            "MLX": evaluated(lambda x, y: nn.silu(x) * y, x, y),
            "mflux": evaluated(layers.silu_times, x, y),
        }
        | in_torch(lambda x, y: of_torch.silu(x) * y, x, y),
    }


def attention(tokens: int) -> dict[str, Work]:
    q, k, v = (drawn(1, HEADS, tokens, HEAD) for _ in range(3))
    plain = evaluated(lambda: mx.fast.scaled_dot_product_attention(q, k, v, scale=HEAD**-0.5))
    ours = {"MLX": plain, "mflux": evaluated(layers.attention, q, k, v)}
    theirs = in_torch(lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v), q, k, v)
    return {f"attention of {tokens} tokens, {HEADS} heads": ours | theirs}


def products(tokens: int, bits: int) -> dict[str, Work]:
    """The dense product, ours with packed weights, and one that unpacks all of them first, with MLX."""
    weight = drawn(4 * WIDTH, WIDTH, scale=0.02)
    packed = mx.quantize(weight, 64, bits)
    mx.eval(packed)
    x = drawn(tokens, WIDTH)
    name = f"product {tokens} × {WIDTH} by {WIDTH} × {4 * WIDTH}, {bits} bits"
    work = {
        "float32": evaluated(lambda: x @ weight.T),
        "MLX, dequantized whole": evaluated(lambda: x @ mx.dequantize(*packed, 64, bits).T),
        "mflux": evaluated(lambda: cpu.quantized_product(x, *packed, 64, bits)),
    }
    return {name: work}


class Blocks(nn.Module):
    """One double and one single block of FLUX.1."""

    def __init__(self):
        super().__init__()
        self.double = TransformerBlock(HEADS, HEAD)
        self.single = SingleTransformerBlock(HEADS, HEAD)

    def __call__(self, image: mx.array, text: mx.array, condition: mx.array, rotary) -> mx.array:
        image, text = self.double(image, text, condition, rotary)
        return self.single(mx.concatenate([text, image], axis=1), condition, rotary)


def quantized(module: nn.Module, bits: int) -> nn.Module:
    plan = planned(module, Quantization(bits))
    of = dict(module.named_modules())
    parts = {path: pack(of[path].weight, plan[path]) for path in plan}
    mx.eval(parts)
    make_room(module, plan)
    for path, layer in module.named_modules():
        layer.update(parts.get(path, {}))
    mx.eval(module.parameters())
    mx.clear_cache()
    return module


def blocks(tokens: int, bits: int) -> dict[str, Work]:
    """Half of the tokens text; beside them what the same costs where numpy does nothing."""
    dense, small = Blocks(), quantized(Blocks(), bits)
    mx.eval(dense.parameters())
    image, text = drawn(1, tokens - tokens // 2, WIDTH), drawn(1, tokens // 2, WIDTH)
    condition, angles = drawn(1, WIDTH), drawn(tokens, HEAD // 2)
    rotary = mx.cos(angles), mx.sin(angles)

    def alone() -> None:
        with cpu.lazily():
            mx.eval(dense(image, text, condition, rotary))

    peaks = {}
    for name, module in (("float32", dense), ("quantized", small)):
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(module(image, text, condition, rotary))
        peaks[name] = (mx.get_peak_memory() - before) / 1e6
    weights = sum(array.nbytes for _, array in tree_flatten(small.parameters())) / 1e6
    print(f"beside the weights ({weights:.0f} MB quantized), MB: {peaks}")

    work = {
        "float32, MLX alone": alone,
        "float32": evaluated(dense, image, text, condition, rotary),
        "mflux": evaluated(small, image, text, condition, rotary),
    }
    return {f"one double and one single block of FLUX.1, {tokens} tokens, {bits} bits": work}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="of each piece of work (default: 5)")
    parser.add_argument("--tokens", type=int, default=512, help="text and picture together (default: 512)")
    parser.add_argument("--bits", type=int, nargs="+", default=[4], help="of quantized weights (default: 4)")
    parser.add_argument("--only", choices=("elementwise", "attention", "products", "blocks"))
    args = parser.parse_args()
    kinds = {
        "elementwise": lambda: elementwise(args.tokens),
        "attention": lambda: attention(args.tokens),
        "products": lambda: {name: work for bits in args.bits for name, work in products(args.tokens, bits).items()},
        "blocks": lambda: {name: work for bits in args.bits for name, work in blocks(args.tokens, bits).items()},
    }
    for kind, make in kinds.items():
        if args.only not in (None, kind):
            continue
        for name, work in make().items():
            found = least(work, args.repeats)
            ours = found.pop("mflux")
            rest = ", ".join(f"{other} {seconds:.4f} s ({seconds / ours:.2f} ×)" for other, seconds in found.items())
            print(f"{name}: mflux {ours:.4f} s; {rest}", flush=True)


if __name__ == "__main__":
    main()
