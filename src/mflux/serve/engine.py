"""Models kept loaded, a queue before them, and one thread that does all of MLX. Nothing here knows HTTP.

MLX computes in the thread that made an array's stream: two threads on one model end in its error, and what one thread
loaded lazily fails in another. So a single thread makes models, generates and lets go, as long as the engine lives.
Requests are checked, and images turned into files, in the threads of others.
"""

from __future__ import annotations

import atexit
import gc
import io
import logging
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from mflux.cli.terminal import is_out_of_memory
from mflux.errors import ImageError, MfluxError, UsageError
from mflux.models.common.family import STAGES
from mflux.serve.jobs import FORMATS, Job, JobError, Picture, Preview
from mflux.serve.models import Served, cached_models, named, served
from mflux.text import shown, size
from mflux.utils import values
from mflux.utils.exceptions import StopImageGenerationException
from mflux.utils.given_image import GivenImage, given

if TYPE_CHECKING:
    import PIL.Image

    from mflux.backend import mx
    from mflux.cli.plan import Plan
    from mflux.models.common.config.config import Config
    from mflux.models.common.pipeline import Pipeline
    from mflux.utils.generated_image import GeneratedImage

log = logging.getLogger(__name__)

# Of a preview: the most latents of a side that it is decoded from, pixels of its longer side, its JPEG's quality, and
# which part of the time of an image's steps all of them may take where nobody said how many are wanted.
_PREVIEW_LATENTS, _PREVIEW_PIXELS, _PREVIEW_QUALITY, _PREVIEW_SHARE = 32, 256, 80, 0.05
# What is kept of jobs that are over: seconds, images, bytes.
_KEPT_SECONDS, _KEPT_PICTURES, _KEPT_BYTES = 3600, 64, 256 << 20
_NEVER_FETCHED = "a request fetches nothing: name the model when the server is started"


class QueueFullError(MfluxError):
    """No more jobs can wait.

    Attributes:
        retry_after: seconds until there is perhaps a place.
    """

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


class StoppingError(MfluxError):
    """The engine takes nothing more."""


@dataclass(eq=False)
class _Loaded:
    """A pipeline that is kept.

    Attributes:
        pipeline: belongs to the engine's thread.
        model: the id that it was last used by.
        needs: bytes of its components by stage.
        used: when it was last needed, by the monotonic clock.
    """

    pipeline: Pipeline
    model: str
    needs: Mapping[str, int]
    used: float = field(default_factory=time.monotonic)

    @property
    def bytes(self) -> int:
        """Of what is in memory."""
        from mflux.models.common.memory import weight_bytes

        return sum(map(weight_bytes, self.pipeline.loaded().values()))


