"""What the two commands of FIBO-VLM share."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mflux.cli.parser.groups import add_device_option
from mflux.errors import OutputError, UsageError
from mflux.models.fibo.vlm.packages import check_installed
from mflux.text import is_text, lines_shown
from mflux.utils.paths import is_folder
from mflux.utils.values import QUANTIZE_CHOICES, Real, Whole, seed

if TYPE_CHECKING:
    from mflux.models.fibo.vlm.fibo_vlm import FiboVLM

# As in the class, which is too heavy to import for --help.
DEFAULT_MODEL = "briaai/FIBO-vlm"


def add_answer_options(parser: argparse.ArgumentParser, *, output: str) -> None:
    parser.add_argument(
        "--model",
        "-m",
        default=DEFAULT_MODEL,
        help=f"a folder or Hugging Face repository with the model (default: {DEFAULT_MODEL})",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(output),
        help=f"the JSON file to write (default: {output}; an existing file is never replaced)",
    )
    parser.add_argument("-q", "--quantize", type=int, choices=QUANTIZE_CHOICES, help="bits per weight to quantize to")
    parser.add_argument(
        "--top-p",
        type=Real(least=0, most=1),
        default=0.9,
        help="only the likeliest tokens that together have this probability may come (default: 0.9)",
    )
    parser.add_argument(
        "--temperature",
        type=Real(least=0),
        default=0.2,
        help="0 always takes the likeliest token, more is more varied (default: 0.2)",
    )
    parser.add_argument(
        "--max-tokens", type=Whole(least=1), default=4096, help="where the answer is cut off (default: 4096)"
    )
    parser.add_argument("--seed", type=seed, help="the same seed gives the same answer (default: a new one each time)")
    add_device_option(parser)


def check_before_loading(args: argparse.Namespace) -> None:
    """What can be found out before anything heavy is imported or fetched.

    Raises:
        MissingExtraError: transformers is not installed.
        UsageError: --output is a folder.
        OutputError: the result could not be written.
    """
    import tempfile

    check_installed()
    if is_folder(args.output):
        raise UsageError(f"--output {args.output} is a folder: name the file to write in it")
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.output.parent):
            pass
    except OSError as error:
        raise OutputError(f"cannot write to the folder {args.output.parent}: {error.strerror or error}") from None


def words(text: str, option: str) -> str:
    """A text from the command line.

    Raises:
        UsageError: it is not UTF-8.
    """
    if not is_text(text):
        raise UsageError(f"{option} is not text in UTF-8: save it as UTF-8, or type it anew")
    return text


def make_model(args: argparse.Namespace) -> FiboVLM:
    """The model; with --verbose, its answer streams to stderr."""
    from mflux.models.fibo.vlm.fibo_vlm import FiboVLM

    vlm = FiboVLM(model_path=args.model, quantize=args.quantize)
    if args.verbose:
        vlm.on_text = stream
    return vlm


def stream(text: str) -> None:
    print(lines_shown(text), end="", file=sys.stderr, flush=True)


def write(path: Path, text: str) -> Path:
    """Write the result, complete or not at all; returns where it went."""
    from mflux.utils.image_util import write_atomically

    return write_atomically(path, lambda file: file.write(f"{text}\n".encode()), overwrite=False)
