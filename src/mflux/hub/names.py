"""A repository's name on Hugging Face, and what is asked for in it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import ModuleType
from urllib.parse import urlsplit

from mflux.errors import DownloadError
from mflux.text import shown

# What git allows in the name of a branch or tag.
_REVISION = re.compile(r"[^\s/~^:?*\[\\][^\s~^:?*\[\\]*")


@dataclass(frozen=True)
class Repository:
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


def check_names(hub: ModuleType, repository: Repository) -> None:
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
        _ = urlsplit(hub.constants.ENDPOINT).port
    except ValueError:
        # With such a one huggingface_hub cannot even read its cache.
        check_endpoint(hub)


def check_endpoint(hub: ModuleType) -> None:
    """
    Raises:
        DownloadError: HF_ENDPOINT is no address.
    """
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


def name_in_address(address: str) -> str:
    """`org/name` out of an address at Hugging Face; just that, where it holds none."""
    scheme, _, rest = address.partition("://")
    parts = [part for part in rest.partition("?")[0].split("/") if part]
    if scheme != "hf":
        parts = parts[1:]
    return "/".join(parts[:2]) if len(parts) > 1 else "org/name"
