"""Every failure that mflux expects, as one sentence a person can act on.

A command prints the message of a `MfluxError` as `error: …` and exits with its `exit_code`; a program catches the
class. Anything that is not a `MfluxError` is a bug in mflux.
"""

from __future__ import annotations

from mflux.text import brief, shown

# What somebody typed, a path or a value, is quoted at most so long.
_LONGEST_WORD = 500
# Of a message: it names some of the tensors that are missing, and never all.
_LONGEST = 2500


class MfluxError(Exception):
    """Base of all expected failures. The message says what is wrong with this input and what to do next."""

    exit_code = 1

    def __init__(self, *args: object):
        super().__init__(*(brief(arg, _LONGEST, _LONGEST_WORD) if isinstance(arg, str) else arg for arg in args))


class UsageError(MfluxError):
    """The request itself makes no sense: an option's value, or options that exclude each other."""

    exit_code = 2


class MissingExtraError(MfluxError, ImportError):
    """A feature needs a package that an optional extra brings and that is not installed."""

    def __init__(self, *args: object, name: str | None = None):
        super().__init__(*args)
        self.name = name


class CheckpointError(MfluxError):
    """A weights file or folder is damaged, incomplete, or not of the expected layout. What the message quotes of a file
    is fit for one line, whoever quotes it."""

    def __init__(self, message: object = ""):
        super().__init__(shown(message, _LONGEST))


class UnsafeCheckpointError(CheckpointError):
    """A PyTorch file asks for something that could run code, or for more than it may have."""


class DownloadError(MfluxError):
    """A model's files could not be had: no network, gated, missing, or no room for them."""


class ModelConfigError(MfluxError, ValueError):
    """A model's name is unknown, or does not tell which architecture it is."""

    exit_code = 2


class OtherModelError(ModelConfigError):
    """A name that recalls a known model, and is known to be another's, or may well be."""


class InvalidBaseModel(ModelConfigError):
    """`base_model` names no known model."""


class ImageError(MfluxError):
    """A picture cannot be read."""


class OutputError(MfluxError):
    """A result cannot be written where it was asked for."""


class NotBuiltError(UsageError):
    """A feature of mflux 0.24 that this version does not have yet."""
