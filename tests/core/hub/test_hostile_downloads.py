"""Servers that send the wrong bytes, too few, too slowly, or what they were told in confidence."""

from __future__ import annotations

import json
import time
from hashlib import sha256

import pytest
from support.fake_hub import INDEX, PATTERNS, REQUIRED, SHARDS, WANTED, FakeHub, Program, files_under, model_files

from mflux.errors import DownloadError
from mflux.hub import resolve_model

OLD_REQUIRED = ["transformer/model.safetensors.index.json", "vae/0.safetensors", "text/0.safetensors"]


class HostileHub(FakeHub):
    """Announces SHA-256 sums as for large files, and may send something else: `sent` maps files to bytes."""

    def __init__(self):
        super().__init__()
        self.sent: dict[str, bytes] = {}
        self.status: dict[str, list[int]] = {}
        self.slow: set[str] = set()

    def send(self, request, status, body, headers):
        name = next((name for name in model_files() if request.path.endswith(name)), "")
        if status == 200 and "ETag" in headers and name.endswith(".safetensors"):
            headers = headers | {"ETag": f'"{sha256(body).hexdigest()}"'}
        if request.command == "GET" and name in self.sent:
            body = self.sent[name]
        if request.command == "GET" and self.status.get(name):
            status = self.status[name].pop(0)
        if request.command == "GET" and name in self.slow:
            request.send_response(200)
            request.send_header("Content-Length", "1000000")
            request.end_headers()
            while True:
                request.wfile.write(b"x")
                time.sleep(0.05)
        super().send(request, status, body, headers)


@pytest.fixture
def hub():
    fake = HostileHub()
    fake.add("org/model")
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


@pytest.fixture
def start(hub, tmp_path):
    programs = []

    def begin(**settings):
        programs.append(Program(hub, tmp_path, **settings))
        return programs[-1]

    yield begin
    for program in programs:
        program.end()


def test_files_with_the_announced_sum(start):
    outcome = start().resolve("org/model")
    assert files_under(outcome.path) == WANTED


def test_the_right_length_with_the_wrong_bytes(hub, start, tmp_path):
    hub.sent[SHARDS[0]] = b"worse shard"
    program = start()
    outcome = program.resolve("org/model")
    assert outcome.error == (
        f"{SHARDS[0]} of org/model came with other bytes than {hub.address} announced, and was removed: run the same "
        "command again to fetch it anew"
    )
    assert b"worse shard" not in {path.read_bytes() for path in (tmp_path / "hub").rglob("*") if path.is_file()}
    # "Again" means again, and only for what was wrong.
    hub.sent.clear()
    outcome = program.resolve("org/model")
    assert outcome.fetched() == [SHARDS[0]]
    assert (outcome.path / SHARDS[0]).read_bytes() == model_files()[SHARDS[0]]


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1\n"])
def test_what_is_no_models_file_is_fetched_again(content, start):
    program = start()
    path = program.resolve("org/model").path / SHARDS[0]
    path.resolve().write_bytes(content)
    outcome = program.resolve("org/model")
    assert outcome.fetched() == [SHARDS[0]]
    assert path.read_bytes() == model_files()[SHARDS[0]]


def test_a_server_that_finds_nothing_after_what_came(hub, start):
    hub.status[SHARDS[0]] = [416]
    assert files_under(start().resolve("org/model").path) == WANTED
    hub.add("org/other")
    hub.status[SHARDS[0]] = [416] * 9
    outcome = start().resolve("org/other")
    assert outcome.error.startswith(f"{hub.address} answered HTTP 416 ")
    # Twice, and no more often.
    assert hub.status[SHARDS[0]] == [416] * 7


def test_one_byte_at_a_time(hub, start):
    hub.slow.add(SHARDS[0])
    began = time.monotonic()
    outcome = start().resolve("org/model", before="mflux.hub.guard.PATIENCE_S = 1")
    assert outcome.error == (
        "the download of org/model broke off (less than 64 kB came in 1 seconds): run the same command again; files "
        "that are complete are kept"
    )
    assert time.monotonic() - began < 50


def test_a_link_where_a_download_begins_is_not_followed(hub, start, tmp_path):
    blobs = tmp_path / "hub" / "models--org--model" / "blobs"
    blobs.mkdir(parents=True)
    mine = tmp_path / "mine"
    mine.write_bytes(b"mine")
    sums = {sha256(content).hexdigest() for name, content in model_files().items() if name.endswith(".safetensors")}
    for name in sums:
        (blobs / f"{name}.incomplete").symlink_to(mine)
    assert files_under(start().resolve("org/model").path) == WANTED
    assert mine.read_bytes() == b"mine"
    assert not list(blobs.glob("*.incomplete"))


