"""`mflux-generate-z-image`: pictures with Z-Image."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from mflux.cli.generate import Generate
from mflux.cli.parser.groups import add_vae_precision_option
from mflux.cli.parser.parsers import Said
from mflux.models.z_image.family import FAMILY

if TYPE_CHECKING:
    from mflux.models.common.config.model_config import ModelConfig

# 0.24's where none is said.
_SCHEDULE = "flow_match_euler_discrete"


def add_float32_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--float32",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="keep what passes between the transformer's layers in float32, as mflux up to 0.20 did",
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    add_float32_option(parser)
    add_vae_precision_option(parser)


def build(args: argparse.Namespace) -> dict[str, Any]:
    return {"float32": args.float32}


def as_in_024(args: argparse.Namespace, said: Said, schedule: str) -> None:
    """Let an image that mflux 0.24 made be made again as it was then: with its schedule, if none is recorded."""
    if said.is_old and args.scheduler is None:
        args.scheduler = schedule


def check(args: argparse.Namespace, said: Said, config: ModelConfig) -> None:
    as_in_024(args, said, _SCHEDULE)
    if said.is_old and not said.was_typed("guidance") and (args.guidance or 0) <= 1:
        # mflux 0.24 guided above 1 only, and not at all where nothing was said.
        args.guidance = 0.0


COMMAND = Generate(
    command=FAMILY.command("generate-z-image"),
    description="Draw with Z-Image from a prompt, or from a prompt and a picture.",
    defaults={"width": 1024, "height": 1024, "scheduler": _SCHEDULE},
    guidance=None,
    conditional={
        "guidance": ("the model takes guidance", "Z-Image-Turbo was made without"),
        "negative_prompt": ("there is guidance", "without it the negative prompt has no part in the image"),
    },
    add_options=add_options,
    build=build,
    check=check,
)
build_parser, main = COMMAND.build_parser, COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
