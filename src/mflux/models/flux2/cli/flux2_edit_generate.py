"""`mflux-generate-flux2-edit`: pictures edited with FLUX.2 klein."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mflux.cli.generate import Generate
from mflux.cli.parser.parsers import Said
from mflux.errors import UsageError
from mflux.models.flux2.cli import options
from mflux.models.flux2.family import FAMILY

if TYPE_CHECKING:
    from mflux.models.common.config.model_config import ModelConfig


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument_group("pictures to edit").add_argument(
        "--image-paths", nargs="+", type=Path, help="one picture or several; the prompt says what to make of them"
    )
    options.add_options(parser)


def check(args: argparse.Namespace, said: Said, config: ModelConfig) -> None:
    options.check(args, said, config)
    if not args.image_paths:
        raise UsageError(
            "no picture to edit was named: use --image-paths PATH, or mflux-generate-flux2 to draw from text"
        )


COMMAND = Generate(
    command=FAMILY.command("generate-flux2-edit"),
    description="Edit one picture or several with FLUX.2 klein, as a prompt says.",
    default_size="the first picture's",
    leave_out=("image", "pid"),
    guidance=1.0,
    rejected=options.REJECTED,
    conditional=options.CONDITIONAL,
    add_options=add_options,
    sources=("image_paths",),
    size_source="image_paths",
    check=check,
    build=options.build,
    draw=lambda args: {"image_paths": args.image_paths},
)
build_parser, main = COMMAND.build_parser, COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
