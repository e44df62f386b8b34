"""From a model's name to a folder on this disk.

A name is a folder, or a repository on Hugging Face, which huggingface_hub fetches into its own cache. Three things are
added to that: the Hub is asked what a repository holds before anything is fetched, so that a wrong one is refused at
once and not after gigabytes; a cached copy is judged for completeness, so that it serves without a network; and each
failure that a person can meet becomes one sentence.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import logging
import os
import posixpath
import re
import shutil
import sys
import time
from base64 import b64encode
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import ModuleType
from urllib.parse import unquote, urlsplit

from mflux.checkpoints.folders import read_json
from mflux.checkpoints.readers.plain import HEAD, what_else
from mflux.errors import CheckpointError, DownloadError, UsageError
from mflux.text import one_line, shown, size, without_password
from mflux.utils.paths import read_bounded, user_path

logger = logging.getLogger(__name__)

# What git allows in the name of a branch or tag.
_REVISION = re.compile(r"[^\s/~^:?*\[\\][^\s~^:?*\[\\]*")
_NOT_LAID_OUT = "it is not a model in the diffusers layout; name a repository or a folder that is"
_AGAIN = "run the same command again"
# A connection that brings less than so many bytes in so many seconds is given up.
_PATIENCE_S = 60
_LEAST_BYTES = 64_000
# Why nothing is to be sent, as the end of a sentence; see `offline`.
_OFFLINE: ContextVar[str | None] = ContextVar("offline", default=None)


@contextmanager
def offline(why: str) -> Iterator[None]:
    """Within the block nothing is sent, as with HF_HUB_OFFLINE.

    Args:
        why: what the message about something that is not in the cache ends with.
    """
    token = _OFFLINE.set(why)
    try:
        yield
    finally:
        _OFFLINE.reset(token)


@dataclass(frozen=True)
class _Repository:
    """A repository and what was asked for in it.

    `layouts` are what it must have: all of one of them. `file` is set when that is one file; `only` when it is the one
    file that has this ending.
    """

    id: str
    revision: str | None
    patterns: tuple[str, ...]
    layouts: tuple[tuple[str, ...], ...] = ((),)
    file: str | None = None
    only: str | None = None

    def __str__(self) -> str:
        return f"{self.id}@{self.revision}" if self.revision else self.id

    @property
    def page(self) -> str:
        return f"https://huggingface.co/{self.id}"


@dataclass(frozen=True)
class _Failure:
    """What went wrong, and what to do. `unreachable` tells a failed connection from an answer that says no."""

    what: str
    remedy: str
    unreachable: bool = False

    def __str__(self) -> str:
        return f"{self.what}: {self.remedy}"


def resolve_model(
    name_or_path: str | Path,
    patterns: Sequence[str],
    *,
    required: Sequence[str] = (),
    alternatives: Sequence[Sequence[str]] = (),
) -> Path:
    """The folder that holds a model, fetched from Hugging Face if need be.

    An existing folder is taken as it is, without a look inside. `org/name` or `org/name@revision` is a repository.
    Online, the Hub is asked once whether the cached copy is the newest. A cached copy is complete when it holds every
    shard that its indexes name, and a match for each of `required`; a complete one needs no network: with
    HF_HUB_OFFLINE set nothing is sent, and where the Hub does not answer, one warning is logged.

    huggingface_hub's own settings hold: HF_HOME, HF_HUB_CACHE, HF_TOKEN and the token that `hf auth login` stored,
    HF_ENDPOINT, HF_HUB_DISABLE_PROGRESS_BARS. Its progress bars go to stderr.

    Args:
        name_or_path: a folder (`~` allowed) or a repository. A `Path` is always taken for a folder.
        patterns: globs of the files to fetch, such as "transformer/*.safetensors"; `*` crosses slashes.
        required: globs that must each match a file, such as "transformer/config.json". Weights that no index lists
            ("vae/*.safetensors") belong here: nothing else tells that they are missing from a cached copy.
        alternatives: what other layouts require instead. A model that has all of one of them is complete; of one that
            has not, the layout that it comes closest to says what is missing.

    Raises:
        DownloadError: says what is wrong with this name, this repository, the network or the disk, and what to do.
    """
    text = str(name_or_path)
    if not text.strip():
        raise DownloadError("the model's name is empty: give a folder, or a Hugging Face repository as org/name")
    if re.match(r"\w+://", text):
        raise DownloadError(
            f"{shown(without_password(text), 300)} is an address: give the repository's name instead, as "
            f"{_name_in_address(text)}"
        )
    try:
        path = user_path(text)
        if path.is_dir():
            return path
        is_file, in_folder = path.is_file(), path.parent.is_dir()
    except UsageError as error:
        raise DownloadError(str(error)) from None
    except (OSError, ValueError) as error:
        raise DownloadError(f"cannot look for {shown(text, 300)}: {_reason(error)}") from None
    if is_file:
        raise DownloadError(f"{shown(path, 300)} is a file: give the folder of a model in the diffusers layout")

    name, at, revision = text.partition("@")
    like_a_path = isinstance(name_or_path, Path) or path.is_absolute() or text[0] in ".~" or name.count("/") > 1
    told, place = shown(text, 300), shown(path, 300)
    if like_a_path:
        raise DownloadError(
            f"there is no folder {place}: check the path, or give a Hugging Face repository as org/name"
        )
    if "/" not in name:
        raise DownloadError(f"there is no folder {told} here, and a Hugging Face repository is written org/name")
    if in_folder and not at:
        raise DownloadError(
            f"there is no folder {place}, though {shown(path.parent, 300)} is there: check the path, or write "
            f"{told}@main for the Hugging Face repository of that name"
        )
    layouts = (tuple(required), *map(tuple, alternatives))
    return _fetch(_Repository(name, revision if at else None, tuple(patterns), layouts))


def cached_copy(name: str) -> Path | None:
    """The folder of a repository's revision in the cache, complete or not, or None. Nothing is sent.

    Args:
        name: `org/name`, or `org/name@revision`.

    Raises:
        DownloadError: this is no repository's name.
    """
    hub = _hub()
    repository_id, at, revision = name.partition("@")
    repository = _Repository(repository_id, revision if at else None, ())
    _check_names(hub, repository)
    return _cached(hub, repository)


def fetch_file(repo_id: str, filename: str, revision: str | None = None) -> Path:
    """One file of a Hugging Face repository, from the cache if the newest is there.

    Args:
        repo_id: `org/name`, or `org/name@revision`.
        filename: its path in the repository.
        revision: a branch, tag or commit; without it, what `repo_id` says, or the main branch.

    Raises:
        DownloadError: as for `resolve_model`; without such a file, it lists similar ones.
    """
    if filename.endswith("/") or filename.startswith("/") or not set(PurePosixPath(filename).parts) - {".."}:
        raise DownloadError(
            f"{shown(repr(filename), 300)} does not name a file in {shown(repo_id)}: give its path in the repository"
        )
    name, at, in_name = repo_id.partition("@")
    pattern = glob.escape(filename)
    repository = _Repository(name, revision or (in_name if at else None), (pattern,), ((pattern,),), filename)
    return _fetch(repository) / filename


def fetch_only_file(repo_id: str, ending: str, *, beside: str | None = None) -> Path:
    """The one file with this ending that a Hugging Face repository holds.

    Args:
        repo_id: `org/name`, or `org/name@revision`.
        ending: of the file's name: ".safetensors".
        beside: a file that is fetched as well, if it is there.

    Raises:
        DownloadError: as for `resolve_model`; where there are several, it names them, and nothing is fetched.
    """
    name, at, revision = repo_id.partition("@")
    pattern = "*" + glob.escape(ending)
    patterns = (pattern, beside) if beside else (pattern,)
    repository = _Repository(name, revision if at else None, patterns, ((pattern,),), only=ending)
    folder = _fetch(repository)
    found = [file for file in _files(folder) if file.endswith(ending)]
    if len(found) != 1:
        raise DownloadError(_several(repository, found))
    return folder / found[0]


def _several(repository: _Repository, found: Sequence[str]) -> str:
    names = _some([f"{repository.id}:{name}" for name in found], most=5)
    return f"{repository} holds {len(found)} {repository.only} files: name one of them, as {names}"


def _fetch(repository: _Repository) -> Path:
    hub = _hub()
    try:
        _check_names(hub, repository)
        return _fetched(hub, repository)
    except DownloadError as error:
        error.args = (_without_secrets(hub, str(error)),)
        raise


def _fetched(hub: ModuleType, repository: _Repository) -> Path:
    cached = _cached(hub, repository)
    lacking = _lacking(hub, cached, repository) if cached else []
    complete = cached is not None and not lacking
    # A web page or an empty file in place of a file would be taken for it for ever.
    found = _matching(hub, _files(cached), repository.patterns) if cached else []
    spoiled = [name for name in found if _is_something_else(cached / name)]

    if _OFFLINE.get() is not None or hub.constants.HF_HUB_OFFLINE:
        if complete:
            return cached
        variable = "HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else "TRANSFORMERS_OFFLINE"
        why = _OFFLINE.get() or f"{variable} is set: unset it and {_AGAIN} to fetch what is missing"
        raise DownloadError(f"{_state_of_cache(hub, repository, lacking)}, and {why}")

    try:
        commit, names = _ask(hub, repository)
    except Exception as error:
        failure = _explain(hub, repository, error, asking=True)
        if complete:
            what = _without_secrets(hub, failure.what)
            logger.warning("%s; taking %s from the cache, %s", what, repository, cached)
            return cached
        if failure.unreachable:
            state = _state_of_cache(hub, repository, lacking)
            raise DownloadError(f"{failure.what}, and {state}: {failure.remedy}") from error
        raise DownloadError(str(failure)) from error

    wanted = None
    if names is not None:
        wanted = _matching(hub, names, repository.patterns)
        if odd := [name for name in wanted if not name.isprintable()]:
            # Progress would show it as it is.
            raise DownloadError(f"{repository} holds a file called {shown(odd[0])}: name another repository")
        _check_contents(hub, repository, names, wanted)
        if complete and not spoiled and cached.name == commit and set(wanted) <= set(_files(cached)):
            return cached
    for name in spoiled:
        _drop(cached / name)
    folder = _download(hub, repository, set(_files(cached)) if cached else set())
    if lacking := _lacking(hub, Path(folder), repository):
        if set(lacking) & set(wanted or ()):
            raise DownloadError(f"the download of {repository} is incomplete, {_some(lacking)} did not come: {_AGAIN}")
        raise DownloadError(
            f"{repository} is itself incomplete, it holds no {_some(lacking)}: name another revision, as "
            f"{repository.id}@revision, or tell its owner at {repository.page}/discussions"
        )
    return Path(folder)


def _download(hub: ModuleType, repository: _Repository, before: set[str]) -> Path:
    """Fetch what is not in the cache, and compare it with the sums that the Hub announced.

    Args:
        before: the files that were there already.
    """
    _watch_speed(hub)
    for attempt in (1, 2):
        _clear_begun(hub, repository, all_of_it=attempt == 2)
        try:
            folder = hub.snapshot_download(
                repository.id, revision=repository.revision, allow_patterns=list(repository.patterns)
            )
            break
        except Exception as error:
            # There is nothing after the bytes that came: they are not of this file. From the beginning, once.
            if attempt == 1 and getattr(getattr(error, "response", None), "status_code", None) == 416:
                continue
            raise DownloadError(str(_explain(hub, repository, error, asking=False))) from error
    folder = Path(folder)
    for name in _matching(hub, _files(folder), repository.patterns):
        if name not in before and not _is_as_announced(folder / name):
            _drop(folder / name)
            raise DownloadError(
                f"{name} of {repository} came with other bytes than {hub.constants.ENDPOINT} announced, and was "
                f"removed: {_AGAIN} to fetch it anew"
            )
    return folder


def _is_as_announced(path: Path) -> bool:
    """Whether a file in the cache has the SHA-256 that is its name there, where that is one: large files' are."""
    announced = path.resolve().name
    if not re.fullmatch(r"[0-9a-f]{64}", announced):
        return True
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == announced


