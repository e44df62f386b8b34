"""huggingface_hub, loaded when it is needed, its log without secrets."""

from __future__ import annotations

import logging
import os
from types import ModuleType

from mflux.errors import DownloadError
from mflux.hub.secrets import without_secrets
from mflux.text import one_line, shown
from mflux.utils.paths import is_homeless
from mflux.utils.progress import bar_class

logger = logging.getLogger(__name__)

_FOLDERS = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN_PATH", "HF_XET_CACHE", "XDG_CACHE_HOME")
_SECONDS = ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT")


def check_settings() -> None:
    """huggingface_hub reads its variables while it is imported. An empty one means that none is set; it would take it
    for an address, or for this folder. Of one that is no number of seconds, the usual number holds.

    Raises:
        DownloadError: one leads to the folder of a user whom this machine does not know.
    """
    for name in ("HF_ENDPOINT", *_FOLDERS):
        if name in os.environ and not os.environ[name].strip():
            del os.environ[name]
    for name in _SECONDS:
        try:
            int(os.environ.get(name, "0"))
        except ValueError:
            logger.warning(
                "%s is %s, which is no number of seconds: it is left out; correct or unset it",
                name,
                shown(repr(os.environ.pop(name)), 60),
            )
    for name in _FOLDERS:
        value = os.environ.get(name, "")
        if is_homeless(os.path.expandvars(value)):
            user = value.partition("/")[0]
            raise DownloadError(
                f"{name} is {shown(value, 200)}, and no home folder of {shown(user, 60)} is known: write the whole path"
            )


def huggingface() -> ModuleType:
    check_settings()
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
