"""mflux.hub against a Hugging Face of the tests' own (tests/support/fake_hub.py)."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fake_hub import PATTERNS, REQUIRED, SHARDS, WANTED, FakeHub, Program, files_under, model_files

from mflux.errors import DownloadError
from mflux.hub import fetch_file, resolve_model

LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
NOT_LAID_OUT = "it is not a model in the diffusers layout; name a repository or a folder that is"


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    fake = FakeHub()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


@pytest.fixture(scope="module")
def start(hub: FakeHub) -> Iterator[Any]:
    programs: list[Program] = []

    def begin(home: Path, **settings: str) -> Program:
        programs.append(Program(hub, home, **settings))
        return programs[-1]

    yield begin
    for program in programs:
        program.end()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("huggingface")


@pytest.fixture(scope="module")
def online(start: Any, home: Path) -> Program:
    return start(home)


@pytest.fixture(scope="module")
def offline(start: Any, home: Path) -> Program:
    """Shares its cache with `online`."""
    return start(home, HF_HUB_OFFLINE="1")


@pytest.fixture(scope="module")
def nobody_there() -> Iterator[str]:
    """An address where nothing listens, and nothing can begin to."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture(scope="module")
def unplugged(start: Any, home: Path, nobody_there: str) -> Program:
    """Shares its cache with `online`, too."""
    return start(home, HF_ENDPOINT=nobody_there)


# Folders.


def test_an_existing_folder_is_returned_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert resolve_model(str(tmp_path), PATTERNS, required=REQUIRED) == tmp_path
    assert resolve_model(tmp_path, PATTERNS) == tmp_path
    assert resolve_model("~/org", PATTERNS) == tmp_path / "org"
    assert resolve_model("org/name", PATTERNS) == Path("org/name")
    assert resolve_model(".", PATTERNS) == Path()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "the model's name is empty: give a folder, or a Hugging Face repository as org/name"),
        ("/nowhere/x", "there is no folder /nowhere/x: check the path, or give a Hugging Face repository as org/name"),
        ("./x", "there is no folder x: check the path, or give a Hugging Face repository as org/name"),
        ("~/x", "there is no folder HOME/x: check the path, or give a Hugging Face repository as org/name"),
        ("a/b/c", "there is no folder a/b/c: check the path, or give a Hugging Face repository as org/name"),
        (Path("a/b"), "there is no folder a/b: check the path, or give a Hugging Face repository as org/name"),
        ("flux", "there is no folder flux here, and a Hugging Face repository is written org/name"),
        (
            "here/x",
            "there is no folder here/x, though here is there: check the path, or write here/x@main for the Hugging "
            "Face repository of that name",
        ),
        ("here/file.pt", "here/file.pt is a file: give the folder of a model in the diffusers layout"),
        (
            "~nobody-of-that-name/x",
            "cannot tell what ~nobody-of-that-name/x is: there is no user nobody-of-that-name here; "
            "write ./~nobody-of-that-name/x for a file called so",
        ),
        (
            "https://huggingface.co/org/name/tree/main",
            "https://huggingface.co/org/name/tree/main is an address: give the repository's name instead, as org/name",
        ),
        ("hf://a/b", "hf://a/b is an address: give the repository's name instead, as a/b"),
        (
            "org/na me",
            "'org/na me' is not a repository's name: write org/name, with letters, digits and single - _ . only",
        ),
        (
            "org/name@",
            "'' is not a revision: write org/name, or org/name@ and a branch, tag or commit",
        ),
        (
            "org/name@../../x",
            "'../../x' is not a revision: write org/name, or org/name@ and a branch, tag or commit",
        ),
    ],
)
def test_a_name_that_is_neither_folder_nor_repository(name, message, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "file.pt").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(DownloadError) as caught:
        resolve_model(name, PATTERNS)
    assert str(caught.value) == message.replace("HOME", str(tmp_path))


def test_a_name_too_long_for_a_path():
    with pytest.raises(DownloadError, match=r"^cannot look for x{299}…: File name too long$"):
        resolve_model("x" * 3000, PATTERNS)


def test_importing_loads_nothing_heavy():
    code = "import sys, mflux.hub; print([n for n in ('mlx.core', 'numpy', 'huggingface_hub') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


# Fetching.


