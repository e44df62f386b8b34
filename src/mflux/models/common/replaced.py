"""What a program puts in the place of a transformer, or of a step's function, is used: called as mflux 0.24 called it.

A transformer's class says how: its `__call__` also takes mflux 0.24's keywords (`also_as_024`), since what wraps a
transformer passes these on, and its `asked_as_024` asks something else for a prediction with them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from mflux.backend import mx
from mflux.errors import MfluxError, UsageError
from mflux.text import shown

P = ParamSpec("P")
S = TypeVar("S")
R = TypeVar("R")


class ReplacedError(MfluxError):
    """What a program put in the place of a part needs more of mflux 0.24 than there is; its own error is the cause."""


def also_as_024(
    theirs: Callable[..., R], *, known_by: str
) -> Callable[[Callable[Concatenate[S, P], R]], Callable[Concatenate[S, P], R]]:
    """Let a method be called with mflux 0.24's keywords as well.

    Args:
        theirs: called with the object and these keywords.
        known_by: one that only mflux 0.24's call has.
    """

    def decorate(call: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
        @wraps(call)
        def either(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
            return theirs(self, **kwargs) if known_by in kwargs else call(self, *args, **kwargs)

        return either

    return decorate


def called(what: str, call: Callable[P, R]) -> Callable[P, R]:
    """A program's own function in the place of `what`, whose errors say where the program can read on.

    Raises:
        ReplacedError: it reads what mflux 0.24's own layers have, or takes other arguments.
    """

    def careful(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return call(*args, **kwargs)
        except MfluxError:
            raise
        except (AttributeError, TypeError) as error:
            raise ReplacedError(
                f"what a program put in the place of {what} fails ({type(error).__name__}: {shown(error, 200)}): it is "
                "called as in mflux 0.24, whose layers are not here (docs/programs.md says what is)"
            ) from error

    return careful


def refuse_more(what: str, **more: Any) -> None:
    """
    Raises:
        UsageError: a prediction that has something that mflux 0.24's call of `what` has no keyword for.
    """
    if given := [name for name, value in more.items() if value is not None]:
        raise UsageError(f"nothing else can stand in the place of {what} here: it gives no {' and '.join(given)}")


def step_at(config: Any, sigma: mx.array) -> int:
    """Which step of a schedule begins at a noise level."""
    nearest = mx.argmin(mx.abs(config.scheduler.sigmas[:-1] - sigma)).item()
    assert isinstance(nearest, int)
    return nearest
