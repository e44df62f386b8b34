"""Settings in the place of options: those of an earlier image (`-C`), and those that a program asks for."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mflux.cli.parser.parsers import MfluxParser, Said, default_of
from mflux.cli.terminal import nearest
from mflux.errors import NotBuiltError, UsageError
from mflux.models.common.family import all_settings
from mflux.text import shown, some
from mflux.utils.given_image import GivenImage, given
from mflux.utils.paths import is_bare, is_repository, read_bounded, user_path
from mflux.utils.settings import SETTINGS, Setting
from mflux.utils.values import Side, Switch, Text, Wrong

log = logging.getLogger(__name__)

# Options that take a file which is no image.
_NO_IMAGES = ("prompt_file", "config_from_metadata")
# Of a `.metadata.json`: nobody's has more.
_LARGEST = 16 << 20


def take_settings(args: argparse.Namespace, said: Said) -> Said:
    """Fill in from the settings of an earlier image what the command line leaves open.

    Returns:
        `said`, with what was taken.

    Raises:
        UsageError: a setting makes no sense, or asks for what this command has no option for.
        NotBuiltError: it asks for what is not built.
    """
    source = args.config_from_metadata
    settings = read_settings(source)
    if settings.get("pid_decode") and not said.was_typed("pid_decode"):
        raise NotBuiltError(
            f"{source}: the model of that picture is decoded with PiD, which is not built yet: --no-pid-decode does "
            "without"
        )
    taken = set()
    for setting in all_settings():
        value = settings.get(setting.name)
        if setting.kind is None or value is None or value == [] or value == "" or setting.name == "pid_decode":
            continue
        if said.was_typed(setting.name, *setting.beaten_by):
            continue
        if setting.name == "image_path" and settings.get("image_paths") and not hasattr(args, setting.name):
            # mflux 0.24 noted the first of several source pictures twice.
            continue
        if not hasattr(args, setting.name):
            raise UsageError(
                f"{source} was made with {setting.label.lower()} ({setting.option}), which this command does not have: "
                "use the command that made it"
            )
        try:
            found = setting.kind.of_setting(value)
        except argparse.ArgumentTypeError as error:
            raise UsageError(
                f"{source}: its {setting.name} makes no sense, {shown(error, 300)}: say {setting.option} yourself"
            ) from None
        _check_bare(source, setting, found)
        setattr(args, setting.name, found)
        taken.add(setting.name)
    if args.scheduler and "." in args.scheduler and not said.was_typed("scheduler"):
        raise UsageError(f"{source}: its scheduler {shown(args.scheduler)} would be imported: say --scheduler yourself")
    take_model(args, said, settings)
    _tell_what_is_taken(args, said, taken)
    _tell_repositories(args, said)
    version = settings.get("mflux_version")
    return replace(said, file=frozenset(taken), file_version=version if isinstance(version, str) else None)


def as_options(parser: MfluxParser, settings: Mapping[str, Any]) -> tuple[argparse.Namespace, Said]:
    """What a command line that asks for these settings would be parsed to.

    Args:
        settings: as an image records them, and options by their destinations; None stands for what is not said.

    Raises:
        UsageError: one of them is unknown, makes no sense, is missing, or excludes another.
    """
    if not isinstance(settings, Mapping):
        raise UsageError(f"settings are {shown(repr(settings), 60)}, which is no table of names and values")
    if odd := [name for name in settings if not isinstance(name, str)]:
        raise UsageError(f"{parser.prog} has no setting {shown(repr(odd[0]), 60)}: names are text")
    args = argparse.Namespace()
    options = {action.dest: action for action in parser._actions if action.default is not argparse.SUPPRESS}
    for name, action in options.items():
        setattr(args, name, default_of(action))
    wanted = {name: _plain(value) for name, value in settings.items() if value is not None}
    kinds = {setting.name: setting.kind for setting in all_settings() if setting.kind is not None}
    for name, value in wanted.items():
        if name == "device" and name in options:
            raise UsageError(
                "a device is chosen for the whole process: set MFLUX_DEVICE before mflux is imported, or call "
                "mflux.backend.use_device"
            )
        if name not in options:
            raise UsageError(f"{parser.prog} has no setting {shown(repr(name), 60)}{nearest(name, options)}")
        # A list of seeds is one only here, and a scale factor is no size that an image has.
        as_option = isinstance(value, (list, GivenImage)) or isinstance(options[name].type, Side)
        kind = None if as_option else kinds.get(name)
        try:
            setattr(args, name, kind.of_setting(value) if kind else _as_typed(options[name], value))
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"{name}: {shown(error, 300)}") from None
    if missing := [name for name, action in options.items() if action.required and name not in wanted]:
        raise UsageError(f"{parser.prog} needs {some(missing)}")
    for group in parser._mutually_exclusive_groups:
        names = [action.dest for action in group._group_actions if action.dest in wanted]
        if len(names) > 1:
            raise UsageError(f"{names[1]} is not allowed with {names[0]}")
    return args, Said(frozenset(wanted), by_program=True)


def _plain(value: Any) -> Any:
    """A value as JSON has it, but for images: paths as text."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if (image := given(value)) is not None:
        return image
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _as_typed(action: argparse.Action, value: Any) -> Any:
    """A value, checked as the option's words are on a command line.

    Raises:
        Wrong: it is none that could be typed.
    """
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        return Switch().of_setting(value)
    if isinstance(action, argparse._AppendAction):
        return [_words(action, item) for item in _list(value)]
    return _words(action, value)


