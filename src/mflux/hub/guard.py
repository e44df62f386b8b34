"""What a server may make huggingface_hub do while it fetches for mflux, in one place: every request passes here.

huggingface_hub joins two things of a server's answers to paths of its cache, the commit and the ETag, and sends the
token where a header says. It waits as long as a server asks for, and reads whatever length comes. So:

- a commit is 40 hexadecimal digits, an ETag a sum, wherever an answer says one;
- the token goes to the endpoint's own host;
- a question has a deadline as a whole, its answer and its pages a most; files have the length that was announced, and
  come no slower than `PATIENCE_S` allows.

`guarded(hub)` is on while mflux asks; a program's own use of huggingface_hub is left as it is.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urljoin, urlsplit

from mflux.checkpoints.folders import read_json
from mflux.errors import CheckpointError, DownloadError
from mflux.text import shown, size
from mflux.utils.strict_json import NotJSON, parse

# A connection that brings less than so many bytes in so many seconds is given up.
PATIENCE_S = 60
_LEAST_BYTES = 64_000
# Until the headers of an answer are there, and of a question's answer the whole; for all questions about a repository.
DEADLINE_S, ALL_QUESTIONS_S = 60, 600
LONGEST_WAIT_S = 60
# A listing of ten thousand files has three megabytes.
LARGEST_ANSWER, MOST_ANSWERS, MOST_PAGES, MOST_REDIRECTS = 32 << 20, 1000, 50, 10

# The folders that huggingface_hub makes for a repository.
_PARTS = ("blobs", "refs", "snapshots", "trees", ".no_exist")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SUM = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_ETAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+:~-]{0,63}")
_HOME = "https://huggingface.co/"


@dataclass
class _Fetch:
    """What is known of one repository's fetching.

    Attributes:
        asked: seconds that questions have taken so far, files not counted.
        answers: how many there were.
        pages: the addresses of listings that were asked.
        lengths: bytes of files, by their addresses' paths, as announced.
        until: when the server has to have answered what was asked since its last answer. Second tries, and what
            huggingface_hub asks by itself, have what the first question left.
    """

    hub: ModuleType
    asked: float = 0.0
    answers: int = 0
    pages: set[str] = field(default_factory=set)
    lengths: dict[str, int] = field(default_factory=dict)
    until: float | None = None

    @property
    def endpoint(self) -> str:
        # A name and password in it are no part of what is told.
        return str(self.hub.constants.ENDPOINT)


_lock = threading.Lock()
# huggingface_hub fetches in threads of its own, which see no context variable.
_fetches: list[_Fetch] = []


class _Deadline(threading.local):
    """When what this thread waits for has to be there; None: a file comes, whose speed is watched instead."""

    until: float | None = None
    began: float = 0.0


_deadline = _Deadline()


@contextmanager
def guarded(hub: ModuleType) -> Iterator[None]:
    """Hold a server to the rules above within the block."""
    _install(hub)
    fetch = _Fetch(hub)
    with _lock:
        _fetches.append(fetch)
    try:
        yield
    finally:
        with _lock:
            _fetches.remove(fetch)


def _current() -> _Fetch | None:
    with _lock:
        return _fetches[-1] if _fetches else None


def _install(hub: ModuleType) -> None:
    """Let each of huggingface_hub's clients, which it makes anew after some errors, call the functions below."""
    module = sys.modules[hub.utils.get_session.__module__]
    factory = getattr(module, "_GLOBAL_CLIENT_FACTORY", None) or module.default_client_factory
    if getattr(factory, "is_guarded", False):
        return

    def guarded_client() -> Any:
        client = factory()
        hooks = client.event_hooks
        client.event_hooks = {
            "request": [*hooks.get("request", ()), _before],
            "response": [*hooks.get("response", ()), _after],
        }
        client.max_redirects = min(client.max_redirects, MOST_REDIRECTS)
        # A program's own client may have other transports.
        for transport in (getattr(client, "_transport", None), *getattr(client, "_mounts", {}).values()):
            pool: Any = getattr(transport, "_pool", None)
            if hasattr(pool, "_network_backend"):
                pool._network_backend = _Network(pool._network_backend)
        return client

    guarded_client.is_guarded = True  # type: ignore[attr-defined]
    module.set_client_factory(guarded_client)


