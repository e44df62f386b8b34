"""`mflux-inspire-fibo`: a picture to the structured prompt that FIBO draws from."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mflux.cli.parser.parsers import MfluxParser
from mflux.cli.terminal import run, say_line
from mflux.models.fibo.cli import vlm_options as options


def build_parser() -> MfluxParser:
    """The command's parser; completions use it as well."""
    parser = MfluxParser(
        prog="mflux-inspire-fibo",
        description="Describe a picture as a structured JSON prompt for FIBO. Needs the extra vlm.",
    )
    parser.add_argument("--image-path", type=Path, required=True, help="the picture")
    parser.add_argument("--prompt", help='what is to be different, for example "make it futuristic"')
    options.add_answer_options(parser, output="inspired.json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run(inspire, argv)


def inspire(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    options.check_before_loading(args)
    prompt = None if args.prompt is None else options.words(args.prompt, "--prompt")

    # A picture that cannot be read is told before gigabytes are loaded.
    from mflux.utils.image_util import ImageUtil

    image = ImageUtil.load_image(args.image_path)
    answer = options.make_model(args).inspire(
        image=image,
        prompt=prompt,
        top_p=args.top_p,
        temperature=args.temperature,
        max_tokens=args.max_tokens,
        seed=args.seed,
    )
    say_line(options.write(args.output, answer))


if __name__ == "__main__":
    sys.exit(main())
