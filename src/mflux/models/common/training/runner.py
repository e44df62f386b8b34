"""One run from its configuration to its LoRA, at mflux 0.24's path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mflux.models.common.training.adapter import TrainingAdapter
from mflux.models.common.training.checkpoint import FOLDER
from mflux.models.common.training.loop import Loop, Written
from mflux.models.common.training.session import TrainingSession
from mflux.models.common.training.spec import TrainingSpec
from mflux.utils.atomic_files import remove_empty


class TrainingRunner:
    @staticmethod
    def train(
        *, config_path: str | Path | None, resume_path: str | Path | None = None
    ) -> tuple[TrainingAdapter, TrainingSpec]:
        """Train as a configuration says, or go on from a checkpoint; exactly one of them.

        Returns:
            What the family adds, with the model that was trained, and the run.

        Raises:
            MfluxError: something makes no sense, cannot be had, or cannot be written.
        """
        spec = TrainingSpec.resolve(config_path, resume_path)
        session, _ = TrainingRunner.run(spec)
        return session.adapter, spec

    @staticmethod
    def run(spec: TrainingSpec, after_batch: Callable[[], None] | None = None) -> tuple[TrainingSession, Written]:
        """The same of a run that is settled; also what was written last."""
        try:
            session = TrainingSession(spec)
            try:
                return session, Loop(session, after_batch).run()
            finally:
                session.close()
        except BaseException:
            # A folder of a run that wrote nothing would make the next one take another name.
            folder = Path(spec.checkpoint.output_path)
            remove_empty(*(folder / inner for inner in (FOLDER, "preview", "loss")), folder)
            raise
