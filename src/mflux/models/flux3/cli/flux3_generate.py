"""`mflux-generate-flux3`: images with FLUX.3 image klein."""

from __future__ import annotations

import sys

from mflux.cli.generate import Generate
from mflux.models.flux3.cli.options import CONDITIONAL, REJECTED, add_options, check
from mflux.models.flux3.family import FAMILY

COMMAND = Generate(
    command=FAMILY.command("generate-flux3"),
    description="Generate with FLUX.3 image klein from a prompt.",
    default_size="1024",
    leave_out=("image", "pid"),
    guidance=None,
    rejected=REJECTED,
    conditional=CONDITIONAL,
    add_options=add_options,
    check=check,
)
build_parser, main = COMMAND.build_parser, COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
