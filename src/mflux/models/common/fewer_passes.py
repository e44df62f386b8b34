"""Which passes of the transformer an image can do without, as mflux 0.24 chooses them.

The step cache uses a step's prediction a second time where the noise level changes least (after Liu et al. 2025,
https://arxiv.org/abs/2411.19108, TeaCache; here by the schedule alone, so that the choice is known before the first
step). Guidance decides what is where in the first steps; what comes after refines it, and needs no second prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

# Fewer steps are all needed; of more, this part at the beginning and at the end is.
LEAST_STEPS = 10
_NEEDED = 0.1


def left_out(sigmas: Sequence[float], ratio: float) -> frozenset[int]:
    """The steps for which the prediction before is used again, counted from 0 among those that are taken.

    Args:
        sigmas: the noise level before each step that is taken.
        ratio: which part of them, between 0 and 1, as far as so many may be left out.
    """
    steps = len(sigmas)
    if steps < LEAST_STEPS:
        return frozenset()
    needed = int(steps * _NEEDED)
    changes = {step: abs(sigmas[step] - sigmas[step - 1]) for step in range(max(needed, 1), steps - needed)}
    return frozenset(sorted(changes, key=lambda step: changes[step])[: round(ratio * steps)])


def guided_steps(steps: int, cfg_end: float | None) -> int:
    """How many of an image's steps are guided: the first is in any case."""
    return steps if cfg_end is None else max(1, round(cfg_end * steps))
