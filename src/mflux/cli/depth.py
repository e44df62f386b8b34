"""What commands share that generate after the depth of an image, found with Depth Pro or given."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mflux.cli.parser.parsers import Said
from mflux.cli.terminal import say_line
from mflux.errors import UsageError

if TYPE_CHECKING:
    from mflux.models.common.config.model_config import ModelConfig


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("depth")
    group.add_argument("--image-path", type=Path, help="a picture whose depth is found with Depth Pro")
    group.add_argument("--depth-image-path", type=Path, help="a depth map instead, white where it is near")
    group.add_argument(
        "--save-depth-map", action="store_true", help="also write the map that Depth Pro made, as NAME_depth_map"
    )


def check(args: argparse.Namespace, said: Said, config: ModelConfig) -> None:
    if args.image_path is None and args.depth_image_path is None:
        raise UsageError("no picture was given: use --image-path PATH, or --depth-image-path with a depth map")
    if args.depth_image_path is not None and said.was_typed("save_depth_map"):
        raise UsageError("--save-depth-map writes the map that is made from --image-path: leave --depth-image-path out")


def draw(args: argparse.Namespace) -> dict[str, Any]:
    return {"image_path": args.image_path, "depth_image_path": args.depth_image_path}


def save_map(image: Any, path: Path, args: argparse.Namespace) -> None:
    if args.save_depth_map:
        from mflux.utils.image_util import ImageUtil

        say_line(ImageUtil.save_image(image.depth_image, path.with_stem(path.stem + "_depth_map")))
