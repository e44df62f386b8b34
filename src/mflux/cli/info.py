"""`mflux-info`: the settings that an image carries, and what a file of weights holds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from mflux.cli.parser.parsers import MfluxParser
from mflux.cli.terminal import run, say
from mflux.errors import ImageError
from mflux.models.common.family import all_settings
from mflux.text import shown
from mflux.utils.paths import is_folder
from mflux.utils.values import path

# Long prompts are shown whole; what a hostile file holds is not.
_MOST = 20_000
_MOST_LINES = 200


def build_parser() -> MfluxParser:
    parser = MfluxParser(
        prog="mflux-info",
        description="Show the settings that an image made with mflux carries, or what a file of weights holds.",
    )
    parser.add_argument("image_path", help="the image, a .metadata.json, or a file of weights (safetensors, GGUF, .pt)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run(show, argv)


def show(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)

    from mflux.utils.metadata_reader import read_settings

    if is_folder(path(args.image_path, "the picture")):
        raise ImageError(f"{shown(args.image_path, 300)} is a folder: name a picture in it, or a .metadata.json")
    if holds_weights(args.image_path):
        from mflux.models.common.on_disk import described

        say(described(path(args.image_path, "the file")))
        return
    for line in lines(read_settings(args.image_path)):
        say(line)


def holds_weights(name: str) -> bool:
    """Whether a file is one of weights, as its ending says."""
    return name.lower().endswith((".safetensors", ".gguf", ".sft", ".ckpt", ".pt", ".pth", ".bin"))


def lines(settings: dict[str, Any]) -> list[str]:
    """One line for each setting that says something, fit for a terminal whatever the file holds."""
    text: list[str] = []
    labels = {setting.name: setting.label for setting in all_settings()}
    for name in dict.fromkeys([*labels, *settings]):
        value = settings.get(name)
        if value is None or value in ([], ""):
            continue
        if len(text) == _MOST_LINES:
            text.append(f"… and more: {len(settings)} settings in all")
            break
        label = labels.get(name) or shown(name.replace("_", " ").capitalize(), 80)
        # What is far too long need not be put together first.
        items = [str(item) for item in value[:_MOST]] if isinstance(value, list) else [str(value)]
        text.append(f"{label}: {shown(', '.join(items), _MOST)}")
    return text


if __name__ == "__main__":
    sys.exit(main())
