"""`mflux-generate-redux`: pictures after other pictures with FLUX.1 Redux."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mflux.cli.generate import Generate
from mflux.cli.parser.parsers import Said
from mflux.errors import UsageError
from mflux.models.flux.cli.options import IGNORED
from mflux.models.flux.family import FAMILY
from mflux.utils import values

if TYPE_CHECKING:
    from mflux.models.common.config.model_config import ModelConfig


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pictures to draw after")
    group.add_argument("--redux-image-paths", nargs="*", type=Path, metavar="PATH", help="one or more")
    group.add_argument(
        "--redux-image-strengths",
        nargs="*",
        type=values.Real(),
        metavar="STRENGTH",
        help="how much of each, in their order (default: 1)",
    )


def check(args: argparse.Namespace, said: Said, config: ModelConfig) -> None:
    paths, strengths = args.redux_image_paths or (), args.redux_image_strengths or ()
    if not paths:
        raise UsageError("no pictures to draw after were given: use --redux-image-paths PATH …")
    if len(strengths) > len(paths):
        raise UsageError(f"--redux-image-strengths says {len(strengths)} and there are {len(paths)} pictures")


def draw(args: argparse.Namespace) -> dict[str, Any]:
    names = ("redux_image_paths", "redux_image_strengths")
    return {name: getattr(args, name) for name in names}


COMMAND = Generate(
    command=FAMILY.command("generate-redux"),
    description="Draw after other pictures and a prompt, with FLUX.1 Redux.",
    stands_for={"dev": "dev-redux"},
    leave_out=("image", "pid"),
    defaults={"width": 1024, "height": 1024},
    add_options=add_options,
    sources=("redux_image_paths",),
    ignored=IGNORED,
    check=check,
    draw=draw,
)
build_parser, main = COMMAND.build_parser, COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
