"""The noise that pictures start from: the same for a seed as in mflux 0.24."""

from __future__ import annotations

from mflux.backend import mx
from mflux.errors import UsageError
from mflux.utils.values import LARGEST_SEED, whole


def check_seed(seed: int) -> int:
    """The seed as an `int`.

    Raises:
        UsageError: it is not a whole number that fits into 64 bits.
    """
    try:
        return whole(seed, "seed", least=0, most=LARGEST_SEED)
    except UsageError as error:
        raise UsageError(f"{error}: a seed is a whole number from 0 to {LARGEST_SEED}") from None


def noise(seed: int, shape: tuple[int, ...]) -> mx.array:
    """Normal noise, float32. Its values depend on the seed and on how many there are, and fill `shape` in C order.

    Raises:
        UsageError: as `check_seed`.
    """
    return mx.random.normal(shape, key=mx.random.key(check_seed(seed)))
