"""The process of a command: its standard streams are open, and a signal that ends it lets it clean up."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TextIO

# Besides SIGINT, which Python itself turns into KeyboardInterrupt: kill's, and that of a terminal that is closed.
_ENDING = (signal.SIGTERM, signal.SIGHUP)


class Ended(KeyboardInterrupt):
    """A signal asked the process to end. What cleans up after Ctrl-C cleans up after this.

    Attributes:
        status: the exit status that shells give such an end, 128 and the signal's number.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


def status_of(error: KeyboardInterrupt) -> int:
    """The exit status for what was raised: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
    return error.status if isinstance(error, Ended) else 130


@contextmanager
def signals_raise() -> Iterator[None]:
    """Inside, a signal that would end the process at once raises `Ended` instead. One that is ignored stays so, as
    under nohup, and so does a handler that somebody has set."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken = [number for number in _ENDING if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _end(number: int, frame: FrameType | None) -> None:
    raise Ended(number)


def open_standard_streams() -> bool:
    """Put nothing, `/dev/null`, where standard input, output or errors are closed.

    The next file to be opened would take their numbers: MLX takes 0 for a failure, and what is written to standard
    errors would go into a picture.

    Returns:
        Whether standard output was open.
    """
    was_open = sys.stdout is not None
    for number, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free, which is this one: those below are open by now.
            os.open(os.devnull, mode)
    if sys.stdout is None:
        sys.stdout = _nowhere()
    if sys.stderr is None:
        sys.stderr = _nowhere()
    return was_open


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123
