"""`mflux-upscale-controlnet`: pictures with more pixels, with FLUX.1 and a ControlNet."""

from __future__ import annotations

import argparse
import sys

from mflux.cli.generate import Generate
from mflux.models.flux.cli.options import IGNORED, add_controlnet_options, draw_controlled
from mflux.models.flux.family import FAMILY


def add_options(parser: argparse.ArgumentParser) -> None:
    add_controlnet_options(parser, required=True)


COMMAND = Generate(
    command=FAMILY.command("upscale-controlnet"),
    description="Draw a picture anew with more pixels, with FLUX.1 and a ControlNet.",
    stands_for={"dev": "dev-controlnet-upscaler"},
    default_size="the picture's",
    leave_out=("image", "pid"),
    guidance=4.0,
    add_options=add_options,
    sources=("controlnet_image_path",),
    size_source="controlnet_image_path",
    ignored=IGNORED,
    draw=draw_controlled,
)
build_parser, main = COMMAND.build_parser, COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
