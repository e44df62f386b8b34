"""HTTP: OpenAI's routes for images, jobs of our own for what these lack, and the page."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mflux.optional import require
from mflux.serve.guard import ClientLeft, Guard, Rules
from mflux.serve.jobs import Job, base64_of
from mflux.serve.requests import (
    ImageRequest,
    RequestError,
    Upload,
    answer_of,
    lora_names,
    of_form,
    opened,
    parsed,
    read,
)
from mflux.serve.responses import about_picture, event, file_response, in_thread, json_response
from mflux.text import shown

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

    from mflux.serve.engine import Engine
    from mflux.serve.jobs import Picture
    from mflux.serve.models import Served

Endpoint = Callable[["Request"], Awaitable["Response"]]

# Parts of a form, of which images may be sixteen.
_MOST_PARTS = 64
_PING_SECONDS = 15.0
# Bodies that wait, together, as a multiple of the largest one.
_WAITING_BODIES = 4
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
_PAGE = Path(__file__).parent / "page"
_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
# What a usage of tokens is where there are none.
_USAGE = {
    "total_tokens": 0,
    "input_tokens": 0,
    "output_tokens": 0,
    "input_tokens_details": {"text_tokens": 0, "image_tokens": 0},
}


def check_installed() -> None:
    """
    Raises:
        MissingExtraError: what this needs is not there.
    """
    for package in ("starlette", "uvicorn", "python_multipart", "prometheus_client"):
        require(package, extra="serve", feature="mflux serve")


def build_app(engine: Engine, rules: Rules | None = None, *, page: bool = True, sdapi: bool = True) -> ASGIApp:
    """The application that a server runs; the engine belongs to the caller.

    Raises:
        MissingExtraError: the extra `serve` is not installed.
    """
    check_installed()
    return Server(engine, rules or Rules(), page=page, sdapi=sdapi).app


class Server:
    """Endpoints over one engine."""

    def __init__(
        self, engine: Engine, rules: Rules, *, page: bool = True, sdapi: bool = True, log_prompts: bool = False
    ):
        from mflux.serve.metrics import Metrics

        self.engine, self.rules, self.log_prompts = engine, rules, log_prompts
        self.metrics = Metrics(engine)
        engine.seconds_of = self.metrics.stage
        # Names of files that are the permission to read them.
        self._files: dict[str, tuple[str, int]] = {}
        routes: list[tuple[str, str, Endpoint]] = [
            ("GET", "/health", self.health),
            ("GET", "/metrics", self.show_metrics),
            ("GET", "/v1/models", self.list_models),
            ("POST", "/v1/models/{id:path}/load", self.load_model),
            ("POST", "/v1/models/{id:path}/unload", self.unload_model),
            ("GET", "/v1/models/{id:path}", self.show_model),
            ("GET", "/v1/loras", self.list_loras),
            ("POST", "/v1/images/generations", partial(self.images, "image_generation")),
            ("POST", "/v1/images/edits", partial(self.images, "image_edit")),
            ("GET", "/v1/images/files/{name}", self.file),
            ("POST", "/v1/settings", self.settings),
            ("POST", "/v1/jobs", self.make_job),
            ("GET", "/v1/jobs", self.list_jobs),
            ("GET", "/v1/jobs/{id}", self.show_job),
            ("DELETE", "/v1/jobs/{id}", self.delete_job),
            ("GET", "/v1/jobs/{id}/events", self.events),
            ("GET", "/v1/jobs/{id}/images/{number:int}", self.image),
        ]
        if sdapi:
            from mflux.serve.sdapi import Sdapi

            routes += Sdapi(self).routes()
        if page:
            for path in sorted(_PAGE.iterdir()):
                if path.suffix in _TYPES:
                    name = "/" if path.name == "index.html" else f"/page/{path.name}"
                    routes.append(("GET", name, partial(self.page, path.read_bytes(), path.suffix)))
        self.app: ASGIApp = Guard(
            _router(routes), rules, is_stopping=lambda: engine.is_stopping, count=self.metrics.request
        )

    # ---- models

    def about(self, model: Served) -> dict[str, Any]:
        side = model.config.default_size
        return {
            "id": model.id,
            "object": "model",
            "created": 0,
            "owned_by": "mflux",
            "mflux": {
                "loaded": model.id in self.engine.loaded(),
                "default": model is self.engine.default,
                "command": model.command.command.prog,
                "size": f"{side}x{side}",
                "steps": model.config.default_steps,
                "guidance": model.command.guidance if model.takes_guidance else None,
                "negative_prompt": model.takes_negative_prompt,
                "lora": model.takes_loras,
                "images": list(model.images),
                "mask": model.takes_mask,
                "strength": any(one.has_strength for one in model.variants),
            },
        }

    async def list_models(self, request: Request) -> Response:
        data = await in_thread(lambda: [self.about(model) for model in self.engine.models])
        return json_response({"object": "list", "data": data})

    async def show_model(self, request: Request) -> Response:
        model = self.engine.model(request.path_params["id"])
        return json_response(await in_thread(self.about, model))

    async def load_model(self, request: Request) -> Response:
        model = self.engine.model(request.path_params["id"])
        await in_thread(self.engine.load, model.id)
        return json_response(self.about(model))

    async def unload_model(self, request: Request) -> Response:
        model = self.engine.model(request.path_params["id"])
        await in_thread(self.engine.unload, model.id)
        return json_response(self.about(model))

    async def list_loras(self, request: Request) -> Response:
        names = await in_thread(lora_names, self.engine)
        return json_response({"object": "list", "data": [{"id": name, "object": "lora"} for name in names]})

    # ---- images, OpenAI's way

    async def images(self, kind: str, request: Request) -> Response:
        asked = await self.read(request, needs_image=kind == "image_edit")
        job = await in_thread(lambda: self.engine.submit(source="openai", **asked.arguments))
        self.tell(request, job)
        if asked.stream:
            from starlette.responses import StreamingResponse

            stream = self._stream(kind, job, asked.partial_images)
            return StreamingResponse(stream, media_type="text/event-stream", headers=_STREAM_HEADERS)
        pictures = await self.finished(job, request)
        data = []
        for number, picture in enumerate(pictures):
            one: dict[str, Any] = {"seed": picture.seed}
            if asked.response_format == "url":
                one["url"] = self._address(request, job, number)
            else:
                one["b64_json"] = await in_thread(base64_of, picture.data)
            data.append(one)
        return json_response(
            {"created": int(job.created), "data": data, **about_picture(pictures[0]), "usage": _USAGE, "job": job.id}
        )

    async def _stream(self, kind: str, job: Job, partial_images: int) -> AsyncIterator[bytes]:
        """Events that OpenAI's clients know, and no others: their unions of types are closed."""
        told, shown_ = 0, 0
        width, height = job.size
        about = {"quality": "auto", "background": "opaque"}
        try:
            async for _ in self.changes(job):
                if _ is None:
                    yield b": ping\n\n"
                    continue
                for preview in [one for one in job.previews if one.number > shown_]:
                    shown_ = preview.number
                    value = {
                        "type": f"{kind}.partial_image",
                        "b64_json": await in_thread(base64_of, preview.data),
                        "created_at": int(job.created),
                        "size": f"{width}x{height}",
                        "output_format": preview.output_format,
                        "partial_image_index": (preview.number - 1) % max(1, partial_images),
                        **about,
                    }
                    yield event(value["type"], value)
                while told < len(job.pictures):
                    picture, told = job.pictures[told], told + 1
                    value = {
                        "type": f"{kind}.completed",
                        "b64_json": await in_thread(base64_of, picture.data),
                        "created_at": int(job.created),
                        "seed": picture.seed,
                        "usage": _USAGE,
                        **about_picture(picture),
                    }
                    yield event(value["type"], value)
            if job.error is not None:
                yield event("error", answer_of(job.error).as_json())
        finally:
            # Whoever has left wants nothing more.
            self.engine.cancel(job)

    def _address(self, request: Request, job: Job, number: int) -> str:
        name = f"{secrets.token_hex(16)}.{job.output_format}"
        self._files = {old: place for old, place in self._files.items() if self.engine.job(place[0]) is not None}
        self._files[name] = job.id, number
        return _own_address(request, name)

    async def file(self, request: Request) -> Response:
        job_id, number = self._files.get(request.path_params["name"], ("", 0))
        job = self.engine.job(job_id)
        if job is None:
            raise RequestError(
                "there is no such file, or no longer: ask for it anew",
                status=404,
                kind="not_found_error",
                code="route_not_found",
            )
        return file_response(job.pictures[number])

    # ---- jobs

    async def make_job(self, request: Request) -> Response:
        asked = await self.read(request, is_job=True)
        job = await in_thread(lambda: self.engine.submit(source="jobs", **asked.arguments))
        self.tell(request, job)
        return json_response(job.as_json(), status=202)

    async def list_jobs(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [job.as_json() for job in self.engine.jobs]})

    async def show_job(self, request: Request) -> Response:
        return json_response(self._job(request).as_json())

    async def delete_job(self, request: Request) -> Response:
        job = self._job(request)
        if not self.engine.cancel(job):
            self.engine.forget(job)
        else:
            # It ends at its next step: that is what is answered.
            async for _ in self.changes(job):
                pass
        return json_response(job.as_json())

    async def image(self, request: Request) -> Response:
        job, number = self._job(request), request.path_params["number"]
        if number >= len(job.pictures):
            raise RequestError(
                f"{job.id} has {len(job.pictures)} images, counted from 0",
                status=404,
                kind="not_found_error",
                code="job_not_found",
            )
        return file_response(job.pictures[number])

    async def events(self, request: Request) -> Response:
        from starlette.responses import StreamingResponse

        stream = self._events(self._job(request))
        return StreamingResponse(stream, media_type="text/event-stream", headers=_STREAM_HEADERS)

    async def _events(self, job: Job) -> AsyncIterator[bytes]:
        shown_ = 0
        async for change in self.changes(job):
            if change is None:
                yield b": ping\n\n"
                continue
            if job.previews and job.previews[-1].number > shown_ and not job.is_over:
                # The last one only: whoever is slow sees fewer.
                preview = job.previews[-1]
                shown_ = preview.number
                value = {
                    "step": preview.step,
                    "image": preview.image,
                    "b64_json": await in_thread(base64_of, preview.data),
                    "output_format": preview.output_format,
                    "width": preview.width,
                    "height": preview.height,
                }
                yield event("preview", value)
            yield event("end" if job.is_over else "job", job.as_json())

    def _job(self, request: Request) -> Job:
        name = request.path_params["id"]
        job = self.engine.job(name)
        if job is None:
            raise RequestError(
                f"there is no job {shown(name, 60)}, or no longer: jobs are kept an hour",
                status=404,
                kind="not_found_error",
                code="job_not_found",
            )
        return job

    async def settings(self, request: Request) -> Response:
        """What an image that was generated before says of how it was made."""
        body = await self.body(request)

        def found() -> dict[str, Any]:
            from mflux.utils.metadata_reader import MetadataReader

            image = opened(body, "image", self.rules.most_pixels)
            settings = MetadataReader.read_exif_metadata(image)
            if settings is None:
                raise RequestError("this image carries no settings: it was not made with mflux", param="image")
            return settings

        return json_response({"settings": await in_thread(found)})

    # ---- the server itself

    async def health(self, request: Request) -> Response:
        if self.engine.is_stopping:
            return json_response({"status": "stopping"}, status=503)
        if not request.scope["mflux.has_key"]:
            return json_response({"status": "ok"})
        import mflux

        waiting, running = self.engine.waiting, self.engine.under_way
        queue = {"waiting": len(waiting), "running": len(running), "limit": self.engine.queue_limit}
        models = [model.id for model in self.engine.models]
        loaded = [*self.engine.loaded()]
        return json_response(
            {"status": "ok", "version": mflux.__version__, "models": models, "loaded": loaded, "queue": queue}
        )

    async def show_metrics(self, request: Request) -> Response:
        from starlette.responses import Response

        return Response(self.metrics.text(), media_type=self.metrics.content_type)

    async def page(self, content: bytes, suffix: str, request: Request) -> Response:
        from starlette.responses import Response

        headers = {"content-security-policy": _POLICY, "cache-control": "no-cache", "content-type": _TYPES[suffix]}
        return Response(content, headers=headers)

    # ---- what endpoints share

    async def body(self, request: Request) -> bytes:
        """A request's body, in time.

        Raises:
            RequestError: it takes too long, or too much waits already.
        """
        self.engine.check_room()
        if self.engine.waiting_bytes > _WAITING_BODIES * self.rules.most_bytes:
            raise RequestError(
                "too many images wait already: try again later",
                status=429,
                kind="rate_limit_error",
                code="queue_full",
                headers={"retry-after": "10"},
            )
        try:
            async with asyncio.timeout(self.rules.body_seconds):
                return await request.body()
        except TimeoutError:
            raise RequestError(
                f"the request's body was not there within {self.rules.body_seconds:g} s",
                status=408,
                kind="timeout_error",
                code="body_timeout",
                headers={"x-should-retry": "false", "connection": "close"},
            ) from None

    async def json(self, request: Request) -> dict[str, Any]:
        """A body of JSON, which says that it is some: a page of another server cannot send that."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise _unsupported_type(kind, "application/json")
        return await in_thread(parsed, await self.body(request))

    async def read(self, request: Request, *, is_job: bool = False, needs_image: bool = False) -> ImageRequest:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        uploads: Sequence[Upload] = ()
        if kind == "multipart/form-data":
            fields, uploads = await self._form(request)
            values: Mapping[str, Any] = of_form(fields)
        elif kind == "application/json":
            values = await self.json(request)
        else:
            raise _unsupported_type(kind, "application/json or multipart/form-data")
        found = await in_thread(
            lambda: read(
                values,
                self.engine,
                uploads,
                most_pixels=self.rules.most_pixels,
                is_job=is_job,
                needs_image=needs_image,
            )
        )
        return cast(ImageRequest, found)

    async def _form(self, request: Request) -> tuple[list[tuple[str, str]], list[Upload]]:
        from starlette.datastructures import UploadFile
        from starlette.formparsers import MultiPartException, MultiPartParser

        body = await self.body(request)

        async def once() -> AsyncIterator[bytes]:
            yield body

        # Whatever is uploaded stays in memory, where its size is known.
        parser = MultiPartParser(
            request.headers, once(), max_files=_MOST_PARTS, max_fields=_MOST_PARTS, max_part_size=1 << 20
        )
        parser.spool_max_size = self.rules.most_bytes + 1
        try:
            form = await parser.parse()
        except (MultiPartException, KeyError, ValueError) as error:
            reason = getattr(error, "message", None) or "it has no boundary"
            raise RequestError(f"the form cannot be read: {shown(reason, 200)}", code="invalid_value") from None
        fields, uploads = [], []
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                uploads.append(Upload(name, await value.read()))
            else:
                fields.append((name, value))
        await form.close()
        return fields, uploads

    async def changes(self, job: Job) -> AsyncIterator[int | None]:
        """The job's count of changes now and after each; None where nothing has happened for a while."""
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()

        def notify() -> None:
            # The loop may have ended meanwhile.
            if not loop.is_closed():
                loop.call_soon_threadsafe(changed.set)

        end = job.watch(notify)
        try:
            while True:
                changed.clear()
                over = job.is_over
                yield job.changes
                if over:
                    return
                while not changed.is_set():
                    try:
                        await asyncio.wait_for(changed.wait(), _PING_SECONDS)
                    except TimeoutError:
                        yield None
        finally:
            end()

    async def finished(self, job: Job, request: Request) -> list[Picture]:
        """A job's images, for a client that waits; when it leaves, the job ends.

        Raises:
            JobError: there are none.
            ClientLeft: nobody waits.
        """

        async def over() -> None:
            async for _ in self.changes(job):
                pass

        async def left() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        tasks = [asyncio.create_task(over()), asyncio.create_task(left())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if not job.is_over:
                self.engine.cancel(job)
        if job.error is not None:
            raise job.error
        if not job.is_over:
            raise ClientLeft
        return job.pictures

    def tell(self, request: Request, job: Job) -> None:
        width, height = job.size
        request.scope["mflux.told"].words += [job.id, job.model, f"{width}x{height}", f"{job.steps} steps"]
        if self.log_prompts:
            request.scope["mflux.told"].words.append(shown(job.prompt, 500))


def _router(routes: Sequence[tuple[str, str, Endpoint]]) -> ASGIApp:
    """What gives each request to its endpoint, and says of others that there is none."""
    from starlette.exceptions import HTTPException
    from starlette.routing import Route, Router

    paths: dict[str, dict[str, Endpoint]] = {}
    for method, path, endpoint in routes:
        paths.setdefault(path, {})[method] = endpoint

    def route(path: str, endpoints: Mapping[str, Endpoint]) -> Route:
        async def answer(request: Request) -> Response:
            request.scope["mflux.route"] = "page" if path == "/" or path.startswith("/page/") else path
            return await endpoints["GET" if request.method == "HEAD" else request.method](request)

        return Route(path, answer, methods=list(endpoints))

    router = Router([route(path, endpoints) for path, endpoints in paths.items()], redirect_slashes=False)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        path = shown(scope["path"], 100)
        try:
            # With an application it raises, where it would answer in plain text.
            scope["app"] = app
            await router(scope, receive, send)
        except HTTPException as error:
            if error.status_code == 405:
                allowed = (error.headers or {}).get("Allow", "")
                raise RequestError(
                    f"{scope['method']} is no method of {path}: {allowed} is",
                    status=405,
                    code="method_not_allowed",
                    headers={"allow": allowed},
                ) from None
            raise RequestError(
                f"there is no {path} here", status=404, kind="not_found_error", code="route_not_found"
            ) from None

    return app


def _own_address(request: Request, name: str) -> str:
    # By the name that the client itself uses, which has been found to be one of ours.
    return f"{request.url.scheme}://{request.headers['host']}/v1/images/files/{name}"


def _unsupported_type(kind: str, wanted: str) -> RequestError:
    return RequestError(
        f"the body is {shown(kind, 60) or 'of no type'}: send {wanted}", status=415, code="unsupported_media_type"
    )
