"""What memory a run will take, told before its first step, and refused where it fits in no case.

Counted on paper (benchmarks/training.md has it beside measurements): weights, what the optimizer holds of each factor,
and of each block what its gradient needs, which is about 34 numbers for each token and channel without attention's
scores (Korthikanti et al. 2022, arxiv.org/abs/2205.05198). For a refusal less is counted than is needed.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mflux.backend import compute_dtype, mx
from mflux.checkpoints.loading import build
from mflux.errors import UsageError
from mflux.models.common.footprint import weights
from mflux.models.common.room import fits_here
from mflux.text import size
from mflux.utils.memory import machine_memory
from mflux.utils.scale_factor import GRID

if TYPE_CHECKING:
    from mflux.models.common.training.session import TrainingSession

log = logging.getLogger(__name__)

_NUMBERS = 34
_WORDS = 512
# Of each factor: itself, its gradient, and two moments, in float32.
_OF_FACTOR = {"Adam": 16, "AdamW": 16, "Lion": 12, "Adafactor": 9}
# What a refusal counts of the blocks: no less is needed, however MLX goes about it.
_LEAST = 0.25


@dataclass(frozen=True)
class Estimate:
    """Bytes of a step, by what they are for."""

    weights: int
    factors: int
    blocks: int

    @property
    def total(self) -> int:
        return self.weights + self.factors + self.blocks

    @property
    def least(self) -> int:
        """Without which it fits in no case."""
        return self.weights + self.factors + int(_LEAST * self.blocks)


def estimate(session: TrainingSession, *, checkpointing: bool | None = None) -> Estimate:
    """What a step takes with the largest of the images.

    Args:
        checkpointing: as if that were asked for, or not; None for what the run has.
    """
    spec, pipeline = session.spec, session.pipeline
    config = pipeline.configuration("transformer")
    width = getattr(config, "inner_dim", 0)
    component = pipeline.component("transformer")
    folder, part = pipeline.folder_of(component), component.folder
    source = folder.root / part / "config.json"
    module = build(component.module_class(), folder.config(part), folder.tensors(part), source=source)
    whole = weights(module, pipeline.bits)
    number = compute_dtype(mx.bfloat16).size
    if not pipeline.bits:
        whole = whole * number // 2
    blocks = sum(len(module[name]) for name in session.adapter.blocks if module.get(name))
    tokens = max((item.width // GRID) * (item.height // GRID) for item in spec.data)
    tokens = (tokens * (2 if spec.is_edit else 1) + _WORDS) * (1 if spec.low_ram else spec.training_loop.batch_size)
    inside = _NUMBERS * tokens * width * number
    recomputes = spec.gradient_checkpointing if checkpointing is None else checkpointing
    held = inside + blocks * tokens * width * number if recomputes else blocks * inside
    return Estimate(whole, session.trainable * _OF_FACTOR[spec.optimizer.name], held)


def check_memory(session: TrainingSession) -> None:
    """
    Raises:
        UsageError: it fits in no case; it says what to change.
    """
    found, memory = estimate(session), machine_memory().most
    if found.least <= memory and fits_here(found.total):
        return
    spec, remedies = session.spec, []
    if not spec.gradient_checkpointing:
        remedies.append(f'"gradient_checkpointing": true (about {size(estimate(session, checkpointing=True).total)})')
    if session.pipeline.bits is None:
        remedies.append('"quantize": 4')
    if max(item.width * item.height for item in spec.data) > 512 * 512:
        remedies.append('"max_resolution": 512')
    if spec.training_loop.batch_size > 1:
        remedies.append('"batch_size": 1')
    advice = ", then ".join(remedies) or "another machine"
    what = f"a step takes about {size(found.total)} of memory, {size(found.weights)} of it for weights"
    if found.least > memory:
        raise UsageError(f"{what}, and this machine has {size(memory)}: try {advice}")
    log.warning("%s, which is more than this machine has to give: try %s", what, advice)
