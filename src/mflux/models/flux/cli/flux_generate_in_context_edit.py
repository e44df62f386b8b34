"""`mflux-generate-in-context-edit`: pictures edited with FLUX.1 Fill and the LoRA of IC-Edit."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mflux.cli.generate import Generate
from mflux.cli.parser.parsers import Said
from mflux.errors import UsageError
from mflux.models.flux.cli.options import IGNORED, add_full_image_option, right_half, save_full_image
from mflux.models.flux.family import FAMILY

if TYPE_CHECKING:
    from mflux.models.common.config.model_config import ModelConfig

LORA = "RiverZ/normal-lora:pytorch_lora_weights.safetensors"
# The LoRA was trained with pictures of this width, and with this sentence before what is to be done.
_WIDTH = 512
_SENTENCE = (
    "A diptych with two side-by-side images of the same scene. On the right, the scene is exactly the same as on the "
    "left but "
)


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("picture to edit")
    group.add_argument("--reference-image", dest="image_path", type=Path, required=True, help="the picture")
    group.add_argument("--instruction", help="what to do with it, as the end of a sentence: make the sky red")
    add_full_image_option(group)


def check(args: argparse.Namespace, said: Said, config: ModelConfig) -> None:
    if args.instruction is not None:
        if said.was_typed("prompt", "prompt_file"):
            raise UsageError("--instruction becomes the prompt: leave --prompt and --prompt-file out")
        args.prompt, args.prompt_file = _SENTENCE + args.instruction, None
    elif args.prompt is None and args.prompt_file is None:
        raise UsageError('nothing was said to do: use --instruction "…", or --prompt with a whole sentence')
    if LORA not in (args.lora_paths or ()):
        args.lora_paths = [LORA, *(args.lora_paths or ())]
        args.lora_scales = [1.0, *(args.lora_scales or ())]


def draw(args: argparse.Namespace) -> dict[str, Any]:
    from mflux.utils.image_util import oriented_size

    width, height = oriented_size(args.image_path)
    return {"left_image_path": args.image_path, "width": _WIDTH, "height": max(16, _WIDTH * height // width // 16 * 16)}


COMMAND = Generate(
    command=FAMILY.command("generate-in-context-edit"),
    description="Edit a picture as an instruction says, with FLUX.1 Fill and IC-Edit's LoRA.",
    stands_for={"dev": "dev-fill"},
    leave_out=("image", "pid"),
    defaults={"width": 1024, "height": 1024},
    guidance=30.0,
    add_options=add_options,
    ignored=IGNORED | {side: f"the LoRA was made for a width of {_WIDTH}" for side in ("width", "height")},
    check=check,
    draw=draw,
    pixels=right_half,
    after=save_full_image,
)
build_parser, main = COMMAND.build_parser, COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