def test_only_what_is_needed_is_fetched(hub, online, home):
    hub.add("org/needed")
    outcome = online.resolve("org/needed")
    assert outcome.error is None
    assert outcome.path.is_relative_to(home / "hub" / "models--org--needed" / "snapshots")
    assert outcome.fetched() == WANTED
    assert files_under(outcome.path) == WANTED
    assert {name: (outcome.path / name).read_bytes() for name in WANTED} == {n: model_files()[n] for n in WANTED}
    assert outcome.modules == []


def test_a_copy_that_is_up_to_date_costs_one_question(hub, online):
    hub.add("org/again")
    first = online.resolve("org/again")
    second = online.resolve("org/again")
    assert second.path == first.path
    assert second.requests == ["GET /api/models/org/again/revision/main"]
    assert second.stderr == ""


def test_a_newer_commit_is_fetched_and_unchanged_files_are_not(hub, online):
    repository = hub.add("org/newer")
    first = online.resolve("org/newer")
    repository.files[SHARDS[0]] = b"trained for longer"
    second = online.resolve("org/newer")
    assert second.fetched() == [SHARDS[0]]
    assert second.path != first.path
    assert (second.path / SHARDS[0]).read_bytes() == b"trained for longer"
    assert files_under(second.path) == WANTED


def test_files_that_are_asked_for_later_are_added(hub, online):
    hub.add("org/later")
    online.call("resolve_model", "org/later", ["vae/*"])
    assert online.resolve("org/later").fetched() == [name for name in WANTED if not name.startswith("vae/")]


def test_files_that_nothing_requires_are_fetched_as_well(hub, online, offline):
    hub.add("org/optional")
    path = online.resolve("org/optional").path
    (path / "model_index.json").resolve().unlink()
    assert offline.resolve("org/optional").path == path
    assert online.resolve("org/optional").fetched() == ["model_index.json"]


def test_a_revision(hub, online, offline):
    repository = hub.add("org/revisions", revisions={"refs/pr/1": {**model_files(), "vae/config.json": b'{"a": 1}'}})
    outcome = online.resolve("org/revisions@refs/pr/1")
    assert (outcome.path / "vae/config.json").read_bytes() == b'{"a": 1}'
    assert outcome.path.name == repository.at("refs/pr/1")[0]
    assert offline.resolve("org/revisions@refs/pr/1").path == outcome.path
    assert online.resolve(f"org/revisions@{outcome.path.name}").path == outcome.path


def test_the_token_is_sent(hub, start, tmp_path):
    hub.add("org/token")
    program = start(tmp_path, HF_TOKEN="hf_secret")
    assert program.resolve("org/token").path
    assert hub.tokens == {"Bearer hf_secret"}


@pytest.mark.parametrize(("silent", "bars"), [("0", True), ("1", False)])
def test_progress_goes_to_stderr_unless_switched_off(silent, bars, hub, start, tmp_path):
    hub.add("org/progress")
    outcome = start(tmp_path, HF_HUB_DISABLE_PROGRESS_BARS=silent).resolve("org/progress")
    # `call` has seen that stdout held the result and nothing else.
    assert outcome.path
    assert ("Fetching 7 files" in outcome.stderr) is bars
    assert bars or outcome.stderr == ""


# Without a network.


def test_offline_a_complete_copy_is_used_and_nothing_is_sent(hub, online, offline):
    hub.add("org/flight")
    path = online.resolve("org/flight").path
    outcome = offline.resolve("org/flight")
    assert (outcome.path, hub.log, outcome.stderr) == (path, [], "")


def test_offline_and_nothing_cached(hub, offline, home):
    hub.add("org/never")
    outcome = offline.resolve("org/never")
    assert outcome.error == (
        f"org/never is not in the cache {home}/hub, and HF_HUB_OFFLINE is set: unset it and run the same command again "
        "to fetch what is missing"
    )
    assert hub.log == []


