"""The exception names that programs built on mflux catch, at mflux's path. New code takes `mflux.errors`."""

from __future__ import annotations

from mflux.errors import InvalidBaseModel, MfluxError, ModelConfigError, OutputError, UsageError

__all__ = [
    "CommandExecutionError",
    "ImageSavingException",
    "InvalidBaseModel",
    "MFluxException",
    "MFluxUserException",
    "MetadataEmbedException",
    "ModelConfigError",
    "PromptFileReadError",
    "ReferenceVsOutputImageError",
    "StopImageGenerationException",
    "StopTrainingException",
]

MFluxException = MfluxError
MFluxUserException = MfluxError
ImageSavingException = OutputError


class MetadataEmbedException(OutputError):
    """A picture was written, its metadata could not be."""


class PromptFileReadError(UsageError):
    """The prompt's file, or standard input, holds no prompt."""


class StopImageGenerationException(MfluxError):
    """Generation was stopped: by Ctrl-C (exit status 130), or because the battery runs low (1)."""

    def __init__(self, message: str, *, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


class CommandExecutionError(MfluxError):
    """A command that a program ran failed."""


class ReferenceVsOutputImageError(MfluxError, AssertionError):
    """An image is not the one that was expected."""


class StopTrainingException(MfluxError):
    """Training was stopped."""
