"""One entry for all families: `mflux-generate` generates with whatever model it is given, as the family's command does.

The words are looked at once, for the model alone; everything else in them is the business of the command that they are
handed to.
"""

from __future__ import annotations

import argparse
import importlib
import logging
from collections.abc import Sequence
from typing import NoReturn

from mflux.cli import replay
from mflux.cli.generate import Generate
from mflux.cli.parser.parsers import Said
from mflux.errors import MfluxError, UsageError
from mflux.models.common.config.model_config import built_key
from mflux.models.common.family import built, first_command
from mflux.utils.paths import user_path

log = logging.getLogger(__name__)


def command_for(words: Sequence[str]) -> Generate | None:
    """The command that generates with the model that a command line names: the first of those that have it.

    Returns:
        None where no model is named, or none that is known, or it is another kind of command's: whoever asked says so.
    """
    try:
        key = _model_key(words)
        command = None if key is None else first_command(key)
    except MfluxError:
        return None
    if command is None:
        return None
    found = getattr(importlib.import_module(command.module), "COMMAND", None)
    return found if isinstance(found, Generate) else None


def asks_for_help(words: Sequence[str]) -> bool:
    """Whether a command line asks for a command's options."""
    return not {"--help", "-h"}.isdisjoint(words)


def help_for(command: Generate, words: Sequence[str] | None) -> None:
    """Show a command's help. Of a model that is unknown, not built, or another kind of command's, a warning says so
    first: the help says nothing of that one."""
    try:
        key = _model_key(words or ())
        if key is not None and built_key(key) not in command.models:
            log.warning("%s does not generate with %s: see %s --help", command.command.prog, key, built()[key])
    except MfluxError as error:
        log.warning("%s", error)
    command.run(["--help"])


def _model_key(words: Sequence[str]) -> str | None:
    """The model, as a key of the registry: by `--model` and `--base-model`, by the settings of an earlier image, or by
    what a saved folder says of itself."""
    parser = _Words(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", "-m")
    parser.add_argument("--base-model")
    parser.add_argument("--config-from-metadata", "--config-from-conf", "-C", type=user_path)
    args, _ = parser.parse_known_args(words)
    typed = Said(frozenset(name for name, value in vars(args).items() if value is not None))
    if args.config_from_metadata is not None and args.model is None:
        replay.take_model(args, typed, replay.read_settings(args.config_from_metadata))
    if args.model is None and args.base_model is None:
        return None

    from mflux.models.common.config.model_config import key_of
    from mflux.models.common.saved_model import recorded_base_model

    model = args.model or args.base_model
    return key_of(model, args.base_model or recorded_base_model(model))


class _Words(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)
