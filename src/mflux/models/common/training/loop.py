"""The run: batch after batch, what is written meanwhile, and how it ends.

Whatever ends it, Ctrl-C, a signal, a battery, what is written last is the state after the last batch that was finished:
a batch becomes part of it in one assignment.
"""

from __future__ import annotations

import logging
import math
import random
import shlex
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mflux.backend import mx
from mflux.errors import MfluxError, OutputError
from mflux.models.common.memory import give_back_memory, keeping_memory
from mflux.models.common.training import checkpoint, objective, plot
from mflux.models.common.training.checkpoint import Losses
from mflux.models.common.training.data import Batch, Dataset, Iterator, described, size_of
from mflux.models.common.training.estimate import estimate
from mflux.models.common.training.session import TrainingSession
from mflux.models.common.training.spec import TrainingSpec
from mflux.text import count, shown, size
from mflux.utils.atomic_files import write_atomically
from mflux.utils.exceptions import StopTrainingException
from mflux.utils.progress import bar_class

log = logging.getLogger(__name__)

_MOST_SKIPPED = 20
# The loss that the bar shows is about the mean of so many batches.
_RUNNING = 20


@dataclass(frozen=True)
class State:
    """Where a run stands after a batch; nothing in it is changed any more."""

    weights: dict[str, mx.array]
    optimizer: tuple[int, dict[str, Any]]
    iterator: dict[str, Any]
    steps: int
    looks: int
    held_out: int
    window: tuple[dict[str, mx.array], int]


@dataclass
class Written:
    """What a run has written last."""

    checkpoint: Path | None = None
    adapter: Path | None = None


