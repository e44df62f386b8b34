"""What every request passes: who may ask, how much and how long, what is told of it, and what becomes of errors."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mflux.serve.requests import RequestError, answer_of
from mflux.text import shown

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

# What a client may call this machine by.
LOOPBACK = ("127.0.0.1", "localhost", "::1", "host.docker.internal")
BODY_SECONDS = 60.0
MOST_REQUESTS = 128
_WRONG_KEY_SECONDS = 0.2
# What a browser may do with an answer.
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
# Found without a key: the page, whether the server lives, and files whose names are the permission.
_OPEN = re.compile(r"/(|page/[\w.-]+|favicon\.ico|health|v1/images/files/[\w.-]+)")


@dataclass
class Rules:
    """Who may ask, and how much.

    Attributes:
        key: what clients have to know; None for nothing.
        hosts: names that this server may be called by, without a port.
        origins: pages of other servers that may ask, as `http://host:port`.
        most_bytes: of a request's body.
        most_pixels: of a source image.
        body_seconds: in which a body has to be there.
    """

    key: str | None = None
    hosts: Collection[str] = LOOPBACK
    origins: Collection[str] = ()
    most_bytes: int = 64 << 20
    most_pixels: int = 50_000_000
    body_seconds: float = BODY_SECONDS


@dataclass
class Told:
    """What an endpoint adds to its request's line in the log."""

    words: list[str] = field(default_factory=list)


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


class Guard:
    """An ASGI application around another one.

    Args:
        app: what answers.
        rules: as above.
        is_stopping: whether only `/health` is answered still.
        count: called with the route and the status of every answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        rules: Rules,
        *,
        is_stopping: Callable[[], bool] = lambda: False,
        count: Callable[[str, int], None] = lambda route, status: None,
    ):
        self._app, self.rules, self._is_stopping, self._count = app, rules, is_stopping, count
        self._requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1000})
                return
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(self, scope, receive, send)
        self._requests += 1
        try:
            await exchange.run(self._app, too_many=self._requests > MOST_REQUESTS)
        finally:
            self._requests -= 1
            self._count(exchange.route, exchange.status)
            exchange.tell()

    # ---- who may ask

    async def check(self, scope: Scope, headers: Mapping[str, str]) -> None:
        """
        Raises:
            RequestError: this one may not.
        """
        path = scope["path"]
        host = headers.get("host", "")
        if _name_of(host) not in self.rules.hosts:
            raise RequestError(
                f"this server is not called {shown(host, 60)!r}: --allow-host says that it may be",
                status=403,
                kind="permission_error",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is not None and origin not in self.rules.origins and not self._is_own(origin, host):
            raise _no_origin(f"a page of {shown(origin, 100)} may not ask here")
        is_foreign = headers.get("sec-fetch-site") in ("cross-site", "same-site") and origin not in self.rules.origins
        if is_foreign and path != "/":
            raise _no_origin("a page of another site may not ask here")
        if self._is_stopping() and path != "/health":
            raise RequestError(
                "the server is being stopped: try again later, or another one",
                status=503,
                kind="server_error",
                code="stopping",
                headers={"retry-after": "5"},
            )
        if not _OPEN.fullmatch(path) and scope["method"] != "OPTIONS" and not self.knows_key(scope, headers):
            await asyncio.sleep(_WRONG_KEY_SECONDS)
            raise RequestError(
                "this server wants a key: send it as Authorization: Bearer KEY",
                status=401,
                kind="authentication_error",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    def knows_key(self, scope: Scope, headers: Mapping[str, str]) -> bool:
        if self.rules.key is None:
            return True
        scheme, _, sent = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "basic" and scope["path"].startswith("/sdapi/"):
            try:
                sent = base64.b64decode(sent, validate=True).decode().partition(":")[2]
            except (binascii.Error, ValueError):
                return False
        elif scheme.lower() != "bearer":
            return False
        # As bytes: of text it takes ASCII alone.
        return hmac.compare_digest(sent.strip().encode(), self.rules.key.encode())

    def _is_own(self, origin: str, host: str) -> bool:
        try:
            parts = urlsplit(origin)
        except ValueError:
            # As "http://[": no browser's.
            return False
        return parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower()

    def cors(self, headers: Mapping[str, str]) -> dict[str, str]:
        """For a page that may ask although it is another server's."""
        origin = headers.get("origin")
        if origin not in self.rules.origins or origin is None:
            return {}
        return {
            "access-control-allow-origin": origin,
            "access-control-allow-methods": "GET, POST, DELETE",
            "access-control-allow-headers": "authorization, content-type",
            "access-control-expose-headers": "x-request-id, retry-after",
            "cross-origin-resource-policy": "cross-origin",
            "vary": "origin",
        }


