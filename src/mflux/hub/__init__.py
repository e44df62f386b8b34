"""Models on Hugging Face: from a name to a folder on this disk (`resolve`), every way that fails as one sentence
(`explain`), and what is broken in the cache (`cache`)."""

from mflux.errors import DownloadError
from mflux.hub.resolve import cached_copy, fetch_file, fetch_only_file, offline, resolve_model

__all__ = ["DownloadError", "cached_copy", "fetch_file", "fetch_only_file", "offline", "resolve_model"]