# ---- each request, redirected ones as well


def _before(request: Any) -> None:
    fetch = _current()
    if fetch is None:
        _deadline.until = None
        return
    if not _is_own(fetch, str(request.url)):
        request.headers.pop("authorization", None)
    # What is unpacked from an answer has no length that is known before.
    request.headers["accept-encoding"] = "identity"
    _deadline.began = time.monotonic()
    if fetch.until is None:
        fetch.until = _deadline.began + DEADLINE_S
    _deadline.until = fetch.until


def _after(response: Any) -> None:
    fetch = _current()
    try:
        if fetch is not None:
            _check(fetch, response)
            fetch.until = None
    finally:
        _deadline.until = None


_ELSEWHERE = "try again later, or check HF_ENDPOINT"


def _check(fetch: _Fetch, response: Any) -> None:
    request, headers, told = response.request, response.headers, _told(fetch)
    own = _is_own(fetch, str(request.url))
    if own:
        _check_names(told, headers)
        _check_storage(fetch, headers)
    if (wait := _asked_to_wait(response)) > LONGEST_WAIT_S:
        raise DownloadError(
            f"{told} answered HTTP {response.status_code} and asks to wait {wait:,.0f} seconds: run the same command "
            "again after that"
        )
    if request.method == "HEAD":
        announced = headers.get("x-linked-size") or headers.get("content-length") or ""
        if response.status_code < 400 and announced.isdecimal() and len(announced) < 19:
            fetch.lengths[request.url.path] = int(announced)
        return
    if response.status_code in (200, 206) and not _is_question(fetch, request):
        _watch(fetch, response)
        return
    fetch.answers += 1
    if fetch.answers > MOST_ANSWERS:
        raise DownloadError(f"{told} does not come to an end, after {MOST_ANSWERS:,} answers: {_ELSEWHERE}")
    _read_whole(told, response)
    fetch.asked += time.monotonic() - _deadline.began
    if fetch.asked > ALL_QUESTIONS_S:
        raise DownloadError(f"{told} does not come to an end within {ALL_QUESTIONS_S} seconds: {_ELSEWHERE}")
    if own and response.status_code == 200:
        _check_answer(told, request.url.path, response.content)
        _check_pages(fetch, response)


def _told(fetch: _Fetch) -> str:
    from mflux.hub.secrets import without_secrets

    return without_secrets(fetch.hub, fetch.endpoint)


def _is_own(fetch: _Fetch, address: str) -> bool:
    """Whether an address is the endpoint's own host, by the endpoint's way or a safer one."""
    ours, theirs = urlsplit(fetch.endpoint), urlsplit(address)
    usual = {"http": 80, "https": 443}
    try:
        places = [(part.scheme, part.hostname, part.port or usual.get(part.scheme)) for part in (ours, theirs)]
    except ValueError:
        return False
    return places[0] == places[1] or (places[0][1] == places[1][1] and places[0][2] == 80 and places[1][2] == 443)


def _is_question(fetch: _Fetch, request: Any) -> bool:
    """Whether what is asked for is no file of a repository."""
    return _is_own(fetch, str(request.url)) and "/resolve/" not in request.url.path


def _check_names(told: str, headers: Any) -> None:
    commit = headers.get("x-repo-commit")
    if commit is not None and not _COMMIT.fullmatch(commit):
        raise _no_hub(told, f"names the commit {shown(commit, 60)}")
    for name in ("etag", "x-linked-etag"):
        tag = headers.get(name)
        if tag is not None and not _ETAG.fullmatch(tag.lstrip("W/").strip('"')):
            raise _no_hub(told, f"announces a file as {shown(tag, 60)}")
    if (content := headers.get("x-xet-hash")) is not None and not is_sum(content):
        raise _no_hub(told, f"announces a file as {shown(content, 60)}")


