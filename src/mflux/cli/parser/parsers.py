"""The argument parser of all commands. mflux 0.24 has its parser at this path."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import NoReturn

from mflux.cli.terminal import say
from mflux.errors import UsageError
from mflux.utils.paths import user_path


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