def _drop(path: Path) -> None:
    """Remove a file of a snapshot together with what it leads to, so that it is fetched again."""
    for place in (path.resolve(), path):
        try:
            place.unlink(missing_ok=True)
        except OSError as error:
            raise DownloadError(f"{place} is damaged and cannot be removed ({_reason(error)}): remove it") from None


def _clear_begun(hub: ModuleType, repository: _Repository, *, all_of_it: bool) -> None:
    """Remove what lies where a download begins and is no file of its own, or all that had begun."""
    blobs = Path(hub.constants.HF_HUB_CACHE) / f"models--{repository.id.replace('/', '--')}" / "blobs"
    for path in blobs.glob("*.incomplete"):
        if all_of_it or path.is_symlink():
            path.unlink(missing_ok=True)


def _watch_speed(hub: ModuleType) -> None:
    """Let huggingface_hub's connections end that bring next to nothing: its own limit is on silence alone."""
    session = getattr(hub, "get_session", None) or getattr(hub.utils, "get_session", None)
    client = session() if session is not None else None
    hooks = getattr(client, "event_hooks", None)
    if not hooks or any(hook is _watched for hook in hooks.get("response", ())):
        return
    client.event_hooks = {**hooks, "response": [*hooks.get("response", ()), _watched]}


def _watched(response) -> None:
    stream = response.stream
    base = next((base for base in type(stream).__mro__ if base.__name__ == "SyncByteStream"), None)
    if base is None:
        return

    class Watched(base):
        def __iter__(self) -> Iterator[bytes]:
            began, came = time.monotonic(), 0
            for chunk in stream:
                yield chunk
                came += len(chunk)
                if came >= _LEAST_BYTES:
                    began, came = time.monotonic(), 0
                elif time.monotonic() - began > _PATIENCE_S:
                    raise ConnectionError(f"less than {size(_LEAST_BYTES)} came in {_PATIENCE_S} seconds")

        def close(self) -> None:
            stream.close()

    response.stream = Watched()


