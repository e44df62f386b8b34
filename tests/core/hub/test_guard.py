"""Servers and caches that would have something written, removed or sent elsewhere, and servers that come to no end."""

from __future__ import annotations

import json
import time
from email.utils import formatdate
from hashlib import sha1
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from support.fake_hub import SHARDS, WANTED, FakeHub, Program, files_under, model_files

from mflux.errors import DownloadError
from mflux.hub import guard

OUTSIDE = "../../../../../planted"
COMMIT = sha1(b"a commit").hexdigest()
FILE = "vae/config.json"


class Server(FakeHub):
    """Changes answers: each of `changes` takes and gives (status, body, headers), or answers by itself with None."""

    def __init__(self):
        super().__init__()
        self.change = lambda request, status, body, headers: (status, body, headers)

    def send(self, request, status, body, headers):
        if (changed := self.change(request, status, body, headers)) is not None:
            super().send(request, *changed)


@pytest.fixture
def hub():
    fake = Server()
    fake.add("org/model")
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


@pytest.fixture
def start(hub, tmp_path):
    programs = []

    def begin(**settings):
        programs.append(Program(hub, tmp_path / "a" / "b" / "c" / "d", HF_HUB_DOWNLOAD_TIMEOUT="10", **settings))
        return programs[-1]

    yield begin
    for program in programs:
        program.end()


def with_header(name, value, command=None):
    def change(request, status, body, headers):
        if "/resolve/" in request.path and command in (None, request.command):
            headers = headers | {name: value}
        return status, body, headers

    return change


def with_json(kind, change_answer):
    def change(request, status, body, headers):
        if f"/{kind}/" in request.path and status == 200:
            body = json.dumps(change_answer(json.loads(body))).encode()
        return status, body, headers

    return change


def everything_but_the_cache(folder: Path) -> list[str]:
    cache = folder / "a" / "b" / "c" / "d" / "hub"
    told = "stderr-"
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if not path.is_relative_to(cache) and path.is_file() and not path.name.startswith(told)
    )


def skip_without_lists(outcome) -> None:
    if outcome.error is None and not any("/tree/" in line for line in outcome.requests):
        pytest.skip("this version of huggingface_hub asks for no lists")


TREE = [{"type": "file", "path": FILE, "size": 1, "oid": "0" * 40}]
NAMES_ELSEWHERE = {
    "ETag": with_header("ETag", f'"{OUTSIDE}"'),
    "a weak ETag": with_header("ETag", f'W/"{OUTSIDE}"'),
    "the ETag of what is linked": with_header("X-Linked-Etag", f'"{OUTSIDE}"'),
    "an ETag of dots": with_header("ETag", '".."'),
    "an ETag without end": with_header("ETag", '"' + "a" * 5000 + '"'),
    "the commit of a file": with_header("X-Repo-Commit", OUTSIDE),
    "the commit": with_json("revision", lambda answer: answer | {"sha": OUTSIDE}),
    "the commit as a number": with_json("revision", lambda answer: answer | {"sha": 5}),
    "a listed id": with_json("tree", lambda _: [TREE[0] | {"oid": OUTSIDE}]),
    "a listed sum": with_json("tree", lambda _: [TREE[0] | {"lfs": {"oid": OUTSIDE, "size": 1}, "xetHash": "0" * 64}]),
    "a listed content": with_json("tree", lambda _: [TREE[0] | {"xetHash": OUTSIDE}]),
}


@pytest.mark.parametrize("change", NAMES_ELSEWHERE.values(), ids=NAMES_ELSEWHERE)
def test_what_a_server_says_names_no_file(hub, start, tmp_path, change):
    hub.change = change
    program = start()
    outcome = program.resolve("org/model")
    skip_without_lists(outcome)
    assert outcome.error and "check HF_ENDPOINT" in outcome.error and outcome.error.isprintable()
    assert len(outcome.error) < 400
    assert everything_but_the_cache(tmp_path) == []
    cache = tmp_path / "a" / "b" / "c" / "d" / "hub"
    assert not [path for path in cache.rglob("*") if "planted" in path.name]


def links_at_every_name_that_is_written(cache: Path, outside: Path, commit: str) -> list[Path]:
    """Links to a file, or to nothing, where huggingface_hub of any version opens a file for writing."""
    holder, locks = cache / "models--org--model", cache / ".locks" / "models--org--model"
    sums = [sha1(content).hexdigest() for content in model_files().values()]
    names = [cache / "CACHEDIR.TAG", holder / "refs" / "main", holder / "trees" / f"{commit}.json"]
    names += [holder / "blobs" / f"{name}{ending}" for name in sums for ending in (".incomplete", ".lock", ".tmp")]
    names += [locks / f"{name}.lock" for name in sums]
    names += [holder / ".no_exist" / commit / "vae" / "config.json"]
    for number, name in enumerate(names):
        name.parent.mkdir(parents=True, exist_ok=True)
        name.symlink_to(outside / ("mine.txt" if number % 2 else f"new-{number}"))
    return names


