"""What all commands share: the parser, groups of options, and how a failure ends.

Nothing here loads MLX, numpy or PIL: `--help` and usage errors answer at once.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mflux.errors import MfluxError, NotBuiltError, UsageError
from mflux.models.common.lora.library import STYLES, settle_scales, style_path
from mflux.utils.scale_factor import GRID, LARGEST, ScaleFactor

log = logging.getLogger(__name__)
QUANTIZE_CHOICES = (3, 4, 5, 6, 8)
DEFAULT_GUIDANCE = 3.5


class MfluxParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and whose long options are not to be shortened."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        self.add_argument("--verbose", "-v", action="store_true", help="say more about what is done")

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


class _LineFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        return f"warning: {message}" if record.levelno >= logging.WARNING else message


def run(command: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None) -> int:
    """Run a command's body and turn every expected failure into one `error:` line and an exit status.

    Returns:
        0, or the failure's status: 1, 2 for usage, 130 for Ctrl-C.
    """
    _log_to_stderr(argv)
    try:
        with warnings.catch_warnings():
            # What a library warns of is one line like our own.
            warnings.showwarning = lambda message, *_: log.warning(" ".join(str(message).split()))
            return command(argv) or 0
    except MfluxError as error:
        # One line, whatever a library's own message had in it.
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone; Python would complain again while shutting down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (MemoryError, RuntimeError) as error:
        # MLX has no exception of its own for memory that it cannot have.
        if isinstance(error, RuntimeError) and "alloc" not in str(error):
            raise
        print("error: not enough memory: try --low-ram, or a smaller --width and --height", file=sys.stderr)
        return 1


def _log_to_stderr(argv: Sequence[str] | None) -> None:
    words = sys.argv[1:] if argv is None else argv
    handler = logging.StreamHandler()
    handler.setFormatter(_LineFormatter())
    logger = logging.getLogger("mflux")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.DEBUG if "--verbose" in words or "-v" in words else logging.INFO)


def advise() -> None:
    """Say once, before long work, what would make it faster on this machine."""
    from mflux.backend import blas_advice

    if advice := blas_advice():
        log.info(advice)


# ---- types of values


def number(kind: type, *, above: float | None = None, least: float | None = None, most: float | None = None):
    """A type for `add_argument`: an int or float within bounds."""

    def read(text: str):
        try:
            value = kind(text)
            if not math.isfinite(value):
                raise ValueError
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number") from None
        if above is not None and value <= above:
            raise argparse.ArgumentTypeError(f"{text} is not above {above}")
        if least is not None and value < least:
            raise argparse.ArgumentTypeError(f"{text} is too small: at least {least}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"{text} is too large: at most {most}")
        return value

    return read


seed = number(int, least=0, most=2**64 - 1)
steps = number(int, least=1, most=10_000)
guidance = number(float, least=0)
strength = number(float, least=0, most=1)
pixels = number(int, least=GRID, most=LARGEST)


def dimension(text: str) -> int | ScaleFactor:
    """A side in pixels, "auto", or a scale factor such as "2x"."""
    if text.lower() == "auto":
        return ScaleFactor(1)
    try:
        return ScaleFactor.parse(text) if text.lower().endswith("x") else pixels(text)
    except argparse.ArgumentTypeError as error:
        detail = str(error)
        if "not a whole number" in detail:
            detail = f"{text!r} is neither a number of pixels, nor auto, nor a scale factor such as 2x"
        raise argparse.ArgumentTypeError(detail) from None
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def tile_size(text: str) -> int:
    value = number(int, least=128)(text)
    if value % 16:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of 16")
    return value


def bits(text: str) -> int:
    value = number(int)(text)
    if value not in QUANTIZE_CHOICES:
        raise argparse.ArgumentTypeError(f"{text} is not one of {', '.join(map(str, QUANTIZE_CHOICES))}")
    return value


def battery_limit(text: str) -> int:
    return max(1, min(99, number(int)(text)))


# ---- groups of options, in the order --help shows them


def add_model_options(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", "-m", required=required, help="a model's name, a Hugging Face repository (org/name), or a folder"
    )
    group.add_argument(
        "--base-model", help="the model it derives from, when the repository's or folder's name does not tell"
    )
    group.add_argument("--quantize", "-q", type=int, choices=QUANTIZE_CHOICES, help="bits per weight to quantize to")


def add_lora_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("LoRA")
    group.add_argument(
        "--lora",
        nargs="+",
        action="append",
        metavar=("PATH", "SCALE"),
        help="a LoRA and its scale (1); a file, a name from LORA_LIBRARY_PATH, org/name, or org/name:file; repeatable",
    )
    group.add_argument("--lora-style", choices=sorted(STYLES), help="an In-Context LoRA by the name of its style")
    group.add_argument("--lora-paths", nargs="*", help="LoRAs without scales; --lora says both at once")
    group.add_argument(
        "--lora-scales", nargs="*", type=number(float), help="one scale for each of --lora-paths", metavar="SCALE"
    )
    group.add_argument(
        "--bake-lora",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="add LoRAs to the weights once, instead of computing them in each step (default: yes)",
    )


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompt")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--prompt", help="what to draw; - reads it from standard input")
    either.add_argument("--prompt-file", type=Path, help="a text file with the prompt, read anew for each picture")
    group.add_argument("--negative-prompt", default="", help="what not to draw, for models that can use it")


def add_generation_options(parser: argparse.ArgumentParser, *, default_size: str) -> None:
    group = parser.add_argument_group("picture")
    group.add_argument("--seed", type=seed, nargs="+", help="one picture for each seed (default: one, from the clock)")
    group.add_argument(
        "--auto-seeds", type=number(int, most=10**6), default=-1, metavar="N", help="N pictures with random seeds"
    )
    group.add_argument(
        "--width", type=dimension, default="auto", help=f"pixels, 2x of the source picture, or auto ({default_size})"
    )
    group.add_argument("--height", type=dimension, default="auto", help="likewise")
    group.add_argument("--steps", type=steps, help="denoising steps (default: the model's)")
    group.add_argument(
        "--guidance",
        type=guidance,
        help=f"how closely to follow the prompt (default: {DEFAULT_GUIDANCE})",
    )
    group.add_argument(
        "--scheduler", default="linear", help="linear, flow_match_euler_discrete, or your own package.module.Class"
    )


def add_image_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("picture to start from")
    group.add_argument(
        "--image",
        nargs="+",
        metavar=("PATH", "STRENGTH"),
        help="a picture, and how much of it to keep, from 0 to 1 (default: 0.4)",
    )
    group.add_argument("--image-path", type=Path, help="the picture alone; --image says both at once")
    group.add_argument("--image-strength", type=strength, default=0.4, help="the strength alone")


def add_pid_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("PiD decoder")
    group.add_argument(
        "--pid-decode", action=argparse.BooleanOptionalAction, default=False, help="decode with PiD; not built yet"
    )
    group.add_argument(
        "--pid-degrade-sigma", type=float, default=0.0, help="noise to add before PiD decodes; not built yet"
    )


def add_output_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output",
        default="image.png",
        help="where to write; {seed} stands for the seed (default: image.png; an existing file is never replaced)",
    )
    group.add_argument(
        "--metadata", "--make-conf", action="store_true", help="also write the settings as NAME.metadata.json"
    )
    group.add_argument(
        "--no-metadata", "--no-exif", action="store_true", help="do not write the settings into the picture"
    )
    group.add_argument(
        "--config-from-metadata",
        "--config-from-conf",
        "-C",
        type=Path,
        metavar="FILE",
        help="take the settings of a .metadata.json or a picture; options given here come before them",
    )
    group.add_argument(
        "--stepwise-image-output-dir",
        metavar="DIR",
        help="write a picture of each step, and a strip of them all, to this folder",
    )


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    group.add_argument("--low-ram", action="store_true", help="use as little memory as possible; slower")
    group.add_argument(
        "--mlx-cache-limit-gb", type=number(float, above=0), metavar="GB", help="how much freed memory MLX may keep"
    )
    group.add_argument("--vae-tiling", action="store_true", help="decode in overlapping tiles")
    group.add_argument(
        "--vae-tile-size", type=tile_size, metavar="PIXELS", help="of a tile (default: 512); implies --vae-tiling"
    )
    group.add_argument(
        "--battery-percentage-stop-limit",
        "-B",
        type=battery_limit,
        default=5,
        metavar="PERCENT",
        help="on a Mac's battery, stop at this charge (default: 5)",
    )


# ---- what options mean together


def was_given(argv: Sequence[str] | None, *options: str) -> bool:
    """Whether one of these options stands on the command line, in any spelling that argparse takes."""
    for word in sys.argv[1:] if argv is None else argv:
        name = word.partition("=")[0]
        for option in options:
            if name == option or (len(option) == 2 and word.startswith(option) and not word.startswith("--")):
                return True
    return False


def refuse_what_is_not_built(args: argparse.Namespace) -> None:
    """
    Raises:
        NotBuiltError: an option whose feature this version lacks was given.
    """
    for given, sentence in (
        (
            getattr(args, "pid_decode", False) or getattr(args, "pid_degrade_sigma", 0.0),
            "PiD decoding is not built yet in this version: leave --pid-decode out",
        ),
    ):
        if given:
            raise NotBuiltError(sentence)


def settle_image(args: argparse.Namespace, argv: Sequence[str] | None) -> None:
    """Fold `--image PATH [STRENGTH]` into `image_path` and `image_strength`.

    Raises:
        UsageError: too many values, a strength that is not a number from 0 to 1, or the same said twice.
    """
    if args.image is None:
        return
    if was_given(argv, "--image-path", "--image-strength"):
        raise UsageError("--image says what --image-path and --image-strength say: use --image PATH [STRENGTH] alone")
    if len(args.image) > 2:
        raise UsageError(f"--image takes a path and a strength, not {len(args.image)} values: --image photo.jpg 0.6")
    args.image_path = Path(args.image[0])
    if len(args.image) == 2:
        try:
            args.image_strength = strength(args.image[1])
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"the strength of --image: {error}") from None


def settle_loras(args: argparse.Namespace, argv: Sequence[str] | None) -> None:
    """Fold `--lora PATH [SCALE]` and `--lora-style` into `lora_paths` and `lora_scales`, a scale for each path.

    Raises:
        UsageError: the same said twice, too many values, or a scale that is not a number.
    """
    if args.lora is not None:
        if was_given(argv, "--lora-paths", "--lora-scales"):
            raise UsageError(
                "--lora says what --lora-paths and --lora-scales say: use --lora PATH [SCALE] alone, once for each LoRA"
            )
        args.lora_paths, args.lora_scales = [], []
        for path, *scale in args.lora:
            if len(scale) > 1:
                raise UsageError(
                    f"--lora takes a path and a scale, not {len(scale) + 1} values: --lora {path} 0.7; say it again "
                    "for another LoRA"
                )
            try:
                args.lora_scales.append(number(float)(scale[0]) if scale else 1.0)
            except argparse.ArgumentTypeError as error:
                raise UsageError(f"the scale of --lora {path}: {error}") from None
            args.lora_paths.append(path)
    args.lora_paths = list(args.lora_paths or ())
    args.lora_scales = settle_scales(args.lora_scales, len(args.lora_paths))
    if args.lora_style is not None:
        args.lora_paths.append(style_path(args.lora_style))
        args.lora_scales.append(1.0)


def settle_seeds(args: argparse.Namespace) -> None:
    """Give every picture its seed, and every seed its file name."""
    import random
    import time

    if args.seed is None and args.auto_seeds > 0:
        args.seed = random.sample(range(10**9), args.auto_seeds)
    if args.seed is None:
        args.seed = [int(time.time())]
    if len(args.seed) > 1 and "{seed}" not in args.output:
        output = Path(args.output)
        # A name that is none is refused with the others, see `check_output`.
        args.output = str(output.with_stem(output.stem + "_seed_{seed}")) if output.name else args.output


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a `.metadata.json`, or those that a picture carries.

    Raises:
        UsageError: there is no such file, or it holds no settings.
    """
    import json

    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the settings in {path}: {error.strerror or error}") from None
    try:
        settings = json.loads(content)
    except (ValueError, RecursionError):
        from mflux.utils.metadata_reader import MetadataReader

        settings = MetadataReader.read_exif_metadata(path)
    if not isinstance(settings, dict):
        raise UsageError(f"{path} holds no settings: it is neither a .metadata.json nor a picture made with mflux")
    return settings


