"""`mflux-generate-in-context`: pictures beside another one with FLUX.1-dev and an In-Context LoRA."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mflux.cli.generate import Generate
from mflux.models.flux.cli.options import IGNORED, add_full_image_option, right_half, save_full_image, with_picture
from mflux.models.flux.family import FAMILY


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("picture to stand beside")
    group.add_argument("--reference-image", dest="image_path", type=Path, required=True, help="the picture")
    add_full_image_option(group)


COMMAND = Generate(
    command=FAMILY.command("generate-in-context"),
    description="Draw a picture in the manner of another one, with FLUX.1-dev and an In-Context LoRA (--lora-style).",
    leave_out=("image", "pid"),
    defaults={"width": 1024, "height": 1024},
    add_options=add_options,
    ignored=IGNORED,
    draw=with_picture,
    pixels=right_half,
    after=save_full_image,
)
build_parser, main = COMMAND.build_parser, COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
