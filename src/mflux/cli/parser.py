"""What all commands share: the parser, groups of options, and how a failure ends.

Nothing here loads MLX, numpy or PIL: `--help` and usage errors answer at once.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from mflux.cli.process import open_standard_streams, signals_raise, status_of
from mflux.errors import MfluxError, NotBuiltError, UsageError
from mflux.models.common.lora.library import settle_scales
from mflux.models.flux.lora_styles import STYLES, style_path
from mflux.text import lines_shown, one_line, shown, size
from mflux.utils import values
from mflux.utils.paths import read_bounded, user_path
from mflux.utils.values import number

log = logging.getLogger(__name__)


class _NotGiven:
    """Stands where an option was not said, until its default takes the place."""

    def __repr__(self) -> str:
        return "not given"


_NOT_GIVEN = _NotGiven()


class MfluxParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and whose long options are not to be shortened."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        self.add_argument("--verbose", "-v", action="store_true", help="say more about what is done")
        self.add_argument("--version", action=_Version, help="show the version and exit")

    def parse_args(self, args=None, namespace=None):
        """As argparse has it; the result's `given` are the destinations of the options that were said."""
        namespace = argparse.Namespace()
        options = {
            action.dest: action
            for action in self._actions
            # What is said several times is collected in a list of its own, which nothing else begins.
            if action.option_strings and not isinstance(action, argparse._AppendAction)
        }
        for name, action in options.items():
            if action.default is not argparse.SUPPRESS:
                setattr(namespace, name, _NOT_GIVEN)
        parsed = super().parse_args(args, namespace)
        given = {name for name, value in vars(parsed).items() if value is not _NOT_GIVEN and value is not None}
        for name in [name for name, value in vars(parsed).items() if value is _NOT_GIVEN]:
            action = options[name]
            default = action.default
            setattr(parsed, name, action.type(default) if isinstance(default, str) and action.type else default)
        parsed.given = frozenset(given)
        if parsed.verbose:
            # Also where it stands in one word with others, as in -vq8.
            logging.getLogger("mflux").setLevel(logging.DEBUG)
        return parsed

    def _get_value(self, action, arg_string):
        """`~` stands for a home folder in every option that takes a path."""
        if action.type is not Path:
            return super()._get_value(action, arg_string)
        try:
            # From the text: of an empty one `Path` would make the folder that one is in.
            return user_path(arg_string)
        except UsageError as error:
            raise argparse.ArgumentError(action, str(error)) from None

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


class _Version(argparse.Action):
    def __init__(self, option_strings, dest, **kwargs):
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        import mflux

        say(f"mflux {mflux.__version__}")
        parser.exit()


class _LineFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        message = one_line(super().format(record))
        return f"warning: {message}" if record.levelno >= logging.WARNING else message


def run(command: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None) -> int:
    """Run a command's body and turn every expected failure into one `error:` line and an exit status.

    Returns:
        0, or the failure's status: 1, 2 for usage, 130 for Ctrl-C, 143 for SIGTERM.
    """
    # Nothing is to be opened before.
    _Output.failure = None if open_standard_streams() else OSError("it is closed")
    _log_to_stderr(argv)
    try:
        with signals_raise(), warnings.catch_warnings():
            # What a library warns of is one line like our own.
            warnings.showwarning = lambda message, *_: log.warning("%s", message)
            status = command(argv) or 0
        if _Output.failure is None:
            return status
        if not isinstance(_Output.failure, BrokenPipeError):
            reason = getattr(_Output.failure, "strerror", None) or _Output.failure
            complain(f"cannot write to standard output ({reason}): the work is done, its results were not told")
        return 1
    except MfluxError as error:
        # One line, whatever a library's own message had in it.
        complain(str(error))
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        complain("stopped")
        return status_of(interrupt)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        complain("not enough memory: try --low-ram, or a smaller --width and --height")
        return 1


def is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """MLX has no exception of its own for memory that it cannot have."""
    return isinstance(error, MemoryError) or "alloc" in str(error)


class _Output:
    """Why standard output takes nothing more, if it does not."""

    failure: Exception | None = None


def say(text: object) -> None:
    """A command's result on stdout, in one line or in several. What would move the cursor, and what the terminal cannot
    show, is escaped; where stdout takes nothing more (its device is full, its reader has gone) work goes on, and the
    command ends with a failure."""
    if _Output.failure is not None:
        return
    line = lines_shown(text)
    try:
        try:
            print(line, flush=True)
        except UnicodeEncodeError:
            encoding = getattr(sys.stdout, "encoding", None) or "ascii"
            print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except (OSError, ValueError) as error:
        _Output.failure = error
        # What is left in its buffer would fail again while Python shuts down.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say_line(text: object) -> None:
    """A result that is one line, such as where a picture went, whatever is in its name."""
    say(shown(text, most=10_000))


def nearest(name: str, known: Iterable[str]) -> str:
    """What was perhaps meant, as a part of a sentence."""
    near = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {near[0]}?" if near else ""


