"""`mflux-generate-ernie-image-turbo`: images with ERNIE-Image-Turbo, in few steps."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from mflux.cli.generate import Generate
from mflux.cli.parser.groups import add_vae_precision_option
from mflux.cli.parser.parsers import Said
from mflux.errors import UsageError
from mflux.models.ernie_image.family import FAMILY

if TYPE_CHECKING:
    from mflux.models.common.config.model_config import ModelConfig


def check(args: argparse.Namespace, said: Said, config: ModelConfig) -> None:
    """
    Raises:
        UsageError: guidance, which is in Turbo's weights already.
    """
    if args.guidance not in (None, 1.0):
        raise UsageError(
            "ERNIE-Image-Turbo was distilled, and a guidance other than 1 spoils its images: leave --guidance out, or "
            "use mflux-generate-ernie-image"
        )


COMMAND = Generate(
    command=FAMILY.command("generate-ernie-image-turbo"),
    description="Generate with ERNIE-Image-Turbo in few steps, from a prompt, or from a prompt and an image.",
    defaults={"model": "ernie-image-turbo"},
    guidance=1.0,
    ignored={"negative_prompt": "without guidance it has no part in the image"},
    conditional={"guidance": ("it is 1", "Turbo was distilled, and any other is refused")},
    add_options=add_vae_precision_option,
    check=check,
)
build_parser, main = COMMAND.build_parser, COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
