"""The embedded model: a FLUX.1-architecture checkpoint that knows coloured shapes. See README.md beside this file."""

from __future__ import annotations

from pathlib import Path

from mflux.errors import CheckpointError


def checkpoint_folder() -> Path:
    """Where the embedded checkpoint lies.

    Raises:
        CheckpointError: this installation lacks it.
    """
    folder = Path(__file__).parent / "checkpoint"
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(f"the embedded model is missing from {folder}: reinstall mflux")
    return folder