class Engine:
    """Generates what it is asked for, one job after the other, with models that stay in memory.

        with Engine(["schnell"], quantize=4) as engine:
            job = engine.submit(prompt="a lighthouse", seed=2)
            for event in job:
                print(event)
            job.pictures[0].save("lighthouse.png")

    Args:
        models: names, folders or repositories, or one of them; what may be asked for, and nothing else. The first is
            the default. None for every built-in model that is whole in Hugging Face's cache, and the one that comes
            with mflux.
        queue: how many jobs may wait.
        keep: seconds without work after which a model leaves memory; -1 for never.
        memory_limit: bytes that models may have together; None for three quarters of this machine's.
        options: settings of every job, as the commands' options have them: `quantize`, `lora_paths`, `low_ram`, …

    Attributes:
        output: a folder that every image is written to as well.
        seconds_of: called with a stage ("wait", "load", "encode", "step", "decode") and what it took.

    Raises:
        UsageError: a model cannot be served, or an option makes no sense.
        ModelConfigError: a model's name tells nothing.
    """

    def __init__(
        self,
        models: Sequence[str] | str | None = None,
        *,
        queue: int = 16,
        keep: float = 900,
        memory_limit: int | None = None,
        **options: Any,
    ):
        # What is wrong here would end the thread, or be the fault of every request.
        values.number(queue, "queue", values.Whole(1))
        values.number(keep, "keep", values.Real(-1))
        if memory_limit is not None:
            values.number(memory_limit, "memory_limit", values.Whole(1))
        names = cached_models() if models is None else [models] if isinstance(models, str) else models
        self.models: list[Served] = [served(name, options) for name in dict.fromkeys(names)]
        if not self.models:
            raise UsageError("no model is to be served: name one")
        if options:
            for model in self.models:
                model.sample()
        self.queue_limit, self.keep, self.memory_limit = queue, keep, memory_limit
        self.options = options
        self.output: Path | None = None
        self.seconds_of: Callable[[str, float], None] = lambda stage, seconds: None
        self._waiting: deque[Job | _Task] = deque()
        self._running: Job | None = None
        # Models that only other servers have, and jobs that are there.
        self.elsewhere: set[str] = set()
        self._away: list[Job] = []
        self._jobs: dict[str, Job] = {}
        self._loaded: dict[Any, _Loaded] = {}
        # Of a model and size: seconds of a step and of decoding.
        self._seconds: dict[tuple[str, Any], tuple[float, float]] = {}
        self._preview_seconds: dict[tuple[str, Any], float] = {}
        self._condition = threading.Condition()
        self._stopping = False
        self._ended = threading.Event()
        self._files = ThreadPoolExecutor(2, thread_name_prefix="mflux-files")
        # A daemon: a step cannot be interrupted, and is not to keep a process that ends.
        self._thread = threading.Thread(target=self._work, name="mflux-engine", daemon=True)
        self._thread.start()
        # Python is not to end while MLX computes.
        atexit.register(self.close, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(grace=0)

    # ---- for any thread: asking

    @property
    def default(self) -> Served:
        return self.models[0]

    def model(self, name: str | None) -> Served:
        """
        Raises:
            ModelNotFoundError: no served model is called so.
        """
        return self.default if name is None else named(self.models, name)

    def submit(
        self,
        model: str | None = None,
        *,
        prompt: str,
        n: int = 1,
        images: Any = (),
        mask: Any = None,
        loras: Iterable[tuple[str, float]] | None = None,
        output_format: str = "png",
        quality: int | None = None,
        previews: int | None = 0,
        source: str = "python",
        weight: int = 0,
        **settings: Any,
    ) -> Job:
        """Put a request into the queue.

        Args:
            model: as it is served, or an alias; None for the first.
            n: how many images; their seeds follow each other.
            images: source images, opened, as files' contents, or paths.
            mask: of the source image, white where to paint.
            loras: names and scales; None for the engine's own.
            output_format: "png", "jpeg" or "webp".
            quality: 0 to 100, for those that have one.
            previews: how many at most; None for as many as cost next to nothing.
            source: who asks, to tell jobs apart.
            weight: bytes that it holds while it waits.
            settings: as images record them: `seed`, `steps`, `width`, `height`, `guidance`, `negative_prompt`, …

        Raises:
            UsageError: the request makes no sense, or the model cannot do it.
            ImageError: a source image cannot be read.
            QueueFullError: too many wait.
            StoppingError: nothing more is taken.
        """
        self.check_room()
        found = self.model(None if model is None else values.text(model, "model"))
        if output_format not in [*FORMATS]:
            raise UsageError(f"output_format: {shown(output_format, 40)!r} is none of {', '.join(FORMATS)}")
        if type(n) is not int or n < 1:
            raise UsageError(f"n: {shown(n, 40)} is not a number of images: 1 or more")
        if quality is not None:
            values.number(quality, "quality", values.Whole(0, 100))
        if previews is not None:
            values.number(previews, "previews", values.Whole(0))
        wanted = {name: value for name, value in settings.items() if value is not None}
        pairs: list[tuple[str, float]] = []
        if loras is not None:
            pairs = _pairs(loras)
            wanted |= {"lora_paths": [name for name, _ in pairs], "lora_scales": [scale for _, scale in pairs]}
        images = () if images is None else images
        sources = [_image(one) for one in ([images] if _is_one(images) else images)]
        mask = None if mask is None else _image(mask)
        from mflux import hub

        with hub.offline(_NEVER_FETCHED):
            command, plan = found.plan({"prompt": prompt, **wanted}, sources, mask, n=n)
        shown_settings = wanted | {"steps": plan.options.steps, "seed": plan.images[0]["seed"]}
        job = Job(
            found.id,
            command,
            plan,
            shown_settings,
            output_format=output_format,
            quality=quality,
            previews=previews,
            source=source,
            weight=weight,
        )
        job.request = {
            "model": found.id,
            "prompt": prompt,
            "n": n,
            "images": sources,
            "mask": mask,
            "loras": None if loras is None else [{"name": name, "scale": scale} for name, scale in pairs],
            "output_format": output_format,
            "output_compression": quality,
            "previews": "auto" if previews is None else previews,
            **{name: value for name, value in settings.items() if value is not None},
            "seed": shown_settings["seed"],
        }
        job.expected_step_seconds, job.decode_seconds = self._seconds.get((found.id, job.size), (0.0, 0.0))
        job.position_of = self._position
        with self._condition:
            self.check_room()
            self._forget()
            self._jobs[job.id] = job
            self._waiting.append(job)
            self._condition.notify_all()
        return job

    def check_room(self) -> None:
        """
        Raises:
            QueueFullError: too many jobs wait.
            StoppingError: nothing more is taken.
        """
        if self._stopping:
            raise StoppingError("the server is being stopped: try again later, or another one")
        if len(self.waiting) >= self.queue_limit:
            raise QueueFullError(
                f"{len(self.waiting)} jobs are waiting, and no more may: try again later", self._seconds_to_a_place()
            )

    @property
    def waiting(self) -> list[Job]:
        """Jobs in the queue, the next one first."""
        with self._condition:
            return [job for job in self._waiting if isinstance(job, Job)]

    @property
    def waiting_bytes(self) -> int:
        """What they hold."""
        return sum(job.weight for job in self.waiting)

    @property
    def running(self) -> Job | None:
        """The job that this machine generates."""
        return self._running

    @property
    def under_way(self) -> list[Job]:
        """All that are generated, here and elsewhere."""
        with self._condition:
            return [*([self._running] if self._running else []), *self._away]

    @property
    def is_stopping(self) -> bool:
        return self._stopping

    @property
    def has_ended(self) -> bool:
        """Whether its thread has."""
        return self._ended.is_set()

    @property
    def jobs(self) -> list[Job]:
        """All that are remembered, newest first."""
        with self._condition:
            self._forget()
            return list(self._jobs.values())[::-1]

    def job(self, name: str) -> Job | None:
        with self._condition:
            self._forget()
            return self._jobs.get(name)

    def loaded(self) -> dict[str, int]:
        """Bytes of the models that are in memory, by their ids."""
        found: dict[str, int] = {}
        for one in list(self._loaded.values()):
            if taken := one.bytes:
                found[one.model] = found.get(one.model, 0) + taken
        return found

    def cancel(self, job: Job, why: str = "it was cancelled") -> bool:
        """Take a job from the queue, or end it at its next step.

        Returns:
            Whether it was not over yet.
        """
        with self._condition:
            if job in self._waiting:
                self._waiting.remove(job)
            elif job.is_over:
                return False
        job.cancelled.set()
        with self._condition:
            is_away = job in self._away
        if is_away:
            if job.cancel_elsewhere is not None:
                self._files.submit(job.cancel_elsewhere)
        elif job is not self._running:
            job.end("cancelled", JobError(why, "cancelled"))
        return True

    def forget(self, job: Job) -> bool:
        """Let go of a job's images.

        Returns:
            Whether it was remembered.
        """
        with self._condition:
            return self._jobs.pop(job.id, None) is not None

    # ---- for threads that have jobs done elsewhere

    def take(self, models: Collection[str], seconds: float) -> Job | None:
        """The next job for one of these models, to be done elsewhere; None where there is none in that time. It is to
        be given to `give_back`."""
        until = time.monotonic() + seconds
        with self._condition:
            while not self._stopping:
                for job in self._waiting:
                    if isinstance(job, Job) and job.model in models:
                        self._waiting.remove(job)
                        self._away.append(job)
                        return job
                if not self._condition.wait(until - time.monotonic()) and time.monotonic() >= until:
                    break
        return None

    def give_back(self, job: Job, *, undone: bool = False) -> None:
        """A job that was taken: it is over, or it is to be done anew, before all others."""
        with self._condition:
            self._away.remove(job)
            if undone and not self._stopping and not job.cancelled.is_set():
                job.start_anew()
                self._waiting.appendleft(job)
            elif not job.is_over:
                job.end("cancelled", JobError("it was cancelled", "cancelled"))
            self._condition.notify_all()

    def load(self, name: str | None = None) -> None:
        """Have a model in memory; waits its turn.

        Raises:
            MfluxError: it cannot be had, or is too large.
        """
        self._do(lambda: self._load(self.model(name)))

    def fetch(self, name: str) -> None:
        """Have a model's files on this machine, and know that it can be opened.

        Raises:
            MfluxError: it cannot be had.
        """
        self._do(lambda: self._fetch(self.model(name)))

    def unload(self, name: str | None = None) -> None:
        """Have a model leave memory, after the job that uses it."""
        found = self.model(name)
        self._do(lambda: self._release([one for one in self._loaded.values() if one.model == found.id]))

    def close(self, grace: float = 5.0) -> None:
        """Take nothing more, end what waits, and give the running job some seconds before it is cancelled."""
        with self._condition:
            first, self._stopping = not self._stopping, True
            waiting, self._waiting = list(self._waiting), deque()
            self._condition.notify_all()
        for one in waiting:
            if isinstance(one, Job):
                one.end("cancelled", JobError("the server is being stopped", "stopping"))
            else:
                one.future.set_exception(StoppingError("the server is being stopped"))
        if first:
            until = time.monotonic() + grace
            self._ended.wait(grace)
            while self.under_way and time.monotonic() < until:
                time.sleep(0.02)
            for job in self.under_way:
                self.cancel(job)
        self._ended.wait(10 if grace == 0 else 3)
        self._files.shutdown(wait=False)
        atexit.unregister(self.close)

    # ---- for any thread: inside

    def _do(self, what: Callable[[], None]) -> None:
        task = _Task(what)
        with self._condition:
            if self._stopping:
                raise StoppingError("the server is being stopped")
            self._waiting.append(task)
            self._condition.notify_all()
        task.future.result()

    def _position(self, job: Job) -> int:
        """How many jobs are before it, the running one among them; 0 is the running one."""
        with suppress(ValueError):
            return self.waiting.index(job) + len(self.under_way)
        return 0

    def _seconds_to_a_place(self) -> int:
        job = self._running
        return max(1, min(60, round((job.eta_seconds or 1.0) if job is not None else 1.0)))

    def _forget(self) -> None:
        """Jobs that are over for long, and images beyond what is kept, the oldest first."""
        over = [job for job in self._jobs.values() if job.is_over]
        now = time.time()
        pictures = sum(len(job.pictures) for job in over)
        taken = sum(len(picture.data) for job in over for picture in job.pictures)
        for job in over:
            is_old = job.finished is not None and now - job.finished > _KEPT_SECONDS
            if is_old or pictures > _KEPT_PICTURES or taken > _KEPT_BYTES or len(self._jobs) > 1000:
                del self._jobs[job.id]
                pictures -= len(job.pictures)
                taken -= sum(len(picture.data) for picture in job.pictures)

    # ---- the thread of MLX

    def _work(self) -> None:
        while (work := self._next()) is not None:
            if isinstance(work, _Task):
                work.run()
                continue
            try:
                self._generate(work)
            finally:
                with self._condition:
                    self._running = None
        self._loaded.clear()
        gc.collect()
        self._ended.set()
        # A thread that has used MLX and ends lets go of its streams after Python has counted it as ended; where the
        # process ends meanwhile, MLX aborts it. One that sleeps for ever does no harm.
        threading.Event().wait()

    def _next(self) -> Job | _Task | None:
        """What is to be done; meanwhile models leave that nobody has needed for long. None: nothing more."""
        while True:
            with self._condition:
                for work in self._waiting:
                    if isinstance(work, Job) and work.model in self.elsewhere:
                        continue
                    self._waiting.remove(work)
                    if isinstance(work, Job):
                        self._running = work
                    return work
                if self._stopping:
                    return None
                due = [one.used + self.keep for one in self._loaded.values()] if self.keep >= 0 else []
                self._condition.wait(max(0.0, min(due) - time.monotonic()) if due else None)
                if any(not isinstance(one, Job) or one.model not in self.elsewhere for one in self._waiting):
                    continue
                if not due or self._stopping:
                    continue
            now = time.monotonic()
            self._release([one for one in self._loaded.values() if one.used + self.keep <= now])

    def _generate(self, job: Job) -> None:
        started = time.time()
        self.seconds_of("wait", started - job.created)
        job.change(status="loading", started=started)
        futures: list[Future[None]] = []
        pipeline: Pipeline | None = None
        watch = _Watch(self, job)
        from mflux import hub

        try:
            with hub.offline(_NEVER_FETCHED):
                watch.check()
                loaded = self._pipeline(job.plan, self.model(job.model))
                pipeline = loaded.pipeline
                pipeline.callbacks.register(watch)
                watch.begin(pipeline)
                for image in job.command.images(job.plan, pipeline):
                    watch.decoded()
                    pixels = image.image
                    if job.command.pixels is not None:
                        pixels = job.command.pixels(image, job.plan.options)
                    futures.append(self._files.submit(self._keep_picture, job, image, pixels))
                    watch.begin(pipeline)
                loaded.used = time.monotonic()
            for future in futures:
                future.result()
            self._seconds[job.model, job.size] = (watch.step_seconds, job.decode_seconds)
            job.end("done")
        except Exception as error:
            kind, message = _kind_of(error, job)
            # Where Python ends, nobody is there who has lost an image.
            is_told = threading.main_thread().is_alive() and not isinstance(error, MfluxError)
            if kind == "failed" and is_told:
                log.error("%s: %s: %s", job.id, type(error).__name__, error, exc_info=log.isEnabledFor(logging.DEBUG))
                # Whatever state it is in.
                self._release([one for one in self._loaded.values() if one.pipeline is pipeline])
            job.end("cancelled" if kind == "cancelled" else "failed", JobError(message, kind))
        finally:
            if pipeline is not None:
                _unregister(pipeline, watch)
            if self.keep == 0:
                self._release([*self._loaded.values()])

    def _keep_picture(self, job: Job, image: GeneratedImage, pixels: PIL.Image.Image) -> None:
        """In a thread of its own kind: a file's contents of an image."""
        from mflux.utils.picture_files import picture_bytes, plain_settings

        settings = plain_settings(image.settings())
        kind = FORMATS[job.output_format][0]
        if kind == "JPEG" and pixels.mode != "RGB":
            pixels = pixels.convert("RGB")
        data = picture_bytes(pixels, settings, picture_format=kind, quality=job.quality)
        picture = Picture(data, job.output_format, image.seed, pixels.size, settings)
        if self.output is not None:
            # By the clock and the seed: no name comes from a request.
            name = f"{time.strftime('%Y%m%d-%H%M%S')}-{image.seed}.{job.output_format}"
            try:
                picture.save(self.output / name)
            except MfluxError as error:
                # Whoever asked for it gets it all the same.
                log.error("%s", error)
        job.add_picture(picture)

    # ---- the thread of MLX: models

    def _pipeline(self, plan: Plan, model: Served) -> _Loaded:
        """The pipeline for a plan, with its LoRAs, and room for it."""
        loaded = self._open(plan, model)
        pipeline = loaded.pipeline
        names, scales = (list(plan.constructor.get(name) or ()) for name in ("lora_paths", "lora_scales"))
        # Beside the weights they come and go with requests; in them, every change means to read the weights again.
        bake = bool(self.options.get("bake_lora", False))
        if (pipeline.lora_paths or [], pipeline.lora_scales or []) != (names, scales):
            pipeline.set_loras(names or None, scales or None, bake)
        self._make_room(loaded)
        return loaded

    def _open(self, plan: Plan, model: Served) -> _Loaded:
        key = _without_loras(plan).key
        found = self._loaded.get(key)
        if found is None:
            started = time.perf_counter()
            pipeline = _without_loras(plan).load()
            _settle_pipeline(pipeline, plan)
            needs = _needs(pipeline, self.options.get("quantize"))
            largest = max(needs.values())
            if largest > self._most_bytes():
                raise UsageError(
                    f"{model.id} takes {size(largest)} in its largest part, and models may have "
                    f"{size(self._most_bytes())} here: quantize it (-q 4), or allow more (--memory-limit-gb)"
                )
            found = self._loaded[key] = _Loaded(pipeline, model.id, needs)
            self.seconds_of("load", time.perf_counter() - started)
        found.model, found.used = model.id, time.monotonic()
        return found

    def _fetch(self, model: Served) -> None:
        self._open(model.sample(), model)

    def _load(self, model: Served) -> None:
        from mflux import hub

        with hub.offline(_NEVER_FETCHED):
            loaded = self._pipeline(model.sample(), model)
            for component in loaded.pipeline.components:
                if loaded.pipeline.keep.text_encoders or component.stage == "denoise":
                    getattr(loaded.pipeline, component.name)

    def _make_room(self, wanted: _Loaded) -> None:
        """Let those leave that were used longest ago, until the wanted one fits; and say which of its parts stay."""
        needed, most = sum(wanted.needs.values()), self._most_bytes()
        others = sorted((one for one in self._loaded.values() if one is not wanted), key=lambda one: one.used)
        while others and sum(one.bytes for one in others) + needed > most:
            self._release([others.pop(0)])
        pipeline, low = wanted.pipeline, bool(self.options.get("low_ram"))
        together = needed <= most and not low
        two = max(wanted.needs[first] + wanted.needs["denoise"] for first in ("encode", "decode")) <= most and not low
        pipeline.keep = replace(pipeline.keep, text_encoders=together, transformer=two, for_next_image=two)

    def _release(self, leaving: Collection[_Loaded]) -> None:
        self._loaded = {key: one for key, one in self._loaded.items() if one not in leaving}
        for one in leaving:
            one.pipeline.release_stages(*STAGES)

    def _most_bytes(self) -> int:
        if self.memory_limit is None:
            from mflux.backend import mx
            from mflux.utils.memory import machine_memory

            most = machine_memory().most * 3 // 4
            if mx.metal.is_available():
                most = int(mx.device_info().get("max_recommended_working_set_size", most))
            self.memory_limit = most
        return self.memory_limit


@dataclass(eq=False)
class _Task:
    """Something else than a job for the thread of MLX."""

    what: Callable[[], None]
    future: Future[None] = field(default_factory=Future)

    def run(self) -> None:
        try:
            self.what()
        except BaseException as error:
            self.future.set_exception(error)
        else:
            self.future.set_result(None)


class _Watch:
    """A callback that tells a job how far it is, cancels it, and makes its previews."""

    def __init__(self, engine: Engine, job: Job):
        self._engine, self._job = engine, job
        self._pipeline: Any = None
        self._image = -1
        self._since = time.perf_counter()
        self._steps: range = range(0)
        # Previews so far, and the step of this image that the last one is of.
        self._previewed = self._last_preview = 0

    @property
    def step_seconds(self) -> float:
        return statistics.median(self._job.step_seconds) if self._job.step_seconds else 0.0

    def begin(self, pipeline: Any) -> None:
        """The next image begins."""
        self._pipeline, self._image = pipeline, self._image + 1
        self._since = time.perf_counter()

    def decoded(self) -> None:
        """An image is there."""
        seconds = self._lap("decode")
        self._job.change(decode_seconds=seconds)

    def check(self) -> None:
        """
        Raises:
            StopImageGenerationException: the job is to end.
        """
        if self._job.cancelled.is_set():
            raise StopImageGenerationException("it was cancelled")

    def call_before_loop(self, config: Config, **_: Any) -> None:
        self.check()
        self._lap("encode")
        self._steps = config.time_steps
        self._last_preview = 0
        self._job.change(status="drawing")

    def call_in_loop(self, t: int, config: Config, denoised: mx.array, **_: Any) -> None:
        seconds = self._lap("step")
        job = self._job
        if t > self._steps.start or len(self._steps) == 1:  # the first one may have loaded the transformer
            job.step_seconds.append(seconds)
        job.change(step=job.step + 1)
        self.check()
        if t + 1 < self._steps.stop and self._is_due(t):
            self._preview(config, denoised)
            self._last_preview = t + 1 - self._steps.start
            self._since = time.perf_counter()

    def call_after_loop(self, **_: Any) -> None:
        self.check()
        self._since = time.perf_counter()

    def _lap(self, stage: str) -> float:
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self._engine.seconds_of(stage, seconds)
        return seconds

    def _is_due(self, t: int) -> bool:
        """Whether the step is one that is shown."""
        taken, steps, wanted = t + 1 - self._steps.start, len(self._steps), self._job.wanted_previews
        if wanted is None:
            # None after a first step, which is noise.
            most = self._affordable(steps)
            return most > 0 and taken > 1 and taken - self._last_preview >= steps / (most + 1)
        if self._previewed >= wanted:
            return False
        of_each = -(-wanted // self._job.n)
        return taken in [round(steps * number / (of_each + 1)) for number in range(1, of_each + 1)]

    def _affordable(self, steps: int) -> int:
        """How many previews of an image cost next to nothing."""
        costs, key = self._engine._preview_seconds, (self._job.model, self._job.size)
        # One decodes a quarter of the image, or less.
        cost = costs.get(key) or self._job.decode_seconds / 4
        if self._last_preview == 0:
            # What was measured on a busy moment is not to be the last word.
            costs[key] = cost * 0.99
        return int(_PREVIEW_SHARE * self.step_seconds * steps / cost) if cost else 1

    def _preview(self, config: Config, denoised: mx.array) -> None:
        is_first = not self._engine._preview_seconds.get((self._job.model, self._job.size))
        started = time.perf_counter()
        small = _small_image(self._pipeline, config, denoised)
        if not is_first:  # which may have loaded the autoencoder
            self._engine._preview_seconds[self._job.model, self._job.size] = time.perf_counter() - started
        self._previewed += 1
        preview = Preview(self._previewed, self._image, self._job.step, b"", *("jpeg", *small.size))
        self._engine._files.submit(_keep_preview, self._job, preview, small)


def _small_image(pipeline: Any, config: Config, denoised: mx.array) -> PIL.Image.Image:
    """What the model predicts at a step: its latents averaged to a few, and decoded by its own autoencoder."""
    from mflux.models.common.networks.autoencoders import tiling
    from mflux.utils.image_util import ImageUtil

    latents = pipeline.latent_creator.unpack_latents(denoised, config.height, config.width)
    *front, height, width = latents.shape
    factor = max(2, -(-max(height, width) // _PREVIEW_LATENTS))
    # Even sides, which every autoencoder takes.
    rows, columns = (max(2, side // factor // 2 * 2) for side in (height, width))
    factor = min(factor, height // rows, width // columns)
    latents = latents[..., : rows * factor, : columns * factor]
    latents = latents.reshape(*front, rows, factor, columns, factor).mean(axis=(-3, -1))
    image = ImageUtil.to_pil(tiling.decode(pipeline.vae, latents, None))
    image.thumbnail((_PREVIEW_PIXELS, _PREVIEW_PIXELS))
    return image


def _keep_preview(job: Job, preview: Preview, image: PIL.Image.Image) -> None:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_PREVIEW_QUALITY)
    job.add_preview(replace(preview, data=file.getvalue()))


def _settle_pipeline(pipeline: Pipeline, plan: Plan) -> None:
    """What a command's options say of the machine."""
    from mflux.callbacks.instances.memory_saver import limit_cache
    from mflux.models.common.networks.autoencoders.tiling import TilingConfig

    args = plan.options
    if args.vae_tiling or args.vae_tile_size or args.low_ram:
        pipeline.tiling_config = TilingConfig(vae_decode_tile_size=args.vae_tile_size or 512)
    if args.mlx_cache_limit_gb or args.low_ram:
        limit_cache(int((args.mlx_cache_limit_gb or 1) * 1e9))
    pipeline.vae_full_precision = getattr(args, "vae_full_precision", False)


def _needs(pipeline: Pipeline, bits: int | None) -> dict[str, int]:
    """Bytes of a pipeline's components by stage, from its files' headers."""
    from mflux.backend import has_gpu
    from mflux.checkpoints.quantization import Quantization
    from mflux.checkpoints.saving import estimated_bytes

    asked = Quantization.asked(bits)
    needs = dict.fromkeys(STAGES, 0)
    for component in pipeline.components:
        folder = pipeline.folder_of(component)
        tensors = folder.tensors(component.folder)
        found = estimated_bytes(tensors, asked, getattr(component.module_class(), "least_bits", None))
        if not has_gpu() and asked is None and pipeline.bits is None:
            # Computed in float32.
            found = max(found, 4 * sum(value.size for value in tensors.values()))
        needs[component.stage] += found
    return needs


def _without_loras(plan: Plan) -> Plan:
    """The same for all plans that one loaded model serves, once it has their LoRAs."""
    of_loras = ("lora_paths", "lora_scales", "bake_lora")
    return replace(plan, constructor={name: value for name, value in plan.constructor.items() if name not in of_loras})


def _unregister(pipeline: Pipeline, callback: object) -> None:
    registry = pipeline.callbacks
    for callbacks in (registry.before_loop, registry.in_loop, registry.after_loop, registry.interrupt):
        if callback in callbacks:
            callbacks.remove(callback)


def _kind_of(error: Exception, job: Job) -> tuple[str, str]:
    """Whose fault it is that there are no images, and a sentence."""
    if isinstance(error, StopImageGenerationException) and job.cancelled.is_set():
        return "cancelled", "the job was cancelled"
    if isinstance(error, (UsageError, ImageError)):
        return "invalid", str(error)
    if isinstance(error, MfluxError):
        return "failed", str(error)
    if isinstance(error, (MemoryError, RuntimeError)) and is_out_of_memory(error):
        return "failed", "there is not enough memory for this image: ask for a smaller size"
    return "failed", f"the model failed ({type(error).__name__}): the server's log has more"


def _pairs(loras: Any) -> list[tuple[str, float]]:
    try:
        return [(values.text(name, "loras"), scale) for name, scale in loras]
    except (TypeError, ValueError):
        raise UsageError('loras: names with their scales are wanted, as in [("style", 0.8)]') from None


def _is_one(images: Any) -> bool:
    return isinstance(images, (str, bytes)) or not isinstance(images, Iterable) or given(images) is not None


def _image(value: Any) -> GivenImage:
    """A source image of a program: opened, contents, or a path, which is read now."""
    found = values.image(value, "images")
    if isinstance(found, GivenImage):
        return found
    try:
        return GivenImage(found.read_bytes(), found.name)
    except OSError as error:
        from mflux.utils.picture_files import unreadable

        raise unreadable(found, error) from None
