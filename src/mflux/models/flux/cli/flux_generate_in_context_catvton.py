"""`mflux-generate-in-context-catvton`: clothes tried on with CatVTON-FLUX."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mflux.cli.generate import Generate
from mflux.cli.parser.parsers import Said
from mflux.models.flux.cli.options import IGNORED, add_full_image_option, right_half, save_full_image
from mflux.models.flux.family import FAMILY

if TYPE_CHECKING:
    from mflux.models.common.config.model_config import ModelConfig

# What the model was trained with: a product shot on the left, the same worn by a person on the right.
PROMPT = (
    "The pair of images highlights a clothing and its styling on a model, high resolution, 4K, 8K; [IMAGE1] Detailed "
    "product shot of a clothing; [IMAGE2] The same cloth is worn by a model in a lifestyle setting."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pictures")
    group.add_argument("--garment-image", type=Path, required=True, help="what is to be worn")
    group.add_argument("--person-image", type=Path, required=True, help="the person who is to wear it")
    group.add_argument(
        "--person-mask", type=Path, required=True, help="where on the person: white is painted anew, black is kept"
    )
    add_full_image_option(group)


def check(args: argparse.Namespace, said: Said, config: ModelConfig) -> None:
    if args.prompt is None and args.prompt_file is None:
        args.prompt = PROMPT


def draw(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "left_image_path": args.garment_image,
        "right_image_path": args.person_image,
        "masked_image_path": args.person_mask,
    }


COMMAND = Generate(
    command=FAMILY.command("generate-in-context-catvton"),
    description="Show a person wearing a garment, with CatVTON's transformer for FLUX.1 Fill.",
    stands_for={"dev": "dev-fill-catvton", "dev-fill": "dev-fill-catvton"},
    leave_out=("image", "pid", "settings"),
    defaults={"width": 1024, "height": 1024},
    guidance=30.0,
    add_options=add_options,
    sources=("garment_image", "person_image", "person_mask"),
    size_source="person_image",
    ignored=IGNORED,
    check=check,
    draw=draw,
    pixels=right_half,
    after=save_full_image,
)
build_parser, main = COMMAND.build_parser, COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
