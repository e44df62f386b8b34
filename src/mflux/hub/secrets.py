"""Tokens and passwords, which no message and no log may hold."""

from __future__ import annotations

import os
from base64 import b64encode
from contextlib import suppress
from types import ModuleType
from urllib.parse import unquote

from mflux.text import without_password
from mflux.utils.paths import read_bounded


def without_secrets(hub: ModuleType, text: str) -> str:
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
