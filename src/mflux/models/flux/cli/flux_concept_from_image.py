"""`mflux-concept-from-image`: where a picture shows a concept, with FLUX.1."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

from mflux.cli.parser.settle import was_given, was_said
from mflux.errors import UsageError
from mflux.models.flux.cli.flux_concept import Concept, add_options, check_concept, draw_concept


def check(args: argparse.Namespace, config: Any) -> None:
    if was_given(args, "image", "image_path"):
        raise UsageError(
            "--input-image-path says which picture: leave --image and --image-path out; --image-strength alone says "
            "how many steps are left out"
        )
    args.image_path = args.input_image_path
    check_concept(args, config)


def draw(args: argparse.Namespace) -> dict[str, Any]:
    strength = args.image_strength if was_said(args, "image_strength") else None
    return draw_concept(args) | {"image_strength": strength}


COMMAND = Concept(
    prog="mflux-concept-from-image",
    description="Show as NAME_heatmap where a picture has a concept, as FLUX.1 sees it.",
    pipeline="mflux.models.flux.variants.concept_attention.flux_concept_from_image:Flux1ConceptFromImage",
    add_options=partial(add_options, of_picture=True),
    sources=("input_image_path",),
    size_source="input_image_path",
    check=check,
    draw=draw,
)
build_parser, main = COMMAND.build_parser, COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
