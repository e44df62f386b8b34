"""`mflux-generate-qwen-edit`: pictures changed with Qwen-Image-Edit."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mflux.cli.generate import Generate
from mflux.errors import UsageError
from mflux.models.qwen.cli.options import settle_lightning
from mflux.models.qwen.family import EDIT_MODELS


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pictures to edit")
    group.add_argument(
        "--image-paths",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="the pictures, which the prompt calls Picture 1, 2, …",
    )


def check(args: argparse.Namespace, config) -> None:
    if not args.image_paths:
        raise UsageError("no picture to edit was given: use --image-paths PATH …")
    settle_lightning(args)


COMMAND = Generate(
    prog="mflux-generate-qwen-edit",
    description="Change pictures with Qwen-Image-Edit as a prompt says.",
    pipeline="mflux.models.qwen.variants.edit.qwen_image_edit:QwenImageEdit",
    models=EDIT_MODELS,
    default_size="about a million pixels in the last picture's shape",
    leave_out=("image", "pid"),
    default_model="qwen-image-edit",
    guidance=2.5,
    add_options=add_options,
    sources=("image_paths",),
    size_source="image_paths",
    own_size=True,
    exact_auto=True,
    check=check,
    draw=lambda args: {"image_paths": args.image_paths},
)
build_parser, main = COMMAND.build_parser, COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
