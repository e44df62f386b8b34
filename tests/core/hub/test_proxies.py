"""Proxies of every form that a shell may set, against a Hugging Face of the tests' own (tests/support/fake_hub.py)."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.fake_hub import PATTERNS, REQUIRED, FakeHub, Outcome, Program

NEEDS_SOCKS = importlib.util.find_spec("socksio") is None


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    fake = FakeHub()
    fake.add("org/kept")
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


@pytest.fixture(scope="module")
def home(tmp_path_factory, hub) -> Path:
    """A cache that holds org/kept."""
    home = tmp_path_factory.mktemp("huggingface")
    program = Program(hub, home)
    assert program.resolve("org/kept").path
    program.end()
    return home


@pytest.fixture(scope="module")
def closed() -> Iterator[str]:
    """A port where nothing listens, and nothing can begin to."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


# Makes the program begin anew with other variables; the connections of before would be used again.
ANEW = """
import os, huggingface_hub
huggingface_hub.close_session()
for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
    del os.environ[name]
os.environ.update(%r)
"""


@pytest.fixture(scope="module")
def program(hub, home, closed) -> Iterator[Callable[..., Outcome]]:
    """Fetches one of the repositories with these variables."""
    process = Program(hub, home)

    def fetch(name: str, variables: dict[str, str]) -> Outcome:
        settings = {key: value.replace("CLOSED", closed) for key, value in variables.items()}
        return process.call("resolve_model", name, PATTERNS, before=ANEW % settings, required=REQUIRED)

    yield fetch
    process.end()


KINDS = "is of another kind than http://, https://, socks5://, socks5h://: give one of these"
# What the variables say, CLOSED for a port where nobody is → what the error says of them.
CASES = {
    "socks4": ({"ALL_PROXY": "socks4://CLOSED"}, f"the proxy socks4://CLOSED (ALL_PROXY) {KINDS}"),
    "socks": ({"all_proxy": "socks://CLOSED"}, f"the proxy socks://CLOSED (all_proxy) {KINDS}"),
    "ftp": ({"HTTP_PROXY": "ftp://CLOSED"}, f"the proxy ftp://CLOSED (HTTP_PROXY) {KINDS}"),
    "both cases": (
        {"http_proxy": "ftp://CLOSED", "HTTP_PROXY": "http://CLOSED"},
        f"the proxy ftp://CLOSED (http_proxy) {KINDS}",
    ),
    "mixed case": ({"All_Proxy": "ftp://CLOSED"}, f"the proxy ftp://CLOSED (All_Proxy) {KINDS}"),
    "of other addresses": (
        {"HTTPS_PROXY": "gopher://CLOSED"},
        f"the proxy gopher://CLOSED (HTTPS_PROXY) {KINDS}",
    ),
    "no host": (
        {"ALL_PROXY": "http://"},
        "the proxy http:// (ALL_PROXY) is not an address: give one as http://HOST:PORT",
    ),
    "half a host": ({"ALL_PROXY": "http://[::1"}, "the proxy http://[::1 (ALL_PROXY) is not an address"),
    "no port": ({"ALL_PROXY": "http://a:99999"}, "the proxy http://a:99999 (ALL_PROXY) is not an address"),
    "a password": (
        {"HTTP_PROXY": "ftp://me:secret@CLOSED"},
        f"the proxy ftp://…@CLOSED (HTTP_PROXY) {KINDS}",
    ),
    "nobody there": (
        {"HTTP_PROXY": "http://CLOSED"},
        "no connection to HUB through the proxy http://CLOSED (HTTP_PROXY) (Connection refused): check the proxy, or "
        "unset HTTP_PROXY, and run the same command again",
    ),
    "no scheme": ({"http_proxy": "me:secret@CLOSED"}, "through the proxy http://…@CLOSED (http_proxy) (Connection"),
}
if NEEDS_SOCKS:
    for scheme in ("socks5", "socks5h"):
        for variable in ("ALL_PROXY", "https_proxy"):
            CASES[f"{scheme} {variable}"] = (
                {variable: f"{scheme}://CLOSED"},
                f"the proxy {scheme}://CLOSED ({variable}) needs a package that is not installed: pip install",
            )


@pytest.mark.parametrize("name", CASES)
def test_a_proxy_that_does_not_serve(name, hub, program, home, closed):
    variables, message = CASES[name]
    kept, lacking = program("org/kept", variables), program("org/other", variables)
    message = message.replace("CLOSED", closed).replace("HUB", hub.address)
    # What is in the cache serves, with a warning.
    assert kept.path is not None and kept.error is None
    (warning,) = kept.stderr.splitlines()
    assert warning.startswith("WARNING no connection to") and "taking org/kept from the cache" in warning
    # What is not is asked for in vain, and the one line names the proxy.
    assert lacking.path is None and "\n" not in lacking.error
    without_state = lacking.error.replace(f", and org/other is not in the cache {home}/hub", "")
    assert message in without_state
    assert "unset" in lacking.error.rpartition(":")[2] or "unset" in lacking.error
    assert "secret" not in warning + lacking.error


@pytest.mark.parametrize(
    "variables",
    [
        {"ALL_PROXY": "", "http_proxy": "", "HTTPS_PROXY": ""},
        {"HTTP_PROXY": "http://CLOSED", "NO_PROXY": "127.0.0.1"},
        {"HTTP_PROXY": "http://CLOSED", "no_proxy": "*"},
        {"SOMETHING_PROXY": "ftp://CLOSED"},
        {"NO_PROXY": "http://["},
    ],
)
def test_what_is_no_proxy_for_this_address(variables, program):
    outcome = program("org/kept", variables)
    assert outcome.path and not outcome.stderr and outcome.requests


def test_an_empty_setting_is_none(hub, home):
    """HF_HOME would be this folder, and HF_ENDPOINT no address."""
    names = ("HF_ENDPOINT", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN_PATH")
    program = Program(hub, home, **dict.fromkeys(names, ""), HF_HUB_OFFLINE="1")
    kept, lacking = program.resolve("org/kept"), program.resolve("org/other")
    program.end()
    assert kept.path and f"is not in the cache {home}/hub" in lacking.error


def test_socks_for_a_download_of_python_itself(monkeypatch, tmp_path, closed):
    from mflux.errors import DownloadError
    from mflux.models.common.controls.depth_pro import download

    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", f"socks5://{closed}")
    with (tmp_path / "part").open("w+b") as file, pytest.raises(DownloadError) as caught:
        download._fetch("https://example.org/x.pt", file, "take another")
    assert str(caught.value) == (
        f"no connection to example.org, because the proxy socks5://{closed} (https_proxy) is of another kind than "
        "http://, https://: give one of these, or unset https_proxy, or take another"
    )
