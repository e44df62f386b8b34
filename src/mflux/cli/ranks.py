"""A command as one of several processes that `mlx.launch` has started, on one machine or on many: each generates a part
of the images, and together they generate what one process would. Two processes with one image have each one of the two
passes that guidance takes in every step.

    mlx.launch -n 2 mflux-generate --model schnell --prompt "a lighthouse" --seed 1 2 3 4
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mflux.errors import UsageError

if TYPE_CHECKING:
    from mflux.cli.plan import Plan
    from mflux.models.common.pipeline import Pipeline

log = logging.getLogger(__name__)

# What mlx.launch tells each of its processes.
_VARIABLE = "MLX_RANK"
OPTION = "--divide-transformer"
# Stands for the guidance that a model has where nobody says one.
_MODELS_OWN = 5.0


@dataclass(frozen=True)
class Part:
    """What of a plan is this process's to do.

    Attributes:
        plan: with its images.
        tells: whether it is the process that tells how far all are.
        together: both processes, where the two of them have one image to generate, and may share the passes of its
            guidance; None where each has images of its own.
        divides: whether all of them generate each image, with a part of the transformer each.
    """

    plan: Plan
    tells: bool = True
    together: Any = None
    divides: bool = False

    def share(self, pipeline: Pipeline) -> Part:
        """Have a model that guides with a second pass compute one of both in each process; the image is the first
        one's. Otherwise the second process has nothing to do."""
        if self.together is None:
            return self
        if self.divides:
            if not pipeline.divides:
                raise UsageError(f"{OPTION} is for FLUX.1 and Qwen-Image, from a prompt: leave it out")
            if pipeline.lora_paths:
                raise UsageError(
                    f"{OPTION} takes no LoRAs: save the model with them (mflux-save --lora), and take that, or leave "
                    f"{OPTION} out"
                )
            pipeline.divided_among = self.together
            return self
        guidance = self.plan.images[0].get("guidance")
        if pipeline.is_guided(_MODELS_OWN if guidance is None else guidance):
            pipeline.shares_guidance = self.together
            return self
        return self if self.tells else replace(self, plan=replace(self.plan, images=()))


def own_part(plan: Plan) -> Part:
    """What of a plan is this process's to do.

    Raises:
        UsageError: the transformer is to be divided, and there is no other process.
    """
    divides = getattr(getattr(plan, "options", None), "divide_transformer", False)
    alone = UsageError(f"{OPTION} divides it among the processes that mlx.launch starts, and this is the only one")
    if _VARIABLE not in os.environ:
        if divides:
            raise alone
        return Part(plan)
    import numpy as np

    from mflux.backend import mx

    group = mx.distributed.init()
    rank, size = group.rank(), group.size()
    if size == 1 and divides:
        raise alone
    if size == 1:
        return Part(plan)
    args = plan.options
    if not plan.said.was_set("seed"):
        # Each has chosen some: the first one's are everybody's.
        chosen = mx.array(args.seed if rank == 0 else [0] * len(args.seed), dtype=mx.int64)
        shared = [int(seed) for seed in np.array(mx.distributed.all_sum(chosen, group=group))]
        plan = replace(plan, images=tuple({**one, "seed": seed} for one, seed in zip(plan.images, shared, strict=True)))
        args.seed = shared
    if rank > 0:
        logging.getLogger("mflux").setLevel(logging.WARNING)
    if divides:
        return Part(plan, rank == 0, group, divides=True)
    if len(plan.images) == 1 and size == 2:
        return Part(plan, rank == 0, group)
    args.seed = args.seed[rank::size]
    if len(plan.images) < size:
        log.info("%d images for %d processes: some have nothing to do", len(plan.images), size)
    return Part(replace(plan, images=plan.images[rank::size]), rank == 0)
