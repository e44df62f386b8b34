"""The parser that programs take from mflux 0.24, `CommandLineParser`: for a command of their own in its own process.

Our commands parse with `parse`, and end with what `terminal.run` makes of an error. A plugin calls `parse_args`, which
gives settled options as 0.24's did, and ends the process as argparse does.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from mflux.cli.parser import groups
from mflux.cli.parser.parsers import MfluxParser, Said
from mflux.cli.terminal import complain
from mflux.errors import MfluxError, NotBuiltError, UsageError
from mflux.utils import values


class Options(argparse.Namespace):
    """Options that know who chose them, which a plugin hands on without knowing it."""

    __slots__ = ("said",)
    said: Said


class CommandLineParser(MfluxParser):
    """A command's parser, or one that a program puts together of groups of options.

    Attributes:
        settles: gives each option the value that it stands for, and returns who chose what.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.settles: Callable[[argparse.Namespace, Said], Said] = _settle
        self._parses = self._reads_settings = False

    def parse(self, argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Said]:
        self._parses = True
        try:
            return super().parse(argv)
        finally:
            self._parses = False

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: None = None
    ) -> Options:
        """Options, settled; what is wrong with them ends the process."""
        try:
            parsed, said = self.parse(args)
            options = Options(**vars(parsed))
            options.said = self.settles(options, said)
            return options
        except MfluxError as error:
            _end(error)

    def error(self, message: str) -> NoReturn:
        if self._parses:
            super().error(message)
        # A plugin's own refusal.
        _end(UsageError(f"{message} (see {self.prog} --help)"))

    @staticmethod
    def _option_was_provided(*option_names: str) -> bool:
        """Whether one of these options stands on this process's command line: "--steps", "-s"."""
        short = tuple(name for name in option_names if len(name) == 2)
        return any(
            word.partition("=")[0] in option_names or (word.startswith(short) and not word.startswith("--"))
            for word in sys.argv[1:]
        )

    @staticmethod
    def warn_ignored_options(options_reasons: Mapping[str, str]) -> None:
        """Warn of each option of these that stands there, with the reason why it has no effect."""
        for option, reason in options_reasons.items():
            if CommandLineParser._option_was_provided(option):
                warnings.warn(f"{option} is ignored: {reason}", stacklevel=2)

    # ---- groups of options, by mflux 0.24's names

    def add_general_arguments(self) -> None:
        groups.add_machine_options(self)

    def add_model_arguments(self, path_type: str = "load", require_model_arg: bool = True, **_: Any) -> None:
        groups.add_model_options(self, required=require_model_arg)
        if path_type == "save":
            self.add_argument("--path", help="the folder to save the model to")

    def add_lora_arguments(self, **_: Any) -> None:
        groups.add_lora_options(self)

    def add_image_generator_arguments(
        self,
        supports_metadata_config: bool = False,
        require_prompt: bool = True,
        supports_dimension_scale_factor: bool = False,
    ) -> None:
        groups.add_prompt_options(self)
        groups.add_generation_options(self, default_size="1024", guidance="the model's", scheduler="linear")
        self._reads_settings = supports_metadata_config
        for action in self._actions:
            if action.dest in ("width", "height") and not supports_dimension_scale_factor:
                action.type, action.default = values.pixels, 1024

    def add_image_to_image_arguments(self, required: bool = False) -> None:
        groups.add_image_options(self)

    def add_compute_precision_arguments(self) -> None:
        groups.add_compute_precision_option(self)

    def add_vae_full_precision_arguments(self) -> None:
        groups.add_vae_precision_option(self)

    def add_pid_decode_arguments(self) -> None:
        groups.add_pid_options(self)

    def add_output_arguments(self) -> None:
        groups.add_output_options(self, settings=self._reads_settings)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("add_") and name.endswith(("_arguments", "_argument")):
            raise _NoGroupError(
                f"CommandLineParser has no {name} in this version: begin with build_parser of the command that has "
                "these options (docs/programs.md)"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class _NoGroupError(NotBuiltError, AttributeError):
    """So that `hasattr` says no, and whoever goes on without asking is told why."""


def _end(error: MfluxError) -> NoReturn:
    complain(str(error))
    sys.exit(error.exit_code)


def _settle(args: argparse.Namespace, said: Said) -> Said:
    """The options of a parser that a program put together: those that there are, as a command settles them."""
    from mflux.cli import replay
    from mflux.cli.parser import settle
    from mflux.models.common.config.model_config import is_builtin
    from mflux.programs.defaults import model_inference_steps

    settle.refuse_what_is_not_built(args)
    if hasattr(args, "image"):
        settle.settle_image(args, said)
    if getattr(args, "config_from_metadata", None):
        said = replay.take_settings(args, said)
    if hasattr(args, "lora"):
        settle.settle_loras(args, said)
    if hasattr(args, "seed") and hasattr(args, "output"):
        settle.settle_seeds(args, said)
    settle.settle_paths(args, ())
    if hasattr(args, "scheduler") and not said.was_set("scheduler"):
        # The checkpoint's.
        args.scheduler = None
    model = getattr(args, "model", None)
    if hasattr(args, "model"):
        args.model_path = None if model is None or is_builtin(model) else model
    if hasattr(args, "steps") and args.steps is None:
        args.steps = model_inference_steps(model, getattr(args, "base_model", None))
    if getattr(args, "prompt", "") is None and args.prompt_file is None:
        raise UsageError('no prompt was given: use --prompt "…", --prompt - or --prompt-file FILE')
    return said
