"""From a model's name to a folder on this disk.

A name is a folder, or a repository on Hugging Face, which huggingface_hub fetches into its own cache. Three things are
added to that: the Hub is asked what a repository holds before anything is fetched, so that a wrong one is refused at
once and not after gigabytes; a cached copy is judged for completeness, so that it serves without a network; and each
failure that a person can meet becomes one sentence.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path, PurePosixPath
from types import ModuleType

from mflux.checkpoints.folders import shards_of
from mflux.checkpoints.readers.plain import HEAD, what_else
from mflux.errors import CheckpointError, DownloadError, UsageError
from mflux.hub.explain import AGAIN, explain, explain_disk, reason_of
from mflux.hub.guard import check_files, guarded, make_ready
from mflux.hub.library import huggingface
from mflux.hub.names import Repository, check_endpoint, check_names, name_in_address
from mflux.hub.secrets import without_secrets
from mflux.text import shown, some, without_password
from mflux.utils.atomic_files import remove_within
from mflux.utils.paths import snapshot_in, user_path

logger = logging.getLogger(__name__)

_NOT_LAID_OUT = "it is not a model in the diffusers layout; name a repository or a folder that is"
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
            f"{name_in_address(text)}"
        )
    try:
        path = user_path(text)
        if path.is_dir():
            return snapshot_in(path)
        is_file, in_folder = path.is_file(), path.parent.is_dir()
    except UsageError as error:
        raise DownloadError(str(error)) from None
    except (OSError, ValueError) as error:
        raise DownloadError(f"cannot look for {shown(text, 300)}: {reason_of(error)}") from None
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
    return _fetch(Repository(name, revision if at else None, tuple(patterns), layouts))


def cached_copy(name: str) -> Path | None:
    """The folder of a repository's revision in the cache, complete or not, or None. Nothing is sent.

    Args:
        name: `org/name`, or `org/name@revision`.

    Raises:
        DownloadError: this is no repository's name.
    """
    hub = huggingface()
    repository_id, at, revision = name.partition("@")
    repository = Repository(repository_id, revision if at else None, ())
    check_names(hub, repository)
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
    repository = Repository(name, revision or (in_name if at else None), (pattern,), ((pattern,),), filename)
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
    repository = Repository(name, revision if at else None, patterns, ((pattern,),), only=ending)
    folder = _fetch(repository)
    found = [file for file in _files(folder) if file.endswith(ending)]
    if len(found) != 1:
        raise DownloadError(_several(repository, found))
    return folder / found[0]


def _several(repository: Repository, found: Sequence[str]) -> str:
    names = some([f"{repository.id}:{name}" for name in found], 5, counted=True)
    return f"{repository} holds {len(found)} {repository.only} files: name one of them, as {names}"


def _fetch(repository: Repository) -> Path:
    hub = huggingface()
    try:
        check_names(hub, repository)
        with guarded(hub):
            return _fetched(hub, repository)
    except DownloadError as error:
        error.args = (without_secrets(hub, str(error)),)
        raise


def _fetched(hub: ModuleType, repository: Repository) -> Path:
    cached = _cached(hub, repository)
    present = _files(cached) if cached else []
    lacking = _lacking(hub, cached, repository) if cached else []
    complete = None if lacking else cached
    # A web page or an empty file in place of a file would be taken for it for ever.
    found = [cached / name for name in _matching(hub, present, repository.patterns)] if cached else []
    spoiled = [path for path in found if _is_something_else(path)]

    if _OFFLINE.get() is not None or hub.constants.HF_HUB_OFFLINE:
        if complete:
            return complete
        variable = "HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else "TRANSFORMERS_OFFLINE"
        why = _OFFLINE.get() or f"{variable} is set: unset it and {AGAIN} to fetch what is missing"
        raise DownloadError(f"{_state_of_cache(hub, repository, lacking)}, and {why}")

    try:
        commit, names = _ask(hub, repository)
    except DownloadError as error:
        if complete:
            logger.warning("%s; taking %s from the cache, %s", without_secrets(hub, str(error)), repository, complete)
            return complete
        raise
    except Exception as error:
        failure = explain(hub, repository, error, asking=True)
        if complete:
            what = without_secrets(hub, failure.what)
            logger.warning("%s; taking %s from the cache, %s", what, repository, complete)
            return complete
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
        if complete and not spoiled and complete.name == commit and set(wanted) <= set(present):
            return complete
    for path in spoiled:
        _drop(hub, repository, path)
    folder = _download(hub, repository, set(_files(cached)) if cached else set())
    if lacking := _lacking(hub, folder, repository):
        if set(lacking) & set(wanted or ()):
            raise DownloadError(
                f"the download of {repository} is incomplete, {some(lacking, 3, counted=True)} did not come: {AGAIN}"
            )
        raise DownloadError(
            f"{repository} is itself incomplete, it holds no {some(lacking, 3, counted=True)}: name another revision, "
            f"as {repository.id}@revision, or tell its owner at {repository.page}/discussions"
        )
    return folder


def _download(hub: ModuleType, repository: Repository, before: set[str]) -> Path:
    """Fetch what is not in the cache, and compare it with the sums that the Hub announced.

    Args:
        before: the files that were there already.
    """
    for attempt in (1, 2):
        _clear_begun(hub, repository, all_of_it=attempt == 2)
        try:
            folder = hub.snapshot_download(
                repository.id, revision=repository.revision, allow_patterns=list(repository.patterns)
            )
            break
        except DownloadError:
            raise
        except Exception as error:
            # There is nothing after the bytes that came: they are not of this file. From the beginning, once.
            if attempt == 1 and getattr(getattr(error, "response", None), "status_code", None) == 416:
                continue
            raise DownloadError(str(explain(hub, repository, error, asking=False))) from error
    folder = Path(folder)
    for name in _matching(hub, _files(folder), repository.patterns):
        if name not in before and not _is_as_announced(folder / name):
            _drop(hub, repository, folder / name)
            raise DownloadError(
                f"{name} of {repository} came with other bytes than {hub.constants.ENDPOINT} announced, and was "
                f"removed: {AGAIN} to fetch it anew"
            )
    return folder


def _is_as_announced(path: Path) -> bool:
    """Whether a file in the cache has the SHA-256 that is its name there, where that is one: large files' are."""
    announced = (path.readlink() if path.is_symlink() else path).name
    if not re.fullmatch(r"[0-9a-f]{64}", announced):
        return True
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == announced


