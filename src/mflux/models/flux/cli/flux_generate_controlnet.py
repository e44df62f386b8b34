"""`mflux-generate-controlnet`: pictures that follow the edges of another one, with FLUX.1 and a ControlNet."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mflux.cli.generate import Generate
from mflux.cli.parser.parsers import Said
from mflux.cli.terminal import say_line
from mflux.errors import UsageError
from mflux.models.flux.cli.options import CONDITIONAL, IGNORED, add_controlnet_options, draw_controlled
from mflux.models.flux.family import FAMILY

if TYPE_CHECKING:
    from mflux.models.common.config.model_config import ModelConfig


def add_options(parser: argparse.ArgumentParser) -> None:
    group = add_controlnet_options(parser)
    group.add_argument(
        "--controlnet-save-canny",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="also write the edges that are followed, as NAME_controlnet_canny",
    )
    next(action for action in parser._actions if action.dest == "model").required = True


def check(args: argparse.Namespace, said: Said, config: ModelConfig) -> None:
    if args.controlnet_image_path is None:
        raise UsageError("no picture to follow was given: use --controlnet-image-path PATH")


def save_edges(image: Any, path: Path, args: argparse.Namespace) -> None:
    if args.controlnet_save_canny:
        from mflux.utils.image_util import ImageUtil

        say_line(ImageUtil.save_image(image.canny_image, path.with_stem(path.stem + "_controlnet_canny")))


COMMAND = Generate(
    command=FAMILY.command("generate-controlnet"),
    description="Draw a picture with the edges of another one, with FLUX.1 and a ControlNet.",
    default_model=None,
    stands_for={"dev": "dev-controlnet-canny", "schnell": "schnell-controlnet-canny"},
    leave_out=("image", "pid"),
    defaults={"width": 1024, "height": 1024},
    add_options=add_options,
    sources=("controlnet_image_path",),
    size_source="controlnet_image_path",
    ignored=IGNORED,
    conditional=CONDITIONAL,
    check=check,
    draw=draw_controlled,
    after=save_edges,
)
build_parser, main = COMMAND.build_parser, COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
