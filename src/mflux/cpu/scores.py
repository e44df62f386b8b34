"""Attention, a few rows of a head's scores at a time, the heads shared among threads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mflux.backend import mx
from mflux.cpu import work
from mflux.cpu.work import LEAST, differentiable, is_first_order, is_here, room, spare

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

    def gradient(primals: Sequence[mx.array], cotangent: mx.array) -> Sequence[mx.array]:
        q, k, v, *seen = primals
        is_added = any(mx.issubdtype(one.dtype, mx.floating) for one in seen)
        if not (is_first_order() and is_here(q, k, v, cotangent)) or is_added:
            # What is added to scores may be asked for its own gradient.
            return mx.vjp(plain, list(primals), [cotangent])[1]
        mx.eval(cotangent)
        found = _back(q, k, v, scale, np.asarray(seen[0]) if seen else None, causal, cotangent)
        return [*found, *(mx.zeros_like(one) for one in seen)]

    return differentiable(compute, plain, gradient)(*arrays)


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


def _back(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    mask: np.ndarray | None,
    causal: bool,
    cotangent: mx.array,
) -> list[mx.array]:
    """The gradients of queries, keys and values (Dao et al. 2022, arxiv.org/abs/2205.14135, section B.4): the scores
    are computed again, a few rows at a time. A head of keys, whose gradient is a sum, stays on one thread."""
    batch, heads, length, _ = q.shape
    keys, key_heads = k.shape[2], k.shape[1]
    shared = heads // key_heads
    (out_q, of_q), (out_k, of_k), (out_v, of_v) = (room(x.shape) for x in (q, k, v))
    of_k[:], of_v[:] = 0, 0
    queries, whole_k, whole_v, backward = (np.asarray(x) for x in (q, k, v, cotangent))
    if mask is not None:
        mask = np.broadcast_to(mask, (batch, heads, length, keys))
    rows = _rows(length, keys)

    def back(number: int, _: int) -> None:
        at, key_head = divmod(number, key_heads)
        own_k, own_v = whole_k[at, key_head], whole_v[at, key_head]
        for head in range(key_head * shared, (key_head + 1) * shared):
            for start in range(0, length, rows):
                stop = min(start + rows, length)
                some, wanted = queries[at, head, start:stop], backward[at, head, start:stop]
                scores = np.matmul(some * np.float32(scale), own_k.T, out=spare((stop - start, keys), 1))
                if mask is not None:
                    np.copyto(scores, np.finfo(np.float32).min, where=~mask[at, head, start:stop])
                if causal:
                    _hide(scores, start + keys - length)
                np.subtract(scores, scores.max(axis=-1, keepdims=True), out=scores)
                np.exp(scores, out=scores)
                np.divide(scores, scores.sum(axis=-1, keepdims=True), out=scores)
                of_v[at, key_head] += np.matmul(scores.T, wanted)
                change = np.matmul(wanted, own_v.T, out=spare((stop - start, keys), 2))
                along = np.einsum("rc,rc->r", change, scores)
                np.subtract(change, along[:, None], out=change)
                np.multiply(change, scores, out=change)
                np.multiply(change, np.float32(scale), out=change)
                # A row that sees nothing is the mean of all, whatever their scores are.
                if mask is not None:
                    np.copyto(change, 0, where=~mask[at, head, start:stop])
                if causal:
                    _hide(change, start + keys - length, 0)
                np.matmul(change, own_k, out=of_q[at, head, start:stop])
                of_k[at, key_head] += np.matmul(change.T, some)

    work.share(back, batch * key_heads, 1, multiplies=True)
    return [out_q, out_k, out_v]


def _hide(scores: np.ndarray, diagonal: int, value: float = float(np.finfo(np.float32).min)) -> None:
    """Row i sees keys up to `diagonal` + i."""
    keys = np.arange(scores.shape[-1])
    np.copyto(scores, np.float32(value), where=keys > diagonal + np.arange(len(scores))[:, None])
