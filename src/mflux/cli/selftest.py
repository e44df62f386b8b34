"""`mflux doctor --selftest`: whether this machine's GPU computes right, found out with the embedded model.

It generates one image on the GPU and one on the CPU. Where MLX finds no GPU, the CPU computes in a GPU's place, in its
way: that shows whether this installation is sound.
"""

from __future__ import annotations

import json
import time
from typing import Any

PROMPT = "a large red circle on a white background"
# Of 255, on average: what 16 bits instead of 32 may change (0.1 to 0.6 were seen). A wrong kernel changes tens.
MOST = 3.0


def answer() -> None:
    """Run in a process of its own: print one line of JSON."""
    from mflux import backend
    from mflux.backend import mx

    where = "gpu" if mx.is_available(mx.gpu) else "as-gpu"
    # The CPU's first: what a fault of the GPU breaks then, breaks nothing else.
    images, seconds = {}, {}
    for device in ("cpu", where):
        backend.use_device(device)
        images[device], seconds[device] = _image()
    difference = abs(images["cpu"] - images[where]).mean()
    kinds = [kind for kind in ("metal", "cuda") if hasattr(mx, kind) and getattr(mx, kind).is_available()]
    print(
        json.dumps(
            {
                "device": kinds[0] if where == "gpu" and kinds else None,
                "name": mx.device_info().get("device_name"),
                "difference": round(float(difference), 2),
                "seconds": round(seconds[where], 2),
                "cpu_seconds": round(seconds["cpu"], 2),
            }
        )
    )


def _image() -> tuple[Any, float]:
    """An image's pixels, and what it took with everything loaded."""
    import numpy as np

    from mflux.models.flux.cli.flux_generate import COMMAND

    plan = COMMAND.plan({"model": "demo", "prompt": PROMPT, "seed": [4]})
    pipeline = plan.load()
    for _ in range(2):  # what is compiled and loaded the first time is not to be timed
        start = time.perf_counter()
        (image,) = COMMAND.images(plan, pipeline)
        took = time.perf_counter() - start
    return np.asarray(image.image).astype(float), took


def is_right(found: dict[str, Any]) -> bool:
    return bool(found["difference"] <= MOST)


def describe(found: dict[str, Any]) -> str:
    """One line: right or not, how fast, what to do."""
    names = {"metal": "Metal", "cuda": "CUDA"}
    kind = names.get(found["device"] or "", "")
    what = f"this GPU ({kind}, {found['name']})" if kind else "MLX finds no GPU; in its way this CPU"
    apart = f"{found['difference']:.2f} of 255 from the CPU's image"
    if not is_right(found):
        return (
            f"{what} computes wrong: {apart}, where rounding explains {MOST:.0f}. Use --device cpu, and report this "
            f"line to those who make mflux, with what mflux doctor says"
        )
    speed = f"{found['seconds']:.2f} s an image of 256 pixels, on the CPU {found['cpu_seconds']:.2f} s"
    return f"{what} computes right: {apart}; {speed}"