@pytest.mark.parametrize(
    ("name", "gone", "lacks"),
    [
        ("shard", [SHARDS[1]], SHARDS[1]),
        ("shards", SHARDS, f"{SHARDS[0]}, {SHARDS[1]}"),
        ("config", ["transformer/config.json"], "transformer/config.json"),
        ("weights", ["vae/diffusion_pytorch_model.safetensors"], "vae/*.safetensors"),
    ],
)
def test_an_incomplete_copy(name, gone, lacks, hub, online, offline, unplugged, home, nobody_there):
    """Files whose content is gone, so that their links lead nowhere, are as good as absent."""
    hub.add(f"org/{name}")
    path = online.resolve(f"org/{name}").path
    for file in gone:
        (path / file).resolve().unlink()
    state = f"org/{name} in the cache {home}/hub lacks {lacks}"
    assert offline.resolve(f"org/{name}").error == (
        f"{state}, and HF_HUB_OFFLINE is set: unset it and run the same command again to fetch what is missing"
    )
    assert unplugged.resolve(f"org/{name}").error == (
        f"no connection to {nobody_there} (Connection refused), and {state}: check the network and run the same "
        "command again"
    )
    mended = online.resolve(f"org/{name}")
    assert mended.fetched() == sorted(gone)
    assert offline.resolve(f"org/{name}").path == mended.path == path


def test_an_index_of_a_variant_that_is_not_wanted_is_not_missed(hub, online, offline):
    fp16 = "transformer/diffusion_pytorch_model.fp16"
    index = {"weight_map": {"w": "diffusion_pytorch_model.fp16-00001-of-00001.safetensors"}}
    files = {
        **model_files(),
        f"{fp16}.safetensors.index.json": json.dumps(index).encode(),
        f"{fp16}-00001-of-00001.safetensors": b"half",
    }
    hub.add("org/variant", files)
    patterns = ["transformer/*.json", "transformer/diffusion_pytorch_model-*.safetensors"]
    path = online.call("resolve_model", "org/variant", patterns).path
    assert f"{fp16}.safetensors.index.json" in files_under(path)
    assert offline.call("resolve_model", "org/variant", patterns).path == path
    # Asked for, it is missed.
    assert offline.call("resolve_model", "org/variant", ["transformer/*"]).error.startswith(
        f"org/variant in the cache {path.parents[2]} lacks {fp16}-00001-of-00001.safetensors, and HF_HUB_OFFLINE"
    )


def test_a_reference_that_was_cut_off_leads_nowhere(hub, online, offline):
    hub.add("org/cut")
    path = online.resolve("org/cut").path
    (path.parents[1] / "refs" / "main").write_text("")
    everywhere = ["*.safetensors"]
    assert offline.call("resolve_model", "org/cut", everywhere).error.startswith("org/cut is not in the cache")


def test_no_network_and_nothing_cached(unplugged, home, nobody_there):
    outcome = unplugged.resolve("org/nothing")
    assert outcome.error == (
        f"no connection to {nobody_there} (Connection refused), and org/nothing is not in the cache {home}/hub: check "
        "the network and run the same command again"
    )


def test_no_network_and_a_complete_copy(hub, online, unplugged, nobody_there):
    hub.add("org/train")
    path = online.resolve("org/train").path
    outcome = unplugged.resolve("org/train")
    assert outcome.path == path
    assert outcome.stderr == (
        f"WARNING no connection to {nobody_there} (Connection refused); taking org/train from the cache, {path}\n"
    )


