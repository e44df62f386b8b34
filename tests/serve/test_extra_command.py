"""`mflux serve` as a process: its first line, two of them at one port, and its end at any moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from .conftest import PROMPT, wait_for


@dataclass
class Process:
    """The command, its address, and where its standard errors go."""

    process: subprocess.Popen[str]
    url: str
    errors: Path

    def end(self, *signals: int, within: float = 45.0) -> tuple[int, str]:
        began = time.monotonic()
        for number in signals:
            self.process.send_signal(number)
            time.sleep(0.05)
        status = self.process.wait(within)
        assert time.monotonic() - began < within
        return status, self.errors.read_text()


def _as_in_a_terminal() -> None:
    """Tests that run in the background, or under nohup, are started with these ignored, and hand that on."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def started(tmp_path: Path, *words: object, **environment: str) -> Iterator[Process]:
    errors = tmp_path / "errors.txt"
    call = [sys.executable, "-m", "mflux.cli.serve", "--port", "0", *map(str, words)]
    with errors.open("w") as file:
        process = subprocess.Popen(
            call, stdout=subprocess.PIPE, stderr=file, text=True, env=os.environ | environment, cwd=tmp_path,
            preexec_fn=_as_in_a_terminal,
        )  # fmt: skip
    try:
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), errors.read_text()
        yield Process(process, url.rstrip("/"), errors)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_it_answers_and_ends(tmp_path):
    words = ("--model", "demo", "--output", tmp_path / "images", "--api-key", "secret")
    with started(tmp_path, *words) as server:
        headers = {"authorization": "Bearer secret"}
        found = httpx2.get(f"{server.url}/health", headers=headers).json()
        assert (found["status"], found["models"], found["loaded"]) == ("ok", ["demo"], ["demo"])
        body = {"prompt": PROMPT, "seed": 4, "steps": 2}
        assert httpx2.post(f"{server.url}/v1/images/generations", json=body, headers=headers, timeout=90).is_success
        assert [path.suffix for path in (tmp_path / "images").iterdir()] == [".png"]
        status, errors = server.end(signal.SIGTERM)
        assert status == 143
        assert "POST /v1/images/generations 200" in errors
        assert "Traceback" not in errors
        assert "secret" not in errors


def test_two_at_one_port(tmp_path, cli_process):
    with started(tmp_path, "--model", "demo") as server:
        done = cli_process("serve", "--model", "demo", "--port", server.url.rpartition(":")[2])
        assert (done.status, done.out, len(done.errors)) == (1, "", 1)
        assert "Address already in use" in done.errors[0]


@pytest.mark.parametrize(
    ("state", "number"),
    [
        ("idle", signal.SIGTERM),
        ("sending", signal.SIGTERM),
        *((state, number) for state in ("generating", "following") for number in (1, 2, 15)),
    ],
)
def test_a_signal_at_any_moment(tmp_path, state, number):
    with started(tmp_path, "--model", "demo", "--grace", "0.3") as server, httpx2.Client(timeout=90) as client:
        job = {}
        if state in ("generating", "following"):
            body = {"prompt": PROMPT, "steps": 1000}
            job = client.post(f"{server.url}/v1/jobs", json=body).json()
            wait_for(lambda: client.get(f"{server.url}/v1/jobs/{job['id']}").json()["step"] > 0)
        if state == "following":
            with client.stream("GET", f"{server.url}/v1/jobs/{job['id']}/events") as answer:
                lines = answer.iter_lines()
                next(lines)
                server.process.send_signal(number)
                last = [line for line in lines if line.startswith("data: ")][-1]
            assert json.loads(last[6:])["status"] == "cancelled"
            status, errors = server.end()
        elif state == "sending":
            import socket

            with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
                connection.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\n\r\n{")
                status, errors = server.end(number)
        else:
            status, errors = server.end(number)
        assert status == 128 + number
        assert "Traceback" not in errors


def test_a_second_signal_ends_it_at_once(tmp_path):
    with started(tmp_path, "--model", "demo", "--grace", "60") as server:
        httpx2.post(f"{server.url}/v1/jobs", json={"prompt": PROMPT, "steps": 5000})
        status, errors = server.end(signal.SIGTERM, signal.SIGTERM, within=20)
        assert status == 143
        assert "Traceback" not in errors


def test_a_model_that_is_not_there(cli_process):
    for words, status in ((("--model", "nonsense"), 2), (("--model", "schnell"), 1)):
        done = cli_process("serve", "--port", "0", *words)
        assert (done.status, len(done.errors), done.out) == (status, 1, "")


@pytest.mark.parametrize("seconds", [0.3, 0.6, 0.9])
def test_a_signal_while_it_starts(tmp_path, seconds):
    call = [sys.executable, "-m", "mflux.cli.serve", "--port", "0", "--model", "demo"]
    with (tmp_path / "errors.txt").open("w") as file:
        process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=file, cwd=tmp_path)
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    # Python itself ends by the signal before the command has begun.
    assert process.wait(15) in (143, -signal.SIGTERM)
    assert "Traceback" not in (tmp_path / "errors.txt").read_text()
