"""A Hugging Face of the tests' own: an HTTP server on this machine that knows a few small repositories, and programs
that ask it.

huggingface_hub reads its settings while it is imported, so each set of settings gets a process of its own, which
answers one call after another.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

PATTERNS = ["model_index.json", "transformer/*.json", "transformer/*.safetensors", "vae/*"]
REQUIRED = ["transformer/config.json", "vae/*.safetensors"]
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
SHARDS = [f"transformer/diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]


def model_files() -> dict[str, bytes]:
    """A model whose transformer is sharded and whose autoencoder is not, beside what nobody needs."""
    return {
        ".gitattributes": b"*.safetensors filter=lfs",
        "README.md": b"# a model",
        "flux1-dev.safetensors": b"everything once more in a single file",
        "model_index.json": b"{}",
        "transformer/config.json": b'{"num_layers": 1}',
        INDEX: json.dumps({"weight_map": {f"w{n}": Path(name).name for n, name in enumerate(SHARDS)}}).encode(),
        SHARDS[0]: b"first shard",
        SHARDS[1]: b"second shard",
        "transformer/notes.txt": b"not asked for",
        "vae/config.json": b'{"latent_channels": 4}',
        "vae/diffusion_pytorch_model.safetensors": b"autoencoder",
    }


WANTED = sorted(name for name in model_files() if name.startswith(("model_index", "transformer/", "vae/")))
WANTED.remove("transformer/notes.txt")


@dataclass
class Repository:
    """What the server tells about one repository. `faults` maps "info" or a file's name to a status and headers."""

    files: dict[str, bytes]
    gated: str | bool = False
    shows_files: bool = True
    faults: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    revisions: dict[str, dict[str, bytes]] = field(default_factory=dict)
    cut_short: str = ""

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        for name, files in {"main": self.files, **self.revisions}.items():
            commit = sha1(repr(sorted(files.items())).encode()).hexdigest()
            if revision in (name, commit):
                return commit, files
        return None


class FakeHub:
    """The part of huggingface.co's protocol that huggingface_hub 1 and 2 use to fetch a model over plain HTTP."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.log: list[str] = []
        self.tokens: set[str | None] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            def do_HEAD(self) -> None:
                hub.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def add(self, name: str, files: dict[str, bytes] | None = None, **more: Any) -> Repository:
        self.repositories[name] = Repository(model_files() if files is None else files, **more)
        return self.repositories[name]

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        self.log.append(f"{request.command} {path}")
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/(.+)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not (api or file):
            return self.send(request, 404, b"", {})
        self.tokens.add(request.headers.get("Authorization"))
        name = (api or file)[1]
        repository = self.repositories.get(name)
        if repository is None:
            return self.send(request, 404, b"", {"X-Error-Code": "RepoNotFound"})
        found = repository.at(api[3] if api else file[2])
        if found is None:
            return self.send(request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
        commit, files = found
        if fault := repository.faults.get("info" if api else file[3]):
            return self.send(request, fault[0], b"", fault[1])
        if file and file[3] not in files:
            return self.send(request, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        if file:
            content = files[file[3]]
            headers = {"ETag": f'"{sha1(content).hexdigest()}"', "X-Repo-Commit": commit}
            if repository.cut_short == file[3] and request.command == "GET":
                content = content[:-1]
            return self.send(request, 200, content, headers)
        listed = files if repository.shows_files else {}
        if api[2] == "tree":
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": sha1(content).hexdigest()}
                for path, content in files.items()
            ]
            return self.send(request, 200, json.dumps(entries).encode(), {})
        info = {"id": name, "sha": commit, "gated": repository.gated, "siblings": [{"rfilename": n} for n in listed]}
        return self.send(request, 200, json.dumps(info).encode(), {})

    def send(self, request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)


DRIVER = """
import json, logging, sys
import mflux.hub
logging.basicConfig(level="WARNING", format="%(levelname)s %(message)s")
for line in sys.stdin:
    function, args, keywords, before = json.loads(line)
    exec(before)
    try:
        answer = {"path": str(getattr(mflux.hub, function)(*args, **keywords))}
    except mflux.hub.DownloadError as error:
        answer = {"error": str(error)}
    answer["modules"] = [name for name in ("mlx.core", "numpy") if name in sys.modules]
    print(json.dumps(answer), flush=True)
"""


@dataclass
class Outcome:
    path: Path | None
    error: str | None
    modules: list[str]
    stderr: str
    requests: list[str]

    def fetched(self) -> list[str]:
        found = (re.fullmatch(r"GET /.+/resolve/[^/]+/(.+)", line) for line in self.requests)
        return sorted(match[1] for match in found if match)


class Program:
    """A process with mflux in it. Each call tells what came back, what stderr said and what the server was asked."""

    def __init__(self, hub: FakeHub, home: Path, **settings: str):
        dropped = re.compile("HF_|HUGGING|TRANSFORMERS_|.*_PROXY$|TQDM_", re.IGNORECASE)
        environment = {name: value for name, value in os.environ.items() if not dropped.match(name)}
        environment |= {"HF_HOME": str(home), "HF_ENDPOINT": hub.address, **settings}
        home.mkdir(exist_ok=True, parents=True)
        self.hub = hub
        self.stderr = home / f"stderr-{id(self)}"
        with self.stderr.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", DRIVER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=environment,
                cwd=home,
            )

    def call(self, function: str, *args: object, before: str = "", **keywords: object) -> Outcome:
        self.hub.log.clear()
        self.hub.tokens.clear()
        said = len(self.stderr.read_text())
        self.process.stdin.write(json.dumps([function, args, keywords, before]) + "\n")
        self.process.stdin.flush()
        patience = threading.Timer(60, self.process.kill)
        patience.start()
        line = self.process.stdout.readline()
        patience.cancel()
        stderr = self.stderr.read_text()[said:]
        # A line that is not JSON means that something else wrote to stdout, none that the call ended in a traceback.
        assert line, stderr
        answer = json.loads(line)
        path = Path(answer["path"]) if "path" in answer else None
        # huggingface_hub 2 also asks, once a day, which programs it should know; that is not about a repository.
        requests = [line for line in self.hub.log if line != "GET /api/agent-harnesses"]
        return Outcome(path, answer.get("error"), answer["modules"], stderr, requests)

    def resolve(self, name: str, **keywords: object) -> Outcome:
        return self.call("resolve_model", name, PATTERNS, required=REQUIRED, **keywords)

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=10)
        self.process.stdout.close()


def files_under(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
