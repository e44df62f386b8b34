"""`mflux-generate-flux2`: pictures with FLUX.2 klein."""

from __future__ import annotations

import sys

from mflux.cli.generate import Generate
from mflux.models.flux2.cli.options import CONDITIONAL, REJECTED, add_options, build, check
from mflux.models.flux2.family import FAMILY

COMMAND = Generate(
    command=FAMILY.command("generate-flux2"),
    description="Draw with FLUX.2 klein from a prompt, or from a prompt and a picture.",
    guidance=1.0,
    rejected=REJECTED,
    conditional=CONDITIONAL,
    add_options=add_options,
    check=check,
    build=build,
)
build_parser, main = COMMAND.build_parser, COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
