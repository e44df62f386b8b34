"""The proxies that the environment names: which one a connection goes through, and what is wrong with one that cannot
serve."""

from __future__ import annotations

import importlib.util
import os
import urllib.request
from dataclasses import dataclass
from urllib.parse import urlsplit

from mflux.text import shown, some, without_password

_SOCKS = ("socks5", "socks5h")


@dataclass(frozen=True)
class Proxy:
    """One proxy: its address, and the variable that names it ("" for the system's own settings)."""

    address: str
    variable: str

    def __str__(self) -> str:
        return f"the proxy {shown(without_password(self.address), 200)} ({self.variable or 'of the system'})"

    @property
    def otherwise(self) -> str:
        """What to do with it where it does not serve."""
        return f"unset {self.variable}" if self.variable else "turn it off in the system's settings"


def proxy_for(address: str) -> Proxy | None:
    """The proxy that a connection to an address goes through, or None."""
    parts = urlsplit(address)
    found = _proxies()
    proxy = found.get(parts.scheme) or found.get("all")
    try:
        return None if proxy is None or urllib.request.proxy_bypass(parts.hostname or "") else proxy
    except ValueError:
        return proxy


def unusable_proxy(*, library: str | None, scheme: str | None = None) -> tuple[str, str] | None:
    """What keeps a proxy from being used at all, as (what is wrong, what to do), or None.

    Args:
        library: the package that makes the connections: httpx or a later one of its kind, which tries every proxy as
            soon as it begins, and brings SOCKS with an extra of its own; None for Python itself, which has none.
        scheme: of the addresses that are asked, where other addresses' proxies do not matter.
    """
    for kind, proxy in _proxies().items():
        if scheme is not None and kind != scheme:
            continue
        try:
            parts = urlsplit(proxy.address)
            sound = bool(parts.hostname) and parts.port != 0
        except ValueError:
            sound = False
        known = ("http", "https", *(_SOCKS if library else ()))
        if sound and parts.scheme in _SOCKS and library and importlib.util.find_spec("socksio") is None:
            remedy = f'pip install "{library}[socks]", or {proxy.otherwise}'
            return f"{proxy} needs a package that is not installed", remedy
        if sound and parts.scheme not in known:
            kinds = some([f"{name}://" for name in known])
            return f"{proxy} is of another kind than {kinds}", f"give one of these, or {proxy.otherwise}"
        if not sound:
            return f"{proxy} is not an address", f"give one as http://HOST:PORT, or {proxy.otherwise}"
    return None


def _proxies() -> dict[str, Proxy]:
    """By the scheme of the addresses that they are for: "http", "https", "all"."""
    found = {}
    for kind, address in urllib.request.getproxies().items():
        if kind not in ("http", "https", "all") or not address:
            continue
        # Of variables that differ in case alone, the one in small letters holds.
        named = [name for name, value in os.environ.items() if name.lower() == f"{kind}_proxy" and value]
        variable = max(named, key=str.islower, default="")
        found[kind] = Proxy(address if "://" in address else f"http://{address}", variable)
    return found
