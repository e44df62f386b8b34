"""What the commands of FLUX.1's variants have in common."""

from __future__ import annotations

import argparse
from typing import Any

from mflux.cli.parser import was_given
from mflux.errors import UsageError

IGNORED = {"negative_prompt": "FLUX.1 has no negative branch"}


def check_picture(args: argparse.Namespace, config: Any) -> None:
    """
    Raises:
        UsageError: no picture, or a strength, for which a model that starts from noise has no use.
    """
    if args.image_path is None:
        raise UsageError("no picture was given: use --image PATH")
    if was_given(args, "image_strength") or len(getattr(args, "image", None) or ()) > 1:
        raise UsageError(
            "this model sees the picture in every step and starts from noise: leave the strength (--image-strength, or "
            "the number after --image PATH) out"
        )


def without_strength(args: argparse.Namespace) -> dict[str, Any]:
    return {"image_strength": None}
