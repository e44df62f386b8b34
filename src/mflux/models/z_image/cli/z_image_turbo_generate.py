"""`mflux-generate-z-image-turbo`: pictures with Z-Image-Turbo, in few steps."""

from __future__ import annotations

import sys

from mflux.cli.generate import Generate
from mflux.models.z_image.cli.z_image_generate import add_options, build
from mflux.models.z_image.family import FAMILY

COMMAND = Generate(
    prog="mflux-generate-z-image-turbo",
    description="Draw with Z-Image-Turbo in few steps, from a prompt, or from a prompt and a picture.",
    pipeline="mflux.models.z_image.variants.z_image:ZImage",
    models=FAMILY.commands[0].models,
    published_schedule=True,
    default_model="z-image-turbo",
    guidance=None,
    ignored={
        "guidance": "Z-Image-Turbo was made without",
        "negative_prompt": "without guidance it has no part in the picture",
    },
    add_options=add_options,
    build=build,
)
build_parser, main = COMMAND.build_parser, COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