def _no_origin(message: str) -> RequestError:
    return RequestError(
        f"{message}: --allow-origin says that it may", status=403, kind="permission_error", code="origin_not_allowed"
    )


def _name_of(host: str) -> str:
    """A `Host` without its port: "[::1]:80" → "::1"."""
    found = re.fullmatch(r"\[([0-9a-fA-F:.]+)\](?::\d+)?|([^:]*)(?::\d+)?", host.strip().lower())
    return (found[1] or found[2] or "") if found else ""


class _Exchange:
    """One request and its answer."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send):
        self._guard, self._scope, self._receive, self._send = guard, scope, receive, send
        self.headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        self.id = f"req_{secrets.token_hex(8)}"
        self.status = 0
        self._read = 0
        self._began = time.perf_counter()
        self.told = scope["mflux.told"] = Told()
        scope["mflux.has_key"] = guard.knows_key(scope, self.headers)

    @property
    def route(self) -> str:
        """From the table of routes, and never from the request."""
        route = self._scope.get("mflux.route")
        return route if isinstance(route, str) else "other"

    async def run(self, app: ASGIApp, *, too_many: bool) -> None:
        try:
            await self._guard.check(self._scope, self.headers)
            if too_many:
                raise RequestError(
                    "too many requests are under way: try again later",
                    status=503,
                    kind="server_error",
                    code="too_many_connections",
                    headers={"retry-after": "1"},
                )
            announced = self.headers.get("content-length", "0")
            if announced.isdecimal() and int(announced) > self._guard.rules.most_bytes:
                raise self._too_large()
            if self._scope["method"] == "OPTIONS" and self._guard.cors(self.headers):
                await self._answer(204, {}, b"")
                return
            await app(self._scope, self._receive_counted, self._send_with_headers)
        except ClientLeft:
            self.status = self.status or 499
        except asyncio.CancelledError:
            # uvicorn ends what still runs.
            if self.status:
                raise
            await self._fail(
                RequestError("the server is being stopped", status=503, kind="server_error", code="stopping")
            )
        except Exception as error:
            if _is_disconnect(error):
                self.status = self.status or 499
                return
            answer = answer_of(error)
            if answer.status == 500 and not isinstance(error, RequestError):
                log.error("%s: %s: %s", self.id, type(error).__name__, error, exc_info=log.isEnabledFor(logging.DEBUG))
            await self._fail(answer)

    def _too_large(self) -> RequestError:
        most = self._guard.rules.most_bytes
        return RequestError(
            f"the request's body is larger than {most / (1 << 20):g} MB: send smaller images (--max-body-mb)",
            status=413,
            code="body_too_large",
            headers={"connection": "close"},
        )

    async def _receive_counted(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._read += len(message.get("body", b""))
            if self._read > self._guard.rules.most_bytes:
                raise self._too_large()
        return message

    async def _send_with_headers(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = {"x-request-id": self.id, **_HEADERS, **self._guard.cors(self.headers)}
            there = {name.lower() for name, _ in message.get("headers", ())}
            added = [(name.encode(), value.encode()) for name, value in own.items() if name.encode() not in there]
            message = {**message, "headers": [*message.get("headers", ()), *added]}
        await self._send(message)

    async def _fail(self, error: RequestError) -> None:
        """Answer with an error, unless the answer has begun."""
        import json

        if self.status:
            return
        body: dict[str, Any] = error.as_json()
        if self._scope["path"].startswith("/sdapi/"):
            body["detail"] = body["error"]["message"]
        await self._answer(
            error.status, error.headers | {"content-type": "application/json"}, json.dumps(body).encode()
        )

    async def _answer(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        try:
            pairs = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
            pairs.append((b"content-length", str(len(body)).encode()))
            await self._send_with_headers({"type": "http.response.start", "status": status, "headers": pairs})
            await self._send({"type": "http.response.body", "body": body})
        except Exception as error:
            if not _is_disconnect(error):
                raise

    def tell(self) -> None:
        """One line a request; never a prompt, a key or an image."""
        words = [
            self._scope["method"],
            shown(self._scope["path"], 100),
            str(self.status),
            f"{(time.perf_counter() - self._began) * 1000:.0f} ms",
            *self.told.words,
        ]
        # Asked every few seconds by who watches.
        quiet = self.route in ("/health", "/metrics", "page") and self.status < 400
        log.log(logging.DEBUG if quiet else logging.INFO, "%s", " ".join(words))


def _is_disconnect(error: BaseException) -> bool:
    """Whether an error only says that the client is gone, or talks nonsense: h11's and Starlette's."""
    return type(error).__name__ in ("ClientDisconnect", "LocalProtocolError", "RemoteProtocolError")
