"""`mflux-generate-z-image-controlnet`: pictures with Z-Image-Turbo after edges or depths of others."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mflux.cli.generate import Generate
from mflux.cli.parser.groups import add_vae_precision_option
from mflux.cli.parser.parsers import Said
from mflux.models.z_image.cli.z_image_generate import add_float32_option
from mflux.models.z_image.family import FAMILY
from mflux.models.z_image.variants.controlnet.control_types import ControlSpec, ControlType
from mflux.utils import values

if TYPE_CHECKING:
    from mflux.models.common.config.model_config import ModelConfig


def control(text: str) -> ControlSpec:
    """TYPE:PATH or TYPE:PATH:STRENGTH; paths may have colons, and what ends one is a strength if it is a number."""
    kind, _, rest = text.partition(":")
    if kind not in ControlType.__members__:
        raise argparse.ArgumentTypeError(f"{kind!r} is none of {', '.join(ControlType.__members__)}: canny:photo.jpg")
    path, _, last = rest.rpartition(":")
    strength = 1.0
    try:
        strength = float(last) if path else strength
    except ValueError:
        path = ""
    if not math.isfinite(strength):
        raise argparse.ArgumentTypeError(f"the strength of {text} is not a finite number")
    if not (path or rest):
        raise argparse.ArgumentTypeError(f"{text} names no picture: canny:photo.jpg")
    return ControlSpec(ControlType(kind), values.path(path or rest, "--control"), strength)


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("control")
    group.add_argument(
        "--control",
        type=control,
        action="append",
        required=True,
        metavar="TYPE:PATH[:STRENGTH]",
        help="what to draw after: canny (edges) or depth, of which picture, and how much it counts (default: 1); may "
        "be said several times. pose, hed and mlsd are not built yet",
    )
    group.add_argument(
        "--controlnet-strength",
        type=values.Real(),
        default=1.0,
        help="how much all controls count (default: 1.0; 0.65 to 1 is advised)",
    )
    add_float32_option(parser)
    add_vae_precision_option(parser)


def check(args: argparse.Namespace, said: Said, config: ModelConfig) -> None:
    from mflux.models.z_image.variants.controlnet.z_image_turbo_controlnet import check_controls
    from mflux.utils.image_util import open_image

    check_controls(args.control)
    for one in args.control:
        open_image(Path(one.image_path))


COMMAND = Generate(
    command=FAMILY.command("generate-z-image-controlnet"),
    description="Draw with Z-Image-Turbo from a prompt, after the edges or depths of other pictures.",
    stands_for={"z-image-turbo": "z-image-turbo-controlnet-union-2.1"},
    leave_out=("image", "pid", "settings"),
    defaults={"model": "z-image-controlnet", "width": 1024, "height": 1024},
    guidance=None,
    ignored={
        "guidance": "Z-Image-Turbo was made without",
        "negative_prompt": "without guidance it has no part in the picture",
    },
    add_options=add_options,
    check=check,
    build=lambda args: {"float32": args.float32},
    draw=lambda args: {"controls": args.control, "controlnet_strength": args.controlnet_strength},
)
build_parser, main = COMMAND.build_parser, COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
