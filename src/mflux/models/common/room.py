"""Reject sizes that cannot fit in this machine's memory, before MLX aborts.

Less is counted than an image needs: the weights, the text, LoRAs and other images are left out, and so is whatever
depends on how MLX goes about it. What is refused here fits in no case.
"""

from __future__ import annotations

from typing import Any

from mflux.backend import compute_dtype, mx, on_gpu
from mflux.errors import UsageError
from mflux.text import size
from mflux.utils.memory import machine_memory
from mflux.utils.scale_factor import GRID

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
    if on_gpu() and not mx.metal.is_available():
        return  # a GPU's own memory is beside the machine's, and MLX moves what does not fit
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


def _that_fits(config: Any, width: int, height: int, memory: int) -> tuple[int, int] | None:
    """The largest size of about the same shape that leaves something over, or None."""
    for share in range(63, 0, -1):
        sides = [max(GRID, side * share // 64 // GRID * GRID) for side in (width, height)]
        if least_bytes(config, *sides) <= memory * _SPARE:
            return sides[0], sides[1]
    return None
