"""`mflux-capabilities`: what every command takes, for programs, read off the commands' own parsers and descriptions.

The layout is mflux 0.24's, schema 1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any

from mflux.cli.commands import COMMANDS
from mflux.cli.generate import Generate
from mflux.cli.parser.parsers import MfluxParser
from mflux.cli.parser.settle import NOT_BUILT_OPTIONS
from mflux.cli.terminal import nearest, run, say
from mflux.errors import UsageError

SCHEMA = SCHEMA_VERSION = 1
FORMATS = ("json", "yaml", "markdown")
_TYPES = {"Path": "path", "int | ScaleFactor": "int-or-scale"}


def build_parser() -> MfluxParser:
    parser = MfluxParser(
        prog="mflux-capabilities",
        description="Show every command's options, with defaults, choices, and which have no effect, for programs.",
    )
    parser.add_argument("--command", metavar="NAME", help="only this one, such as mflux-generate")
    parser.add_argument("--format", choices=FORMATS, default="json", help="of the output (default: json)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run(show, argv)


def show(argv: Sequence[str] | None) -> None:
    """
    Raises:
        UsageError: there is no such command.
    """
    args = build_parser().parse_args(argv)
    names = list(COMMANDS)
    if args.command is not None:
        names = [args.command.removeprefix("mflux-")]
        if names[0] not in COMMANDS:
            raise UsageError(f"there is no command {args.command!r}{nearest(names[0], COMMANDS)} (see mflux --help)")
    found = capabilities(names)
    if args.format == "json":
        say(json.dumps(found, indent=2))
    elif args.format == "yaml":
        say("\n".join(yaml_lines(found)))
    else:
        say("\n".join(markdown_lines(found)))


def capabilities(names: Sequence[str]) -> dict[str, Any]:
    """What these commands take, by their names after "mflux-"."""
    import mflux

    commands = [describe(name) for name in names]
    return {"schema_version": SCHEMA, "mflux_version": mflux.__version__, "commands": commands}


def describe(name: str) -> dict[str, Any]:
    """One command."""
    module = importlib.import_module(COMMANDS[name].module)
    parser = module.build_parser()
    command = next((thing for thing in vars(module).values() if isinstance(thing, Generate)), None)
    groups = {
        id(action): {"choice_group": number} | ({"choice_required": True} if group.required else {})
        for number, group in enumerate(parser._mutually_exclusive_groups)
        for action in group._group_actions
    }
    options = [
        option(action, command) | groups.get(id(action), {})
        for action in _actions(parser)
        if not {"--help", "--version"} & set(action.option_strings)
    ]
    entry = {
        "command": f"mflux-{name}",
        "module": COMMANDS[name].module,
        "coverage": "full",
        "description": parser.description,
        "options": options,
    }
    return entry | ({"traits": traits(command, parser)} if command else {})


# mflux 0.24's names, for programs.


def discover_commands() -> list[tuple[str, str]]:
    """Every command by its name, with its module."""
    return sorted((command.prog, command.module) for command in COMMANDS.values())


def describe_command(command: str, module_path: str | None = None) -> dict[str, Any]:
    """One command, as `describe`; its module follows from its name."""
    return describe(command.removeprefix("mflux-"))


def build_capabilities() -> dict[str, Any]:
    """All of them, as `capabilities`."""
    return capabilities(list(COMMANDS))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """A parser's options, and behind a choice of what to do, those of what is chosen."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                known = {flag for option in parser._actions for flag in option.option_strings}
                yield from (option for option in _actions(below) if not known & set(option.option_strings))


def option(action: argparse.Action, command: Generate | None = None) -> dict[str, Any]:
    """One option: its long name, type, default, whether it is honoured, and what else there is to say."""
    flags = action.option_strings or [action.dest]
    flag = next((flag for flag in flags if flag.startswith("--")), flags[0])
    status, condition, reason = "honored", None, None
    if reason := NOT_BUILT_OPTIONS.get(action.dest) or (command and command.rejected.get(action.dest)):
        status = "rejected"
    elif reason := command and command.ignored.get(action.dest):
        status = "ignored"
    elif command and action.dest in command.conditional:
        status = "conditional"
        condition, reason = command.conditional[action.dest]
    default = None if action.default is argparse.SUPPRESS else plain(action.default)
    record = {"flag": flag, "type": type_name(action), "parser_default": default, "status": status}
    more = {
        "aliases": [other for other in flags if other != flag],
        "choices": sorted(map(str, action.choices or ())),
        "required": action.required,
        "nargs": None if action.nargs in (None, 0) else str(action.nargs),
        "help": action.help,
        "condition": condition,
        "reason": reason,
    }
    return record | {name: value for name, value in more.items() if value}


def type_name(action: argparse.Action) -> str:
    """What an option's value is; a type of our own says what it gives in its annotation."""
    if action.nargs == 0:
        return "bool"
    if action.type is None:
        return "str"
    if isinstance(action.type, type):
        name = action.type.__name__
    else:
        name = getattr(action.type, "gives", None) or str(action.type.__annotations__["return"])
    return _TYPES.get(name, name)


def plain(value: Any) -> Any:
    """A default as JSON can have it."""
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, PurePath) else value


def traits(command: Generate, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """What a command that draws can do."""
    from mflux.models.common.config.model_config import ModelConfig

    options = {action.dest for action in parser._actions}
    model = command.default_model or parser.get_default("model")
    default = {"default_model": model} if model else {}
    return {
        "lora": "lora" in options,
        "img2img": "image_path" in options,
        "controlnet": any(name.startswith("control") for name in options),
        "outpaint": any("outpaint" in name for name in options),
        "metadata_config": "config_from_metadata" in options,
        **default,
        "models": list(command.models),
        "supports_guidance": bool(ModelConfig.from_name(model or command.models[0]).supports_guidance),
    }


def yaml_lines(value: Any, indent: str = "") -> Iterator[str]:
    """YAML in block style whose scalars are JSON's, which YAML 1.2 reads as they are."""
    items = value.items() if isinstance(value, dict) else ((None, item) for item in value)
    for key, item in items:
        start = f"{indent}-" if key is None else f"{indent}{key}:"
        if not isinstance(item, (dict, list)) or not item:
            yield f"{start} {_scalar(item)}"
        elif key is None:
            first, *rest = yaml_lines(item, f"{indent}  ")
            yield f"{start} {first.lstrip()}"
            yield from rest
        else:
            yield start
            yield from yaml_lines(item, f"{indent}  ")


def _scalar(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    # Older readers take a number without a point, such as 1e-05, for text.
    return text.replace("e", ".0e") if isinstance(value, float) and "." not in text else text


def markdown_lines(found: dict[str, Any]) -> Iterator[str]:
    """A table for each command."""
    yield f"# mflux capabilities (schema {found['schema_version']}, mflux {found['mflux_version']})"
    for command in found["commands"]:
        yield from ("", f"## {command['command']}", "", command["description"], "")
        yield from ("| option | type | default | status | notes |", "|---|---|---|---|---|")
        for entry in command["options"]:
            default = "" if entry["parser_default"] is None else repr(entry["parser_default"])
            notes = entry.get("reason", "")
            if "condition" in entry:
                notes = f"where {entry['condition']}: {notes}"
            cells = (f"`{entry['flag']}`", entry["type"], default, entry["status"], notes)
            yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    sys.exit(main())