def _no_hub(told: str, what: str) -> DownloadError:
    return DownloadError(f"{told} {what}, which is no sum, and so not Hugging Face: check HF_ENDPOINT")


def _check_storage(fetch: _Fetch, headers: Any) -> None:
    """Where the key to Xet's storage is asked for, and sent the token: the endpoint, which may say Hugging Face."""
    routes = re.findall(r'<([^>]*)>\s*;[^,]*rel="?xet-auth', headers.get("link", ""))
    routes += [headers["x-xet-refresh-route"]] if "x-xet-refresh-route" in headers else []
    for route in routes:
        if not _is_own(fetch, route) and not route.startswith(_HOME):
            raise DownloadError(
                f"{_told(fetch)} wants the token sent to {shown(urlsplit(route).hostname or route, 100)}, which was "
                "refused: check HF_ENDPOINT, or set HF_HUB_DISABLE_XET=1"
            )


def _asked_to_wait(response: Any) -> float:
    """Seconds that an answer asks to wait before the next question."""
    if response.status_code not in (429, 500, 502, 503, 504):
        return 0
    text = response.headers.get("retry-after", "").strip()
    waits = [float(found) for found in re.findall(r"\bt=(\d{1,15})\b", response.headers.get("ratelimit", ""))]
    if re.fullmatch(r"\d+", text):
        waits.append(float(text[:15]))
    elif text:
        with suppress(ValueError, TypeError, OverflowError):
            waits.append(parsedate_to_datetime(text).timestamp() - time.time())
    return max(waits, default=0)


class NotTheHub(ValueError):
    """An answer that Hugging Face gives nobody."""


def _check_answer(told: str, path: str, content: bytes) -> None:
    """An answer's shape, where mflux and huggingface_hub rely on it, and its sums: of the commit, and of files, under
    whose sums they are kept.

    Raises:
        NotTheHub: it has another shape.
        DownloadError: a sum is none.
    """
    try:
        answer = parse(content)
    except NotJSON as error:
        raise NotTheHub(f"what came {error}") from None
    if re.search(r"/api/models/[^/]+/[^/]+(/revision/[^/]+)?/?$", path):
        _check_repository(answer)
    elif "/tree/" in path:
        _check_listing(answer)
    entries = answer if isinstance(answer, list) else [answer]
    if isinstance(answer, dict) and isinstance(answer.get("siblings"), list):
        entries += answer["siblings"]
    for entry in (entry for entry in entries if isinstance(entry, dict)):
        large = entry.get("lfs")
        sums = [entry.get(name) for name in ("sha", "oid", "blobId", "xetHash")]
        sums += [large.get(name) for name in ("oid", "sha256")] if isinstance(large, dict) else []
        for found in sums:
            if found is not None and not is_sum(found):
                raise _no_hub(told, f"names the commit or file {shown(found, 60)}")


def _check_repository(answer: Any) -> None:
    files = answer.get("siblings") if isinstance(answer, dict) else None
    if not isinstance(answer, dict) or answer.get("sha") is None or not isinstance(files, (list, type(None))):
        raise NotTheHub("what came describes no repository")
    _check_texts(files or [], "rfilename")


def _check_listing(answer: Any) -> None:
    if not isinstance(answer, list):
        raise NotTheHub("what came is no list of files")
    _check_texts(answer, "path", "type")
    for entry in answer:
        large = entry.get("lfs") or {}
        sizes = [entry.get("size"), *([large.get("size")] if isinstance(large, dict) else [""])]
        if any(number is not None and (type(number) is not int or number < 0) for number in sizes):
            raise NotTheHub("a file in what came has no length")


