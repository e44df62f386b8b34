"""`mflux-generate-qwen-edit`: pictures changed with Qwen-Image-Edit."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mflux.cli.generate import Generate
from mflux.cli.parser.parsers import Said
from mflux.cli.parser.settle import is_untyped_auto
from mflux.errors import UsageError
from mflux.models.qwen.cli.options import settle_lightning
from mflux.models.qwen.family import FAMILY

if TYPE_CHECKING:
    from mflux.models.common.config.model_config import ModelConfig


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pictures to edit")
    group.add_argument(
        "--image-paths",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="the pictures, which the prompt calls Picture 1, 2, …",
    )


def check(args: argparse.Namespace, said: Said, config: ModelConfig) -> None:
    if not args.image_paths:
        raise UsageError("no picture to edit was given: use --image-paths PATH …")
    settle_lightning(args, said, config)


COMMAND = Generate(
    command=FAMILY.command("generate-qwen-edit"),
    description="Change pictures with Qwen-Image-Edit as a prompt says.",
    default_size="about a million pixels in the last picture's shape",
    leave_out=("image", "pid"),
    guidance=2.5,
    add_options=add_options,
    sources=("image_paths",),
    size_source="image_paths",
    own_size=is_untyped_auto,
    check=check,
    draw=lambda args: {"image_paths": args.image_paths},
)
build_parser, main = COMMAND.build_parser, COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
