"""`mflux-generate-flux2`: pictures with FLUX.2 klein."""

from __future__ import annotations

import sys

from mflux.cli.generate import Generate
from mflux.models.flux2.cli.options import DEFAULT_MODEL, add_options, build, check, draw
from mflux.models.flux2.family import FAMILY

COMMAND = Generate(
    prog="mflux-generate-flux2",
    description="Draw with FLUX.2 klein from a prompt, or from a prompt and a picture.",
    pipeline="mflux.models.flux2.variants.txt2img.flux2_klein:Flux2Klein",
    models=FAMILY.commands[0].models,
    default_model=DEFAULT_MODEL,
    guidance=1.0,
    add_options=add_options,
    check=check,
    build=build,
    draw=draw,
)
build_parser, main = COMMAND.build_parser, COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