def test_a_network_that_swallows_everything_does_not_hold_the_command(start, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        program = start(tmp_path, HF_ENDPOINT=address, HF_HUB_ETAG_TIMEOUT="1")
        assert program.resolve("org/silence").error == (
            f"no connection to {address} (timed out), and org/silence is not in the cache {tmp_path}/hub: check the "
            "network and run the same command again"
        )


@pytest.mark.parametrize(
    ("name", "fault", "what"),
    [
        ("down", (503, {}), "HUB answered HTTP 503 for org/down"),
        ("closed", (401, {"X-Error-Code": "GatedRepo"}), "org/closed is gated"),
        (
            "removed",
            (404, {"X-Error-Code": "RepoNotFound"}),
            "there is no repository org/removed at HUB, or it is private",
        ),
    ],
)
def test_a_complete_copy_outlives_its_repository(name, fault, what, hub, online):
    repository = hub.add(f"org/{name}")
    path = online.resolve(f"org/{name}").path
    repository.faults["info"] = fault
    outcome = online.resolve(f"org/{name}")
    assert outcome.path == path
    what = what.replace("HUB", hub.address)
    assert outcome.stderr == f"WARNING {what}; taking org/{name} from the cache, {path}\n"


# Refusals.

GATED = f"org/REPO is gated: accept the licence at https://huggingface.co/org/REPO and {LOG_IN}"
GATED_FOR_TOKEN = (
    "org/REPO is gated and this token may not read it: accept the licence at https://huggingface.co/org/REPO and "
    f"{LOG_IN}, with the account that accepted it (a fine-grained token also needs the permission to read gated "
    "repositories)"
)


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (401, {"X-Error-Code": "GatedRepo"}, GATED),
        (403, {"X-Error-Code": "GatedRepo"}, GATED_FOR_TOKEN),
        (
            404,
            {"X-Error-Code": "RepoNotFound"},
            f"there is no repository org/REPO at HUB, or it is private: check the name, and for a private one {LOG_IN}",
        ),
        (
            404,
            {"X-Error-Code": "RevisionNotFound"},
            "org/REPO has no revision main: check it at https://huggingface.co/org/REPO/tree/main, or leave it out",
        ),
        (
            403,
            {"X-Error-Message": "Access to this resource is disabled."},
            "org/REPO has been disabled: see https://huggingface.co/org/REPO, or name another repository",
        ),
        (
            401,
            {"X-Error-Message": "Invalid credentials in Authorization header"},
            "HUB refuses the token that was sent (HTTP 401): log in anew with `hf auth login`, or correct or unset "
            "HF_TOKEN",
        ),
        (
            403,
            {"X-Error-Message": "Not for you"},
            "HUB answered HTTP 403 (Not for you) for org/REPO: give the token the permission to read it, or "
            f"{LOG_IN} with another account",
        ),
        (
            429,
            {},
            "HUB answered HTTP 429 for org/REPO: these are too many requests: wait a few minutes, or "
            f"{LOG_IN} for a higher limit",
        ),
        (
            500,
            {"X-Error-Message": "Oh"},
            "HUB answered HTTP 500 (Oh) for org/REPO: run the same command again in a while; files that are complete "
            "are kept",
        ),
    ],
)
def test_the_hub_refuses(status, headers, message, hub, online):
    name = f"refused-{status}-{len(message)}"
    hub.add(f"org/{name}", faults={"info": (status, headers)})
    outcome = online.resolve(f"org/{name}")
    assert outcome.error == message.replace("HUB", hub.address).replace("REPO", name)
    assert len(outcome.requests) == 1


@pytest.mark.parametrize("shows_files", [True, False])
@pytest.mark.parametrize(("status", "message"), [(401, GATED), (403, GATED_FOR_TOKEN)])
def test_a_gated_repository_that_shows_itself_but_not_its_files(status, message, shows_files, hub, online):
    """So huggingface.co does: whom it knows not may ask about the repository, with or without its list of files."""
    faults = {name: (status, {"X-Error-Code": "GatedRepo"}) for name in model_files()}
    name = f"gated-{status}-{shows_files}"
    hub.add(f"org/{name}", gated="manual", shows_files=shows_files, faults=faults)
    assert online.resolve(f"org/{name}").error == message.replace("REPO", name)


def test_a_missing_repository(online, hub):
    assert online.resolve("org/missing").error == (
        f"there is no repository org/missing at {hub.address}, or it is private: check the name, and for a private one "
        f"{LOG_IN}"
    )


def test_a_missing_revision(hub, online):
    hub.add("org/there")
    assert online.resolve("org/there@v9").error == (
        "org/there has no revision v9: check it at https://huggingface.co/org/there/tree/main, or leave it out"
    )


def test_a_repository_of_another_layout_is_refused_before_anything_is_fetched(hub, online):
    hub.add("org/other", {"README.md": b"", "model.gguf": b"weights"})
    outcome = online.resolve("org/other")
    assert outcome.error == (
        "org/other holds none of model_index.json, transformer/*.json, transformer/*.safetensors and 1 more: "
        + NOT_LAID_OUT
    )
    hub.add("org/half", {"model_index.json": b"{}", "transformer/config.json": b"{}"})
    outcome = online.resolve("org/half")
    assert outcome.error == f"org/half holds no vae/*.safetensors: {NOT_LAID_OUT}"
    assert outcome.requests == ["GET /api/models/org/half/revision/main"]


