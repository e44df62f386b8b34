"""Settings of an earlier picture in the place of options: `-C`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mflux.cli.parser.settle import was_given
from mflux.errors import NotBuiltError, UsageError
from mflux.text import shown, some
from mflux.utils.paths import is_repository, read_bounded
from mflux.utils.settings import SETTINGS

log = logging.getLogger(__name__)

# Of a `.metadata.json`: nobody's has more.
_LARGEST = 16 << 20


def take_settings(args: argparse.Namespace) -> None:
    """Fill in from the settings of an earlier picture what the command line leaves open.

    Raises:
        UsageError: a setting makes no sense, or asks for what this command has no option for.
        NotBuiltError: it asks for what is not built.
    """
    source = args.config_from_metadata
    settings = read_settings(source)
    if settings.get("pid_decode") and not was_given(args, "pid_decode"):
        raise NotBuiltError(
            f"{source}: the model of that picture is decoded with PiD, which is not built yet: --no-pid-decode does "
            "without"
        )
    args.taken = frozenset()
    # Its schedule is the command's of then, or the one that is written down.
    args.schedule_is_recorded = settings.get("scheduler") is not None
    args.of_old_picture = is_old(settings.get("mflux_version"))
    for setting in SETTINGS:
        value = settings.get(setting.name)
        if setting.read is None or value is None or value == [] or value == "" or setting.name == "pid_decode":
            continue
        if was_given(args, setting.name, *setting.beaten_by):
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
            setattr(args, setting.name, setting.read(value))
            args.taken |= {setting.name}
        except argparse.ArgumentTypeError as error:
            raise UsageError(
                f"{source}: its {setting.name} makes no sense, {shown(error, 300)}: say {setting.option} yourself"
            ) from None
    if args.scheduler and "." in args.scheduler and not was_given(args, "scheduler"):
        raise UsageError(f"{source}: its scheduler {shown(args.scheduler)} would be imported: say --scheduler yourself")
    _take_model(args, settings)
    _tell_repositories(args)


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


def _tell_repositories(args: argparse.Namespace) -> None:
    """Say which repositories the settings name, before one is asked: whoever made the picture chose them."""
    named = [] if was_given(args, "model") or args.model is None else [args.model]
    if not was_given(args, "lora", "lora_paths", "lora_style"):
        named += getattr(args, "lora_paths", None) or ()
    if named := [name for name in named if is_repository(name)]:
        log.info("%s names %s: Hugging Face is asked for what is not here yet", args.config_from_metadata, some(named))


def is_old(version: Any) -> bool:
    """Whether that is mflux 0.24's version or an older one."""
    return isinstance(version, str) and version.startswith("0.")


def _take_model(args: argparse.Namespace, settings: Mapping[str, Any]) -> None:
    """The command line of the earlier picture named a folder or repository; the model is what that was taken for."""
    if was_given(args, "model"):
        return
    names = {name: settings.get(name) for name in ("model", "model_path", "base_model")}
    for name, value in names.items():
        if value is not None and not isinstance(value, str):
            raise UsageError(
                f"{args.config_from_metadata}: its {name} makes no sense, {shown(value, 40)} is not text: say --model "
                "yourself"
            )
    model = names["model_path"] or names["model"]
    if model is None:
        return
    args.model = model
    if args.base_model is None:
        if names["model_path"]:
            args.base_model = names["model"]
        if names["base_model"] not in (None, "None"):  # older versions of mflux wrote this for a built-in model
            args.base_model = names["base_model"]
