"""`mflux serve`, as far as it goes with the wheel alone: its options, its address, and what it refuses."""

from __future__ import annotations

import socket
import sys

import pytest

from mflux.cli import serve


def test_help_needs_nothing(cli_process):
    done = cli_process("serve", "--help")
    assert done.status == 0
    assert "mflux[serve]" in done.out


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "python_multipart", "prometheus_client"])
def test_without_the_extra_it_is_named(cli, monkeypatch, package):
    from mflux import optional

    def find(name: str, *args):
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return sys

    monkeypatch.setattr(optional.importlib, "import_module", find)
    with pytest.raises(optional.MissingExtraError, match=f"mflux serve needs the package {package}"):
        from mflux.serve.app import check_installed

        check_installed()
    monkeypatch.undo()
    assert optional.pip_command("serve") == 'pip install "mflux[serve]"'


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--host", "0.0.0.0"), "--host 0.0.0.0 lets other machines ask, and there is no key"),
        (("--host", "192.0.2.1"), "lets other machines ask"),
        (("--api-key", ""), "the key is empty"),
        (("--api-key", "a\nb"), "the key is empty, or holds what no header can"),
        (("--api-key", "x", "--no-api-key"), "not allowed with"),
        (("--api-key-file", "nowhere.txt"), "cannot read the key in nowhere.txt: No such file"),
        (("--allow-origin", "example.org"), "--allow-origin example.org is no origin"),
        (("--allow-origin", "https://example.org/page"), "is no origin"),
        (("--port", "70000"), "70000 is too large"),
        (("--queue", "0"), "0 is too small"),
        (("--memory-limit-gb", "0"), "0 is not above 0"),
        (("--keep", "-2"), "-2 is too small"),
        (("--quantize", "7"), "invalid choice"),
        (("--worker", "nonsense"), "--worker nonsense is no address of a server"),
        (("--worker", ""), "no address of a server"),
    ],
)
def test_options_that_make_no_sense(cli, in_folder, monkeypatch, words, told):
    monkeypatch.delenv(serve.KEY_VARIABLE, raising=False)
    done = cli("serve", *words)
    assert done.status == 2
    assert len(done.errors) == 1
    assert told in done.errors[0]


def test_where_a_key_comes_from(in_folder, monkeypatch):
    (in_folder / "key.txt").write_text("from-a-file\nanother line\n")

    def key(*words: str) -> str | None:
        return serve._rules(serve.build_parser().parse_args(list(words))).key

    monkeypatch.setenv(serve.KEY_VARIABLE, "from-the-environment")
    assert key() == "from-the-environment"
    assert key("--api-key", "typed") == "typed"
    assert key("--api-key-file", "key.txt") == "from-a-file"
    assert key("--no-api-key", "--host", "0.0.0.0") is None


def test_a_port_that_is_taken():
    from mflux.errors import MfluxError

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MfluxError, match=f"cannot listen at 127.0.0.1 port {port} .*--port 0"):
            serve._listen("127.0.0.1", port)
    with serve._listen("127.0.0.1", 0) as listener:
        assert serve._address(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}/"
