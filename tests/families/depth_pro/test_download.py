"""The download of Depth Pro's weights against an HTTP server on this machine that can misbehave in chosen ways."""

from __future__ import annotations

import io
import re
import socket
import threading
import zipfile
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mflux.errors import DownloadError
from mflux.models.common.controls.depth_pro import download, weights
from mflux.models.common.controls.depth_pro.download import fetch_archive
from mflux.models.depth_pro.cli import save_depth

REMEDY = "name the file with --model"


def archive(seed: int = 0, size: int = 3_000_000) -> bytes:
    """A stored zip archive, as torch writes one."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as records:
        for name in ("data.pkl", "data/0", "data/1"):
            records.writestr(f"depth_pro/{name}", np.random.default_rng(seed).bytes(size // 3))
    return file.getvalue()


@dataclass
class Server:
    """What is served and how. `cut` closes each connection after so many bytes; `asked` gathers the Range headers."""

    body: bytes
    ranges: bool = True
    cut: int | None = None
    status: int | None = None
    lengths: bool = True
    asked: list[str | None] = field(default_factory=list)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server: Server = self.server.behaviour
        asked = self.headers.get("Range")
        server.asked.append(asked)
        if server.status:
            return self.send_error(server.status)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and server.ranges else 0
        total = len(server.body)
        if start >= total:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{total}")
            return self.end_headers()
        self.send_response(206 if asked and server.ranges else 200)
        if asked and server.ranges:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if server.lengths:
            self.send_header("Content-Length", str(total - start))
        self.end_headers()
        end = total if server.cut is None else start + server.cut
        self.wfile.write(server.body[start:end])
        return None


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "_PAUSE_S", 0.0)
    behaviour = Server(archive())
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.behaviour = behaviour
        behaviour.url = f"http://127.0.0.1:{http.server_address[1]}/models/depth_pro.pt"
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield behaviour
        http.shutdown()
        thread.join()


@pytest.fixture
def target(tmp_path):
    return tmp_path / "cache" / "depth_pro" / "depth_pro.pt"


def partial(target: Path) -> Path:
    return target.with_name("depth_pro.pt.partial")


def begin(target: Path, data: bytes, name: str = "depth_pro.pt.partial") -> None:
    target.parent.mkdir(parents=True)
    target.with_name(name).write_bytes(data)


def test_fetched_once_and_kept(server, target):
    assert fetch_archive(server.url, target, remedy=REMEDY) == target
    assert target.read_bytes() == server.body and not partial(target).exists()
    server.status = 500
    assert fetch_archive(server.url, target, remedy=REMEDY) == target
    assert server.asked == [None]


def test_carries_on_where_it_broke_off(server, target):
    begin(target, server.body[:1_234_567])
    fetch_archive(server.url, target, remedy=REMEDY)
    assert target.read_bytes() == server.body and server.asked == ["bytes=1234567-"]


def test_a_connection_that_keeps_breaking_is_taken_up_again(server, target):
    server.cut = 700_000
    fetch_archive(server.url, target, remedy=REMEDY)
    assert target.read_bytes() == server.body
    assert server.asked == [None, *(f"bytes={700_000 * i}-" for i in range(1, 5))]


def test_no_bytes_again_and_again_gives_up_and_keeps_what_came(server, target):
    begin(target, server.body[:2_000_000])
    server.cut = 0
    with pytest.raises(DownloadError, match=r"2 MB are kept and the same command carries on there.*--model"):
        fetch_archive(server.url, target, remedy=REMEDY)
    assert len(server.asked) == 3
    assert partial(target).read_bytes() == server.body[:2_000_000] and not target.exists()
    server.cut = None
    fetch_archive(server.url, target, remedy=REMEDY)
    assert target.read_bytes() == server.body and server.asked[-1] == "bytes=2000000-"


def test_server_without_ranges_starts_over(server, target):
    server.ranges = False
    begin(target, server.body[:1_000_000])
    fetch_archive(server.url, target, remedy=REMEDY)
    assert target.read_bytes() == server.body


@pytest.mark.parametrize("lengths", [True, False])
def test_length_unknown_or_not_the_archive_is_checked(server, target, lengths):
    server.lengths = lengths
    fetch_archive(server.url, target, remedy=REMEDY)
    assert target.read_bytes() == server.body


def test_cut_off_with_no_length_is_noticed(server, target):
    server.lengths, server.cut = False, 2_500_000
    with pytest.raises(DownloadError, match="is damaged"):
        fetch_archive(server.url, target, remedy=REMEDY)
    assert not target.exists() and not partial(target).exists()


def test_partial_that_is_already_complete(server, target):
    begin(target, server.body)
    fetch_archive(server.url, target, remedy=REMEDY)
    assert target.read_bytes() == server.body and server.asked == [f"bytes={len(server.body)}-"]


def test_partial_that_is_longer_than_the_file_starts_over(server, target):
    begin(target, server.body + b"more")
    fetch_archive(server.url, target, remedy=REMEDY)
    assert target.read_bytes() == server.body and server.asked == [f"bytes={len(server.body) + 4}-", None]


def test_a_file_that_mflux_024_left_half_done_is_carried_on(server, target):
    begin(target, server.body[:900_000], "depth_pro.pt")
    fetch_archive(server.url, target, remedy=REMEDY)
    assert target.read_bytes() == server.body and server.asked == ["bytes=900000-"]
    assert not partial(target).exists()


def test_something_else_under_the_final_name_is_left_alone(server, target):
    begin(target, b"my own notes", "depth_pro.pt")
    with pytest.raises(DownloadError, match="is not the archive that belongs there"):
        fetch_archive(server.url, target, remedy=REMEDY)
    assert target.read_bytes() == b"my own notes" and server.asked == []


def test_wrong_bytes_are_found_by_the_checksums_and_dropped(server, target):
    # The beginning of another file of the same length, such as an older release.
    begin(target, archive(seed=1)[:1_500_000])
    with pytest.raises(DownloadError, match=r"damaged: .*(checksum|not an archive)"):
        fetch_archive(server.url, target, remedy=REMEDY)
    assert not target.exists() and not partial(target).exists()
    fetch_archive(server.url, target, remedy=REMEDY)
    assert target.read_bytes() == server.body


def test_a_flipped_bit_is_found(server, target):
    body = bytearray(server.body)
    body[1_700_000] ^= 4
    server.body = bytes(body)
    with pytest.raises(DownloadError, match="checksum of its record depth_pro/data/"):
        fetch_archive(server.url, target, remedy=REMEDY)
    assert not target.exists()


def test_a_sign_in_page_is_not_kept(server, target):
    server.body = b"<html>please sign in</html>"
    with pytest.raises(DownloadError, match="sign-in"):
        fetch_archive(server.url, target, remedy=REMEDY)
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize(("status", "sentence"), [(404, "HTTP 404"), (403, "HTTP 403"), (503, "HTTP 503")])
def test_an_answer_that_says_no(server, target, status, sentence):
    server.status = status
    with pytest.raises(DownloadError, match=f"{sentence}.*{REMEDY}"):
        fetch_archive(server.url, target, remedy=REMEDY)
    assert list(target.parent.iterdir()) == []


def test_no_network(server, target):
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unheard.getsockname()[1]}/depth_pro.pt"
        with pytest.raises(DownloadError, match=f"no connection to 127.0.0.1 .*: check the network, or {REMEDY}"):
            fetch_archive(url, target, remedy=REMEDY)


def test_offline_asks_nobody(server, target, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
        fetch_archive(server.url, target, remedy=REMEDY)
    assert server.asked == [] and not target.parent.exists()


def test_no_room_is_said_before_a_byte_is_written(server, target, monkeypatch):
    free = download.shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: free)
    with pytest.raises(DownloadError, match=r"no room.*MFLUX_CACHE_DIR"):
        fetch_archive(server.url, target, remedy=REMEDY)
    assert list(target.parent.iterdir()) == []


def test_a_folder_that_cannot_be_made(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DownloadError, match="cannot write"):
        fetch_archive(server.url, tmp_path / "file" / "depth_pro.pt", remedy=REMEDY)


def test_two_at_once_fetch_once(server, target):
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(fetch_archive(server.url, target, remedy=REMEDY)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [target] * 4
    assert target.read_bytes() == server.body and len(server.asked) == 1


def test_the_default_is_apples_file_in_mflux_cache(server, tmp_path, monkeypatch, capsys):
    assert weights.APPLE_URL.endswith("cdn-apple.com/models/depth-pro/depth_pro.pt")
    monkeypatch.setattr(weights, "APPLE_URL", server.url)
    monkeypatch.setenv("MFLUX_CACHE_DIR", str(tmp_path / "chosen"))
    assert weights.locate() == tmp_path / "chosen" / "depth_pro" / "depth_pro.pt"
    assert weights.locate().read_bytes() == server.body and len(server.asked) == 1

    monkeypatch.setenv("MFLUX_CACHE_DIR", str(tmp_path / "empty"))
    server.status = 404
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    capsys.readouterr()
    assert save_depth.main(["--image-path", str(tmp_path / "photo.png")]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert "HTTP 404" in captured.err and "--model" in captured.err


def test_cache_folders_are_those_of_mflux_024(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MFLUX_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    assert weights.cache_folder() == tmp_path / ".cache" / "mflux"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert weights.cache_folder() == tmp_path / "xdg" / "mflux"
    monkeypatch.setattr("sys.platform", "darwin")
    assert weights.cache_folder() == tmp_path / "Library" / "Caches" / "mflux"
    monkeypatch.setenv("MFLUX_CACHE_DIR", str(tmp_path / "mine"))
    assert weights.cache_folder() == tmp_path / "mine"
