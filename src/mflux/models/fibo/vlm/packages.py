"""The packages that only FIBO-VLM needs; the extra `vlm` brings them. torch is not among them."""

from __future__ import annotations

import os
from types import ModuleType

from mflux.optional import is_installed, require

_EXTRA, _FEATURE = "vlm", "FIBO-VLM"


def import_transformers() -> ModuleType:
    """transformers, once all that FIBO-VLM needs of it is known to be there.

    Raises:
        MissingExtraError: a package is not installed; says which extra brings it.
    """
    # It would tell that torch is missing and no model can be had. None of its models is wanted.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    transformers = require("transformers", extra=_EXTRA, feature=_FEATURE)
    require("jinja2", extra=_EXTRA, feature=_FEATURE)
    return transformers


def check_installed() -> None:
    """The same without importing what is there, which takes a second.

    Raises:
        MissingExtraError: as above.
    """
    if not is_installed(_EXTRA):
        import_transformers()