def _check_texts(entries: list[Any], *names: str) -> None:
    if not all(
        isinstance(entry, dict) and all(isinstance(entry.get(name), str) for name in names) for entry in entries
    ):
        raise NotTheHub("a file in what came has no name")


def _check_pages(fetch: _Fetch, response: Any) -> None:
    """A list of pages leads on, and to this host."""
    fetch.pages.add(str(response.url))
    following = response.links.get("next", {}).get("url")
    if following is None:
        return
    if len(fetch.pages) >= MOST_PAGES:
        raise DownloadError(f"{_told(fetch)} does not come to an end, after {MOST_PAGES} pages: {_ELSEWHERE}")
    following = urljoin(str(response.url), following)
    if following in fetch.pages or not _is_own(fetch, following):
        raise DownloadError(f"{_told(fetch)} lists a repository in pages that lead nowhere: {_ELSEWHERE}")


# ---- bodies


def _read_whole(told: str, response: Any) -> None:
    """Read an answer that is no file, up to `LARGEST_ANSWER`."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise DownloadError(f"{told} answers compressed, which was not asked for: {_ELSEWHERE}")
    inner = response.stream

    def chunks(_: Any) -> Iterator[bytes]:
        came = 0
        for chunk in inner:
            came += len(chunk)
            if came > LARGEST_ANSWER:
                raise DownloadError(f"{told} answers a question with more than {size(LARGEST_ANSWER)}: {_ELSEWHERE}")
            yield chunk

    _exchange(response, chunks)
    response.read()


def _watch(fetch: _Fetch, response: Any) -> None:
    """Let a file's connection end that brings next to nothing, or more than the file: its own limit is on silence."""
    inner = response.stream
    most: int | None = None
    if "content-length" not in response.headers:
        most = fetch.lengths.get(response.request.url.path)
        if most is None:
            raise DownloadError(f"{_told(fetch)} sends a file and does not say how long it is: {_ELSEWHERE}")

    def chunks(_: Any) -> Iterator[bytes]:
        began, came, all_of_it = time.monotonic(), 0, 0
        for chunk in inner:
            yield chunk
            came += len(chunk)
            all_of_it += len(chunk)
            if most is not None and all_of_it > most:
                raise ConnectionError(f"more than the {most:,} bytes came that were announced")
            if came >= _LEAST_BYTES:
                began, came = time.monotonic(), 0
            elif time.monotonic() - began > PATIENCE_S:
                raise ConnectionError(f"less than {size(_LEAST_BYTES)} came in {PATIENCE_S} seconds")

    _exchange(response, chunks)


def _exchange(response: Any, chunks: Any) -> None:
    """Let a response's body come from elsewhere. Its base is httpx's, whichever version huggingface_hub has."""
    inner = response.stream
    base = next((base for base in type(inner).__mro__ if base.__name__ == "SyncByteStream"), None)
    if base is not None:
        response.stream = type("Watched", (base,), {"__iter__": chunks, "close": lambda _: inner.close()})()


# ---- connections


class _Network:
    """httpcore's network, in which no wait goes beyond the deadline of what is waited for."""

    def __init__(self, inner: Any):
        self._inner = inner

    def connect_tcp(self, host: str, port: int, timeout: float | None = None, **options: Any) -> _Stream:
        with _in_time(host):
            return _Stream(self._inner.connect_tcp(host, port, timeout=_left(timeout), **options), host)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _Stream:
    def __init__(self, inner: Any, host: str):
        self._inner, self._host = inner, host

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        with _in_time(self._host):
            data: bytes = self._inner.read(max_bytes, timeout=_left(timeout))
            return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        with _in_time(self._host):
            self._inner.write(buffer, timeout=_left(timeout))

    def start_tls(self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None) -> _Stream:
        with _in_time(self._host):
            return _Stream(self._inner.start_tls(ssl_context, server_hostname, _left(timeout)), self._host)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _left(timeout: float | None) -> float | None:
    """How long a wait may be that has a limit of its own, or none."""
    if _deadline.until is None:
        return timeout
    left = max(_deadline.until - time.monotonic(), 0.001)
    return left if timeout is None else min(timeout, left)


