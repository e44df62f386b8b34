"""`mflux-generate-flux3-edit`: images edited with FLUX.3 image klein."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mflux.cli.generate import Generate
from mflux.cli.parser.parsers import Said
from mflux.cli.parser.settle import is_auto
from mflux.models.flux3.cli import options
from mflux.models.flux3.family import FAMILY
from mflux.models.flux3.sources import canvas_of, check_count

if TYPE_CHECKING:
    from mflux.models.common.config.model_config import ModelConfig


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument_group("images to edit").add_argument(
        "--image-paths",
        nargs="+",
        type=Path,
        help="1 to 10 images; the prompt describes the result, and may call the first <ref_image_1>",
    )
    options.add_options(parser)


def check(args: argparse.Namespace, said: Said, config: ModelConfig) -> None:
    options.check(args, said, config)
    check_count(len(args.image_paths or ()))


def is_natural(args: argparse.Namespace, said: Said) -> bool:
    """Whether the class is to choose the size: none is said, or that of the only image, as its own settings have it."""
    from mflux.utils.picture_files import oriented_size

    if is_auto(args, said):
        return True
    return len(args.image_paths) == 1 and canvas_of(oriented_size(args.image_paths[0])).image == (
        args.width,
        args.height,
    )


COMMAND = Generate(
    command=FAMILY.command("generate-flux3-edit"),
    description="Edit one image or several with FLUX.3 image klein, as a prompt says.",
    default_size="the first image's",
    leave_out=("image", "pid"),
    guidance=None,
    rejected=options.REJECTED,
    conditional=options.CONDITIONAL,
    add_options=add_options,
    sources=("image_paths",),
    size_source="image_paths",
    own_size=is_natural,
    check=check,
    draw=lambda args: {"image_paths": args.image_paths},
)
build_parser, main = COMMAND.build_parser, COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