def saved(read: Callable[[str], Any] | None = None) -> Callable[[Any], Any]:
    """A reader for a setting that a file holds: text, or a number within the bounds of `read`, a type from above."""

    def check(value: Any):
        if read is None:
            if not isinstance(value, str):
                raise argparse.ArgumentTypeError(f"{str(value)[:40]} is not text")
            return value
        if type(value) not in (int, float):
            raise argparse.ArgumentTypeError(f"{str(value)[:40]!r} is not a number")
        return read(str(value))

    return check


def saved_list(read: Callable[[Any], Any]) -> Callable[[Any], list[Any]]:
    """A reader for a setting that is a list of what `read` reads."""

    def check(value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise argparse.ArgumentTypeError(f"{str(value)[:40]} is not a list")
        return [read(item) for item in value]

    return check


def saved_switch(value: Any) -> bool:
    """A setting that is true or false."""
    if not isinstance(value, bool):
        raise argparse.ArgumentTypeError(f"{str(value)[:40]} is neither true nor false")
    return value


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt for the next picture: from the option, from standard input, or from the file as it is now.

    Raises:
        PromptFileReadError: there is none, or it is not text.
    """
    from mflux.utils.exceptions import PromptFileReadError

    source = "--prompt"
    try:
        if args.prompt == "-":
            source = "standard input"
            prompt = sys.stdin.read().strip()
        elif args.prompt_file is not None:
            source = f"the prompt file {args.prompt_file}"
            prompt = args.prompt_file.read_text(encoding="utf-8").strip()
        else:
            prompt = args.prompt or ""
        # What the shell passed on in another encoding comes as surrogates.
        prompt.encode()
    except OSError as error:
        raise PromptFileReadError(f"cannot read {source}: {error.strerror or error}") from None
    except UnicodeError:
        raise PromptFileReadError(f"{source} is not text in UTF-8: write the prompt in UTF-8") from None
    if not prompt.strip():
        raise PromptFileReadError(f"there is no prompt: {source} is empty")
    return prompt
