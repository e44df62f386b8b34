"""`mflux-generate-krea2`: images with Krea 2, Turbo or Raw."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from mflux.cli.generate import Generate
from mflux.cli.parser.parsers import Said
from mflux.models.krea2.family import FAMILY

if TYPE_CHECKING:
    from mflux.models.common.config.model_config import ModelConfig

# Advised for Raw, as it counts here: Krea's own pages say 3.5, from 0.
RAW_STEPS, RAW_GUIDANCE = 52, 4.5
CONDITIONAL = {"negative_prompt": ("guidance is above 1", "without it the negative prompt has no part in the image")}


def as_in_024(args: argparse.Namespace, said: Said) -> None:
    """Let an image that mflux 0.24 made be made again as it was then: its `linear` was er_sde."""
    if said.is_old and args.scheduler in (None, "linear", "LinearScheduler"):
        args.scheduler = "er_sde"


def check(args: argparse.Namespace, said: Said, config: ModelConfig) -> None:
    as_in_024(args, said)
    if "krea-2-raw" in config.aliases:
        args.steps = args.steps if said.was_set("steps") else RAW_STEPS
        args.guidance = RAW_GUIDANCE if args.guidance is None else args.guidance


COMMAND = Generate(
    command=FAMILY.command("generate-krea2"),
    description="Generate with Krea 2, Turbo or Raw, from a prompt, or from a prompt and an image.",
    guidance=1.0,
    conditional=CONDITIONAL,
    check=check,
)
build_parser, main = COMMAND.build_parser, COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