def complain(message: str) -> None:
    """The one line on stderr that says why a command failed."""
    print("error:", one_line(message), file=sys.stderr)


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


# ---- groups of options, in the order --help shows them


def add_model_options(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", "-m", required=required, help="a model's name, a Hugging Face repository (org/name), or a folder"
    )
    group.add_argument(
        "--base-model", help="the model it derives from, when the repository's or folder's name does not tell"
    )
    group.add_argument(
        "--quantize", "-q", type=int, choices=values.QUANTIZE_CHOICES, help="bits per weight to quantize to"
    )


def add_lora_options(parser: argparse.ArgumentParser, *, style: bool = True) -> None:
    group = parser.add_argument_group("LoRA")
    group.add_argument(
        "--lora",
        nargs="+",
        action="append",
        metavar=("PATH", "SCALE"),
        help="a LoRA and its scale (1); a file, a name from LORA_LIBRARY_PATH, org/name, or org/name:file; repeatable",
    )
    if style:
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


def add_generation_options(
    parser: argparse.ArgumentParser, *, default_size: str, guidance: str, scheduler: str = "linear"
) -> None:
    group = parser.add_argument_group("picture")
    group.add_argument(
        "--seed", type=values.seed, nargs="+", help="one picture for each seed (default: one, from the clock)"
    )
    group.add_argument(
        "--auto-seeds", type=number(int, most=10**6), default=-1, metavar="N", help="N pictures with random seeds"
    )
    group.add_argument(
        "--width",
        type=values.dimension,
        default="auto",
        help=f"pixels, 2x of the source picture, or auto ({default_size})",
    )
    group.add_argument("--height", type=values.dimension, default="auto", help="likewise")
    group.add_argument("--steps", type=values.steps, help="denoising steps (default: the model's)")
    group.add_argument(
        "--guidance",
        type=values.guidance,
        help=f"how closely to follow the prompt (default: {guidance})",
    )
    group.add_argument(
        "--scheduler", default=scheduler, help="linear, flow_match_euler_discrete, or your own package.module.Class"
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
    group.add_argument("--image-strength", type=values.strength, default=0.4, help="the strength alone")


def add_compute_precision_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--compute-precision",
        choices=["float16"],
        help="compute attention and feed-forwards in float16, for GPUs that are slow with bfloat16",
    )


def add_vae_precision_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--vae-full-precision",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="run the autoencoder in float32 and on the whole picture at once; takes more memory",
    )


def add_float32_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--float32",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="keep what passes between the transformer's layers in float32, as mflux up to 0.20 did",
    )


def add_pid_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("PiD decoder")
    group.add_argument(
        "--pid-decode", action=argparse.BooleanOptionalAction, default=False, help="decode with PiD; not built yet"
    )
    group.add_argument(
        "--pid-degrade-sigma", type=float, default=0.0, help="noise to add before PiD decodes; not built yet"
    )


def add_output_options(parser: argparse.ArgumentParser, *, settings: bool = True) -> None:
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
    if settings:
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
        "--vae-tile-size",
        type=values.tile_size,
        metavar="PIXELS",
        help="of a tile (default: 512); implies --vae-tiling",
    )
    group.add_argument(
        "--battery-percentage-stop-limit",
        "-B",
        type=values.battery_limit,
        default=5,
        metavar="PERCENT",
        help="on a Mac's battery, stop at this charge (default: 5)",
    )


# ---- what options mean together

# Of a prompt's file, or of a `.metadata.json`: nobody's has more.
_LARGEST = 16 << 20


def was_given(args: argparse.Namespace, *names: str) -> bool:
    """Whether one of these options, by their destinations, stands on the command line."""
    return any(name in args.given for name in names)


def was_said(args: argparse.Namespace, *names: str) -> bool:
    """Whether one of them stands there, or in the settings that `-C` names."""
    return was_given(args, *names) or any(name in getattr(args, "taken", ()) for name in names)


_NO_PID = "PiD decoding is not built yet in this version: leave --pid-decode out"
# Options that are refused, by their destinations, and with what.
NOT_BUILT_OPTIONS = {
    "pid_decode": _NO_PID,
    "pid_degrade_sigma": _NO_PID,
    "hf_symlink": "links into Hugging Face's cache are not built yet in this version: leave --hf-symlink out",
}


def refuse_what_is_not_built(args: argparse.Namespace) -> None:
    """
    Raises:
        NotBuiltError: an option whose feature this version lacks was given.
    """
    for name, sentence in NOT_BUILT_OPTIONS.items():
        if getattr(args, name, None) not in (None, False, 0.0):
            raise NotBuiltError(sentence)


