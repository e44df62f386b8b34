"""The argument parser of all commands. mflux 0.24 has its parser at this path."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mflux.cli.terminal import say
from mflux.errors import UsageError
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
        numbers = re.match(r"(\d{1,9})\.(\d{1,9})", self.file_version or "")
        # 0.25.0 is the first that is not.
        return numbers is not None and (int(numbers[1]), int(numbers[2])) < (0, 25)


class _NotTyped:
    """Stands where an option was not typed, until its default takes the place."""

    def __repr__(self) -> str:
        return "not typed"


_NOT_TYPED = _NotTyped()


class MfluxParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and whose long options are not to be shortened."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        self.add_argument("--verbose", "-v", action="store_true", help="say more about what is done")
        self.add_argument("--version", action=_Version, help="show the version and exit")

    def parse(self, argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Said]:
        """Parse, and tell what was typed."""
        words = list(sys.argv[1:] if argv is None else argv)
        asked = words[: words.index("--")] if "--" in words else words
        # Help never fails, whatever else stands in the line; a command of several says which one's help is meant.
        if not {"--help", "-h"}.isdisjoint(asked) and self.add_help and self._subparsers is None:
            self.print_help()
            self.exit()
        blank = argparse.Namespace(**dict.fromkeys(self._typed_options(), _NOT_TYPED))
        args = super().parse_args(argv, blank)
        typed = {name for name, value in vars(args).items() if value is not _NOT_TYPED and value is not None}
        for name, action in self._typed_options().items():
            if getattr(args, name) is _NOT_TYPED:
                setattr(args, name, default_of(action))
        if args.verbose:
            # Also where it stands in one word with others, as in -vq8.
            logging.getLogger("mflux").setLevel(logging.DEBUG)
        if getattr(args, "device", None) is not None:
            from mflux.backend import use_device

            use_device(args.device)
        return args, Said(frozenset(typed))

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: None = None
    ) -> argparse.Namespace:
        """The options alone, as argparse has them."""
        return self.parse(args)[0]

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
        raise UsageError(f"{message} (see {self.prog} --help)")


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
