"""Attention, a few rows of a head's scores at a time, the heads shared among threads."""

from __future__ import annotations

import numpy as np

from mflux.backend import mx
from mflux.cpu import work
from mflux.cpu.work import LEAST, differentiable, is_here, room, spare

# Queries at a time: with more a product is no faster, and their scores leave the cache.
_QUERIES = 256


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | str | None) -> mx.array:
    """`mx.fast.scaled_dot_product_attention`, `ROOM` bytes of scores at a time and thread.

    Args:
        q: (B, heads, L, D).
        k, v: (B, heads or a divisor of it, S, D).
        mask: true where a position may be seen, or what is added to the scores, (B, heads, L, S) or broadcast to it;
            "causal": the last query sees all keys, the one before it all but the last.
    """
    causal = isinstance(mask, str)
    arrays = (q, k, v) if mask is None or causal else (q, k, v, mask)

    def plain(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | str | None = mask) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)

    def compute(q: mx.array, k: mx.array, v: mx.array, seen: mx.array | None = None) -> mx.array:
        return _attend(q, k, v, scale, None if seen is None else np.asarray(_real(seen)), causal)

    return differentiable(compute, plain)(*arrays)


def attention_serves(q: mx.array, k: mx.array, v: mx.array) -> bool:
    """Whether `attention` is to compute it; the number of scores counts."""
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    return is_here(q, k, v) and scores >= LEAST


def _rows(queries: int, keys: int) -> int:
    return max(1, min(queries, _QUERIES, work.ROOM // (4 * keys)))


def _real(mask: mx.array) -> mx.array:
    """A mask that numpy can read: it knows no bfloat16."""
    return mask if mask.dtype == mx.bool_ else mask.astype(mx.float32)


def _attend(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: np.ndarray | None, causal: bool) -> mx.array:
    batch, heads, length, _ = q.shape
    keys, shared = k.shape[2], heads // k.shape[1]
    # Heads beside each other, as the next layer wants them.
    out, into = room((batch, length, heads, v.shape[-1]))
    queries, whole_k, whole_v = (np.asarray(x) for x in (q, k, v))
    if mask is not None:
        mask = np.broadcast_to(mask, (batch, heads, length, keys))
    rows = _rows(length, keys)
    blocks = -(-length // rows)
    ones = np.ones(keys, np.float32)

    def attend(number: int, _: int) -> None:
        place, block = divmod(number, blocks)
        at, head = divmod(place, heads)
        start, stop = block * rows, min((block + 1) * rows, length)
        # What the last of these queries sees, where each sees what lies before it.
        visible = max(1, min(keys, stop + keys - length)) if causal else keys
        scaled = np.multiply(
            queries[at, head, start:stop], np.float32(scale), out=spare((stop - start, q.shape[-1]), 0)
        )
        scores = spare((stop - start, visible), 1)
        np.matmul(scaled, whole_k[at, head // shared, :visible].T, out=scores)
        if mask is not None:
            seen = mask[at, head, start:stop]
            if seen.dtype == bool:
                np.copyto(scores, np.finfo(np.float32).min, where=~seen)
            else:
                np.add(scores, seen, out=scores)
        if causal:
            _hide(scores, start + keys - length)
        np.subtract(scores, scores.max(axis=-1, keepdims=True), out=scores)
        np.exp(scores, out=scores)
        # A product reads them four times as fast as a sum does.
        sums = np.matmul(scores, ones[:visible], out=spare((stop - start,), 2))
        part = np.matmul(scores, whole_v[at, head // shared, :visible], out=spare((stop - start, v.shape[-1]), 0))
        np.divide(part, sums[:, None], out=into[at, start:stop, head])

    work.share(attend, batch * heads * blocks, 1, multiplies=True)
    return out.swapaxes(1, 2)


def _hide(scores: np.ndarray, diagonal: int) -> None:
    """Row i sees keys up to `diagonal` + i."""
    keys = np.arange(scores.shape[-1])
    np.copyto(scores, np.finfo(np.float32).min, where=keys > diagonal + np.arange(len(scores))[:, None])
