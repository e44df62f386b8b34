"""`mflux-generate-qwen`: pictures with Qwen-Image."""

from __future__ import annotations

import sys

from mflux.cli.generate import Generate
from mflux.models.qwen.cli.options import settle_lightning
from mflux.models.qwen.family import FAMILY

COMMAND = Generate(
    command=FAMILY.command("generate-qwen"),
    description="Draw with Qwen-Image from a prompt, or from a prompt and a picture.",
    guidance=3.5,
    check=settle_lightning,
)
build_parser, main = COMMAND.build_parser, COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
