"""`mflux-generate-depth`: pictures of a given depth with FLUX.1 Depth."""

from __future__ import annotations

import sys

from mflux.cli import depth
from mflux.cli.generate import Generate
from mflux.models.flux.cli.options import IGNORED
from mflux.models.flux.family import FAMILY

COMMAND = Generate(
    command=FAMILY.command("generate-depth"),
    description="Draw a picture of the depth of another one, with FLUX.1 Depth.",
    stands_for={"dev": "dev-depth"},
    leave_out=("image", "pid"),
    defaults={"width": 1024, "height": 1024},
    guidance=10.0,
    add_options=depth.add_options,
    sources=("depth_image_path",),
    ignored=IGNORED,
    check=depth.check,
    draw=depth.draw,
    after=depth.save_map,
)
build_parser, main = COMMAND.build_parser, COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