@dataclass
class Loop:
    """A run that is under way.

    Args:
        session: the model and its data.
        after_batch: called after each batch; what it raises ends the run.
    """

    session: TrainingSession
    after_batch: Callable[[], None] | None = None
    written: Written = field(default_factory=Written)

    def __post_init__(self) -> None:
        spec, session = self.session.spec, self.session
        dataset = Dataset(session.items)
        self.window: tuple[dict[str, mx.array], int] = ({}, 0)
        if spec.resumed is not None:
            self.iterator = Iterator.from_dict(spec.resumed.iterator(), dataset)
            self.losses = spec.resumed.losses()
            self.window = spec.resumed.put_into(session)
        else:
            loop = spec.training_loop
            self.iterator = Iterator(dataset, loop.batch_size, loop.num_epochs, spec.seed)
            self.losses = Losses()
        self.total = self.iterator.total_number_of_steps()
        self._skipped, self._skipped_in_all = 0, 0
        self._saved = -1
        self.state = self._now()

    @property
    def spec(self) -> TrainingSpec:
        return self.session.spec

    # ---- the run

    def run(self) -> Written:
        """Take all batches that are left.

        Raises:
            MfluxError: what was learned is no longer finite, or something cannot be written.
            KeyboardInterrupt, StopTrainingException: something ended it; a checkpoint of the last batch is written.
        """
        self._tell()
        if self.iterator.num_iterations >= self.total:
            log.warning(
                "this run has ended, all of its %d batches are done: nothing is learned any more, its last files are "
                "written again (for more epochs begin a run with --config)",
                self.total,
            )
        try:
            if self.iterator.num_iterations == 0 and self.spec.monitoring is not None:
                self._preview()
                self._look()
                plot.write(self.spec, self.losses, done=0, total=self.total)
            self._batches()
        except (KeyboardInterrupt, StopTrainingException):
            self._keep()
            raise
        except Exception:
            # Whatever it is, what was learned is not lost for it; should that fail as well, the first is told.
            with suppress(Exception):
                self._keep()
            raise
        if self._skipped_in_all:
            log.warning("%d of the batches had no finite loss or gradient, and taught nothing", self._skipped_in_all)
        try:
            self._save()
        except OutputError:
            # The LoRA alone is much smaller.
            with suppress(OutputError):
                self._save_adapter()
            raise
        self.written.adapter = self._save_adapter()
        return self.written

    def _batches(self) -> None:
        running: float | None = None
        # A terminal that is none gets the bar as well: programs read it.
        with (
            keeping_memory(),
            _closed(bar_class()(total=self.total, initial=self.iterator.num_iterations, file=sys.stderr)) as bar,
        ):
            for batch in self.iterator:
                loss = self._batch(batch)
                if loss is not None:
                    running = loss if running is None else running + (loss - running) / _RUNNING
                with suppress(OSError):  # nobody looks any more
                    if running is not None:
                        bar.set_postfix_str(f"loss={running:.4f}", refresh=False)
                    bar.update()
                self._meanwhile()
                if self.after_batch is not None:
                    self.after_batch()

    def _batch(self, batch: Batch) -> float | None:
        """Learn from a batch; its loss, or None if that taught nothing."""
        session, spec = self.session, self.spec
        drawn = [self._draw(batch.rng, item) for item in batch.data]
        value, gradients = session.loss_and_gradients(
            batch.data, [sigma for sigma, _ in drawn], [noise for _, noise in drawn]
        )
        loss = float(value)
        summed, batches = self.window
        taken = False
        if math.isfinite(loss) and _are_finite(gradients):
            summed = {name: summed[name] + one for name, one in gradients.items()} if batches else gradients
            batches += 1
            is_last = self.iterator.num_iterations == self.total
            if batches >= spec.optimizer.gradient_accumulation_steps or is_last:
                taken = session.apply({name: one / batches for name, one in summed.items()})
                summed, batches = {}, 0
            else:
                mx.eval(summed)
                taken = True
        elif self.iterator.num_iterations == self.total and batches:
            # The last window is closed, whatever its last batch was.
            session.apply({name: one / batches for name, one in summed.items()})
            summed, batches = {}, 0
        if taken:
            self._skipped = 0
            self.losses.step_loss.append(Losses.entry(self.iterator.num_iterations, loss))
        else:
            self._skipped, self._skipped_in_all = self._skipped + 1, self._skipped_in_all + 1
        self.window = summed, batches
        self.state = self._now()
        if self._skipped > _MOST_SKIPPED:
            raise MfluxError(
                f"the last {self._skipped} batches had no finite loss or gradient, so that nothing is learned any "
                "more: go on from an earlier checkpoint with a smaller learning_rate, or with max_grad_norm 1.0"
            )
        if spec.low_ram:
            give_back_memory()
        return loss if taken else None

    def _draw(self, rng: random.Random, item: Any) -> tuple[float, mx.array]:
        session = self.session
        return objective.draw(
            rng,
            self.spec.training_loop,
            session.config_of(item),
            item.clean_latents.shape,
            continuous=session.continuous,
        )

    # ---- meanwhile

    def _meanwhile(self) -> None:
        spec, number = self.spec, self.iterator.num_iterations
        monitoring = spec.monitoring
        shows = monitoring is not None and number % monitoring.plot_frequency == 0
        previews = monitoring is not None and number % monitoring.generate_image_frequency == 0
        if shows:
            self._look()
        try:
            if number % spec.checkpoint.save_frequency == 0:
                self._save()
                shows = True
            if previews:
                self._preview()
            if shows or previews:
                plot.write(spec, self.losses, done=number, total=self.total)
        except (OutputError, OSError) as error:
            # The next one may find room again; what was learned is not lost for that.
            log.warning("%s; training goes on", error)

    def _look(self) -> None:
        """The loss of some of the images with noise of its own, and of those that are not learned from."""
        batch = self.iterator.get_validation_batch()
        drawn = [self._draw(batch.rng, item) for item in batch.data]
        value = self.session.loss(batch.data, [sigma for sigma, _ in drawn], [noise for _, noise in drawn])
        if math.isfinite(float(value)):
            self.losses.batch_loss.append(Losses.entry(self.iterator.num_iterations, float(value)))
        if held_out := self.session.held_out:
            # The same noise at every look: what changes is what was learned.
            rng, values = random.Random(self.spec.seed), []
            for item in held_out:
                sigma, noise = self._draw(rng, item)
                values.append(float(self.session.loss([item], [sigma], [noise])))
            if math.isfinite(mean := math.fsum(values) / len(values)):
                self.losses.held_out_loss.append(Losses.entry(self.iterator.num_iterations, mean))
        self.state = self._now()

    def _preview(self) -> None:
        monitoring = self.spec.monitoring
        assert monitoring is not None
        images = monitoring.preview_images or [None] * len(monitoring.preview_prompts)  # type: ignore[list-item]
        folder = Path(self.spec.checkpoint.output_path) / "preview"
        for name, prompt, image in zip(
            monitoring.preview_prompt_names, monitoring.preview_prompts, images, strict=True
        ):
            # An edit has the size of the image that it starts from.
            side = (monitoring.preview_width, monitoring.preview_height) if image is None else size_of(image, None)
            drawn = self.session.preview(prompt, image, *side)
            path = folder / f"{self.iterator.num_iterations:07d}_preview_image_{name}.png"
            write_atomically(path, partial(drawn.image.save, format="PNG"), overwrite=True)

    # ---- what is written

    def _now(self) -> State:
        session = self.session
        return State(
            session.lora_weights(),
            session.optimizer.state(),
            self.iterator.to_dict(),
            len(self.losses.step_loss),
            len(self.losses.batch_loss),
            len(self.losses.held_out_loss),
            self.window,
        )

    def _go_back(self) -> None:
        """To the last batch that was finished."""
        state = self.state
        if not self.session.has_layers:
            self.session.reload()
        self.session.set_lora_weights(state.weights)
        self.session.optimizer.put(state.optimizer)
        self.iterator = Iterator.from_dict(state.iterator, self.iterator.dataset)
        del self.losses.step_loss[state.steps :], self.losses.batch_loss[state.looks :]
        del self.losses.held_out_loss[state.held_out :]
        self.window = state.window

    def _keep(self) -> None:
        """Write a checkpoint of the last batch that was finished, if there is one that is not written yet."""
        self._go_back()
        if self.iterator.num_iterations != self._saved:
            self._save()
        log.info("stopped after batch %d: go on with %s", self.iterator.num_iterations, self._resumed_by())

    def _save(self) -> None:
        self.written.checkpoint = checkpoint.write(self.session, self.state.iterator, self.losses, self.window)
        self._saved = self.state.iterator["num_iterations"]

    def _save_adapter(self) -> Path:
        """The LoRA as a file of its own, and the page once more."""
        output = Path(self.spec.checkpoint.output_path)
        path = output / f"{self.iterator.num_iterations:07d}_adapter.safetensors"
        self.session.save_adapter(path, dtype=self.session.adapter_dtype)
        plot.write(self.spec, self.losses, done=self.iterator.num_iterations, total=self.total)
        log.info("generate with it: %s", self._drawn_by(path))
        return path

    # ---- what is told

    def _tell(self) -> None:
        spec, session, found = self.spec, self.session, estimate(self.session)
        steps = -(-self.total // spec.optimizer.gradient_accumulation_steps)
        log.info("data: %s (%s) in %s", count(spec.data, "image"), described(spec.data), spec.data_root)
        if session.held_out:
            log.info("held out: %s, whose loss is looked at", count(session.held_out, "image"))
        log.info(
            "LoRA: %s, %s numbers, %s of memory with what the optimizer keeps",
            count(session.layers, "layer"),
            f"{session.trainable:,}",
            size(found.factors),
        )
        log.info(
            "run: %d batches of %s, %s of %s; a step takes about %s of memory, %s of it for weights",
            self.total,
            count(spec.training_loop.batch_size, "image"),
            count(steps, "step"),
            spec.optimizer.name,
            size(found.total),
            size(found.weights),
        )
        log.info("written to: %s", spec.checkpoint.output_path)

    def _resumed_by(self) -> str:
        return f"mflux-train --resume {shlex.quote(str(self.written.checkpoint))}"

    def _drawn_by(self, path: Path) -> str:
        spec = self.spec
        words = [spec.command.prog, "--model", spec.model_path or spec.model]
        if spec.model_path is not None or spec.base_model is not None:
            words += ["--base-model", spec.key]
        words += ["--lora", str(path), "--steps", str(spec.steps), "--seed", str(spec.seed)]
        if self.session.pipeline.model_config.supports_guidance:
            words += ["--guidance", f"{spec.guidance:g}"]
        words += ["--prompt", self.session.adapter.words(spec.data[0].prompt)]
        return shown(shlex.join(words), 2000)


@contextmanager
def _closed(bar: Any) -> Generator[Any]:
    """A bar that is closed in the end, also where nobody reads what it says any more."""
    try:
        yield bar
    finally:
        with suppress(OSError):
            bar.close()


def _are_finite(gradients: Mapping[str, mx.array]) -> bool:
    return bool(mx.stack([mx.isfinite(one).all() for one in gradients.values()]).all().item())
