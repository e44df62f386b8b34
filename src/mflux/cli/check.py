"""`mflux-check`: whether a model is whole, without drawing with it and without a network."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mflux.cli.parser.parsers import MfluxParser
from mflux.cli.terminal import run, say
from mflux.errors import MfluxError
from mflux.text import one_line, size


def build_parser() -> MfluxParser:
    """The command's parser; completions use it as well."""
    parser = MfluxParser(
        prog="mflux-check", description="Find out whether a model is whole, offline, before drawing with it."
    )
    commands = parser.add_subparsers(dest="command", metavar="model", required=True)
    model = commands.add_parser(
        "model",
        help="check a folder, or what the cache holds of a repository",
        description="Check headers, indexes, shards, names and shapes of a model's weights as loading does, and its "
        "entry in Hugging Face's cache. Nothing is sent, and no numbers are read. Exit status 1: something is wrong.",
    )
    model.add_argument(
        "model_reference", metavar="MODEL", help="a folder or file, a model's name, or a repository (org/name)"
    )
    model.add_argument(
        "--base-model", help="the model it derives from, when the repository's or folder's name does not tell"
    )
    model.add_argument(
        "--fix",
        "--repair",
        action="store_true",
        help="remove what is broken in Hugging Face's cache, to be fetched again, or take it from another snapshot",
    )
    return parser


def with_command(words: Sequence[str]) -> list[str]:
    """A command line with `model` where a model stands first: `mflux-check schnell` checks it."""
    first = next((word for word in words if not word.startswith("-")), None)
    plain = first is None or first == "model" or not {"--help", "-h", "--version"}.isdisjoint(words)
    return list(words) if plain else ["model", *words]


def check(argv: Sequence[str] | None) -> int:
    """
    Returns:
        0, or 1 where something is wrong with the model.

    Raises:
        MfluxError: there is no such model, or something cannot be removed.
    """
    args = build_parser().parse_args(with_command(sys.argv[1:] if argv is None else argv))

    from mflux.hub.cache import repair, repository_in_cache
    from mflux.models.common.checking import check_model

    report = check_model(args.model_reference, args.base_model)
    done: list[str] = []
    if args.fix and report.holder is not None and report.broken:
        done = repair(report.holder, report.broken)
        try:
            report = check_model(args.model_reference, args.base_model)
        except MfluxError as error:
            # Nothing of it is left.
            report.problems, report.broken = [str(error)], []
    say(f"check: {'pass' if report.passed else 'fail'}")
    for name in ("model", "layout", "root"):
        if (value := getattr(report, name)) is not None:
            say(f"{'format' if name == 'layout' else name}: {value}")
    if report.holds is not None:
        say(f"holds: {one_line(report.holds)}")
    say(f"size: {size(report.size)}")
    for problem in report.problems:
        say(f"problem: {one_line(problem)}")
    for entry in report.broken:
        say(f"{'broken' if entry.is_fault else 'leftover'}: {one_line(entry)}")
    for line in done:
        say(f"fixed: {one_line(line)}")
    if report.broken and not args.fix:
        say(f"fix: mflux-check --fix {one_line(args.model_reference)}")
    if args.fix and report.holder is None:
        link = repository_in_cache(report.root, linked=True) if report.root else None
        own = f"{one_line(link)} is a link to another place" if link else "this is a folder of your own"
        say(f"fixed: nothing, since only Hugging Face's cache is changed and {own}")
    return 0 if report.passed else 1


def main(argv: Sequence[str] | None = None) -> int:
    return run(check, argv)


if __name__ == "__main__":
    sys.exit(main())
