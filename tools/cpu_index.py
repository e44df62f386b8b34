"""A stand-in for PyTorch's CPU index, for machines that cannot reach the real one.

It asks pip for the torch wheel that pip would install (a mirror, a folder of wheels) and serves it on 127.0.0.1 in the
layout of a package index (PEP 503, with PEP 658 metadata), so that uv resolves and installs as it would from
the real index. `tools/lock.py` and the tests of the install paths use it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import urllib.request
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit
from urllib.request import url2pathname

URL = "https://download.pytorch.org/whl/cpu"

# The real index has a wheel for each of these; a resolution for all of them must find what it would find there.
_PYTHONS = ("cp311", "cp312", "cp313", "cp314")
_MACHINES = ("x86_64", "aarch64")


@dataclass(frozen=True)
class Wheel:
    """A torch wheel as pip found it: where it is, and the parts of its metadata that a resolution reads."""

    version: str
    url: str
    metadata: bytes

    @property
    def name(self) -> str:
        return unquote(urlsplit(self.url).path.rpartition("/")[2])


def answers(url: str = URL, timeout: float = 10) -> bool:
    """Whether an index can be reached and lists torch."""
    try:
        with urllib.request.urlopen(f"{url}/torch/", timeout=timeout) as page:
            return b"torch-" in page.read()
    except (OSError, ValueError):
        return False


def find_wheel(python: str | Path, version: str) -> Wheel:
    """The CPU build of torch that this interpreter's pip would install on this machine.

    Raises:
        LookupError: pip finds none, or one that is not a CPU build.
    """
    command = [python, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:", "--report", "-", f"torch=={version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise LookupError(f"pip finds no torch {version}: {done.stderr.strip()}")
    (found,) = json.loads(done.stdout)["install"]
    metadata = found["metadata"]
    if not metadata["version"].endswith("+cpu"):
        raise LookupError(f"pip finds torch {metadata['version']}, which is not a CPU build, and {URL} does not answer")
    lines = Message()
    for header, field in (("Metadata-Version", "metadata_version"), ("Name", "name"), ("Version", "version")):
        lines[header] = metadata[field]
    if "requires_python" in metadata:
        lines["Requires-Python"] = metadata["requires_python"]
    for extra in metadata.get("provides_extra", []):
        lines["Provides-Extra"] = extra
    for requirement in metadata.get("requires_dist", []):
        lines["Requires-Dist"] = requirement
    return Wheel(metadata["version"], found["download_info"]["url"], lines.as_string(maxheaderlen=0).encode())


class StandIn:
    """Serves a wheel at `url` while the `with` block runs; `requests` lists the paths that were asked for."""

    def __init__(self, wheel: Wheel):
        self.wheel = wheel
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> StandIn:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _names(self) -> list[str]:
        version = self.wheel.version
        others = {f"torch-{version}-{p}-{p}-manylinux_2_28_{m}.whl" for p in _PYTHONS for m in _MACHINES}
        return sorted(others | {self.wheel.name})

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                path = unquote(urlsplit(self.path).path)
                index.requests.append(path)
                if path == "/torch/":
                    links = (f'<a href="{quote(n)}" data-core-metadata="true">{n}</a>' for n in index._names())
                    self._send("text/html", "\n".join(links).encode())
                elif path.removeprefix("/torch/").removesuffix(".metadata") not in index._names():
                    self.send_error(404)
                elif path.endswith(".metadata"):
                    self._send("text/plain", index.wheel.metadata)
                elif path == f"/torch/{index.wheel.name}":
                    self._send_wheel()
                else:
                    self.send_error(404, "only this machine's wheel is here")

            def _send(self, kind: str, body: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def _send_wheel(self) -> None:
                if not index.wheel.url.startswith("file:"):
                    self.send_response(302)
                    self.send_header("Location", index.wheel.url)
                    self.end_headers()
                    return
                path = Path(url2pathname(urlsplit(index.wheel.url).path))
                self.send_response(200)
                self.send_header("Content-Type", "application/octet-stream")
                self.send_header("Content-Length", str(path.stat().st_size))
                self.end_headers()
                with path.open("rb") as file:
                    shutil.copyfileobj(file, self.wfile)

            def log_message(self, *arguments) -> None:
                pass

        return Handler
