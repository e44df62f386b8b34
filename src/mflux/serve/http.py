"""uvicorn, with what it lacks: a deadline for a request's head, and an end that a program decides about."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from mflux.serve.requests import RequestError

if TYPE_CHECKING:
    from starlette.types import ASGIApp

HEAD_SECONDS = 30.0
# Connections, idle ones among them; requests have a limit of their own. So many more may come at once, before one is
# looked at, and so many files are left to models and images.
_MOST_CONNECTIONS, _AT_ONCE, _OTHER_FILES = 1000, 64, 384


def _closing(body: dict[str, Any]) -> bytes:
    """An answer to what never becomes a request."""
    data = json.dumps(body).encode()
    head = (
        "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nx-content-type-options: nosniff\r\n"
        f"content-length: {len(data)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + data


_FULL = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_NO_HTTP = _closing(
    RequestError("this is no request in HTTP/1.1: ask with http://, without TLS", code="invalid_http").as_json()
)


def allow_connections() -> None:
    """Have this process open as many files as the server wants, as far as the system lets it: a Mac begins with 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_CONNECTIONS + _AT_ONCE + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _connections_that_fit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _MOST_CONNECTIONS
    return max(16, min(_MOST_CONNECTIONS, soft - _AT_ONCE - _OTHER_FILES))


class HttpServer:
    """Answers at a socket.

    Args:
        app: what answers.
        ready: called when the first request can come.
        head_seconds: in which a connection has to have sent a request's head.
        most_connections: where more come, the one that has waited longest without a head goes; None for as many as this
            process may have.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        ready: Callable[[], None] = lambda: None,
        head_seconds: float = HEAD_SECONDS,
        most_connections: int | None = None,
    ):
        import uvicorn

        config = uvicorn.Config(
            app,
            http=_protocol(head_seconds, most_connections or _connections_that_fit()),
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=_AT_ONCE,
            timeout_graceful_shutdown=3,
        )
        self._server = _server(config, ready)

    def run(self, listener: socket.socket) -> None:
        """Until `stop` is called."""
        asyncio.run(self._server.serve(sockets=[listener]))

    def stop(self) -> None:
        """From any thread: no new connections; those that are open have three seconds."""
        self._server.should_exit = True


def _server(config: Any, ready: Callable[[], None]) -> Any:
    import logging

    import uvicorn

    # What it says of itself is said by ours.
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            # They are the command's.
            yield

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

    return Server(config)


def _protocol(head_seconds: float, most_connections: int) -> Any:
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    # All, and those without a head, in the order in which they came.
    there: set[Any] = set()
    headless: dict[Any, None] = {}

    class Protocol(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            # asyncio does so where the listener says that it is TCP's; else an answer waits 40 ms for the client.
            with suppress(OSError):
                transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            there.add(self)
            if len(there) > most_connections:
                if not headless:
                    transport.write(_FULL)
                    transport.close()
                    return
                # Whoever means it sends a head at once.
                next(iter(headless))._leave()
            self._wait_for_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._head_is_there()
            elif self._deadline is None:
                # A part of the next request's.
                self._wait_for_head()

        def send_400_response(self, msg: str) -> None:
            """In the form of all errors; uvicorn's is plain text."""
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                self.transport.write(_NO_HTTP)
            self.transport.close()

        def connection_lost(self, exc: Exception | None) -> None:
            there.discard(self)
            self._head_is_there()
            super().connection_lost(exc)

        def _leave(self) -> None:
            there.discard(self)
            self._head_is_there()
            self.transport.abort()

        def _wait_for_head(self) -> None:
            headless[self] = None
            self._deadline = self.loop.call_later(head_seconds, self._give_up)

        def _head_is_there(self) -> None:
            headless.pop(self, None)
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _give_up(self) -> None:
            self._deadline = None
            if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                self.transport.close()

    return Protocol
