"""From a request to an image over HTTP: cold, warm, with a new prompt, with previews; and under two hundred requests.

    python benchmarks/serve.py [--pixels 128 256] [--repeats 9]

The model that comes with mflux, in a server in this process, asked from another one. A request's time is set against
what its own `generate_image` took, steps and decoding, as the image's settings have it, so that every ratio comes from
one run. Needs mflux[serve] and httpx2.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx2

from mflux.serve import Engine
from mflux.serve.app import Server
from mflux.serve.guard import Rules
from mflux.serve.http import HttpServer

PROMPT = "a large red circle on a white background"
PAGE = os.sysconf("SC_PAGE_SIZE")


class Probe:
    """How long the server's loop did nothing else, in seconds."""

    def __init__(self) -> None:
        self.found: list[float] = []
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.005)
            self.found.append(time.perf_counter() - before - 0.005)

    def __str__(self) -> str:
        found = sorted(self.found)
        return f"{found[len(found) * 99 // 100] * 1000:.0f} ms in 99 of 100 cases, {found[-1] * 1000:.0f} ms at most"


def memory() -> float:
    """MB of this process."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 1e6
    except OSError:
        return float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pixels", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    probe = Probe()
    with Engine(["demo"], queue=100) as engine, socket.create_server(("127.0.0.1", 0)) as listener:
        ready = threading.Event()

        def begin() -> None:
            probe.start()
            ready.set()

        server = Server(engine, Rules())
        http = HttpServer(server.app, ready=begin)
        thread = threading.Thread(target=http.run, args=(listener,), daemon=True)
        thread.start()
        ready.wait()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with httpx2.Client(base_url=url, timeout=120) as client:
            for pixels in args.pixels:
                rows(client, engine, pixels, args.repeats)
            under_load(url, probe)
        http.stop()
        thread.join()


def rows(client: httpx2.Client, engine: Engine, pixels: int, repeats: int) -> None:
    numbers = iter(range(10**6))

    def ask(**more: object) -> tuple[float, float]:
        """Seconds of a request, and of the class alone."""
        began = time.perf_counter()
        body = {"prompt": PROMPT, "seed": 4, "size": f"{pixels}x{pixels}", **more}
        answer = client.post("/v1/images/generations", json=body)
        answer.raise_for_status()
        seconds = time.perf_counter() - began
        job = engine.job(answer.json()["job"])
        assert job is not None
        return seconds, job.pictures[0].settings["generation_time_seconds"]

    def median(run: Callable[[], tuple[float, float]]) -> tuple[float, float]:
        """Seconds, and the ratio to the class alone."""
        found = [run() for _ in range(repeats)]
        return statistics.median(all_ for all_, _ in found), statistics.median(all_ / own for all_, own in found)

    engine.unload()
    cold = ask()[0]
    ask()
    print(f"| {pixels} px: cold, the model in files | {cold:.2f} | – |")
    seconds, ratio = median(ask)
    print(f"| {pixels} px: warm, the same prompt | {seconds:.2f} | {ratio:.2f} |")
    before = {name: id(part) for name, part in next(iter(engine._loaded.values())).pipeline.loaded().items()}
    seconds, ratio = median(lambda: ask(prompt=f"{PROMPT} {next(numbers)}"))
    print(f"| {pixels} px: warm, a new prompt | {seconds:.2f} | {ratio:.2f} |")
    after = {name: id(part) for name, part in next(iter(engine._loaded.values())).pipeline.loaded().items()}
    assert before == after, "a new prompt loaded something"
    shares, counts = [], []
    for _ in range(repeats + 1):
        job = engine.submit(prompt=PROMPT, seed=4, steps=30, width=pixels, height=pixels, previews=None)
        job.wait()
        cost = engine._preview_seconds.get((job.model, job.size), 0.0)
        shares.append(len(job.previews) * cost / sum(job.step_seconds))
        counts.append(len(job.previews))
    # The first one only measures what a preview costs.
    share, count_ = statistics.median(shares[1:]), statistics.median(counts[1:])
    print(f"| {pixels} px, 30 steps: {count_:g} previews, as on the page | – | {share:.3f} of the steps |")
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        words = ["--model", "demo", "--prompt", PROMPT, "--width", str(pixels), "--height", str(pixels)]
        call = [sys.executable, "-m", "mflux.cli.main", "generate", *words]
        environment = os.environ | {"MFLUX_PROMPT_CACHE": "0"}
        subprocess.run(call, check=True, cwd=folder, capture_output=True, env=environment)
        print(f"| {pixels} px: `mflux-generate` | {time.perf_counter() - began:.2f} | – |")


# Asks from a process of its own: 200 requests from 20 threads, good, malformed, broken off, and for lists.
CLIENTS = """
import httpx2, json, socket, sys, threading
url, prompt = sys.argv[1:]
answers = []
def ask(number):
    with httpx2.Client(base_url=url, timeout=300) as client:
        for turn in range(10):
            kind = (number + turn) % 4
            if kind == 0:
                answers.append(client.post("/v1/images/generations", json={"prompt": prompt}).status_code)
            elif kind == 1:
                answers.append(client.post("/v1/images/generations", json={"nonsense": 1}).status_code)
            elif kind == 2:
                with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as line:
                    line.sendall(b"POST /v1/jobs HTTP/1.1\\r\\nHost: 127.0.0.1\\r\\nContent-Length: 9\\r\\n\\r\\n{")
            else:
                answers.append(client.get("/v1/jobs").status_code)
threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps({status: answers.count(status) for status in sorted(set(answers))}))
"""


def under_load(url: str, probe: Probe) -> None:
    for turn in ("first", "second"):
        before, probe.found = memory(), []
        began = time.perf_counter()
        call = [sys.executable, "-c", CLIENTS, url, PROMPT]
        answers = subprocess.run(call, check=True, capture_output=True, text=True).stdout.strip()
        print(
            f"\n200 requests from 20 threads, {turn} time: {time.perf_counter() - began:.1f} s, answers {answers}, "
            f"memory {before:.0f} to {memory():.0f} MB, the loop was kept for {probe}"
        )


if __name__ == "__main__":
    main()