def _without_secrets(hub: ModuleType, text: str) -> str:
    """A text without the token and without what HF_ENDPOINT has of a name and password, which a server may echo."""
    text = without_password(text)
    for secret in _secrets(hub):
        text = text.replace(secret, "…")
    return text


def _secrets(hub: ModuleType) -> list[str]:
    """The tokens and passwords that are sent, as they are and as messages and servers may write them."""
    secrets = [os.environ.get(name, "") for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")]
    with suppress(OSError, ValueError):
        secrets.append(read_bounded(hub.constants.HF_TOKEN_PATH, 10_000).decode())
    with suppress(Exception):
        # A token of another source. What goes wrong with it is told where it is sent.
        secrets.append(hub.utils.get_token() or "")
    user, _, password = hub.constants.ENDPOINT.partition("://")[2].rpartition("@")[0].partition(":")
    # Alone, the name is a token.
    secret = password or user
    secrets += [secret, unquote(secret), b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode()]
    found = {form for secret in secrets for form in (secret, secret.strip(), repr(secret.strip())[1:-1])}
    # Two or three letters are everywhere, and no secret; the longest first, lest a part of one is left.
    return sorted((secret for secret in found if len(secret) > 3), key=len, reverse=True)


class _Cleaned(logging.Filter):
    """What huggingface_hub logs by itself, such as a server's warnings, is one line without secrets as well."""

    def __init__(self, hub: ModuleType):
        super().__init__()
        self._hub = hub

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = one_line(_without_secrets(self._hub, record.getMessage())), ()
        return True


def _hub() -> ModuleType:
    # Half a second to import: only those pay who get here.
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils.logging
    except ValueError as error:
        # It reads its numbers and addresses while it is imported.
        raise DownloadError(
            f"huggingface_hub cannot use one of the HF_ environment variables ({one_line(error)}): correct or unset it"
        ) from None
    # Its own handler is there from the first time that a logger is asked for.
    for handler in huggingface_hub.utils.logging.get_logger("huggingface_hub").handlers:
        if not any(isinstance(one, _Cleaned) for one in handler.filters):
            handler.addFilter(_Cleaned(huggingface_hub))
    return huggingface_hub


def _check_names(hub: ModuleType, repository: _Repository) -> None:
    try:
        hub.utils.validate_repo_id(repository.id)
        valid = repository.id.count("/") == 1
    except hub.errors.HFValidationError:
        valid = False
    if not valid:
        raise DownloadError(
            f"{shown(repr(repository.id), 300)} is not a repository's name: write org/name, with letters, digits and "
            "single - _ . only"
        )
    revision = repository.revision
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise DownloadError(
            f"{shown(repr(revision), 300)} is not a revision: write {repository.id}, or {repository.id}@ and a branch, "
            "tag or commit"
        )
    try:
        address = urlsplit(hub.constants.ENDPOINT)
        sound = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise DownloadError(
            f"HF_ENDPOINT is {hub.constants.ENDPOINT!r}, which is not an address: set it to one that starts with "
            "https://, or unset it"
        )


def _ask(hub: ModuleType, repository: _Repository) -> tuple[str | None, list[str] | None]:
    """The commit that a revision stands for and the names of its files; None where the Hub keeps the names back."""
    info = hub.HfApi().model_info(
        repository.id,
        revision=repository.revision or hub.constants.DEFAULT_REVISION,
        # Without it a network that swallows packets would hold the command for minutes.
        timeout=hub.constants.HF_HUB_ETAG_TIMEOUT,
    )
    names = [sibling.rfilename for sibling in info.siblings or ()]
    # Gated repositories may show an empty list to those who have no access.
    return info.sha, names if names or not info.gated else None


def _check_contents(hub: ModuleType, repository: _Repository, names: list[str], wanted: list[str]) -> None:
    if repository.file is not None:
        if not wanted:
            suffix = PurePosixPath(repository.file).suffix
            similar = [name for name in names if PurePosixPath(name).suffix == suffix] or names
            hint = f"it has {_some(similar, most=5)}" if similar else "it is empty"
            raise DownloadError(f"{repository} holds no file {repository.file}: {hint}")
        return
    if repository.only is not None:
        found = [name for name in names if name.endswith(repository.only)]
        if not found:
            raise DownloadError(f"{repository} holds no {repository.only} file: name another repository")
        if len(found) > 1:
            raise DownloadError(_several(repository, found))
        return
    if not wanted:
        raise DownloadError(f"{repository} holds none of {_some(repository.patterns)}: {_NOT_LAID_OUT}")
    if absent := _unmatched(hub, names, repository):
        raise DownloadError(f"{repository} holds no {_some(absent)}: {_NOT_LAID_OUT}")


def _cached(hub: ModuleType, repository: _Repository) -> Path | None:
    """The cached copy of a revision, complete or not. Nothing is sent."""
    try:
        folder = Path(hub.snapshot_download(repository.id, revision=repository.revision, local_files_only=True))
    except hub.errors.LocalEntryNotFoundError as error:
        # Newer versions keep a list of a repository's files and miss whatever was never asked for.
        folder = Path(getattr(error, "snapshot_path", ""))
    except OSError as error:
        raise DownloadError(str(_explain_disk(hub, repository, error.errno, _reason(error)))) from error
    # A reference that was cut off while being written leads to the folder of all snapshots.
    return folder if folder.parent.name == "snapshots" else None


def _lacking(hub: ModuleType, folder: Path, repository: _Repository) -> list[str]:
    """What a snapshot needs and does not hold: unmatched requirements, and shards that an index names."""
    present = _files(folder)
    lacking = _unmatched(hub, present, repository)
    found = _matching(hub, present, repository.patterns)
    if not found and not lacking:
        lacking = list(repository.patterns)
    if lacking and repository.file is not None:
        return [repository.file]
    named = set()
    for index in found:
        if index.endswith(".index.json"):
            named.update(posixpath.join(posixpath.dirname(index), shard) for shard in _shards(folder / index))
    # Indexes of other variants come along with "*.json"; their shards are not wanted and so not missed.
    return lacking + _matching(hub, sorted(named - set(present)), repository.patterns)


def _unmatched(hub: ModuleType, names: Iterable[str], repository: _Repository) -> list[str]:
    """What is missing of the layout that these names come closest to."""
    names = list(names)
    absent = [[pattern for pattern in layout if not _matching(hub, names, [pattern])] for layout in repository.layouts]
    # Of two that are as close, the one of which more is there.
    return min(absent, key=lambda patterns: (len(patterns), -len(repository.layouts[absent.index(patterns)])))


def _is_something_else(path: Path) -> bool:
    if path.suffix not in (".json", ".safetensors"):
        return False
    try:
        with path.open("rb") as file:
            return what_else(file.read(HEAD)) is not None
    except OSError:
        return False


def _shards(index: Path) -> set[str]:
    try:
        table = read_json(index).get("weight_map")
        return {shard for shard in table.values() if isinstance(shard, str)}
    except (CheckpointError, AttributeError):
        # Whoever loads the weights says what is wrong with their index.
        return set()


def _files(folder: Path) -> list[str]:
    """Names of the files under a folder, links to nothing left out."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _matching(hub: ModuleType, names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The names that huggingface_hub would fetch for these patterns."""
    return list(hub.utils.filter_repo_objects(names, allow_patterns=list(patterns)))


def _state_of_cache(hub: ModuleType, repository: _Repository, lacking: list[str]) -> str:
    if lacking:
        return f"{repository} in the cache {hub.constants.HF_HUB_CACHE} lacks {_some(lacking)}"
    return f"{repository} is not in the cache {hub.constants.HF_HUB_CACHE}"


def _explain(hub: ModuleType, repository: _Repository, error: Exception, *, asking: bool) -> _Failure:
    """What an exception of huggingface_hub means to the person who asked for `repository`.

    `asking`: nothing was being fetched yet. An exception that only a bug can cause is raised again.
    """
    errors = hub.errors
    while isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, errors.HfHubHTTPError):
        return _explain_answer(hub, repository, error)

    endpoint, reason = hub.constants.ENDPOINT, _reason(error)
    code = _errno(error)
    if code is not None and not asking:
        return _explain_disk(hub, repository, code, reason)
    if code is not None:
        # To ask, only settings are read: the token's file, certificates.
        named = getattr(error, "filename", None) or "a file that HF_TOKEN_PATH or SSL_CERT_FILE names"
        return _Failure(f"cannot read {named} ({reason})", "correct it, or the environment variable that leads to it")
    if isinstance(error, UnicodeEncodeError) or type(error).__name__ == "LocalProtocolError":
        return _Failure(
            f"the Hugging Face token cannot be sent ({reason})", "log in anew with `hf auth login`, or correct HF_TOKEN"
        )
    # httpx in huggingface_hub 1, httpx2 in 2.
    transport = next(base for base in errors.HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
    packages = ("huggingface_hub", "hf_xet", transport.__module__.partition(".")[0])
    if isinstance(error, transport) and asking:
        through = "the proxy" if type(error).__name__ == "ProxyError" else endpoint
        return _Failure(f"no connection to {through} ({reason})", f"check the network and {_AGAIN}", unreachable=True)
    if isinstance(error, errors.FileMetadataError) or (asking and isinstance(error, (ValueError, KeyError, TypeError))):
        return _Failure(
            f"{endpoint} does not answer like Hugging Face",
            "check HF_ENDPOINT, and whether the network wants a sign-in or a proxy",
            unreachable=True,
        )
    expected = isinstance(error, (OSError, RuntimeError, ValueError)) or (
        type(error).__module__.partition(".")[0] in packages
    )
    if not expected:
        raise error
    return _Failure(f"the download of {repository} broke off ({reason})", f"{_AGAIN}; files that are complete are kept")


def _explain_answer(hub: ModuleType, repository: _Repository, error: Exception) -> _Failure:
    """An HTTP status that is not a success, of an `HfHubHTTPError`."""
    errors, status = hub.errors, error.response.status_code
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        if status == 401:
            return _Failure(f"{repository.id} is gated", f"accept the licence at {repository.page} and {log_in}")
        return _Failure(
            f"{repository.id} is gated and this token may not read it",
            f"accept the licence at {repository.page} and {log_in}, with the account that accepted it (a fine-grained "
            "token also needs the permission to read gated repositories)",
        )
    if isinstance(error, errors.DisabledRepoError):
        return _Failure(f"{repository.id} has been disabled", f"see {repository.page}, or name another repository")
    if isinstance(error, errors.RevisionNotFoundError):
        return _Failure(
            f"{repository.id} has no revision {repository.revision or hub.constants.DEFAULT_REVISION}",
            f"check it at {repository.page}/tree/main, or leave it out",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return _Failure(
            f"there is no repository {repository.id} at {hub.constants.ENDPOINT}, or it is private",
            f"check the name, and for a private one {log_in}",
        )
    if status == 401:
        return _Failure(
            f"{hub.constants.ENDPOINT} refuses the token that was sent (HTTP 401)",
            "log in anew with `hf auth login`, or correct or unset HF_TOKEN",
        )
    said = _first_line(error.server_message or "")
    what = f"{hub.constants.ENDPOINT} answered HTTP {status}{f' ({said})' if said else ''} for {repository}"
    if status == 403:
        return _Failure(what, f"give the token the permission to read it, or {log_in} with another account")
    if status == 429:
        return _Failure(what, f"these are too many requests: wait a few minutes, or {log_in} for a higher limit")
    return _Failure(what, f"{_AGAIN} in a while; files that are complete are kept")


def _explain_disk(hub: ModuleType, repository: _Repository, code: int | None, reason: str) -> _Failure:
    cache = Path(hub.constants.HF_HUB_CACHE)
    # Of the variables that say where the cache lies, the one that would win.
    variable = next((name for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE") if os.environ.get(name)), "HF_HOME")
    if code in (errno.ENOSPC, errno.EDQUOT):
        return _Failure(
            f"the disk is full: {_free(cache)} free for the cache {cache}, which is too little for {repository}",
            f"make room, or set {variable} to a folder on a larger disk and {_AGAIN}",
        )
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return _Failure(
            f"no permission to write to the cache {cache} ({reason})",
            f"make it writable, or set {variable} to a folder of your own and {_AGAIN}",
        )
    return _Failure(
        f"cannot use the cache {cache} ({reason})",
        f"mend what is in the way, or set {variable} to another folder and {_AGAIN}",
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


def _name_in_address(address: str) -> str:
    """`org/name` out of an address at Hugging Face; just that, where it holds none."""
    scheme, _, rest = address.partition("://")
    parts = [part for part in rest.partition("?")[0].split("/") if part]
    if scheme != "hf":
        parts = parts[1:]
    return "/".join(parts[:2]) if len(parts) > 1 else "org/name"


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeEncodeError):
        return f"{error.object[error.start]!r} does not belong there"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return re.sub(r"^\[Errno -?\d+\] ", "", _first_line(str(error))) or type(error).__name__


def _first_line(text: str, most: int = 200) -> str:
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    # Secrets go first: half of one that is cut off would not be known again.
    hub = sys.modules.get("huggingface_hub")
    return shown(_without_secrets(hub, line[:10_000]) if hasattr(hub, "constants") else line, most)


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(map(shown, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