def test_no_link_of_a_cache_is_written_through(hub, start, tmp_path):
    commit, _ = hub.repositories["org/model"].at("main")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine.txt").write_text("mine")
    (outside / "config.json").write_text("mine")
    cache = tmp_path / "a" / "b" / "c" / "d" / "hub"
    links_at_every_name_that_is_written(cache, outside, commit)
    snapshot = cache / "models--org--model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "vae").symlink_to(outside)
    outcome = start().resolve("org/model")
    assert outcome.error is None and files_under(outcome.path) == WANTED
    assert sorted(path.name for path in outside.iterdir()) == ["config.json", "mine.txt"]
    assert {path.read_text() for path in outside.iterdir()} == {"mine"}


@pytest.mark.parametrize("part", ["blobs", "refs", "snapshots", "trees"])
def test_a_folder_of_a_cache_that_is_a_link(start, tmp_path, part):
    outside, cache = tmp_path / "outside", tmp_path / "a" / "b" / "c" / "d" / "hub"
    outside.mkdir()
    holder = cache / "models--org--model"
    holder.mkdir(parents=True)
    (holder / part).symlink_to(outside)
    outcome = start().resolve("org/model")
    assert outcome.error and f"{holder / part} is a link" in outcome.error
    assert list(outside.iterdir()) == []


def test_a_list_of_files_in_a_cache_that_names_others(hub, start, tmp_path):
    commit, files = hub.repositories["org/model"].at("main")
    cache = tmp_path / "a" / "b" / "c" / "d" / "hub"
    trees = cache / "models--org--model" / "trees"
    trees.mkdir(parents=True)
    entry = {"size": 1, "oid": OUTSIDE, "lfs_sha256": OUTSIDE, "xet_hash": "0" * 64, "lfs_size": 1}
    (trees / f"{commit}.json").write_text(json.dumps({"version": 1, "files": dict.fromkeys(files, entry)}))
    outcome = start().resolve("org/model")
    assert outcome.error is None and files_under(outcome.path) == WANTED
    assert everything_but_the_cache(tmp_path) == []


@pytest.mark.parametrize("content", ["../../../../../outside/snapshots/x", "/tmp", "..", "x/../../refs"])
def test_a_reference_that_leads_elsewhere(hub, start, tmp_path, content):
    outside = tmp_path / "a" / "b" / "outside" / "snapshots" / "x" / "vae"
    outside.mkdir(parents=True)
    (outside / "config.json").write_text("")
    refs = tmp_path / "a" / "b" / "c" / "d" / "hub" / "models--org--model" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(content)
    outcome = start().resolve("org/model")
    assert outcome.error is None and files_under(outcome.path) == WANTED
    assert (outside / "config.json").exists()


@pytest.mark.parametrize("spoil", [b"", b"<html>", bytes(64)])
def test_what_a_spoiled_entry_leads_to_outside_stays(start, tmp_path, spoil):
    mine = tmp_path / "mine.json"
    mine.write_bytes(spoil)
    program = start()
    folder = program.resolve("org/model").path
    entry = folder / FILE
    entry.unlink()
    entry.symlink_to(mine)
    outcome = program.resolve("org/model")
    assert outcome.error is None and outcome.path == folder
    assert mine.read_bytes() == spoil
    assert entry.read_bytes() == model_files()[FILE]


# ---- the token


def storage(address):
    content = {"X-Xet-Hash": "0" * 64}
    return {
        "a header": content | {"X-Xet-Refresh-Route": f"{address}/api/models/org/model/xet-read-token/main"},
        "a link": content | {"Link": f'<{address}/x>; rel="xet-auth", <https://x/y>; rel="other"'},
    }


@pytest.mark.parametrize("kind", ["a header", "a link"])
def test_the_token_is_not_sent_where_a_header_says(hub, start, kind):
    other = Server()
    try:
        hub.change = lambda request, status, body, headers: (
            (status, body, headers | storage(other.address)[kind])
            if "/resolve/" in request.path
            else (status, body, headers)
        )
        outcome = start(HF_TOKEN="hf_verysecret").resolve("org/model")
        assert "wants the token sent to 127.0.0.1, which was refused" in outcome.error
        assert other.log == []
    finally:
        other.server.shutdown()
        other.server.server_close()


