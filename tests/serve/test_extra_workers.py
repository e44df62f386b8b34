"""Several servers behind one queue: both generate, one may die, and nothing is lost."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import PIL.Image
import pytest

from mflux.errors import MfluxError
from mflux.models.common.pipeline import Pipeline
from mflux.serve import Engine
from mflux.serve.jobs import JobError
from mflux.serve.workers import add_workers

from .conftest import PROMPT, Running, running, wait_for
from .test_extra_command import started


def pixels(picture) -> np.ndarray:
    return np.asarray(PIL.Image.open(io.BytesIO(picture.data)).convert("RGB"))


@contextmanager
def two(monkeypatch, **options) -> Iterator[tuple[Engine, Running]]:
    """An engine, and a server that takes jobs of it."""
    monkeypatch.setattr("mflux.serve.workers._RETRY_SECONDS", 0.1)
    monkeypatch.setattr("mflux.serve.workers._LOOK_SECONDS", 0.2)
    with Engine(["demo"]) as behind, running(behind, **options) as server, Engine(["demo"]) as front:
        add_workers(front, [server.url], options.get("key"))
        yield front, server


def test_both_generate_and_the_images_are_the_same(monkeypatch, pace):
    with Engine(["demo"]) as alone:
        image = PIL.Image.new("RGB", (64, 96), "red")
        wanted = [
            {"prompt": PROMPT, "seed": 4, "n": 2},
            {"prompt": "a blue square", "seed": 5, "width": 96, "height": 64, "output_format": "jpeg", "quality": 90},
            {"prompt": PROMPT, "seed": 6, "images": image, "image_strength": 0.5},
            {"prompt": PROMPT, "seed": 7, "steps": 3},
        ]
        expected = [[pixels(one) for one in alone.submit(**each).wait(60)] for each in wanted]
    pace.seconds = 0.02
    with two(monkeypatch, key="secret") as (front, server):
        jobs = [front.submit(**each, previews=2) for each in wanted]
        most = 0
        while not all(job.is_over for job in jobs):
            most = max(most, len(front.under_way))
            time.sleep(0.01)
        assert most == 2
        for job, found in zip(jobs, expected, strict=True):
            assert [one.tobytes() for one in map(pixels, job.wait(60))] == [one.tobytes() for one in found]
            assert job.progress == 1
        there = len(server.engine._seconds)
        assert there > 0, "the worker has done nothing"
        # It keeps none of them.
        wait_for(lambda: server.engine.jobs == [])


def test_a_worker_that_dies_loses_nothing(monkeypatch, pace):
    with Engine(["demo"]) as alone:
        expected = pixels(alone.submit(prompt=PROMPT, seed=4).wait(60)[0])
    monkeypatch.setattr("mflux.serve.workers._RETRY_SECONDS", 0.1)
    pace.seconds = 0.1
    with Engine(["demo"]) as behind, Engine(["demo"]) as front:
        with running(behind) as server:
            add_workers(front, [server.url])
            jobs = [front.submit(prompt=PROMPT, seed=4) for _ in range(3)]
            wait_for(lambda: behind.running and behind.running.step > 1)
            for job in behind.jobs:
                behind.cancel(job)
        pace.seconds = 0
        for job in jobs:
            assert np.array_equal(pixels(job.wait(60)[0]), expected)
        # And it comes back.
        with running(behind, port=server.port):
            pace.seconds = 0.1
            jobs = [front.submit(prompt=PROMPT, seed=4) for _ in range(2)]
            wait_for(lambda: len(front.under_way) == 2)
            pace.seconds = 0
            for job in jobs:
                assert np.array_equal(pixels(job.wait(60)[0]), expected)


def test_cancelling_reaches_the_worker(monkeypatch, pace):
    pace.seconds = 0.05
    with two(monkeypatch) as (front, server):
        jobs = [front.submit(prompt=PROMPT, steps=400) for _ in range(2)]
        wait_for(lambda: len(front.under_way) == 2 and server.engine.running and server.engine.running.step > 0)
        for job in jobs:
            assert front.cancel(job)
        for job in jobs:
            with pytest.raises(JobError, match="cancelled"):
                job.wait(20)
        wait_for(lambda: server.engine.running is None)
        wait_for(lambda: front.under_way == [])


def test_a_model_that_the_worker_alone_has(monkeypatch, tiny_schnell):
    monkeypatch.setattr("mflux.serve.workers._LOOK_SECONDS", 0.2)
    name = str(tiny_schnell)
    with Engine([name]) as behind, running(behind) as server, Engine(["demo"]) as front:
        add_workers(front, [server.url])
        assert [model.id for model in front.models] == ["demo", name]
        job = front.submit(name, prompt="x", width=32, height=32, steps=1)
        assert job.wait(60)[0].size == (32, 32)
        assert list(front.loaded()) == []
        assert front.submit(prompt=PROMPT, steps=1).wait(60)


def test_what_the_worker_fails_at_is_told(monkeypatch, pace):
    with two(monkeypatch) as (front, _):
        steps = Pipeline.steps

        def broken(self, *args, **kwargs):
            yield from steps(self, *args, **kwargs)
            raise RuntimeError("broken")

        monkeypatch.setattr(Pipeline, "steps", broken)
        for job in [front.submit(prompt=PROMPT, steps=1) for _ in range(4)]:
            with pytest.raises(JobError, match="the model failed"):
                job.wait(30)


def test_closing_ends_what_is_elsewhere(monkeypatch, pace):
    pace.seconds = 0.05
    with two(monkeypatch) as (front, server):
        jobs = [front.submit(prompt=PROMPT, steps=400) for _ in range(2)]
        wait_for(lambda: len(front.under_way) == 2)
        front.close(grace=0.1)
        for job in jobs:
            wait_for(lambda job=job: job.is_over)
        wait_for(lambda: server.engine.running is None)


def test_a_worker_that_does_not_answer(engine):
    with pytest.raises(MfluxError, match="no server answers at http://127.0.0.1:9"):
        add_workers(engine, ["http://127.0.0.1:9"])


def test_a_command_says_so_before_it_loads_a_model(cli, in_folder, monkeypatch):
    monkeypatch.setattr("mflux.cli.serve._engine", lambda args: pytest.fail("a model is made ready"))
    done = cli("serve", "--port", 0, "--worker", "http://127.0.0.1:9")
    assert (done.status, len(done.errors)) == (1, 1)
    assert "no server answers at http://127.0.0.1:9" in done.errors[0]


def test_a_process_that_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("mflux.serve.workers._RETRY_SECONDS", 0.1)
    with started(tmp_path, "--model", "demo") as worker, Engine(["demo"]) as front:
        add_workers(front, [worker.url])
        jobs = [front.submit(prompt=PROMPT, seed=4, steps=60) for _ in range(4)]
        wait_for(lambda: len(front.under_way) == 2 and all(job.step > 1 for job in front.under_way))
        worker.process.kill()
        found = [pixels(job.wait(60)[0]) for job in jobs]
        assert all(np.array_equal(one, found[0]) for one in found)
        assert max(job.losses for job in jobs) == 1