def _words(action: argparse.Action, value: Any) -> Any:
    """What stands behind an option once."""
    if action.nargs not in ("*", "+"):
        return _word(action, value)
    if not _list(value) and action.nargs == "+":
        raise Wrong("the list is empty")
    return [_word(action, item) for item in value]


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise Wrong(f"{shown(value, 40)} is not a list")
    return value


def _word(action: argparse.Action, value: Any) -> Any:
    if isinstance(value, GivenImage):
        if action.type is Path and action.dest not in _NO_IMAGES:
            return value
        raise Wrong("an image is no value for it")
    if action.type is None or action.type is Path:
        value = Text().of_setting(value)
    elif isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise Wrong(f"{shown(value, 40)} is neither text nor a number")
    read: Any = user_path if action.type is Path else action.type or str
    found = read(str(value))
    if action.choices is not None and found not in action.choices:
        raise Wrong(f"{shown(repr(found), 40)} is not one of {', '.join(map(str, action.choices))}")
    return found


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


def _check_bare(source: Path, setting: Setting, value: Any) -> None:
    """
    Raises:
        UsageError: the setting names a file by its folders. Whoever made the image would choose among this user's
            files; mflux itself records names alone.
    """
    for name in (value if isinstance(value, (list, tuple)) else [value]) if setting.takes else ():
        if not is_bare(name, or_repository=setting.takes == "source"):
            raise UsageError(
                f"{source}: its {setting.name} names {shown(name, 200)}, and a stranger's settings choose none of your "
                f"files: say {setting.option} yourself"
            )


def _tell_what_is_taken(args: argparse.Namespace, said: Said, taken: Iterable[str]) -> None:
    """Say what is taken over, with the names of files and models."""
    told = []
    if not said.was_typed("model") and args.model is not None:
        told.append(f"model {shown(args.model, 100)}")
    for setting in (setting for setting in all_settings() if setting.name in taken):
        value = getattr(args, setting.name)
        if setting.takes:
            names = some(value if isinstance(value, (list, tuple)) else [value], 3, 100, counted=True)
            told.append(f"{setting.label.lower()} {names}")
        else:
            told.append(setting.label.lower())
    if told:
        log.info("from %s: %s", args.config_from_metadata, ", ".join(told))


def _tell_repositories(args: argparse.Namespace, said: Said) -> None:
    """Say which repositories the settings name, before one is asked: whoever made the picture chose them."""
    named = [] if said.was_typed("model") or args.model is None else [args.model]
    if not said.was_typed("lora", "lora_paths", "lora_style"):
        named += getattr(args, "lora_paths", None) or ()
    if named := [name for name in named if is_repository(name)]:
        log.info("%s names %s: Hugging Face is asked for what is not here yet", args.config_from_metadata, some(named))


def take_model(args: argparse.Namespace, said: Said, settings: Mapping[str, Any]) -> None:
    """The command line of the earlier picture named a folder or repository; the model is what that was taken for."""
    if said.was_typed("model"):
        return
    names = {name: settings.get(name) for name in ("model", "model_path", "base_model")}
    for name, value in names.items():
        if value is not None and not isinstance(value, str):
            raise UsageError(
                f"{args.config_from_metadata}: its {name} makes no sense, {shown(value, 40)} is not text: say --model "
                "yourself"
            )
    for setting in (setting for setting in SETTINGS if names.get(setting.name)):
        # What mflux 0.24 wrote for a built-in model.
        if names[setting.name] != "None":
            _check_bare(args.config_from_metadata, setting, names[setting.name])
    model = names["model_path"] or names["model"]
    if model is None:
        return
    args.model = model
    if args.base_model is None:
        if names["model_path"]:
            args.base_model = names["model"]
        if names["base_model"] not in (None, "None"):  # older versions of mflux wrote this for a built-in model
            args.base_model = names["base_model"]
