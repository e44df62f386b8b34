"""A server in this process over the model that comes with mflux, whose steps can be made slow, and what talks to it."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from mflux.models.common.pipeline import Pipeline
from mflux.serve import Engine

PROMPT = "a large red circle on a white background"


@dataclass
class Pace:
    """How long each denoising step of all models takes longer, and what happens in it."""

    seconds: float = 0.0
    failure: Exception | None = None


@pytest.fixture(autouse=True)
def no_words_about_closed_streams(monkeypatch) -> None:
    """A command's log ends with its test, and an engine in this process may still have something to say."""
    monkeypatch.setattr(logging, "raiseExceptions", False)


@pytest.fixture
def pace(monkeypatch) -> Pace:
    pace, steps = Pace(), Pipeline.steps

    def slowly(self: Pipeline, *args: Any, **kwargs: Any) -> Iterator[Any]:
        for step in steps(self, *args, **kwargs):
            # In small parts, so that a test's change takes effect at once.
            until = time.monotonic() + pace.seconds
            while time.monotonic() < until and time.monotonic() < until + pace.seconds:
                time.sleep(0.01)
                if pace.seconds == 0:
                    break
            if pace.failure is not None:
                raise pace.failure
            yield step

    monkeypatch.setattr(Pipeline, "steps", slowly)
    return pace


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(["demo"]) as engine:
        yield engine


def wait_for(condition: Callable[[], Any], seconds: float = 90.0) -> Any:
    """What a condition gives once it is true."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.01)
    return found


@dataclass
class Running:
    """A server that answers.

    Attributes:
        url: without a slash at its end.
        server: see `mflux.serve.app.Server`.
    """

    url: str
    engine: Engine
    server: Any
    port: int
    clients: list[Any] = field(default_factory=list)

    def client(self, **options: Any) -> Any:
        import httpx2

        return self._closed_at_end(httpx2.Client(base_url=self.url, timeout=90, **options))

    def openai(self, **options: Any) -> Any:
        import openai

        options = {"api_key": "none", "max_retries": 0, **options}
        return self._closed_at_end(openai.OpenAI(base_url=f"{self.url}/v1", **options))

    def _closed_at_end(self, client: Any) -> Any:
        self.clients.append(client)
        return client


@contextmanager
def running(
    engine: Engine,
    *,
    head_seconds: float = 30.0,
    most_connections: int | None = None,
    port: int = 0,
    **options: Any,
) -> Iterator[Running]:
    """A server over an engine at a free port of this machine; `options` as `Server` has them, and of `Rules`."""
    from mflux.serve.app import Server
    from mflux.serve.guard import Rules
    from mflux.serve.http import HttpServer

    names = {"page", "sdapi", "log_prompts"}
    rules = Rules(**{name: value for name, value in options.items() if name not in names})
    server = Server(engine, rules, **{name: value for name, value in options.items() if name in names})
    ready = threading.Event()
    limits: Any = {"head_seconds": head_seconds, "most_connections": most_connections}
    http = HttpServer(server.app, ready=ready.set, **limits)
    with socket.create_server(("127.0.0.1", port)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=http.run, args=(listener,), daemon=True)
        thread.start()
        assert ready.wait(20)
        try:
            found = Running(f"http://127.0.0.1:{port}", engine, server, port)
            yield found
        finally:
            for client in found.clients:
                client.close()
            http.stop()
            thread.join(20)


@pytest.fixture
def serve() -> Callable[..., Any]:
    """`running`, for tests that want a server of their own."""
    return running


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    """One for all tests of a module that leave it as it is."""
    with Engine(["demo"]) as engine, running(engine) as server:
        yield server
