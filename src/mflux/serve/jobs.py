"""A job: one request with its images, from the queue to the bytes, for whoever waits for it in whichever thread."""

from __future__ import annotations

import argparse
import base64
import secrets
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mflux.cli.generate import Generate
from mflux.cli.plan import Plan
from mflux.errors import MfluxError
from mflux.utils.given_image import GivenImage

OVER = ("done", "failed", "cancelled")
# By the name in requests: PIL's, and the type.
FORMATS = {"png": ("PNG", "image/png"), "jpeg": ("JPEG", "image/jpeg"), "webp": ("WEBP", "image/webp")}
# Previews of one job that are kept for who asks late.
_MOST_PREVIEWS = 64


class JobError(MfluxError):
    """A job has no images.

    Attributes:
        kind: "invalid" where the request is at fault, "failed", "cancelled" or "stopping".
    """

    def __init__(self, message: str, kind: str):
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Picture:
    """A generated image as a file's contents, its settings inside.

    Attributes:
        data: the contents.
        output_format: "png", "jpeg" or "webp".
        seed: it was generated with.
        size: width and height in pixels.
        settings: those that are in the file.
    """

    data: bytes = field(repr=False)
    output_format: str
    seed: int
    size: tuple[int, int]
    settings: Mapping[str, Any] = field(repr=False)

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write it; in another format where the name's ending says so.

        Returns:
            Where it went: `path`, or the next free name beside it.

        Raises:
            OutputError: it cannot be written.
            UsageError: the name's ending stands for no image format.
        """
        from mflux.utils.atomic_files import write_atomically
        from mflux.utils.picture_files import check_output, format_of, open_image, save_picture

        path = check_output(path)
        if format_of(path) == FORMATS[self.output_format][0]:
            return write_atomically(path, lambda file: file.write(self.data), overwrite=overwrite)
        return save_picture(open_image(GivenImage(self.data)), path, self.settings, overwrite=overwrite)


@dataclass(frozen=True)
class Preview:
    """What an image looks like after a step, small.

    Attributes:
        number: counted from 1 in its job.
        image: which image of the job, from 0.
        step: of the job's steps, from 1.
    """

    number: int
    image: int
    step: int
    data: bytes = field(repr=False)
    output_format: str = "jpeg"
    width: int = 0
    height: int = 0


@dataclass(frozen=True)
class Changed:
    """The job is in another state, or further: `job` is `Job.as_json()`."""

    job: Mapping[str, Any]


@dataclass(frozen=True)
class Ended(Changed):
    """The same, for the last time."""


class Job:
    """One request. Its methods may be called in any thread.

    Attributes:
        id: 128 random bits.
        status: "queued", "loading", "drawing", "done", "failed" or "cancelled".
        model: as it is served.
        n: how many images.
        prompt: as it was said.
        pictures: those that are there, in order.
        previews: of the last images' steps.
        error: why it has none.
    """

    def __init__(
        self,
        model: str,
        command: Generate,
        plan: Plan,
        settings: Mapping[str, Any],
        *,
        output_format: str = "png",
        quality: int | None = None,
        previews: int | None = 0,
        source: str = "python",
        weight: int = 0,
    ):
        """
        Args:
            settings: as they were asked for, to be shown.
            previews: how many at most; None for as many as cost next to nothing.
            source: which family of routes it came by.
            weight: bytes that it holds while it waits.
        """
        self.id = f"job_{secrets.token_hex(16)}"
        self.model, self.command, self.plan = model, command, plan
        self.prompt = plan.words or ""
        self.settings, self.source, self.weight = dict(settings), source, weight
        self.output_format, self.quality, self.wanted_previews = output_format, quality, previews
        self.n = len(plan.images)
        self.status = "queued"
        self.created = time.time()
        self.started: float | None = None
        self.finished: float | None = None
        self.step = 0
        self.steps = sum(map(_steps_of, plan.images))
        self.pictures: list[Picture] = []
        self.previews: list[Preview] = []
        self.error: JobError | None = None
        self.size = (plan.images[0].get("width"), plan.images[0].get("height"))
        # Seconds: of its steps so far, and of the last decoding of an image like its own.
        self.step_seconds: list[float] = []
        self.decode_seconds = 0.0
        self.expected_step_seconds = 0.0
        self.cancelled = threading.Event()
        # Where another server generates it: what it is sent, what is done there when it is cancelled, and how often
        # one died meanwhile.
        self.request: Mapping[str, Any] = {}
        self.cancel_elsewhere: Callable[[], None] | None = None
        self.losses = 0
        self.position_of: Callable[[Job], int] = lambda job: 0
        self._changes = 0
        self._condition = threading.Condition()
        self._watchers: list[Callable[[], None]] = []

    # ---- for who waits

    @property
    def is_over(self) -> bool:
        return self.status in OVER

    @property
    def changes(self) -> int:
        """How often it has changed, so that a reader knows whether something is new."""
        return self._changes

    def watch(self, watcher: Callable[[], None]) -> Callable[[], None]:
        """Have something called after every change, in the thread that made it.

        Returns:
            What ends it.
        """
        with self._condition:
            self._watchers.append(watcher)

        def end() -> None:
            with self._condition:
                if watcher in self._watchers:
                    self._watchers.remove(watcher)

        return end

    def wait(self, timeout: float | None = None) -> list[Picture]:
        """Its images, once it is over.

        Raises:
            JobError: it has none.
            TimeoutError: it takes longer.
        """
        with self._condition:
            if not self._condition.wait_for(lambda: self.is_over, timeout):
                raise TimeoutError(f"{self.id} is still {self.status}")
        if self.error is not None:
            raise self.error
        return self.pictures

    def __iter__(self) -> Iterator[Changed | Preview]:
        """Its state now and after every change, and previews as they come; the last one is `Ended`. Who is slow gets
        the newest state and not each."""
        seen, shown = -1, 0
        while True:
            with self._condition:
                while self._changes == seen and not self.is_over:
                    self._condition.wait()
                seen, over = self._changes, self.is_over
                previews = [preview for preview in self.previews if preview.number > shown]
            for preview in previews:
                shown = preview.number
                yield preview
            if over:
                yield Ended(self.as_json())
                return
            yield Changed(self.as_json())

    # ---- for the engine

    def change(self, **values: Any) -> None:
        """Set attributes, and tell everybody."""
        with self._condition:
            for name, value in values.items():
                setattr(self, name, value)
            self._changes += 1
            self._condition.notify_all()
            watchers = list(self._watchers)
        for watcher in watchers:
            watcher()

    def add_preview(self, preview: Preview) -> None:
        self.change(previews=[*self.previews, preview][-_MOST_PREVIEWS:])

    def add_picture(self, picture: Picture) -> None:
        self.change(pictures=[*self.pictures, picture], size=picture.size)

    def start_anew(self) -> None:
        """Back to the queue, as if nothing had been."""
        self.step_seconds = []
        self.cancel_elsewhere = None
        self.change(status="queued", started=None, step=0, pictures=[], previews=[])

    def end(self, status: str, error: JobError | None = None) -> None:
        """Over; once."""
        with self._condition:
            if self.is_over:
                return
            # Its source images may be large, and a job is remembered for long.
            self.plan = replace(self.plan, images=(), constructor={}, options=argparse.Namespace())
            self.request, self.cancel_elsewhere = {}, None
            self.change(status=status, error=error, finished=time.time())

    # ---- what it says of itself

    @property
    def progress(self) -> float:
        if self.status == "done":
            return 1.0
        # Decoding is a part of the work as well.
        return min(0.99, self.step / (self.steps + self.n)) if self.steps else 0.0

    @property
    def eta_seconds(self) -> float | None:
        """Seconds left, once something is known of its steps."""
        if self.is_over:
            return None
        step = statistics.median(self.step_seconds) if self.step_seconds else self.expected_step_seconds
        if not step:
            return None
        return round((self.steps - self.step) * step + (self.n - len(self.pictures)) * self.decode_seconds, 1)

    def as_json(self) -> dict[str, Any]:
        """As the API has it."""
        width, height = self.size
        return {
            "id": self.id,
            "object": "image.job",
            "status": self.status,
            "position": None if self.is_over else self.position_of(self),
            "progress": round(self.progress, 4),
            "step": self.step,
            "steps": self.steps,
            "eta_seconds": self.eta_seconds,
            "created": int(self.created),
            "started": self.started and int(self.started),
            "finished": self.finished and int(self.finished),
            "model": self.model,
            "prompt": self.prompt,
            "size": f"{width}x{height}" if width and height else None,
            "n": self.n,
            "settings": self.settings,
            "images": [
                {
                    "url": f"/v1/jobs/{self.id}/images/{number}",
                    "seed": picture.seed,
                    "size": "{}x{}".format(*picture.size),
                    "output_format": picture.output_format,
                }
                for number, picture in enumerate(self.pictures)
            ],
            "error": None if self.error is None else {"message": str(self.error), "code": self.error.kind},
        }


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _steps_of(arguments: Mapping[str, Any]) -> int:
    """Steps that are taken for an image; those that its source image stands for are not."""
    steps = int(arguments["num_inference_steps"])
    strength = arguments.get("image_strength")
    if arguments.get("image_path") is None or not strength:
        return steps
    return steps - max(1, int(steps * strength))