def test_a_repository_that_lacks_a_shard_of_its_own(hub, online):
    files = model_files()
    del files[SHARDS[1]]
    hub.add("org/lacks", files)
    assert online.resolve("org/lacks").error == (
        f"org/lacks is itself incomplete, it holds no {SHARDS[1]}: name another revision, as org/lacks@revision, or "
        "tell its owner at https://huggingface.co/org/lacks/discussions"
    )


def test_a_network_that_answers_for_hugging_face(hub, online, home):
    """As in a hotel, whose sign-in page stands before every address."""
    repository = hub.add("org/hotel", faults={"info": (200, {"Content-Type": "text/html"})})
    message = (
        f"{hub.address} does not answer like Hugging Face, and org/hotel is not in the cache {home}/hub: check "
        "HF_ENDPOINT, and whether the network wants a sign-in or a proxy"
    )
    assert online.resolve("org/hotel").error == message
    repository.faults.clear()
    assert online.resolve("org/hotel").path


# Downloads that break off.


def test_a_status_in_the_middle_of_a_download(hub, online):
    repository = hub.add("org/middle", faults={SHARDS[1]: (410, {})})
    assert online.resolve("org/middle").error == (
        f"{hub.address} answered HTTP 410 for org/middle: run the same command again in a while; files that are "
        "complete are kept"
    )
    repository.faults.clear()
    again = online.resolve("org/middle")
    assert files_under(again.path) == WANTED
    assert SHARDS[1] in again.fetched()


def test_a_file_that_comes_short(hub, online, offline):
    hub.add("org/short", cut_short=SHARDS[0])
    assert re.fullmatch(
        r"the download of org/short broke off \(Consistency check failed: .* size 11 .* size 10 .*\): run the same "
        "command again; files that are complete are kept",
        online.resolve("org/short").error,
    )
    assert SHARDS[0] in offline.resolve("org/short").error


def fail(error: str) -> str:
    """Code that makes huggingface_hub fail at the point where it writes a file."""
    return f"""
import collections, errno, shutil
import huggingface_hub.file_download
def http_get(*args, **keywords):
    raise {error}
huggingface_hub.file_download.http_get = http_get
shutil.disk_usage = lambda path: collections.namedtuple("Usage", "total used free")(0, 0, 12_345_000_000)
"""


@pytest.mark.parametrize(
    ("variable", "error", "message"),
    [
        (
            "HF_HOME",
            "OSError(errno.ENOSPC, 'No space left on device')",
            "the disk is full: 12.3 GB free for the cache CACHE, which is too little for org/disk: make room, or set "
            "VARIABLE to a folder on a larger disk and run the same command again",
        ),
        (
            "HF_HUB_CACHE",
            "RuntimeError('IO Error: No space left on device (os error 28)')",
            "the disk is full: 12.3 GB free for the cache CACHE, which is too little for org/disk: make room, or set "
            "VARIABLE to a folder on a larger disk and run the same command again",
        ),
        (
            "HF_HOME",
            "PermissionError(errno.EACCES, 'Permission denied')",
            "no permission to write to the cache CACHE (Permission denied): make it writable, or set VARIABLE to a "
            "folder of your own and run the same command again",
        ),
        (
            "HF_HOME",
            "OSError(errno.EIO, 'Input/output error')",
            "cannot use the cache CACHE (Input/output error): mend what is in the way, or set VARIABLE to another "
            "folder and run the same command again",
        ),
        (
            "HF_HOME",
            "ConnectionResetError(errno.ECONNRESET, 'Connection reset by peer')",
            "the download of org/disk broke off (Connection reset by peer): run the same command again; files that are "
            "complete are kept",
        ),
        (
            "HF_HOME",
            "RuntimeError('CAS service error: Connection reset by peer (os error 104)')",
            "the download of org/disk broke off (CAS service error: Connection reset by peer (os error 104)): run the "
            "same command again; files that are complete are kept",
        ),
    ],
)
def test_a_file_that_cannot_be_written(variable, error, message, hub, start, tmp_path):
    hub.add("org/disk")
    cache = tmp_path / "hub"
    program = start(tmp_path, **({"HF_HUB_CACHE": str(cache)} if variable == "HF_HUB_CACHE" else {}))
    outcome = program.resolve("org/disk", before=fail(error))
    assert outcome.error == message.replace("CACHE", str(cache), 1).replace("VARIABLE", variable)


