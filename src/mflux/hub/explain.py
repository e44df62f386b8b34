"""Each failure of huggingface_hub that a person can meet, as one sentence."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from mflux.hub.guard import NotTheHub
from mflux.hub.names import Repository
from mflux.hub.proxies import proxy_for, unusable_proxy
from mflux.hub.secrets import without_secrets
from mflux.text import shown, size

AGAIN = "run the same command again"
# What huggingface_hub ends in when it reads an answer of another shape than it expects.
_MISREAD = (ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError)


@dataclass(frozen=True)
class Failure:
    """What went wrong, and what to do. `unreachable` tells a failed connection from an answer that says no."""

    what: str
    remedy: str
    unreachable: bool = False

    def __str__(self) -> str:
        return f"{self.what}: {self.remedy}"


def explain(hub: ModuleType, repository: Repository, error: Exception, *, asking: bool) -> Failure:
    """What an exception of huggingface_hub means to the person who asked for `repository`.

    `asking`: nothing was being fetched yet. An exception that only a bug can cause is raised again.
    """
    errors = hub.errors
    while isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, errors.HfHubHTTPError):
        return _explain_answer(hub, repository, error)

    endpoint, reason = hub.constants.ENDPOINT, reason_of(error)
    # httpx in huggingface_hub 1, httpx2 in 2.
    transport = next(base for base in errors.HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
    library = transport.__module__.partition(".")[0]
    if asking and (fault := unusable_proxy(library=library)):
        return Failure(f"no connection to {endpoint}, because {fault[0]}", fault[1], unreachable=True)
    code = _errno(error)
    if code is not None and not asking:
        return explain_disk(hub, repository, code, reason)
    if code is not None:
        # To ask, only settings are read: the token's file, certificates.
        named = getattr(error, "filename", None) or "a file that HF_TOKEN_PATH or SSL_CERT_FILE names"
        return Failure(f"cannot read {named} ({reason})", "correct it, or the environment variable that leads to it")
    if isinstance(error, UnicodeEncodeError) or type(error).__name__ == "LocalProtocolError":
        return Failure(
            f"the Hugging Face token cannot be sent ({reason})", "log in anew with `hf auth login`, or correct HF_TOKEN"
        )
    packages = ("huggingface_hub", "hf_xet", library)
    if asking and (isinstance(error, transport) or type(error).__name__ == "InvalidURL"):
        proxy = proxy_for(endpoint)
        through = f" through {proxy}" if proxy else ""
        check = f"check the proxy, or {proxy.otherwise}," if proxy else "check the network"
        return Failure(f"no connection to {endpoint}{through} ({reason})", f"{check} and {AGAIN}", unreachable=True)
    if isinstance(error, (errors.FileMetadataError, NotTheHub)) or (asking and isinstance(error, _MISREAD)):
        return Failure(
            f"{endpoint} does not answer like Hugging Face",
            "check HF_ENDPOINT, and whether the network wants a sign-in or a proxy",
            unreachable=True,
        )
    expected = isinstance(error, (OSError, RuntimeError, ValueError)) or (
        type(error).__module__.partition(".")[0] in packages
    )
    if not expected:
        raise error
    return Failure(f"the download of {repository} broke off ({reason})", f"{AGAIN}; files that are complete are kept")


def _explain_answer(hub: ModuleType, repository: Repository, error: Any) -> Failure:
    """An HTTP status that is not a success, of an `HfHubHTTPError`."""
    errors, status = hub.errors, error.response.status_code
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        if status == 401:
            return Failure(f"{repository.id} is gated", f"accept the licence at {repository.page} and {log_in}")
        return Failure(
            f"{repository.id} is gated and this token may not read it",
            f"accept the licence at {repository.page} and {log_in}, with the account that accepted it (a fine-grained "
            "token also needs the permission to read gated repositories)",
        )
    if isinstance(error, errors.DisabledRepoError):
        return Failure(f"{repository.id} has been disabled", f"see {repository.page}, or name another repository")
    if isinstance(error, errors.RevisionNotFoundError):
        return Failure(
            f"{repository.id} has no revision {repository.revision or hub.constants.DEFAULT_REVISION}",
            f"check it at {repository.page}/tree/main, or leave it out",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return Failure(
            f"there is no repository {repository.id} at {hub.constants.ENDPOINT}, or it is private",
            f"check the name, and for a private one {log_in}",
        )
    if status == 401:
        return Failure(
            f"{hub.constants.ENDPOINT} refuses the token that was sent (HTTP 401)",
            "log in anew with `hf auth login`, or correct or unset HF_TOKEN",
        )
    said = _first_line(error.server_message or "")
    what = f"{hub.constants.ENDPOINT} answered HTTP {status}{f' ({said})' if said else ''} for {repository}"
    if status == 403:
        return Failure(what, f"give the token the permission to read it, or {log_in} with another account")
    if status == 429:
        return Failure(what, f"these are too many requests: wait a few minutes, or {log_in} for a higher limit")
    return Failure(what, f"{AGAIN} in a while; files that are complete are kept")


def explain_disk(hub: ModuleType, repository: Repository, code: int | None, reason: str) -> Failure:
    cache = Path(hub.constants.HF_HUB_CACHE)
    # Of the variables that say where the cache lies, the one that would win.
    variable = next((name for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE") if os.environ.get(name)), "HF_HOME")
    if code in (errno.ENOSPC, errno.EDQUOT):
        return Failure(
            f"the disk is full: {_free(cache)} free for the cache {cache}, which is too little for {repository}",
            f"make room, or set {variable} to a folder on a larger disk and {AGAIN}",
        )
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return Failure(
            f"no permission to write to the cache {cache} ({reason})",
            f"make it writable, or set {variable} to a folder of your own and {AGAIN}",
        )
    return Failure(
        f"cannot use the cache {cache} ({reason})",
        f"mend what is in the way, or set {variable} to another folder and {AGAIN}",
    )


def _errno(error: Exception) -> int | None:
    """The operating system's error number behind an exception, if the disk is where it comes from."""
    if isinstance(error, OSError) and error.errno and not isinstance(error, (ConnectionError, TimeoutError)):
        return error.errno
    # hf_xet writes the files of most repositories; its errors carry the number in their text.
    found = re.search(r"\(os error (\d+)\)", str(error))
    disk = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
    return int(found[1]) if found and int(found[1]) in disk else None


def _free(path: Path) -> str:
    for folder in (path, *path.parents):
        try:
            free = shutil.disk_usage(folder).free
        except OSError:
            continue
        return size(free)
    return "an unknown amount"


def reason_of(error: Exception) -> str:
    if isinstance(error, UnicodeEncodeError):
        return f"{error.object[error.start]!r} does not belong there"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return re.sub(r"^\[Errno -?\d+\] ", "", _first_line(str(error))) or type(error).__name__


def _first_line(text: str, most: int = 200) -> str:
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    # Secrets go first: half of one that is cut off would not be known again.
    hub = sys.modules.get("huggingface_hub")
    return shown(without_secrets(hub, line[:10_000]) if hub and hasattr(hub, "constants") else line, most)
