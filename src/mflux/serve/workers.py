"""Other servers that take jobs from this one's queue, each of them one at a time.

Nothing but `mflux serve`'s own jobs is spoken, so a worker may be of another version, have other models, join late, and
die: its job then goes to the head of the queue, once.
"""

from __future__ import annotations

import base64
import logging
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mflux.errors import MfluxError
from mflux.serve.jobs import Job, JobError, Picture, Preview
from mflux.serve.models import served
from mflux.serve.remote import AwayError, RefusedError, Server, data_url
from mflux.text import shown
from mflux.utils.given_image import GivenImage

if TYPE_CHECKING:
    from mflux.serve.engine import Engine

log = logging.getLogger(__name__)

# Between two looks at what a worker has, and at one that is away or busy with others' jobs.
_LOOK_SECONDS, _RETRY_SECONDS = 10.0, 2.0
_BUSY = (429, 503)


class Worker:
    """A server that takes jobs.

    Args:
        engine: whose queue it is.
        url: where it answers.
        key: that it wants, if any.
    """

    def __init__(self, engine: Engine, url: str, key: str | None = None):
        self._engine, self._server = engine, replace(Server.at(url, "--worker"), key=key)
        self._is_away = False
        self._thread = threading.Thread(target=self._work, name=f"mflux-worker {url}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def models(self) -> list[str]:
        """What it has.

        Raises:
            MfluxError: it does not answer.
        """
        try:
            return [str(model["id"]) for model in self._server.json("GET", "/v1/models")["data"]]
        except (KeyError, TypeError):
            raise self._server.other() from None

    def _work(self) -> None:
        while not self._engine.is_stopping:
            try:
                models = self.models()
            except MfluxError as error:
                self._tell(away=True, why=str(error))
                time.sleep(_RETRY_SECONDS)
                continue
            self._tell(away=False)
            job = self._engine.take(models, _LOOK_SECONDS)
            if job is not None:
                self._do(job)

    def _tell(self, *, away: bool, why: str = "") -> None:
        """Once for each time that it goes or comes back."""
        if away and not self._is_away:
            log.warning("the worker %s is away: %s", shown(self._server.url, 100), why)
        elif self._is_away and not away:
            log.info("the worker %s is back", shown(self._server.url, 100))
        self._is_away = away

    def _do(self, job: Job) -> None:
        undone = False
        try:
            self._generate(job)
        except RefusedError as error:
            undone = error.status in _BUSY
            if undone:
                time.sleep(_RETRY_SECONDS)
            else:
                job.end("failed", JobError(str(error), "invalid" if error.status == 400 else "failed"))
        except AwayError as error:
            job.losses += 1
            undone = job.losses == 1
            self._tell(away=True, why=str(error))
            if not undone:
                job.end("failed", JobError("two servers died while they generated it", "failed"))
        except Exception as error:
            log.error("%s at %s: %s: %s", job.id, self._server.url, type(error).__name__, error)
            job.end("failed", JobError("the worker answered what no server answers", "failed"))
        finally:
            self._engine.give_back(job, undone=undone)

    def _generate(self, job: Job) -> None:
        server = self._server
        there = server.json("POST", "/v1/jobs", _as_sent(job))
        path = f"/v1/jobs/{there['id']}"

        def cancel() -> None:
            with suppress(MfluxError):
                server.ask("DELETE", path).close()

        job.cancel_elsewhere = cancel
        if job.cancelled.is_set():
            cancel()
        job.change(status="loading", started=time.time())
        state: dict[str, Any] = {}
        for name, data in server.events(f"{path}/events"):
            if name == "preview":
                self._add_preview(job, data)
                continue
            state = data
            status = {"queued": "loading", "loading": "loading"}.get(data["status"], "drawing")
            if not job.is_over:
                job.change(status=status, step=int(data["step"]))
        if state["status"] == "done":
            for number, image in enumerate(state["images"]):
                job.add_picture(_picture(server.read("GET", f"{path}/images/{number}"), image))
            job.end("done")
        else:
            kind = "cancelled" if state["status"] == "cancelled" else str(state["error"]["code"])
            status = "cancelled" if kind == "cancelled" else "failed"
            if kind == "stopping" or (kind == "cancelled" and not job.cancelled.is_set()):
                # The worker is being stopped.
                raise AwayError(f"{server.url} stopped")
            job.end(status, JobError(str(state["error"]["message"]), kind))
        # Nobody asks for them there.
        cancel()

    def _add_preview(self, job: Job, data: dict[str, Any]) -> None:
        job.add_preview(
            Preview(
                len(job.previews) + 1,
                int(data.get("image", 0)),
                int(data["step"]),
                base64.b64decode(data["b64_json"]),
                str(data["output_format"]),
                int(data["width"]),
                int(data["height"]),
            )
        )


def check_workers(urls: Sequence[str], key: str | None = None) -> None:
    """
    Raises:
        UsageError: one is no address of a server.
        MfluxError: one does not answer, or refuses.
    """
    for url in urls:
        replace(Server.at(url, "--worker"), key=key).json("GET", "/v1/models")


def add_workers(engine: Engine, urls: Sequence[str], key: str | None = None) -> None:
    """Have other servers take jobs of an engine. What they have and this machine has not may be asked for as well.

    Raises:
        UsageError: one is no address of a server.
        MfluxError: one does not answer.
    """
    workers = [Worker(engine, url, key) for url in urls]
    for worker in workers:
        for name in worker.models():
            if name in [model.id for model in engine.models]:
                continue
            try:
                engine.models.append(served(name, engine.options))
                engine.elsewhere.add(name)
            except MfluxError as error:
                log.warning("a worker has %s, which cannot be asked for here: %s", shown(name, 60), error)
    for worker in workers:
        worker.start()


def _as_sent(job: Job) -> dict[str, Any]:
    """A job's request in the fields of another server."""
    body = {name: value for name, value in job.request.items() if value not in (None, [])}
    for name in ("images", "mask"):
        if name in body:
            images = body[name] if isinstance(body[name], list) else [body[name]]
            urls = [data_url(_contents(image)) for image in images]
            body[name] = urls if name == "images" else urls[0]
    return body


def _contents(image: GivenImage) -> bytes:
    """A file of an image; of one that a program opened, a new one."""
    if isinstance(image.image, bytes):
        return image.image
    from mflux.utils.picture_files import open_image, picture_bytes

    return picture_bytes(open_image(image))


def _picture(data: bytes, image: dict[str, Any]) -> Picture:
    from mflux.utils.metadata_reader import MetadataReader
    from mflux.utils.picture_files import oriented_size

    given = GivenImage(data)
    settings = MetadataReader.read_exif_metadata(given) or {}
    return Picture(data, str(image["output_format"]), int(image["seed"]), oriented_size(given), settings)
