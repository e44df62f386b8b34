"""`mflux-generate-z-image-turbo`: pictures with Z-Image-Turbo, in few steps."""

from __future__ import annotations

import sys

from mflux.cli.generate import Generate
from mflux.models.z_image.cli.z_image_generate import add_options, as_in_024, build
from mflux.models.z_image.family import FAMILY

COMMAND = Generate(
    command=FAMILY.command("generate-z-image-turbo"),
    description="Draw with Z-Image-Turbo in few steps, from a prompt, or from a prompt and a picture.",
    guidance=None,
    ignored={
        "guidance": "Z-Image-Turbo was made without",
        "negative_prompt": "without guidance it has no part in the picture",
    },
    add_options=add_options,
    check=lambda args, said, config: as_in_024(args, said, "linear"),
    build=build,
)
build_parser, main = COMMAND.build_parser, COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
