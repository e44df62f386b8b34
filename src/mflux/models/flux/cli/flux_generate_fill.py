"""`mflux-generate-fill`: parts of pictures painted anew with FLUX.1 Fill."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from mflux.cli.generate import Generate
from mflux.models.flux.cli.options import IGNORED
from mflux.models.flux.family import FAMILY


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("picture to paint in")
    group.add_argument("--image-path", type=Path, required=True, help="the picture")
    group.add_argument(
        "--masked-image-path", type=Path, required=True, help="its mask: white is painted anew, black is kept"
    )


def draw(args: argparse.Namespace) -> dict[str, Any]:
    return {"image_path": args.image_path, "masked_image_path": args.masked_image_path}


COMMAND = Generate(
    command=FAMILY.command("generate-fill"),
    description="Paint anew what is masked in a picture, with FLUX.1 Fill.",
    stands_for={"dev": "dev-fill"},
    leave_out=("image", "pid"),
    defaults={"width": 1024, "height": 1024},
    guidance=30.0,
    add_options=add_options,
    sources=("masked_image_path",),
    ignored=IGNORED,
    draw=draw,
)
build_parser, main = COMMAND.build_parser, COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
