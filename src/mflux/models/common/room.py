"""Reject sizes and models that cannot fit in this machine's memory, before MLX aborts or the machine stands still.

Less is counted than an image needs: of the weights the transformer's alone, or none; the text, LoRAs and other images
are left out, and so is whatever depends on how MLX goes about it. What is refused here fits in no case. A Mac's memory
is the GPU's as well, and Metal says how much of it a program should take at most: beyond that a warning is due, for
macOS then takes to its disk.
"""

from __future__ import annotations

import logging
from typing import Any

from mflux.backend import compute_dtype, mx, on_gpu
from mflux.errors import UsageError
from mflux.models.common.footprint import weights
from mflux.models.common.memory import recommended
from mflux.text import size
from mflux.utils.memory import machine_memory
from mflux.utils.scale_factor import GRID
from mflux.utils.values import QUANTIZE_CHOICES

log = logging.getLogger(__name__)

# Arrays as wide as the stream of tokens that attention has at once: what came in, queries, keys, values.
_STREAMS = 4
# What is proposed leaves this part of the memory for all that is not counted.
_SPARE = 0.5


def least_bytes(config: Any, width: int, height: int) -> int:
    """Bytes without which no step of denoising, or no picture, comes to be.

    Args:
        config: the transformer's, with `inner_dim`, a token's channels.
        width, height: pixels.
    """
    return max(_denoising(config, (width // GRID) * (height // GRID)), _decoding(width, height))


def _denoising(config: Any, tokens: int) -> int:
    return _STREAMS * tokens * config.inner_dim * compute_dtype(mx.bfloat16).size


def _decoding(width: int, height: int) -> int:
    """The picture itself, as the autoencoder gives it and as it is written."""
    return width * height * 3 * (4 + 1)


def check_room(config: Any, width: int, height: int) -> None:
    """
    Raises:
        UsageError: a picture of this size cannot be drawn here; it says what might.
    """
    if _is_beside():
        return
    memory = machine_memory().most
    needed = least_bytes(config, width, height)
    if needed <= memory:
        return
    smaller = _that_fits(config, width, height, memory)
    remedy = f"try --width {smaller[0]} --height {smaller[1]}, or less" if smaller else "draw it on another machine"
    raise UsageError(
        f"a picture of {width} × {height} pixels takes at least {size(needed)} of memory, and this machine has "
        f"{size(memory)}: {remedy}"
    )


def _is_beside() -> bool:
    """Whether what computes has memory of its own, beside the machine's: MLX moves what does not fit there."""
    return on_gpu() and not mx.metal.is_available()


def fits_here(peak: int) -> bool:
    """Whether a program can take so many bytes on this machine without its disk."""
    memory = machine_memory()
    return peak <= (recommended() or min(memory.total, memory.limit or memory.total))


def check_weights(module_class: Any, config: Any, bits: int | None, *, is_stored: bool) -> None:
    """Refuse a transformer whose weights alone are more than this machine has, and warn of one that Metal would rather
    not have.

    Args:
        module_class, config: the transformer's.
        bits: what its weights are or become quantized to; None for none.
        is_stored: whether the file holds them so, and nothing can be chosen any more.

    Raises:
        UsageError: it fits in no case; it says with how many bits it would.
    """
    if _is_beside():
        return
    module = module_class(config)

    def taken(bits: int | None) -> int:
        whole = weights(module, bits, late=True)
        return whole if bits else whole * compute_dtype(mx.bfloat16).size // 2

    needed, memory, most = taken(bits), machine_memory().most, recommended()
    if needed <= min(memory, most or memory):
        return
    fewer = [] if is_stored else [number for number in QUANTIZE_CHOICES if number < (bits or 16)]
    fitting = [number for number in fewer if taken(number) <= min(memory, most or memory)]
    # Not more than is needed: each bit less costs something of the image.
    remedy = f"--quantize {fitting[-1]} takes {size(taken(fitting[-1]))}" if fitting else "it needs another machine"
    what = f"the transformer's weights take {size(needed)} of memory {f'in {bits} bits' if bits else 'unquantized'}"
    if needed > memory:
        raise UsageError(f"{what}, and this machine has {size(memory)}: {remedy}")
    log.warning("%s, and Metal recommends %s at most on this Mac: %s", what, size(most or 0), remedy)


def _that_fits(config: Any, width: int, height: int, memory: int) -> tuple[int, int] | None:
    """The largest size of about the same shape that leaves something over, or None."""
    for share in range(63, 0, -1):
        sides = [max(GRID, side * share // 64 // GRID * GRID) for side in (width, height)]
        if least_bytes(config, *sides) <= memory * _SPARE:
            return sides[0], sides[1]
    return None
