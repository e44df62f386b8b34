"""`mflux-generate-ernie-image`: images with ERNIE-Image."""

from __future__ import annotations

import sys

from mflux.cli.generate import Generate
from mflux.cli.parser.groups import add_vae_precision_option
from mflux.models.ernie_image.family import FAMILY

COMMAND = Generate(
    command=FAMILY.command("generate-ernie-image"),
    description="Generate with ERNIE-Image from a prompt, or from a prompt and an image.",
    defaults={"model": "ernie-image", "guidance": 4.0},
    guidance=4.0,
    conditional={"negative_prompt": ("guidance is above 1", "without it the negative prompt has no part in the image")},
    add_options=add_vae_precision_option,
)
build_parser, main = COMMAND.build_parser, COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
