"""A command as one of several processes that `mlx.launch` has started, on one machine or on many: each generates a part
of the images, and together they generate what one process would.

    mlx.launch -n 2 mflux-generate --model schnell --prompt "a lighthouse" --seed 1 2 3 4
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mflux.cli.plan import Plan

log = logging.getLogger(__name__)

# What mlx.launch tells each of its processes.
_VARIABLE = "MLX_RANK"


def own_part(plan: Plan) -> tuple[Plan, bool]:
    """What of a plan is this process's to do, and whether it is the one that tells how far all are."""
    if _VARIABLE not in os.environ:
        return plan, True
    import numpy as np

    from mflux.backend import mx

    group = mx.distributed.init()
    rank, size = group.rank(), group.size()
    if size == 1:
        return plan, True
    args = plan.options
    if not plan.said.was_set("seed"):
        # Each has chosen some: the first one's are everybody's.
        chosen = mx.array(args.seed if rank == 0 else [0] * len(args.seed), dtype=mx.int64)
        shared = [int(seed) for seed in np.array(mx.distributed.all_sum(chosen, group=group))]
        plan = replace(plan, images=tuple({**one, "seed": seed} for one, seed in zip(plan.images, shared, strict=True)))
        args.seed = shared
    args.seed = args.seed[rank::size]
    if rank > 0:
        logging.getLogger("mflux").setLevel(logging.WARNING)
    if len(plan.images) < size:
        log.info("%d images for %d processes: some have nothing to do", len(plan.images), size)
    return replace(plan, images=plan.images[rank::size]), rank == 0
