"""uvicorn, with what it lacks: a deadline for a request's head, and an end that a program decides about."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import ASGIApp

HEAD_SECONDS = 30.0
# Connections, idle ones among them; requests have a limit of their own.
_MOST_CONNECTIONS = 1000


class HttpServer:
    """Answers at a socket.

    Args:
        app: what answers.
        ready: called when the first request can come.
        head_seconds: in which a connection has to have sent a request's head.
    """

    def __init__(self, app: ASGIApp, *, ready: Callable[[], None] = lambda: None, head_seconds: float = HEAD_SECONDS):
        import uvicorn

        config = uvicorn.Config(
            app,
            http=_protocol(head_seconds),
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=_MOST_CONNECTIONS,
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


def _protocol(head_seconds: float) -> Any:
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait_for_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._head_is_there()
            elif self._deadline is None:
                # A part of the next request's.
                self._wait_for_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head_is_there()
            super().connection_lost(exc)

        def _wait_for_head(self) -> None:
            self._deadline = self.loop.call_later(head_seconds, self._give_up)

        def _head_is_there(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _give_up(self) -> None:
            self._deadline = None
            if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                self.transport.close()

    return Protocol