@pytest.mark.parametrize("text", ["no hf_verysecret here", "\x1b[2J\u202eOh " + "x" * 100_000])
def test_nothing_of_a_server_reaches_a_terminal_as_it_came(hub, start, text):
    hub.add("org/echo", faults={"info": (500, {"X-Error-Message": text.encode().decode("latin-1")})})
    error = start(HF_TOKEN="hf_verysecret").resolve("org/echo").error
    assert "hf_verysecret" not in error
    assert error.isprintable()
    assert len(error) < 600


# HF_ENDPOINT's name and password, a token in their place, and what a server that echoes them may make of them.
@pytest.mark.parametrize("user", ["me:geheim", "me:ge%3Aheim", "hf_verysecret", "me:hf_verysecret"])
@pytest.mark.parametrize("kind", ["missing", "echoed", "warned of", "no address", "nobody there"])
def test_a_password_in_the_endpoint_is_not_told(hub, start, user, kind):
    from base64 import b64encode
    from urllib.parse import unquote

    secret = user.rpartition(":")[2]
    basic = b64encode(unquote(user if ":" in user else f"{user}:").encode()).decode()
    said = f"{'x' * 190}{secret} {unquote(secret)} http://{user}@host/ {basic} Bearer hf_mytoken"
    headers = {"X-Error-Message": said} if kind == "echoed" else {"X-HF-Warning": f"a; {said}"}
    hub.add("org/echo", faults={"info": (500, headers)} if kind == "echoed" else {})
    if kind == "warned of":
        hub.add("org/echo", faults={"info": (404, headers)})
    address = {"no address": f"x://{user}@y", "nobody there": f"http://{user}@127.0.0.1:9"}.get(
        kind, hub.address.replace("://", f"://{user}@")
    )
    program = start(HF_ENDPOINT=address, HF_TOKEN="hf_mytoken")
    outcome = program.resolve("org/none" if kind == "missing" else "org/echo")
    assert outcome.error
    for hidden in (secret, unquote(secret), basic, "hf_mytoken"):
        assert hidden not in outcome.error + outcome.stderr
        # Nor the beginning of one that was cut off.
        assert hidden[:6] not in outcome.error + outcome.stderr


def test_a_token_from_a_file_is_not_told(hub, start, tmp_path):
    (tmp_path / "token").write_text("hf_fromafile\n")
    hub.add("org/echo", faults={"info": (500, {"X-Error-Message": "no hf_fromafile here"})})
    outcome = start().resolve("org/echo")
    assert "(no … here)" in outcome.error
    assert hub.tokens == {"Bearer hf_fromafile"}


def test_a_file_whose_name_moves_the_cursor(hub, start):
    hub.add("org/odd", model_files() | {"transformer/\x1b[2J.json": b"{}"})
    outcome = start().resolve("org/odd")
    assert outcome.error == r"org/odd holds a file called transformer/\x1b[2J.json: name another repository"
    assert outcome.fetched() == []


def test_an_address_with_a_password_is_no_name():
    with pytest.raises(DownloadError) as error:
        resolve_model("https://me:geheim@huggingface.co/org/name", ["*"])
    assert str(error.value) == (
        "https://…@huggingface.co/org/name is an address: give the repository's name instead, as org/name"
    )


def test_an_index_from_a_stranger(hub, start):
    deep = b"[" * 100_000
    hub.add("org/deep", model_files() | {INDEX: b'{"weight_map": ' + deep})
    # Whoever reads the weights says what is wrong with their index.
    assert start().resolve("org/deep").path


# ---- several layouts


def test_the_layout_that_comes_closest_says_what_is_missing(hub, start):
    program = start()
    both = {"required": REQUIRED, "alternatives": [OLD_REQUIRED]}
    assert program.call("resolve_model", "org/model", PATTERNS, **both).path
    old = {
        "transformer/model.safetensors.index.json": json.dumps({"weight_map": {}}).encode(),
        "vae/0.safetensors": b"x",
    }
    hub.add("org/old", old)
    outcome = program.call("resolve_model", "org/old", [*PATTERNS, "text/*"], **both)
    assert outcome.error.startswith("org/old holds no text/0.safetensors: ")
    hub.add("org/old2", old | {"text/0.safetensors": b"y"})
    assert program.call("resolve_model", "org/old2", [*PATTERNS, "text/*"], **both).path
    hub.add("org/new", {"transformer/config.json": b"{}", "transformer/a.safetensors": b"x"})
    outcome = program.call("resolve_model", "org/new", PATTERNS, **both)
    assert outcome.error.startswith("org/new holds no vae/*.safetensors: ")


def test_names_that_no_folder_can_have():
    for name in ("x" * 5000, "a\0b", "\ud800/x", "a/" + "b" * 300, "~nobody-of-that-name/x", "\x1b[2J"):
        with pytest.raises(DownloadError) as caught:
            resolve_model(name, PATTERNS)
        assert str(caught.value).isprintable(), name[:20]
        assert len(str(caught.value)) < 3000
