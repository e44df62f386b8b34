"""`mflux-generate-anima`: images with Anima."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from mflux.cli.generate import Generate
from mflux.cli.parser.parsers import Said
from mflux.errors import UsageError
from mflux.models.anima.family import FAMILY

if TYPE_CHECKING:
    from mflux.models.common.config.model_config import ModelConfig


def check(args: argparse.Namespace, said: Said, config: ModelConfig) -> None:
    """
    Raises:
        UsageError: 3 bits.
    """
    if args.quantize == 3:
        raise UsageError("--quantize 3 gives noise with Anima: take 4, 5, 6 or 8")


COMMAND = Generate(
    command=FAMILY.command("generate-anima"),
    description="Generate with Anima from a prompt, in words or tags.",
    default_size="1024",
    leave_out=("image", "pid"),
    defaults={"width": 1024, "height": 1024, "scheduler": "er_sde"},
    guidance=None,
    conditional={
        "negative_prompt": ("guidance is not 1", "without guidance the negative prompt has no part in the image")
    },
    check=check,
)
build_parser, main = COMMAND.build_parser, COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
