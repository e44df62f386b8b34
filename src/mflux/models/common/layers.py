"""Small building blocks that several architectures share."""

from __future__ import annotations

from collections.abc import Callable

from mflux.backend import mx, nn


def quick_gelu(x: mx.array) -> mx.array:
    """x · sigmoid(1.702 x), as OpenAI's CLIP was trained."""
    return x * mx.sigmoid(1.702 * x)


# By the names that published configurations use.
ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "gelu": nn.gelu,
    "gelu_new": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "quick_gelu": quick_gelu,
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
}


def split_heads(x: mx.array, heads: int) -> mx.array:
    """(B, L, heads · D) → (B, heads, L, D)."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def merge_heads(x: mx.array) -> mx.array:
    """(B, heads, L, D) → (B, L, heads · D)."""
    x = x.transpose(0, 2, 1, 3)
    return x.reshape(*x.shape[:2], -1)


def attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float | None = None, mask=None) -> mx.array:
    """Scaled dot-product attention over (B, heads, L, D); `scale` defaults to 1/√D."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