def _drop(hub: ModuleType, repository: Repository, path: Path) -> None:
    """Remove a file of a snapshot, so that it is fetched again; see `remove_within`."""
    try:
        remove_within(path, _holder(hub, repository), follow=True)
    except OSError as error:
        raise DownloadError(f"{path} is damaged and cannot be removed ({reason_of(error)}): remove it") from None


def _holder(hub: ModuleType, repository: Repository) -> Path:
    """The repository's folder in the cache."""
    return Path(hub.constants.HF_HUB_CACHE) / f"models--{repository.id.replace('/', '--')}"


def _clear_begun(hub: ModuleType, repository: Repository, *, all_of_it: bool) -> None:
    """Remove what lies where a download begins and is no file of its own, or all that had begun."""
    holder = _holder(hub, repository)
    make_ready(holder.parent, holder.name)
    if all_of_it:
        for path in (holder / "blobs").glob("*.incomplete"):
            path.unlink(missing_ok=True)


def _ask(hub: ModuleType, repository: Repository) -> tuple[str | None, list[str] | None]:
    """The commit that a revision stands for and the names of its files; None where the Hub keeps the names back."""
    check_endpoint(hub)
    info = hub.HfApi().model_info(
        repository.id,
        revision=repository.revision or hub.constants.DEFAULT_REVISION,
        # Without it a network that swallows packets would hold the command for minutes.
        timeout=hub.constants.HF_HUB_ETAG_TIMEOUT,
    )
    names = [sibling.rfilename for sibling in info.siblings or ()]
    # Gated repositories may show an empty list to those who have no access.
    return info.sha, names if names or not info.gated else None


def _check_contents(hub: ModuleType, repository: Repository, names: list[str], wanted: list[str]) -> None:
    if repository.file is not None:
        if not wanted:
            suffix = PurePosixPath(repository.file).suffix
            similar = [name for name in names if PurePosixPath(name).suffix == suffix] or names
            hint = f"it has {some(similar, 5, counted=True)}" if similar else "it is empty"
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
        raise DownloadError(f"{repository} holds none of {some(repository.patterns, 3, counted=True)}: {_NOT_LAID_OUT}")
    if absent := _unmatched(hub, names, repository):
        raise DownloadError(f"{repository} holds no {some(absent, 3, counted=True)}: {_NOT_LAID_OUT}")


def _cached(hub: ModuleType, repository: Repository) -> Path | None:
    """The cached copy of a revision, complete or not. Nothing is sent."""
    check_files(_holder(hub, repository))
    try:
        folder = Path(hub.snapshot_download(repository.id, revision=repository.revision, local_files_only=True))
    except hub.errors.LocalEntryNotFoundError as error:
        # Newer versions keep a list of a repository's files and miss whatever was never asked for.
        folder = Path(getattr(error, "snapshot_path", ""))
    except OSError as error:
        raise DownloadError(str(explain_disk(hub, repository, error.errno, reason_of(error)))) from error
    # A reference that was cut off while being written leads to the folder of all snapshots, and another anywhere.
    here = Path(os.path.abspath(folder))  # noqa: PTH100
    return folder if here.parent == Path(os.path.abspath(_holder(hub, repository) / "snapshots")) else None  # noqa: PTH100


def _lacking(hub: ModuleType, folder: Path, repository: Repository) -> list[str]:
    """What a snapshot needs and does not hold: unmatched requirements, and shards that an index names."""
    present = _files(folder)
    lacking = _unmatched(hub, present, repository)
    found = _matching(hub, present, repository.patterns)
    if not found and not lacking:
        lacking = list(repository.patterns)
    if lacking and repository.file is not None:
        return [repository.file]
    named: set[str] = set()
    for index in found:
        if index.endswith(".index.json"):
            # Whoever loads the weights says what is wrong with their index.
            with suppress(CheckpointError):
                shards = shards_of(folder / index).values()
                named.update(posixpath.join(posixpath.dirname(index), shard) for shard in shards)
    # Indexes of other variants come along with "*.json"; their shards are not wanted and so not missed.
    return lacking + _matching(hub, sorted(named - set(present)), repository.patterns)


def _unmatched(hub: ModuleType, names: Iterable[str], repository: Repository) -> list[str]:
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


def _files(folder: Path) -> list[str]:
    """Names of the files under a folder, links to nothing left out."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _matching(hub: ModuleType, names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The names that huggingface_hub would fetch for these patterns."""
    return list(hub.utils.filter_repo_objects(names, allow_patterns=list(patterns)))


def _state_of_cache(hub: ModuleType, repository: Repository, lacking: list[str]) -> str:
    if lacking:
        return f"{repository} in the cache {hub.constants.HF_HUB_CACHE} lacks {some(lacking, 3, counted=True)}"
    return f"{repository} is not in the cache {hub.constants.HF_HUB_CACHE}"
