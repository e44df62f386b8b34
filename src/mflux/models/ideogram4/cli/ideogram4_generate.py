"""`mflux-generate-ideogram4`: images with Ideogram 4."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from mflux.cli.generate import Generate
from mflux.cli.parser.groups import add_vae_precision_option
from mflux.cli.parser.parsers import Said
from mflux.models.ideogram4.family import FAMILY

if TYPE_CHECKING:
    from mflux.models.common.config.model_config import ModelConfig

# As `presets.PRESETS`, which loads MLX; a test compares.
PRESETS = ("V4_DEFAULT_20", "V4_QUALITY_48", "V4_TURBO_12")


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Ideogram 4")
    group.add_argument(
        "--preset",
        choices=PRESETS,
        help="steps, guidance and noise levels together: the number at its end is how many steps "
        f"(default: {PRESETS[0]})",
    )
    group.add_argument(
        "--strict-caption-validation",
        action="store_true",
        help="refuse a prompt that is no JSON caption as the model was taught with, instead of warning",
    )
    add_vae_precision_option(parser)


def check(args: argparse.Namespace, said: Said, config: ModelConfig) -> None:
    from mflux.models.ideogram4.presets import preset

    if not said.was_set("steps"):
        args.steps = preset(args.preset).steps
    if said.is_old and not said.was_typed("guidance"):
        # mflux 0.24 noted the first step's, and took the preset's for each.
        args.guidance = None


COMMAND = Generate(
    command=FAMILY.command("generate-ideogram4"),
    description="Draw with Ideogram 4 from a caption in JSON, or from a prompt.",
    leave_out=("image",),
    defaults={"width": 1024, "height": 1024},
    guidance=None,
    ignored={
        "negative_prompt": "Ideogram 4 is guided by a second transformer, which reads no prompt",
        "scheduler": "Ideogram 4 has noise levels of its own, see --preset",
    },
    add_options=add_options,
    check=check,
    draw=lambda args: {"preset": args.preset, "strict_caption_validation": args.strict_caption_validation},
)
build_parser, main = COMMAND.build_parser, COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
