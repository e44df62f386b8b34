"""`mflux-generate-kontext`: pictures edited with FLUX.1 Kontext."""

from __future__ import annotations

import sys

from mflux.cli.generate import Generate
from mflux.cli.parser.settle import is_auto
from mflux.models.flux.cli.options import IGNORED, check_picture, without_strength
from mflux.models.flux.family import FAMILY

COMMAND = Generate(
    command=FAMILY.command("generate-kontext"),
    description="Edit a picture with FLUX.1 Kontext, as the prompt says.",
    stands_for={"dev": "dev-kontext"},
    default_size="the picture's, up to about a megapixel",
    leave_out=("pid",),
    guidance=2.5,
    own_size=is_auto,
    ignored=IGNORED,
    check=check_picture,
    draw=without_strength,
)
build_parser, main = COMMAND.build_parser, COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