def settle_image(args: argparse.Namespace) -> None:
    """Fold `--image PATH [STRENGTH]` into `image_path` and `image_strength`.

    Raises:
        UsageError: too many values, a strength that is not a number from 0 to 1, or the same said twice.
    """
    if args.image is None:
        return
    if was_given(args, "image_path", "image_strength"):
        raise UsageError("--image says what --image-path and --image-strength say: use --image PATH [STRENGTH] alone")
    if len(args.image) > 2:
        raise UsageError(f"--image takes a path and a strength, not {len(args.image)} values: --image photo.jpg 0.6")
    args.image_path = Path(args.image[0])
    if len(args.image) == 2:
        try:
            args.image_strength = values.strength(args.image[1])
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"the strength of --image: {error}") from None


def settle_loras(args: argparse.Namespace) -> None:
    """Fold `--lora PATH [SCALE]` and `--lora-style` into `lora_paths` and `lora_scales`, a scale for each path.

    Raises:
        UsageError: the same said twice, too many values, or a scale that is not a number.
    """
    if args.lora is not None:
        if was_given(args, "lora_paths", "lora_scales"):
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
    if getattr(args, "lora_style", None) is not None:
        args.lora_paths.append(style_path(args.lora_style))
        args.lora_scales.append(1.0)


def settle_paths(args: argparse.Namespace, sources: Sequence[str]) -> None:
    """Expand `~` in every option that takes a path, inputs and outputs alike.

    Args:
        sources: destinations of the command's own options that name pictures.

    Raises:
        UsageError: there is no such user.
    """
    for name in ("image_path", "path", *sources):
        if value := getattr(args, name, None):
            paths = [values.path(one, _option(name)) for one in (value if isinstance(value, list) else [value])]
            setattr(args, name, paths if isinstance(value, list) else paths[0])
    for name in ("output", "stepwise_image_output_dir", "model"):
        # A model may be a name or a repository: only what begins like a path is one.
        if (value := getattr(args, name, None)) and value.startswith("~"):
            setattr(args, name, str(values.path(value, _option(name))))


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def save_picture(image, args: argparse.Namespace, seed: int, pixels=None, output: str | None = None) -> Path:
    """Write a picture, or other pixels with its settings, to `output` or where the options say, and tell where it
    went."""
    path = image.save_with_image(
        output or args.output.replace("{seed}", str(seed)),
        image.image if pixels is None else pixels,
        export_json_metadata=args.metadata,
        embed_metadata=not args.no_metadata,
    )
    say_line(path)
    return path


def settle_seeds(args: argparse.Namespace) -> None:
    """Give every picture its seed, and every seed its file name.

    Raises:
        UsageError: `--auto-seeds` asks for no picture, or stands beside `--seed`.
    """
    import random
    import time

    if was_given(args, "auto_seeds"):
        if was_given(args, "seed"):
            raise UsageError("--auto-seeds draws its seeds and --seed says them: leave one of them out")
        if args.auto_seeds <= 0:
            raise UsageError(f"--auto-seeds {args.auto_seeds} asks for no picture: give 1 or more, or leave it out")
    if args.auto_seeds > 0:
        args.seed = random.sample(range(10**9), args.auto_seeds)
    if args.seed is None:
        args.seed = [int(time.time())]
    if len(args.seed) > 1:
        add_to_name(args, "_seed_", "{seed}")


def add_to_name(args: argparse.Namespace, words: str, placeholder: str) -> None:
    """Let `--output` give each of several pictures a name, unless it does."""
    output = Path(args.output)
    # A name that is none is refused with the others, see `check_output`.
    if placeholder not in args.output and output.name:
        args.output = str(output.with_stem(output.stem + words + placeholder))


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a `.metadata.json`, or those that a picture carries.

    Raises:
        UsageError: there is no such file, or it holds no settings.
    """
    from mflux.utils.strict_json import NotJSON, parse

    try:
        content = read_bounded(path, _LARGEST)
    except OSError as error:
        raise UsageError(f"cannot read the settings in {path}: {error.strerror or error}") from None
    try:
        # A picture may be larger, and is none of JSON's.
        settings = parse(content if len(content) <= _LARGEST else b"")
    except NotJSON as error:
        if content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            raise UsageError(f"the settings in {path} cannot be read: it {error}") from None
        from mflux.utils.metadata_reader import MetadataReader

        settings = MetadataReader.read_exif_metadata(path)
    if not isinstance(settings, dict):
        raise UsageError(f"{path} holds no settings: it is neither a .metadata.json nor a picture made with mflux")
    return settings


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
            if sys.stdin is None:
                raise PromptFileReadError(
                    'there is no prompt: standard input is closed: say it with --prompt "…", or pipe it in'
                )
            prompt = sys.stdin.read().removeprefix("\ufeff").strip()
        elif args.prompt_file is not None:
            source = f"the prompt file {args.prompt_file}"
            content = read_bounded(args.prompt_file, _LARGEST)
            if len(content) > _LARGEST:
                raise PromptFileReadError(f"{source} has more than {size(_LARGEST)}: no prompt is as long")
            prompt = content.decode("utf-8-sig").strip()
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
