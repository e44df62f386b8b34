"""`mflux-generate-z-image`: pictures with Z-Image."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from mflux.cli.generate import Generate
from mflux.cli.parser.groups import add_compute_precision_option, add_float32_option, add_vae_precision_option
from mflux.cli.parser.settle import was_given
from mflux.models.z_image.family import FAMILY


def add_options(parser: argparse.ArgumentParser) -> None:
    add_compute_precision_option(parser)
    add_float32_option(parser)
    add_vae_precision_option(parser)


def build(args: argparse.Namespace) -> dict[str, Any]:
    return {"float32": args.float32, "compute_precision": compute_dtype(args)}


def compute_dtype(args: argparse.Namespace):
    if args.compute_precision is None:
        return None
    from mflux.backend import mx

    return getattr(mx, args.compute_precision)


def draw(args: argparse.Namespace) -> dict[str, Any]:
    """mflux 0.24 guided above 1 only, and not at all where nothing was said: its pictures are drawn again so."""
    old = getattr(args, "of_old_picture", False) and not was_given(args, "guidance")
    return {"guidance": 0.0} if old and (args.guidance or 0) <= 1 else {}


COMMAND = Generate(
    prog="mflux-generate-z-image",
    description="Draw with Z-Image from a prompt, or from a prompt and a picture.",
    pipeline="mflux.models.z_image.variants.z_image:ZImage",
    models=FAMILY.commands[1].models,
    published_schedule=True,
    default_model="z-image",
    defaults={"width": 1024, "height": 1024, "scheduler": "flow_match_euler_discrete"},
    guidance=None,
    add_options=add_options,
    build=build,
    draw=draw,
)
build_parser, main = COMMAND.build_parser, COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
