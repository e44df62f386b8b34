"""What MLX's CPU backend computes slowly, computed by numpy on every core.

MLX's CPU wheel for Linux multiplies matrices with the reference BLAS, some forty times slower than the OpenBLAS that
numpy's wheel carries; it runs everything else on one thread, and its exponentials and its unpacking of quantized
weights take five to thirty times as long as numpy's (benchmarks/README.md). numpy works on MLX's own memory, in blocks
that stay in a core's cache, so nothing is copied and little is allocated.

What is computed here is computed at once and not put off as MLX would. Gradients pass through (`work.differentiable`),
and inside `mx.compile` or `mx.vmap`, where nothing can be computed at once, MLX's own operation is used; within
`lazily`, always.

    blas.py         numpy's BLAS, and how many threads it takes
    work.py         what is numpy's to compute, shared among threads
    products.py     linear layers, whole and quantized
    scores.py       attention
    convolutions.py convolutions
    elementwise.py  activations, norms, modulation, rotary positions
"""

from mflux.cpu.convolutions import convolution, serves_convolution
from mflux.cpu.elementwise import (
    gelu,
    gelu_approx,
    gelu_times,
    layer_norm,
    modulate,
    quick_gelu,
    residual,
    rms_norm,
    silu,
    silu_times,
    turned_pairs,
)
from mflux.cpu.products import product, quantized_product, quantized_serves
from mflux.cpu.scores import attention, attention_serves
from mflux.cpu.work import apart, first_order, lazily, serves, threads

__all__ = [
    "apart",
    "attention",
    "attention_serves",
    "convolution",
    "first_order",
    "gelu",
    "gelu_approx",
    "gelu_times",
    "layer_norm",
    "lazily",
    "modulate",
    "product",
    "quantized_product",
    "quantized_serves",
    "quick_gelu",
    "residual",
    "rms_norm",
    "serves",
    "serves_convolution",
    "silu",
    "silu_times",
    "threads",
    "turned_pairs",
]
