"""`mflux-generate-krea2-controlnet`: images with Krea 2 Turbo after the depth of others."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from mflux.cli import depth
from mflux.cli.generate import Generate
from mflux.cli.parser.parsers import Said
from mflux.models.krea2.cli.krea2_generate import CONDITIONAL
from mflux.models.krea2.family import FAMILY
from mflux.utils import values

if TYPE_CHECKING:
    from mflux.models.common.config.model_config import ModelConfig


def add_options(parser: argparse.ArgumentParser) -> None:
    depth.add_options(parser)
    group = parser.add_argument_group("control")
    group.add_argument(
        "--controlnet-path",
        metavar="FILE",
        help="the depth ControlNet: a file, or a repository that holds one (default: the published one)",
    )
    group.add_argument(
        "--controlnet-strength",
        type=values.Real(),
        default=1.0,
        help="how much its changes to the blocks count (default: 1.0); at 0 its entrance still counts, so that the "
        "image is not that of Krea 2 alone",
    )


def check(args: argparse.Namespace, said: Said, config: ModelConfig) -> None:
    depth.check(args, said, config)
    args.size_from = args.image_path or args.depth_image_path


COMMAND = Generate(
    command=FAMILY.command("generate-krea2-controlnet"),
    description="Generate with Krea 2 Turbo from a prompt, after the depth of an image.",
    stands_for={"krea-2": "krea-2-controlnet-depth"},
    default_size="the given image's",
    leave_out=("image", "pid", "settings"),
    guidance=1.0,
    add_options=add_options,
    sources=("depth_image_path",),
    size_source="size_from",
    conditional=CONDITIONAL,
    check=check,
    build=lambda args: {
        "controlnet_path": args.controlnet_path,
        "controlnet_strength": args.controlnet_strength,
    },
    draw=depth.draw,
    after=depth.save_map,
)
build_parser, main = COMMAND.build_parser, COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
