"""`mflux-concept`: pictures with FLUX.1, and where they show a concept."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mflux.cli.generate import Generate
from mflux.cli.parser.parsers import Said
from mflux.cli.terminal import say
from mflux.errors import UsageError
from mflux.models.flux.cli.options import IGNORED
from mflux.models.flux.family import FAMILY
from mflux.utils import values

if TYPE_CHECKING:
    from mflux.models.common.config.model_config import ModelConfig

SIZES = {"width": 1024, "height": 1024}
HEATMAP = ("heatmap_layer_indices", "heatmap_timesteps")


def add_options(parser: argparse.ArgumentParser, *, of_picture: bool = False) -> None:
    group = parser.add_argument_group("concept")
    group.add_argument("--concept", required=True, help="what to look for: a word, or a few")
    told = "the picture to look at" if of_picture else "taken by mflux-concept-from-image only"
    group.add_argument("--input-image-path", type=Path, required=of_picture, help=told)
    whole = values.Whole()
    group.add_argument(
        "--heatmap-layer-indices",
        nargs="*",
        type=whole,
        default=[15, 16, 17, 18],
        metavar="N",
        help="the transformer's double blocks to look at, from 0 (default: the last four)",
    )
    group.add_argument(
        "--heatmap-timesteps",
        nargs="*",
        type=whole,
        metavar="N",
        help="the steps to look at, counted from 0 among those that are taken (default: all)",
    )


def check_concept(args: argparse.Namespace, said: Said, config: ModelConfig) -> None:
    """
    Raises:
        UsageError: nothing to look for, or a step that is never taken.
    """
    if not args.concept.strip():
        raise UsageError('there is nothing to look for: use --concept "…"')
    # Which blocks and steps there are exactly is known with the model; this is, before it is fetched.
    values.indices(args.heatmap_timesteps, args.steps, "--heatmap-timesteps", "steps")
    for side in SIZES:
        if not said.was_set(side):
            setattr(args, side, config.default_size)
    for name in HEATMAP:
        if not said.was_typed(name):
            # The class knows how many there are.
            setattr(args, name, None)


def check(args: argparse.Namespace, said: Said, config: ModelConfig) -> None:
    if args.input_image_path is not None:
        raise UsageError(
            "--input-image-path is for mflux-concept-from-image, which looks at a picture; to draw from one use "
            "--image PATH STRENGTH"
        )
    check_concept(args, said, config)


def draw_concept(args: argparse.Namespace) -> dict[str, Any]:
    chosen = {name: getattr(args, name) for name in HEATMAP}
    return {"concept": args.concept} | {name: value for name, value in chosen.items() if value is not None}


def save_heatmap(image: Any, path: Path, args: argparse.Namespace) -> None:
    heatmap = path.with_stem(path.stem + "_heatmap")
    say(str(image.save_concept_heatmap(heatmap, args.metadata, embed_metadata=not args.no_metadata)))


Concept = partial(
    Generate,
    default_model="schnell",
    leave_out=("pid",),
    defaults=SIZES,
    ignored=IGNORED,
    after=save_heatmap,
)
COMMAND = Concept(
    command=FAMILY.command("concept"),
    description="Draw with FLUX.1, and show as NAME_heatmap where the picture has a concept.",
    add_options=add_options,
    check=check,
    draw=draw_concept,
)
build_parser, main = COMMAND.build_parser, COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