@pytest.mark.parametrize("what", ["/api/", "/resolve/"])
def test_a_redirect_takes_no_token_along(hub, start, what):
    """To another port of this host, which is another server."""
    other = Server()
    other.add("org/model")
    seen = []

    def record(request, status, body, headers):
        seen.append(request.headers.get("Authorization"))
        return status, body, headers

    other.change = record
    try:
        hub.change = lambda request, status, body, headers: (
            (307, b"", {"Location": other.address + request.path})
            if what in request.path and request.command == "GET"
            else (status, body, headers)
        )
        start(HF_TOKEN="hf_verysecret").resolve("org/model")
        assert seen and set(seen) == {None}
    finally:
        other.server.shutdown()
        other.server.server_close()


# ---- other shapes


def instead(kind, body):
    def change(request, status, given, headers):
        return (status, body, headers) if f"/{kind}/" in request.path and status == 200 else (status, given, headers)

    return change


def told_as(**values):
    return with_json("revision", lambda answer: answer | values)


SHAPES = {
    "a list": instead("revision", b"[]"),
    "a number": instead("revision", b"5"),
    "nothing": instead("revision", b""),
    "null": instead("revision", b"null"),
    "a page": instead("revision", b"<html>"),
    "brackets": instead("revision", b"[" * 200_000),
    "braces": instead("revision", b'{"a":' * 200_000),
    "no commit": with_json("revision", lambda answer: {name: answer[name] for name in answer if name != "sha"}),
    "a commit of nothing": told_as(sha=None),
    "files as text": told_as(siblings="abc"),
    "files as a table": told_as(siblings={"a": 1}),
    "a file's name as a number": told_as(siblings=[{"rfilename": 3}]),
    "a file without a name": told_as(siblings=[{}]),
    "a file that is text": told_as(siblings=["a"]),
    "a card of text": told_as(cardData="x", lastModified=3, safetensors=[3], config=5, transformersInfo=3),
    "a list that is a table": instead("tree", b"{}"),
    "a list of numbers": instead("tree", b"[3]"),
    "a list of brackets": instead("tree", b"[" * 200_000),
    "a listed name": with_json("tree", lambda _: [TREE[0] | {"path": 5}]),
    "a listed kind": with_json("tree", lambda _: [TREE[0] | {"type": None}]),
    "a listed length": with_json("tree", lambda _: [TREE[0] | {"size": "x"}]),
    "a listed length below nothing": with_json("tree", lambda _: [TREE[0] | {"size": -1}]),
    "a listed sum of text": with_json("tree", lambda _: [TREE[0] | {"lfs": "x"}]),
}


def test_answers_of_other_shapes(hub, start):
    program = start()
    for name, change in SHAPES.items():
        hub.change = change
        outcome = program.call("fetch_file", "org/model", FILE)
        if "list" in name.split() and name != "a list" and not any("/tree/" in line for line in outcome.requests):
            continue
        assert outcome.error and "does not answer like Hugging Face" in outcome.error, (name, outcome.error)
        assert outcome.error.isprintable() and "check HF_ENDPOINT" in outcome.error, name


# ---- no end

DEADLINES = "; ".join(
    [
        "import mflux.hub.guard as g",
        "g.DEADLINE_S, g.LARGEST_ANSWER = 2, 100_000",
        "g.MOST_PAGES, g.ALL_QUESTIONS_S = 8, 3",
    ]
)


def begin(request, headers):
    request.send_response(200)
    for name, value in headers.items():
        request.send_header(name, value)
    request.end_headers()


def endless(headers, chunk):
    def change(request, status, body, given):
        if "/revision/" not in request.path:
            return status, body, given
        begin(request, headers)
        try:
            while True:
                request.wfile.write(chunk)
        except OSError:
            return None

    return change