def test_a_cache_that_is_a_file(hub, start, tmp_path):
    hub.add("org/file")
    (tmp_path / "hub").touch()
    outcome = start(tmp_path).resolve("org/file")
    assert re.fullmatch(
        rf"cannot use the cache {tmp_path}/hub \((Not a directory|File exists)\): mend what is in the way, or set "
        "HF_HOME to another folder and run the same command again",
        outcome.error,
    )


def test_a_bug_is_not_taken_for_a_failed_download(hub, start, tmp_path):
    hub.add("org/bug")
    before = fail("AttributeError('a bug')") + "mflux.hub.DownloadError = (mflux.hub.DownloadError, AttributeError)"
    assert start(tmp_path).resolve("org/bug", before=before).error == "a bug"


def test_a_token_that_cannot_be_read(start, tmp_path):
    outcome = start(tmp_path, HF_TOKEN_PATH=str(tmp_path)).resolve("org/any")
    assert outcome.error == (
        f"cannot read {tmp_path} (Is a directory): correct it, or the environment variable that leads to it"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"HF_TOKEN": "hf_ä"},
            "the Hugging Face token cannot be sent ('ä' does not belong there): log in anew with `hf auth login`, or "
            "correct HF_TOKEN",
        ),
        (
            {"HF_ENDPOINT": "huggingface.co"},
            "HF_ENDPOINT is 'huggingface.co', which is not an address: set it to one that starts with https://, or "
            "unset it",
        ),
        (
            {"HF_ENDPOINT": "http://127.0.0.1:99999"},
            "HF_ENDPOINT is 'http://127.0.0.1:99999', which is not an address: set it to one that starts with "
            "https://, or unset it",
        ),
    ],
)
def test_settings_that_make_no_sense(settings, message, start, tmp_path):
    assert start(tmp_path, **settings).resolve("org/any").error == message


NO_FOLDERS = ["HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN_PATH", "HF_XET_CACHE"]


@pytest.mark.parametrize("name", NO_FOLDERS)
def test_a_folder_of_somebody_unknown(name, start, tmp_path):
    assert start(tmp_path, **{name: "~nobody9/x"}).resolve("org/any").error == (
        f"{name} is ~nobody9/x, and no home folder of ~nobody9 is known: write the whole path"
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_ENDPOINT", "nonsense"),
        ("HF_ENDPOINT", "http://"),
        ("HF_ENDPOINT", "ftp://127.0.0.1/x"),
        ("HF_HUB_ETAG_TIMEOUT", "x"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "soon"),
    ],
)
def test_a_setting_that_makes_no_sense_and_a_complete_copy(name, value, hub, online, start, home):
    hub.add("org/set")
    folder = online.resolve("org/set").path
    outcome = start(home, **{name: value}).resolve("org/set")
    assert outcome.path == folder and outcome.stderr.count("\n") == 1
    assert f"{name} is {value.rstrip('/')!r}, which is no" in outcome.stderr.replace("not an address", "no address")


PIPES = ["refs/main", "trees/{commit}.json", ".no_exist/{commit}/x.json", "blobs/0.incomplete", "../CACHEDIR.TAG"]


