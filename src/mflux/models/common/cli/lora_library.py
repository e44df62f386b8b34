"""`mflux-lora-library`: the LoRAs that can be asked for by name."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from mflux.cli.parser.parsers import MfluxParser
from mflux.cli.terminal import run, say_line
from mflux.errors import UsageError
from mflux.models.common.lora.library import VARIABLE, library, library_folders
from mflux.utils.paths import is_folder

log = logging.getLogger(__name__)


def build_parser() -> MfluxParser:
    """The command's parser; completions use it as well."""
    parser = MfluxParser(
        prog="mflux-lora-library",
        description=f"Show the LoRAs that --lora takes by name: the .safetensors files in the folders of {VARIABLE}, "
        "which are separated as in PATH. Where two have one name, the first folder's is taken.",
    )
    commands = parser.add_subparsers(dest="command", metavar="list", required=True)
    listing = commands.add_parser("list", help="print name -> file, one a line", description="Print name -> file.")
    listing.add_argument(
        "--paths", nargs="+", type=Path, metavar="FOLDER", help=f"look in these folders instead of {VARIABLE}"
    )
    return parser


def list_loras(argv: Sequence[str] | None) -> None:
    """
    Raises:
        UsageError: no folder is named, or none of them is there.
    """
    args = build_parser().parse_args(argv)
    named = args.paths or library_folders()
    if not named:
        raise UsageError(f"{VARIABLE} is not set: set it to folders with LoRAs, or name some with --paths")
    folders = [folder for folder in named if is_folder(folder)]
    for folder in named:
        if folder not in folders:
            log.warning("%s is not a folder", folder)
    if not folders:
        raise UsageError(f"none of the folders of {'--paths' if args.paths else VARIABLE} is there: check their paths")
    found = library(folders)
    for name, path in sorted(found.items()):
        say_line(f"{name} -> {path}")
    log.info("%d LoRAs in %d folders", len(found), len(folders))


def main(argv: Sequence[str] | None = None) -> int:
    return run(list_loras, argv)


if __name__ == "__main__":
    sys.exit(main())
