"""huggingface_hub, loaded when it is needed, its log without secrets."""

from __future__ import annotations

import logging
import os
from types import ModuleType

from mflux.errors import DownloadError
from mflux.hub.secrets import without_secrets
from mflux.text import one_line
from mflux.utils.progress import bar_class

_ADDRESSES_AND_FOLDERS = ("HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN_PATH")


def drop_empty_settings() -> None:
    """An empty variable means that none is set; huggingface_hub, which reads them while it is imported, would take it
    for an address, or for this folder."""
    for name in _ADDRESSES_AND_FOLDERS:
        if name in os.environ and not os.environ[name].strip():
            del os.environ[name]


def huggingface() -> ModuleType:
    drop_empty_settings()
    # Half a second to import: only those pay who get here.
    bar_class()
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


class _Cleaned(logging.Filter):
    """What huggingface_hub logs by itself, such as a server's warnings, is one line without secrets as well."""

    def __init__(self, hub: ModuleType):
        super().__init__()
        self._hub = hub

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = one_line(without_secrets(self._hub, record.getMessage())), ()
        return True
