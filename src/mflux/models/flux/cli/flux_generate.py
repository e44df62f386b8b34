"""`mflux-generate`: images with FLUX.1, and with whatever other model is named, as its own command does it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from mflux.cli.entry import asks_for_help, command_for, help_for
from mflux.cli.generate import Generate
from mflux.cli.terminal import run
from mflux.models.flux.cli.options import CONDITIONAL, IGNORED
from mflux.models.flux.family import FAMILY

COMMAND = Generate(
    command=FAMILY.command("generate"),
    description="Draw with FLUX.1 from a prompt, or from a prompt and a picture. With a model of another family it is "
    "the same as that family's command; --model NAME --help shows its options.",
    default_model=None,
    default_size="1024; demo: 128; the source picture's, if there is one",
    ignored=IGNORED,
    conditional=CONDITIONAL,
)
build_parser = COMMAND.build_parser


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    command = command_for(words)
    if command is None and asks_for_help(words):
        # Of a model that this command does not generate with, its help would say nothing.
        return run(partial(help_for, COMMAND), words)
    return (command or COMMAND).main(words)


if __name__ == "__main__":
    sys.exit(main())
