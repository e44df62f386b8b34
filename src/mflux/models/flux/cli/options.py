"""What the commands of FLUX.1's variants have in common."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mflux.cli.parser.parsers import Said
from mflux.cli.terminal import say_line
from mflux.errors import UsageError
from mflux.utils import values

if TYPE_CHECKING:
    from mflux.models.common.config.model_config import ModelConfig

log = logging.getLogger(__name__)

IGNORED = {"negative_prompt": "FLUX.1 has no negative branch"}
CONDITIONAL = {"guidance": ("the model takes guidance, as dev does", "schnell was made without")}


def check_picture(args: argparse.Namespace, said: Said, config: ModelConfig) -> None:
    """
    Raises:
        UsageError: no picture.
    """
    if args.image_path is None:
        raise UsageError("no picture was given: use --image PATH")
    if said.was_typed("image_strength") or len(getattr(args, "image", None) or ()) > 1:
        log.warning(
            "--image-strength (the number after --image PATH) is ignored: the model sees the image in every step, and "
            "starts from noise"
        )


def without_strength(args: argparse.Namespace) -> dict[str, Any]:
    return {"image_strength": None}


def with_picture(args: argparse.Namespace) -> dict[str, Any]:
    return {"image_path": args.image_path}


def add_full_image_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--save-full-image", action="store_true", help="also write both pictures side by side, as NAME_full"
    )


def right_half(image: Any, args: argparse.Namespace) -> Any:
    return image.get_right_half().image


def save_full_image(image: Any, path: Path, args: argparse.Namespace) -> None:
    if args.save_full_image:
        say_line(image.save(path.with_stem(path.stem + "_full"), embed_metadata=not args.no_metadata))


def add_controlnet_options(parser: argparse.ArgumentParser, *, required: bool = False) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("picture to follow")
    group.add_argument("--controlnet-image-path", type=Path, required=required, help="the picture")
    group.add_argument(
        "--controlnet-strength",
        type=values.Real(),
        default=0.4,
        metavar="STRENGTH",
        help="how closely to follow it; 0 is not at all (default: 0.4)",
    )
    return group


def draw_controlled(args: argparse.Namespace) -> dict[str, Any]:
    names = ("controlnet_image_path", "controlnet_strength")
    return {name: getattr(args, name) for name in names}
