"""A command's voice and its ends: results, warnings, and every expected failure as one line and an exit status.

Loads neither MLX nor numpy: usage errors answer at once.
"""

from __future__ import annotations

import difflib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

from mflux.cli.process import open_standard_streams, signals_raise, status_of
from mflux.errors import MfluxError
from mflux.text import lines_shown, one_line, shown

log = logging.getLogger(__name__)


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