def chunked(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


def zeros_in_little():
    import zlib

    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return packer.compress(bytes(20_000_000)) + packer.flush()


def compressed(request, status, body, headers):
    return (
        (200, zeros_in_little(), {"Content-Encoding": "gzip"})
        if "/revision/" in request.path
        else (status, body, headers)
    )


def drips(where):
    """Headers, or a body, of which a letter comes now and then."""

    def change(request, status, body, headers):
        if where not in request.path:
            return status, body, headers
        try:
            request.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
            while True:
                request.wfile.write(b"x")
                request.wfile.flush()
                time.sleep(0.1)
        except OSError:
            return None

    return change


def pages(next_page):
    def change(request, status, body, headers):
        if "/tree/" in request.path:
            headers = headers | {"Link": f'<{next_page(request)}>; rel="next"'}
        return status, body, headers

    return change


def later(request, status, body, headers):
    if "/tree/" in request.path:
        time.sleep(0.5)
    return pages(counting)(request, status, body, headers)


def counting(request):
    change = counting.number = getattr(counting, "number", 0) + 1
    return f"http://{request.headers['Host']}/api/models/org/model/tree/main?cursor={change}"


def redirected(request, status, body, headers):
    return 302, b"", {"Location": request.path + "x"}


def waits(headers):
    """An answer that asks to wait; `headers` is called for each, as a date depends on when it is written."""
    return lambda request, status, body, given: (429, b"", headers())


NO_END = {
    "an answer without end": (endless({"Connection": "close"}, bytes(65536)), "more than 100 kB"),
    "the same in chunks": (endless({"Transfer-Encoding": "chunked"}, chunked(b" " * 65536)), "more than 100 kB"),
    "little that becomes much": (compressed, "answers compressed"),
    "headers that drip": (drips("/revision/"), "no whole answer in 2 seconds"),
    "headers of a list that drip": (drips("/tree/"), "no whole answer in 2 seconds"),
    "headers of a file that drip": (drips("/resolve/"), "no whole answer in 2 seconds"),
    "pages that lead to themselves": (
        pages(lambda request: f"http://{request.headers['Host']}{request.path}"), "in pages that lead nowhere"),
    "pages that lead to another": (pages(lambda request: "http://127.0.0.1:1/x"), "in pages that lead nowhere"),
    "pages without end": (pages(counting), "does not come to an end, after 8 pages"),
    "pages that take their time": (later, "does not come to an end within 3 seconds"),
    "redirects without end": (redirected, "redirect"),
    "a wait of a day": (waits(lambda: {"Retry-After": "86400"}), "asks to wait 86,400 seconds"),
    "a wait until tomorrow": (waits(lambda: {"Retry-After": formatdate(time.time() + 86400)}), "asks to wait 86,"),
    "a limit for a day": (waits(lambda: {"RateLimit": '"api";r=0;t=86400'}), "asks to wait 86,400 seconds"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "told"), NO_END.values(), ids=NO_END)
def test_a_server_that_comes_to_no_end(hub, start, change, told):
    hub.change = change
    began = time.monotonic()
    outcome = start().call("fetch_file", "org/model", FILE, before=DEADLINES)
    skip_without_lists(outcome)
    assert outcome.error and told in outcome.error.lower() + outcome.error, outcome.error
    assert outcome.error.isprintable() and len(outcome.error) < 500
    assert time.monotonic() - began < 40


def test_second_tries_and_other_questions_have_what_the_first_left(monkeypatch):
    hub = ModuleType("hub")
    hub.constants = SimpleNamespace(ENDPOINT="http://127.0.0.1:1")
    monkeypatch.setattr(guard, "_install", lambda hub: None)
    now = [1000.0]
    monkeypatch.setattr(guard, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))

    def ask(path):
        request = SimpleNamespace(url=f"{hub.constants.ENDPOINT}{path}", method="GET", headers={})
        guard._before(request)
        return guard._left(None)

    with guard.guarded(hub):
        assert ask("/api/agent-harnesses") == 60
        now[0] += 45
        assert ask("/api/models/org/model") == 15
        now[0] += 20
        for again in range(2):
            with pytest.raises(DownloadError, match="no whole answer in 60 seconds"), guard._in_time("host"):
                assert ask(f"/api/models/org/model?{again}") == 0.001
        monkeypatch.setattr(guard, "_check", lambda fetch, response: None)
        guard._after(None)
        assert ask("/api/models/org/model") == 60


def test_a_file_without_a_length(hub, start):
    """One of the announced length comes; one that does not end does not."""

    def change(request, status, body, headers):
        if request.command == "GET" and request.path.endswith(SHARDS[0]):
            begin(request, {"Transfer-Encoding": "chunked"})
            try:
                for piece in [body] if not change.endless else iter(lambda: bytes(65536), None):
                    request.wfile.write(chunked(piece))
                request.wfile.write(b"0\r\n\r\n")
            except OSError:
                pass
            return None
        return status, body, headers

    hub.change, change.endless = change, True
    outcome = start().resolve("org/model")
    assert outcome.error and "were announced" in outcome.error
    change.endless = False
    assert files_under(start().resolve("org/model").path) == WANTED


def test_a_cached_model_serves_where_a_server_comes_to_no_end(hub, start):
    program = start()
    folder = program.resolve("org/model").path
    hub.change = drips("/revision/")
    outcome = program.call("resolve_model", "org/model", ["model_index.json"], before=DEADLINES)
    assert outcome.path == folder and "from the cache" in outcome.stderr


def test_a_programs_own_questions_are_its_own(hub, start):
    program = start()
    program.resolve("org/model")
    hub.change = with_header("ETag", '"what/it/likes"')
    before = (
        "import huggingface_hub as h; m = h.get_hf_file_metadata(h.hf_hub_url('org/model', 'vae/config.json')); "
        "assert m.etag == 'what/it/likes', m"
    )
    assert program.call("fetch_file", "org/model", FILE, before=before).path
