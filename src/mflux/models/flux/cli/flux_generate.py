"""`mflux-generate`: pictures with FLUX.1."""

from __future__ import annotations

import sys

from mflux.cli.generate import Generate
from mflux.models.flux.family import FAMILY

COMMAND = Generate(
    command=FAMILY.command("generate"),
    description="Draw with FLUX.1 from a prompt, or from a prompt and a picture.",
    default_model=None,
    default_size="1024; demo: 128; the source picture's, if there is one",
    ignored={"negative_prompt": "FLUX.1 has no negative branch"},
)
build_parser, main = COMMAND.build_parser, COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