@contextmanager
def _in_time(host: str) -> Iterator[None]:
    """
    Raises:
        DownloadError: the deadline has passed.
    """
    try:
        yield
    except Exception:
        if _deadline.until is not None and time.monotonic() >= _deadline.until:
            raise DownloadError(f"{host} gave no whole answer in {DEADLINE_S} seconds: {_ELSEWHERE}") from None
        raise
    if _deadline.until is not None and time.monotonic() >= _deadline.until:
        raise DownloadError(f"{host} gave no whole answer in {DEADLINE_S} seconds: {_ELSEWHERE}")


# ---- the cache, before anything is fetched


def make_ready(cache: Path, name: str) -> None:
    """See that nothing which huggingface_hub writes for a repository is written through a link, or to a name that a
    file of the cache says.

    Args:
        cache: Hugging Face's cache.
        name: of the repository's folder in it, `models--org--name`.

    Raises:
        DownloadError: one of its folders is a link, or cannot be looked at.
    """
    holder, locks = cache / name, cache / ".locks" / name
    for folder in (*(holder / part for part in _PARTS), locks.parent, locks):
        if folder.is_symlink():
            raise DownloadError(f"{folder} is a link, and what is fetched would go where it leads: remove it")
    try:
        for folder in (locks, *(holder / part for part in ("refs", "trees", ".no_exist"))):
            _remove_links(folder)
        for path in [*(holder / "blobs").glob("*.*"), cache / "CACHEDIR.TAG"]:
            if path.is_symlink():
                path.unlink()
        for path in (holder / "trees").glob("*.json"):
            if not _is_listing(path):
                path.unlink()
        # Files are links there, folders never.
        _remove_links(holder / "snapshots", folders_alone=True)
    except OSError as error:
        raise DownloadError(f"cannot clear up {holder}: {error.strerror or error}; remove it") from None


def check_files(holder: Path) -> None:
    """See that what huggingface_hub opens by itself is a file: a pipe would keep it waiting for ever.

    Args:
        holder: the repository's folder in Hugging Face's cache.

    Raises:
        DownloadError: something else is there.
    """
    locks = holder.parent / ".locks" / holder.name
    begun = [path for path in (holder / "blobs").glob("*") if "." in path.name]
    opened = [path for folder in (holder / "refs", holder / "trees", holder / ".no_exist", locks)
              for path in folder.rglob("*")]  # fmt: skip
    for path in (*begun, *opened, holder.parent / "CACHEDIR.TAG"):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise DownloadError(f"{path} is neither a file nor a folder, but a pipe or a device: remove it")


def _remove_links(folder: Path, *, folders_alone: bool = False) -> None:
    for parent, folders, names in os.walk(folder):
        for entry in (Path(parent, name) for name in (folders if folders_alone else [*folders, *names])):
            if entry.is_symlink():
                entry.unlink()


def _is_listing(path: Path) -> bool:
    """Whether a list of a commit's files, as huggingface_hub keeps it, names them by their sums: these become paths."""
    try:
        entries = read_json(path).get("files")
    except CheckpointError:
        return False
    sums = ("oid", "blob_id", "lfs_oid", "lfs_sha256", "xet_hash")
    return isinstance(entries, dict) and all(
        isinstance(entry, dict) and all(entry.get(name) is None or is_sum(entry[name]) for name in sums)
        for entry in entries.values()
    )


def is_sum(value: object) -> bool:
    """Whether it is a commit, a git id or a SHA-256, as they are written."""
    return isinstance(value, str) and _SUM.fullmatch(value) is not None
