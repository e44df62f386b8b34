"""`mflux-generate-fibo-edit`: pictures edited with FIBO-Edit, and cut out with FIBO-Edit-RMBG."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mflux.cli.generate import Generate
from mflux.cli.parser.parsers import Said
from mflux.cli.parser.settle import is_auto
from mflux.errors import UsageError
from mflux.models.fibo.cli.options import add_vlm_option, with_vlm
from mflux.models.fibo.family import FAMILY
from mflux.models.fibo.prompts import MATTE_PROMPT, VLM_SEED, as_object, check_edit

if TYPE_CHECKING:
    import PIL.Image

    from mflux.models.common.config.model_config import ModelConfig
    from mflux.utils.generated_image import GeneratedImage

_REMOVER = "fibo-edit-rmbg"


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("picture to edit")
    group.add_argument("--image-path", type=Path, help="the picture")
    group.add_argument(
        "--mask-path",
        dest="masked_image_path",
        type=Path,
        help="a picture of the same size, white where the picture is to be edited",
    )
    group.add_argument(
        "--matte-output",
        help=f"with {_REMOVER}: also write its matte, white where the cut-out is opaque; {{seed}} stands for the seed",
    )
    add_vlm_option(parser)


def removes(args: argparse.Namespace) -> bool:
    """Whether the model cuts out instead of editing."""
    from mflux.models.common.config.model_config import key_of

    return key_of(args.model, args.base_model) == _REMOVER


def check(args: argparse.Namespace, said: Said, config: ModelConfig) -> None:
    if args.image_path is None:
        raise UsageError("no picture to edit was given: use --image-path PATH")
    if args.guidance is None:
        args.guidance = 1.0 if removes(args) else 3.5
    if not removes(args):
        if args.matte_output is not None:
            raise UsageError(f"--matte-output goes with --model {_REMOVER}: only that one makes a matte")
        return
    if args.prompt is None and args.prompt_file is None:
        args.prompt = MATTE_PROMPT
    from mflux.utils.picture_files import TRANSPARENT

    if Path(args.output).suffix.lower() not in TRANSPARENT:
        raise UsageError(f"{args.output} cannot hold transparency, and a cut-out has some: use .png, .webp or .tiff")
    if args.matte_output is not None:
        from mflux.utils.picture_files import check_output

        for seed in args.seed:
            check_output(matte_path(args, seed))


def rewrite(args: argparse.Namespace, words: str) -> str | Callable[[], str]:
    from mflux.models.fibo.sources import source_picture

    # Also where there is nothing to rewrite: a mask that does not fit is told before anything is loaded.
    picture = source_picture(args.image_path, args.masked_image_path, tell=False)
    if as_object(words) is not None:
        check_edit(words)
        return words
    has_mask = args.masked_image_path is not None
    return with_vlm(args, lambda vlm: vlm.edit(picture, words, use_mask=has_mask, seed=VLM_SEED))


def draw(args: argparse.Namespace) -> dict[str, Any]:
    return {"image_path": args.image_path, "mask_path": args.masked_image_path}


def pixels(image: GeneratedImage, args: argparse.Namespace) -> PIL.Image.Image:
    if not removes(args):
        return image.image
    from mflux.models.fibo.sources import cut_out

    return cut_out(args.image_path, image.image)


def write_matte(image: GeneratedImage, path: Path, args: argparse.Namespace) -> None:
    if removes(args) and args.matte_output is not None:
        from mflux.cli.terminal import say_line

        say_line(image.save(matte_path(args, image.seed), embed_metadata=not args.no_metadata))


def matte_path(args: argparse.Namespace, seed: int) -> str:
    return args.matte_output.replace("{seed}", str(seed))


COMMAND = Generate(
    command=FAMILY.command("generate-fibo-edit"),
    description="Edit a picture with FIBO-Edit, or cut out what is in it with FIBO-Edit-RMBG.",
    default_size="the picture's own, up to about a megapixel",
    default_model=None,
    leave_out=("image", "lora_style", "pid"),
    defaults={"model": "fibo-edit"},
    guidance=None,
    add_options=add_options,
    sources=("image_path", "masked_image_path"),
    own_size=is_auto,
    check=check,
    rewrite=rewrite,
    draw=draw,
    pixels=pixels,
    after=write_matte,
)
build_parser, main = COMMAND.build_parser, COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
