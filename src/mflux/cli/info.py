"""`mflux-info`: the settings that a picture carries."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from mflux.cli.parser import MfluxParser, run, say
from mflux.errors import MfluxError
from mflux.utils.settings import SETTINGS


def build_parser() -> MfluxParser:
    parser = MfluxParser(prog="mflux-info", description="Show the settings that a picture made with mflux carries.")
    parser.add_argument("image_path", help="the picture")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run(show, argv)


def show(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)

    from mflux.utils.image_util import oriented_size
    from mflux.utils.metadata_reader import MetadataReader

    # What is no picture at all is told as such.
    oriented_size(args.image_path)
    settings = MetadataReader.read_exif_metadata(args.image_path)
    if settings is None:
        raise MfluxError(f"{args.image_path} carries no settings: it was not made with mflux, or with --no-metadata")
    for line in lines(settings):
        say(line)


def lines(settings: dict[str, Any]) -> list[str]:
    """One line for each setting that says something."""
    shown = []
    labels = {setting.name: setting.label for setting in SETTINGS}
    for name in dict.fromkeys([*labels, *settings]):
        value = settings.get(name)
        if value is None or value == []:
            continue
        label = labels.get(name) or name.replace("_", " ").capitalize()
        text = ", ".join(str(item) for item in value) if isinstance(value, list) else str(value)
        shown.append(f"{label}: {text}")
    return shown


if __name__ == "__main__":
    sys.exit(main())
