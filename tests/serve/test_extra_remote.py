"""`mflux generate --server URL`: a command's work, done by a server that has the model loaded."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest

from mflux.errors import MfluxError
from mflux.serve import Engine
from mflux.serve.workers import add_workers
from mflux.utils.metadata_reader import MetadataReader

from .conftest import PROMPT, Running, running

WORDS = ("generate", "--model", "demo", "--prompt", PROMPT)


def pixels(path) -> np.ndarray:
    with PIL.Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_the_same_image_as_without(cli, in_folder, shared: Running):
    for name, more in (("a", ("--seed", 4)), ("b", ("--seed", 7, "--width", 64, "--height", 96, "--steps", 3))):
        here = cli(*WORDS, *more, "--output", f"{name}-here.png")
        there = cli(*WORDS, *more, "--output", f"{name}-there.png", "--server", shared.url)
        assert (here.status, there.status, there.out) == (0, 0, f"{name}-there.png\n"), there.err
        assert np.array_equal(pixels(f"{name}-here.png"), pixels(f"{name}-there.png"))
        settings = [MetadataReader.read_exif_metadata(f"{name}-{place}.png") for place in ("here", "there")]
        for one in settings:
            del one["generation_time_seconds"], one["created_at"]
        assert settings[0] == settings[1]


def test_several_seeds_formats_and_an_image(cli, in_folder, monkeypatch, shared: Running):
    monkeypatch.setenv("MFLUX_SERVER", shared.url + "/")
    PIL.Image.new("RGB", (64, 96), "red").save("photo.png")
    done = cli(*WORDS, "--seed", 9, 2, "--image", "photo.png", 0.5, "--output", "out.jpg", "--metadata")
    assert done.status == 0, done.err
    assert [path.name for path in done.paths] == ["out_seed_9.jpg", "out_seed_2.jpg"]
    for path in done.paths:
        with PIL.Image.open(path) as image:
            assert (image.format, image.size) == ("JPEG", (64, 96))
        assert path.with_suffix(".metadata.json").is_file()
    assert shared.engine.jobs[0].settings["image_strength"] == 0.5
    done = cli(*WORDS, "--seed", 9, "--output", "plain.png", "--no-metadata")
    assert MetadataReader.read_exif_metadata(done.paths[0]) is None


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (("--server", ""), 2, "no address of a server: http://127.0.0.1:7860"),
        (("--server", "nonsense"), 2, "--server nonsense is no address of a server"),
        (("--server", "ftp://127.0.0.1"), 2, "no address of a server"),
        (("--server", "http://key@127.0.0.1:7860"), 2, "no address of a server"),
        (("--server", "http://127.0.0.1:7860/#here"), 2, "no address of a server"),
        (("--server", "http://127.0.0.1:9"), 1, "no server answers at http://127.0.0.1:9 (Connection refused)"),
        (("-q", "4"), 2, "--quantize is for whoever starts the server"),
        (("--low-ram",), 2, "--low-ram is for whoever starts the server"),
        (("--stepwise-image-output-dir", "x"), 2, "--stepwise-image-output-dir is for whoever starts the server"),
        (("--scheduler", "mflux.models.common.schedulers.LinearScheduler"), 2, "without dots"),
        (("--model", "schnell"), 1, "there is no model 'schnell' here: demo is served"),
        (("--steps", "0"), 2, "0 is too small"),
        (("--output", "x.nonsense"), 2, "no format"),
    ],
)
def test_what_cannot_be_sent(cli, in_folder, shared: Running, words, status, told):
    where = () if "--server" in words else ("--server", shared.url)
    before = len(shared.engine.jobs)
    done = cli(*WORDS, *words, *where)
    assert (done.status, len(done.errors), done.out) == (status, 1, ""), done.err
    assert told in done.errors[0]
    assert len(shared.engine.jobs) == before


def test_a_key_and_failures(cli, in_folder, monkeypatch, pace):
    with Engine(["demo"]) as engine, running(engine, key="secret") as server:
        done = cli(*WORDS, "--server", server.url)
        assert (done.status, "set MFLUX_API_KEY" in done.err) == (1, True)
        monkeypatch.setenv("MFLUX_API_KEY", "secret")
        pace.failure = RuntimeError("broken")
        done = cli(*WORDS, "--seed", 1, 2, "--server", server.url)
        assert (done.status, "the model failed" in done.err) == (1, True)
        # The second one is not left behind.
        assert {job.status for job in engine.jobs} <= {"failed", "cancelled"}
        pace.failure = None
        assert cli(*WORDS, "--server", server.url).status == 0


def test_who_stops_ends_the_job(cli, in_folder, monkeypatch, pace):
    from mflux.serve import remote

    pace.seconds = 0.05
    with Engine(["demo"]) as engine, running(engine) as server:
        events = remote.Server.events

        def interrupted(self, path):
            for number, event in enumerate(events(self, path)):
                if number == 2:
                    raise KeyboardInterrupt
                yield event

        monkeypatch.setattr(remote.Server, "events", interrupted)
        assert cli(*WORDS, "--steps", 100, "--server", server.url).status == 130
        assert engine.jobs[0].status == "cancelled"


@pytest.mark.parametrize(
    ("status", "body"), [(200, b"<html>"), (200, b"[]"), (200, b'{"ok": true}'), (302, b"there"), (500, b"\xff")]
)
def test_what_is_no_mflux_serve_is_told(cli, in_folder, monkeypatch, status, body):
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    class Other(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.do_GET()

        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as other:
        Thread(target=other.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{other.server_port}"
        monkeypatch.setenv("MFLUX_SERVER", url)
        told = f"what answers at {url} is no mflux serve" if status == 200 else f"{url}: it answered {status}"
        done = cli(*WORDS, "--output", "out.png")
        assert (done.status, len(done.errors)) == (1, 1)
        assert told in done.err
        if status == 200:
            assert "leave MFLUX_SERVER out" in done.err
        # As a worker it is refused in the same words, and the option is named.
        with Engine(["demo"]) as engine, pytest.raises(MfluxError, match=told):
            add_workers(engine, [url])
        other.shutdown()


def test_the_address_that_openai_s_clients_have(cli, in_folder, shared: Running):
    done = cli(*WORDS, "--steps", 1, "--output", "out.png", "--server", f"{shared.url}/v1/")
    assert done.status == 0, done.err
