"""`mflux-refine-fibo`: a structured prompt of FIBO's, changed as one says."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mflux.cli.parser.parsers import MfluxParser
from mflux.cli.terminal import run, say_line
from mflux.errors import UsageError
from mflux.models.fibo.cli import vlm_options as options


def build_parser() -> MfluxParser:
    """The command's parser; completions use it as well."""
    parser = MfluxParser(
        prog="mflux-refine-fibo",
        description="Change a structured JSON prompt of FIBO's as you say. Needs the extra vlm.",
    )
    parser.add_argument("--prompt-file", type=Path, required=True, help="the file with the JSON prompt")
    parser.add_argument("--instructions", required=True, help='what to change, for example "make the dragon blue"')
    options.add_answer_options(parser, output="refined.json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run(refine, argv)


def refine(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    options.check_before_loading(args)
    instructions = options.words(args.instructions, "--instructions")
    if not instructions.strip():
        raise UsageError("--instructions is empty: say what to change")

    from mflux.models.fibo.vlm.json_text import read_structured_prompt

    structured_prompt = read_structured_prompt(args.prompt_file)
    answer = options.make_model(args).refine(
        structured_prompt=structured_prompt,
        editing_instructions=instructions,
        top_p=args.top_p,
        temperature=args.temperature,
        max_tokens=args.max_tokens,
        seed=args.seed,
    )
    say_line(options.write(args.output, answer))


if __name__ == "__main__":
    sys.exit(main())
