"""The argument parser of all commands. mflux 0.24 has its parser at this path."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mflux.cli.terminal import complain, say
from mflux.errors import MfluxError, UsageError
from mflux.utils.paths import user_path


@dataclass(frozen=True)
class Said:
    """Who chose the values of options, by their destinations; what nobody chose has its default.

    Attributes:
        command_line: what was typed, or what a program asks for in its place.
        file: what the settings of an earlier image say, see `mflux.cli.replay`.
        file_version: the version of mflux that wrote those settings.
        by_program: whether there is no command line, and no standard input to read a prompt from.
    """

    command_line: frozenset[str] = frozenset()
    file: frozenset[str] = frozenset()
    file_version: str | None = None
    by_program: bool = False

    def was_typed(self, *names: str) -> bool:
        """Whether one of these options stands on the command line."""
        return not self.command_line.isdisjoint(names)

    def was_set(self, *names: str) -> bool:
        """Whether one of them stands there, or in the settings of the earlier image."""
        return self.was_typed(*names) or not self.file.isdisjoint(names)

    @property
    def is_old(self) -> bool:
        """Whether the earlier image was made with mflux 0.24 or an older version."""
        return self.file_version is not None and self.file_version.startswith("0.")


class _NotTyped:
    """Stands where an option was not typed, until its default takes the place."""

    def __repr__(self) -> str:
        return "not typed"


_NOT_TYPED = _NotTyped()


class Options(argparse.Namespace):
    """Options that know who chose them, which a plugin hands on without knowing it."""

    __slots__ = ("said",)
    said: Said


class MfluxParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and whose long options are not to be shortened.

    Attributes:
        settles: settles the options of a plugin's command, whose own process this is: there `parse_args` gives what
            0.24's gave, and what is wrong ends the process as argparse does.
    """

    settles: Callable[[argparse.Namespace, Said], Said] | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        self._parses = False
        self.add_argument("--verbose", "-v", action="store_true", help="say more about what is done")
        self.add_argument("--version", action=_Version, help="show the version and exit")

    def parse(self, argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Said]:
        """Parse, and tell what was typed."""
        blank = argparse.Namespace(**dict.fromkeys(self._typed_options(), _NOT_TYPED))
        self._parses = True
        try:
            args = super().parse_args(argv, blank)
        finally:
            self._parses = False
        typed = {name for name, value in vars(args).items() if value is not _NOT_TYPED and value is not None}
        for name, action in self._typed_options().items():
            if getattr(args, name) is _NOT_TYPED:
                setattr(args, name, default_of(action))
        if args.verbose:
            # Also where it stands in one word with others, as in -vq8.
            logging.getLogger("mflux").setLevel(logging.DEBUG)
        return args, Said(frozenset(typed))

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: None = None
    ) -> argparse.Namespace:
        """The options alone, as argparse has them; for a plugin, settled."""
        if self.settles is None:
            return self.parse(args)[0]
        try:
            parsed, said = self.parse(args)
            options = Options(**vars(parsed))
            options.said = self.settles(options, said)
            return options
        except MfluxError as error:
            self._end(error)

    def _typed_options(self) -> dict[str, argparse.Action]:
        """Options that `parse` can see were typed; what is said several times is collected in a list of its own, which
        nothing else begins."""
        return {
            action.dest: action
            for action in self._actions
            if action.option_strings
            and action.default is not argparse.SUPPRESS
            and not isinstance(action, argparse._AppendAction)
        }

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """`~` stands for a home folder in every option that takes a path."""
        if action.type is not Path:
            return super()._get_value(action, arg_string)
        try:
            # From the text: of an empty one `Path` would make the folder that one is in.
            return user_path(arg_string)
        except UsageError as error:
            raise argparse.ArgumentError(action, str(error)) from None

    def error(self, message: str) -> NoReturn:
        error = UsageError(f"{message} (see {self.prog} --help)")
        if self.settles is not None and not self._parses:
            # A plugin's own refusal.
            self._end(error)
        raise error

    @staticmethod
    def _end(error: MfluxError) -> NoReturn:
        complain(str(error))
        sys.exit(error.exit_code)

    # What plugins take from mflux 0.24's parser.

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
            if MfluxParser._option_was_provided(option):
                warnings.warn(f"{option} is ignored: {reason}", stacklevel=2)


# mflux 0.24's name.
CommandLineParser = MfluxParser


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any):
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, **kwargs)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        import mflux

        say(f"mflux {mflux.__version__}")
        parser.exit()


def default_of(action: argparse.Action) -> Any:
    """What an option is where nobody says it."""
    is_text = isinstance(action.default, str) and action.type is not None
    return action.type(action.default) if is_text and callable(action.type) else action.default
