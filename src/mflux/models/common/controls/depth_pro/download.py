"""One large file from a plain web address, carried on where it broke off.

The bytes gather in `NAME.partial`, which becomes `NAME` only when its length is the server's and every CRC of the zip
archive is right. So a file under its final name is whole, and an interruption costs nothing that had come.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import shutil
import ssl
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from mflux.errors import DownloadError
from mflux.hub.proxies import proxy_for, unusable_proxy
from mflux.text import shown, size
from mflux.utils.progress import bar_class

logger = logging.getLogger(__name__)

_CHUNK = 1 << 20
_TIMEOUT_S = 30
# Connections in a row that bring nothing before the download gives up, and how long to wait between them.
_ATTEMPTS = 3
_PAUSE_S = 1.0
# Connections in a row that bring less than `_LEAST_BYTES`: so it would take years.
_CRUMBS = 20
# Of the partial file, where another process takes it away each time.
_OPENINGS = 100
# A connection that brings less than so many bytes in so many seconds counts as one that brings nothing.
_PATIENCE_S = 60
_LEAST_BYTES = 64_000
# Until an answer's headers are there, redirects included; and of an archive whose length nobody says, the most.
_DEADLINE_S = 60
_LARGEST = 20 * 10**9


def fetch_archive(url: str, target: Path, *, remedy: str) -> Path:
    """The zip archive at `url` as the file `target`, fetched only as far as it is not there yet.

    Args:
        url: an http(s) address.
        target: where the file belongs; its folder is made. A file that is cut off there counts as begun.
        remedy: what else a person can do where there is no network, as the end of a sentence.

    Raises:
        DownloadError: no network, an answer that says no, no room, or bytes that are not a sound archive.
    """
    if is_whole(target):
        return target
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise DownloadError(f"{target} is not complete on this disk and HF_HUB_OFFLINE is set: unset it, or {remedy}")
    partial = target.with_name(target.name + ".partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(partial) as file:
            # Whoever held the lock before may have brought it.
            if is_whole(target):
                return target
            _adopt(target, partial, file)
            length = _fetch(url, file, remedy)
            _check(file, length, url)
            partial.replace(target)
    except OSError as error:
        raise _disk_failure(target, error) from None
    return target


def is_whole(path: Path) -> bool:
    """Whether the file is a zip archive with its directory, which stands at the very end."""
    try:
        with zipfile.ZipFile(path):
            return True
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError, EOFError):
        return False


@contextmanager
def _locked(partial: Path) -> Iterator[BinaryIO]:
    """The partial file, open for appending, held by one process at a time."""
    for _ in range(_OPENINGS):
        # A link would lead the bytes to somebody's file.
        if partial.is_symlink():
            partial.unlink()
        with open(partial, "a+b", opener=_open_no_link) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.warning("another mflux is fetching %s: waiting for it", partial.stem)
                fcntl.flock(file, fcntl.LOCK_EX)
            if partial.exists() and os.path.samestat(os.fstat(file.fileno()), partial.stat()):
                try:
                    yield file
                finally:
                    # Nothing begun leaves nothing behind.
                    if partial.exists() and not partial.stat().st_size:
                        partial.unlink()
                return
            if is_whole(partial.with_suffix("")):
                # The other process gave this very file its final name.
                yield file
                return
    raise OSError(errno.EIO, "what is created there is another file the next moment")


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _adopt(target: Path, partial: Path, file: BinaryIO) -> None:
    """mflux 0.24 wrote under the final name, so what it left there when it was interrupted is a beginning."""
    if not target.exists() or target.stat().st_size <= partial.stat().st_size:
        return
    with target.open("rb") as begun:
        if begun.read(4) != b"PK\x03\x04":
            raise DownloadError(f"{target} is not the archive that belongs there: move it away and try again")
        begun.seek(0)
        file.truncate(0)
        shutil.copyfileobj(begun, file, _CHUNK)
    file.flush()
    target.unlink()


def _fetch(url: str, file: BinaryIO, remedy: str) -> int | None:
    """Append what is missing; the length that the server gives, if it does."""
    failures = crumbs = 0
    began_again = 0
    if fault := unusable_proxy(library=None, scheme=urlsplit(url).scheme):
        raise DownloadError(f"no connection to {urlsplit(url).hostname}, because {fault[0]}: {fault[1]}, or {remedy}")
    while True:
        before = file.seek(0, os.SEEK_END)
        slow = False
        try:
            with _open(url, before) as response:
                length = _receive(response, file, before)
        except urllib.error.HTTPError as error:
            # It is the answer as well, on an open connection.
            error.close()
            if error.code == 416 and before:
                # There is nothing after these bytes: either they are all, or they are not of this file.
                if _total(error.headers.get("Content-Range")) == before:
                    return before
                file.truncate(0)
                began_again += 1
                if began_again < _ATTEMPTS:
                    continue
                raise DownloadError(
                    f"{url} breaks off, and says each time that there is nothing after the {before:,} bytes that came: "
                    f"try again later, or {remedy}"
                ) from None
            if error.code < 500:
                reason = shown(error.reason)
                raise DownloadError(f"{url} answered HTTP {error.code} ({reason}): {remedy}") from None
            reason = f"the server answered HTTP {error.code}"
        except _TooSlow as error:
            slow, reason = True, str(error)
        except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
            reason = shown(getattr(error, "reason", None) or error) or type(error).__name__
        else:
            if length is None or file.seek(0, os.SEEK_END) >= length:
                return length
            reason = "the connection closed early"
        have = file.seek(0, os.SEEK_END)
        failures = failures + 1 if have <= before or slow else 0
        crumbs = crumbs + 1 if have - before < _LEAST_BYTES else 0
        if failures >= _ATTEMPTS or (failures and not have) or crumbs >= _CRUMBS:
            begun = f"; {have / 1e6:,.0f} MB are kept and the same command carries on there" if have else ""
            host, proxy = urlsplit(url).hostname, proxy_for(url)
            through, check = (f" through {proxy}", f"the proxy, {proxy.otherwise}") if proxy else ("", "the network")
            raise DownloadError(f"no connection to {host}{through} ({reason}){begun}: check {check}, or {remedy}")
        time.sleep(_PAUSE_S * failures)


class _TooSlow(Exception):
    """A connection brought next to nothing for a long time."""


def _open(url: str, start: int) -> HTTPResponse:
    """The answer to a question, once its headers are there. urllib's own limit is on silence alone, and a header may
    come letter by letter."""
    answer: Future[HTTPResponse] = Future()

    def ask() -> None:
        try:
            answer.set_result(_ask(url, start))
        except BaseException as error:
            answer.set_exception(error)

    # A daemon, so that one that is still waiting does not keep the process.
    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.result(_DEADLINE_S)
    except FutureTimeout:
        if not answer.done():
            raise _TooSlow(f"no whole answer came in {_DEADLINE_S} seconds") from None
        raise


def _ask(url: str, start: int) -> HTTPResponse:
    from mflux.utils.version_util import VersionUtil

    headers = {"User-Agent": f"mflux/{VersionUtil.get_mflux_version()}", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    context = ssl.create_default_context() if url.startswith("https:") else None
    if context and not context.get_ca_certs():
        # A Python from python.org has no certificates on macOS until a script is run; huggingface_hub brings these.
        try:
            import certifi
        except ImportError:
            pass
        else:
            context.load_verify_locations(certifi.where())
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S, context=context)


def _receive(response: HTTPResponse, file: BinaryIO, start: int) -> int | None:
    """Write a response where it belongs; the length of the whole file, if the server says."""
    content_range = response.headers.get("Content-Range", "")
    if response.status == 206 and re.match(rf"bytes {start}-", content_range):
        length = _total(content_range)
    else:
        # The server begins at the beginning, whatever was asked.
        start = 0
        file.truncate(0)
        length = _number(response.headers.get("Content-Length"))
    folder = Path(file.name).parent
    free = shutil.disk_usage(folder).free
    if length is not None and length - start > free:
        raise DownloadError(
            f"no room for the download: {(length - start) / 1e9:.1f} GB are missing and {folder} has "
            f"{free / 1e9:.1f} GB free: make room, or set MFLUX_CACHE_DIR to a folder on a larger disk"
        )
    name = Path(file.name).stem
    with bar_class()(total=length, initial=start, unit="B", unit_scale=True, unit_divisor=1000, desc=name) as progress:
        since, came = time.monotonic(), 0
        # What there is, and not as much as was asked for: that could take days.
        while chunk := response.read1(_CHUNK):
            if length is None and file.tell() > _LARGEST:
                raise DownloadError(f"what comes does not end after {size(_LARGEST)}: try again later")
            file.write(chunk)
            progress.update(len(chunk))
            came += len(chunk)
            if came >= _LEAST_BYTES:
                since, came = time.monotonic(), 0
            elif time.monotonic() - since > _PATIENCE_S:
                file.flush()
                raise _TooSlow(f"less than {size(_LEAST_BYTES)} came in {_PATIENCE_S} seconds")
    file.flush()
    return length


def _total(content_range: str | None) -> int | None:
    return _number((content_range or "").rpartition("/")[2])


def _number(text: str | None) -> int | None:
    return int(text) if text and re.fullmatch("[0-9]{1,18}", text) else None


def _check(file: BinaryIO, length: int | None, url: str) -> None:
    """The length that the server gave, and the CRC of each record. What is wrong is thrown away."""
    size = file.seek(0, os.SEEK_END)
    problem: str | None
    if length is not None and size != length:
        problem = f"it has {size:,} bytes instead of {length:,}"
    else:
        try:
            with zipfile.ZipFile(file) as archive:
                if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                    # Little could become endlessly much.
                    problem = "its records are compressed, which torch never does"
                else:
                    bad = archive.testzip()
                    problem = bad and f"the checksum of its record {shown(bad)} is wrong"
        except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, RuntimeError):
            problem = "it is not an archive; perhaps the network wants a sign-in"
    if problem:
        file.truncate(0)
        raise DownloadError(f"what came from {url} is damaged: {problem}; run the same command again to fetch it anew")


def _disk_failure(target: Path, error: OSError) -> DownloadError:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DownloadError(f"the disk is full: make room for {target}, or set MFLUX_CACHE_DIR to another disk")
    return DownloadError(
        f"cannot write {target} ({reason}): make it writable, or set MFLUX_CACHE_DIR to another folder"
    )
