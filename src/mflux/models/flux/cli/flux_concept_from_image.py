"""`mflux-concept-from-image`: where a picture shows a concept, with FLUX.1."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from mflux.cli.parser.parsers import Said
from mflux.errors import UsageError
from mflux.models.flux.cli.flux_concept import Concept, add_options, check_concept, draw_concept
from mflux.models.flux.family import FAMILY

if TYPE_CHECKING:
    from mflux.models.common.config.model_config import ModelConfig


def check(args: argparse.Namespace, said: Said, config: ModelConfig) -> None:
    if said.was_typed("image", "image_path"):
        raise UsageError(
            "--input-image-path says which picture: leave --image and --image-path out; --image-strength alone says "
            "how many steps are left out"
        )
    args.image_path = args.input_image_path
    if not said.was_set("image_strength"):
        args.image_strength = None
    check_concept(args, said, config)


def draw(args: argparse.Namespace) -> dict[str, Any]:
    return draw_concept(args) | {"image_strength": args.image_strength}


COMMAND = Concept(
    command=FAMILY.command("concept-from-image"),
    description="Show as NAME_heatmap where a picture has a concept, as FLUX.1 sees it.",
    add_options=partial(add_options, of_picture=True),
    sources=("input_image_path",),
    size_source="input_image_path",
    check=check,
    draw=draw,
)
build_parser, main = COMMAND.build_parser, COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
