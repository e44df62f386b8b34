"""`mflux`: every command by its name, `mflux generate …` like `mflux-generate …`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from mflux.cli.commands import COMMANDS, NOT_BUILT
from mflux.cli.terminal import nearest, run, say
from mflux.errors import NotBuiltError, UsageError


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words and (command := COMMANDS.get(words[0])) is not None:
        return importlib.import_module(command.module).main(words[1:])
    return run(overview, words)


def overview(words: Sequence[str] | None) -> None:
    """Everything that is not a command: help, the version, and names that are none."""
    name = words[0] if words else "--help"
    if name in ("--help", "-h"):
        say(help_text())
    elif name == "--version":
        import mflux

        say(f"mflux {mflux.__version__}")
    elif name.removeprefix("mflux-") in NOT_BUILT:
        raise NotBuiltError(f"mflux {name} is not built yet in this version (see mflux --help)")
    else:
        meant = nearest(name.removeprefix("mflux-"), COMMANDS)
        raise UsageError(f"there is no command {name!r}{meant} (see mflux --help)")


def help_text() -> str:
    from mflux.models.common.family import built
    from mflux.models.common.registry import MODELS
    from mflux.optional import EXTRAS, is_installed, pip_command

    width = max(map(len, [*COMMANDS, *built()])) + 2
    lines = ["usage: mflux COMMAND [options]     (mflux COMMAND --help says more)", "", "commands:"]
    lines += [f"  {name:{width}}{command.summary}" for name, command in COMMANDS.items()]
    lines += ["", "models:"]
    for name, command in built().items():
        source = "comes with mflux" if name == "demo" else MODELS[name]["model_name"]
        lines.append(f"  {name:{width}}{source} ({command})")
    lines += ["", "extras:"]
    for name, extra in EXTRAS.items():
        state = "installed" if is_installed(name) else f"not installed: {pip_command(name)}"
        lines.append(f"  {name:{width}}{extra.purpose} ({state})")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