@pytest.mark.parametrize("place", [*PIPES, "../.locks/models--org--piped/0.lock"])
@pytest.mark.parametrize("linked", [False, True])
def test_a_pipe_where_a_file_is_opened(place, linked, hub, start, tmp_path):
    repository = hub.add("org/piped")
    start(tmp_path).resolve("org/piped")
    commit, _ = repository.at("main")
    path = Path(os.path.normpath(tmp_path / "hub" / "models--org--piped" / place.format(commit=commit)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(tmp_path / "pipe" if linked else path)
    if linked:
        path.symlink_to(tmp_path / "pipe")
    for settings in ({}, {"HF_HUB_OFFLINE": "1"}):
        assert start(tmp_path, **settings).resolve("org/piped").error == (
            f"{path} is neither a file nor a folder, but a pipe or a device: remove it"
        )


# Single files.


def test_one_file(hub, online, offline):
    hub.add("org/loras", {"README.md": b"", "a.safetensors": b"a", "sub/b[1].safetensors": b"b"})
    outcome = online.call("fetch_file", "org/loras", "sub/b[1].safetensors")
    assert outcome.path.read_bytes() == b"b"
    assert outcome.fetched() == ["sub/b[1].safetensors"]
    assert online.call("fetch_file", "org/loras", "sub/b[1].safetensors").requests == [
        "GET /api/models/org/loras/revision/main"
    ]
    again = offline.call("fetch_file", "org/loras", "sub/b[1].safetensors")
    assert (again.path, again.requests) == (outcome.path, [])
    assert offline.call("fetch_file", "org/loras", "a.safetensors").error == (
        f"org/loras in the cache {offline.stderr.parent}/hub lacks a.safetensors, and HF_HUB_OFFLINE is set: unset it "
        "and run the same command again to fetch what is missing"
    )


def test_one_file_of_a_revision(hub, online):
    hub.add("org/old", {"a.safetensors": b"new"}, revisions={"v1": {"a.safetensors": b"old"}})
    assert online.call("fetch_file", "org/old", "a.safetensors").path.read_bytes() == b"new"
    assert online.call("fetch_file", "org/old", "a.safetensors", "v1").path.read_bytes() == b"old"
    assert online.call("fetch_file", "org/old@v1", "a.safetensors").path.read_bytes() == b"old"


def test_a_file_that_is_not_there(hub, online):
    hub.add("org/files", {"README.md": b"", **{f"{n}.safetensors": b"" for n in range(7)}})
    assert online.call("fetch_file", "org/files", "x.safetensors").error == (
        "org/files holds no file x.safetensors: it has 0.safetensors, 1.safetensors, 2.safetensors, 3.safetensors, "
        "4.safetensors and 2 more"
    )
    hub.add("org/empty", {})
    assert online.call("fetch_file", "org/empty", "x.safetensors").error == (
        "org/empty holds no file x.safetensors: it is empty"
    )


def test_the_only_file(hub, online, offline):
    files = {"README.md": b"r", "sub/a.safetensors": b"a", "adapter_config.json": b"{}", "other.json": b"{}"}
    hub.add("org/only", files)
    assert offline.call("fetch_only_file", "org/only", ".safetensors").error.startswith("org/only is not in the cache")
    outcome = online.call("fetch_only_file", "org/only", ".safetensors", beside="adapter_config.json")
    assert (outcome.path.read_bytes(), outcome.path.name) == (b"a", "a.safetensors")
    assert sorted(outcome.fetched()) == ["adapter_config.json", "sub/a.safetensors"]
    again = offline.call("fetch_only_file", "org/only", ".safetensors", beside="adapter_config.json")
    assert (again.path, again.requests) == (outcome.path, [])


def test_one_of_several_files_is_not_guessed(hub, online, offline):
    hub.add("org/several", {"a.safetensors": b"a", "b.safetensors": b"b"})
    outcome = online.call("fetch_only_file", "org/several", ".safetensors")
    told = (
        "org/several holds 2 .safetensors files: name one of them, as org/several:a.safetensors, "
        "org/several:b.safetensors"
    )
    assert (outcome.error, outcome.fetched()) == (told, [])
    # Both were fetched by their names, and the cache tells no more than the Hub.
    for name in ("a.safetensors", "b.safetensors"):
        online.call("fetch_file", "org/several", name)
    assert offline.call("fetch_only_file", "org/several", ".safetensors").error == told
    hub.add("org/none", {"README.md": b""})
    assert online.call("fetch_only_file", "org/none", ".safetensors").error == (
        "org/none holds no .safetensors file: name another repository"
    )


def test_one_file_fails_like_a_model(hub, online):
    hub.add("org/gated-file", {"a.safetensors": b""}, faults={"a.safetensors": (401, {"X-Error-Code": "GatedRepo"})})
    assert online.call("fetch_file", "org/gated-file", "a.safetensors").error == GATED.replace("REPO", "gated-file")
    assert online.call("fetch_file", "org/missing", "a.safetensors").error.startswith(
        f"there is no repository org/missing at {hub.address}"
    )


@pytest.mark.parametrize("filename", ["", "/etc/passwd", "folder/", ".."])
def test_a_file_name_that_names_no_file(filename):
    with pytest.raises(DownloadError) as caught:
        fetch_file("org/name", filename)
    assert str(caught.value) == f"{filename!r} does not name a file in org/name: give its path in the repository"
