"""The download of Depth Pro's weights from servers that never come to an end, and over links that lead elsewhere."""

from __future__ import annotations

import io
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mflux.errors import DownloadError
from mflux.models.common.controls.depth_pro import download
from mflux.models.common.controls.depth_pro.download import fetch_archive

REMEDY = "name the file with --model"


def archive(method=zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as records:
        records.writestr("depth_pro/data.pkl", bytes(200_000))
    return file.getvalue()


@pytest.fixture
def serve(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "_PAUSE_S", 0.0)
    servers = []

    def begin(answer):
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                self.server.asked += 1
                answer(self)

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        server.asked = 0
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server, f"http://127.0.0.1:{server.server_port}/depth_pro.pt"

    yield begin
    for server in servers:
        server.shutdown()
        server.server_close()


def send(handler, body, status=200, **headers):
    handler.send_response(status)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    for name, value in ({"Content-Length": str(len(body))} | named).items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def test_cut_off_and_then_nothing_more(serve, tmp_path):
    def answer(handler):
        if handler.headers.get("Range"):
            send(handler, b"", 416)
        else:
            send(handler, archive()[:1000], Content_Length="200000")

    server, url = serve(answer)
    with pytest.raises(DownloadError, match="says each time that there is nothing after the 1,000 bytes"):
        fetch_archive(url, tmp_path / "depth_pro.pt", remedy=REMEDY)
    assert server.asked == 6


def test_one_byte_at_a_time(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_PATIENCE_S", 0.3)

    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "200000")
        handler.end_headers()
        while True:
            handler.wfile.write(b"x")
            time.sleep(0.02)

    server, url = serve(answer)
    with pytest.raises(DownloadError, match=r"less than 64 kB came in 0\.3 seconds"):
        fetch_archive(url, tmp_path / "depth_pro.pt", remedy=REMEDY)
    assert server.asked == 3


def test_headers_letter_by_letter(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_DEADLINE_S", 0.3)

    def answer(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        while True:
            handler.wfile.write(b"x")
            time.sleep(0.02)

    _, url = serve(answer)
    with pytest.raises(DownloadError, match=r"no whole answer came in 0\.3 seconds"):
        fetch_archive(url, tmp_path / "depth_pro.pt", remedy=REMEDY)


def test_a_byte_a_connection(serve, tmp_path, monkeypatch):
    """It goes forward each time, and would for years."""
    monkeypatch.setattr(download, "_PAUSE_S", 0.0)

    def answer(handler):
        start = int((handler.headers.get("Range") or "=0-")[6:-1] or 0)
        named = {"Content_Range": f"bytes {start}-199999/200000", "Content_Length": "200000"}
        send(handler, b"P", 206 if start else 200, **named)

    server, url = serve(answer)
    with pytest.raises(DownloadError, match="the connection closed early"):
        fetch_archive(url, tmp_path / "depth_pro.pt", remedy=REMEDY)
    assert server.asked == 20


def test_an_archive_without_end(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_LARGEST", 10**6)

    def answer(handler):
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        while True:
            handler.wfile.write(bytes(65536))

    _, url = serve(answer)
    with pytest.raises(DownloadError, match="does not end after 1 MB"):
        fetch_archive(url, tmp_path / "depth_pro.pt", remedy=REMEDY)


@pytest.mark.parametrize("length", ["9" * 5000, "²", "-5", "1e3"])
def test_lengths_that_are_none(serve, tmp_path, length):
    _, url = serve(lambda handler: send(handler, b"", 416, Content_Range=f"bytes */{length}"))
    (tmp_path / "depth_pro.pt.partial").write_bytes(b"PK")
    with pytest.raises(DownloadError):
        fetch_archive(url, tmp_path / "depth_pro.pt", remedy=REMEDY)


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_not_followed(serve, tmp_path, there):
    mine = tmp_path / "mine"
    if there:
        mine.write_bytes(b"mine")
    _, url = serve(lambda handler: send(handler, archive()))
    target = tmp_path / "cache" / "depth_pro.pt"
    target.parent.mkdir()
    (target.parent / "depth_pro.pt.partial").symlink_to(mine)
    assert fetch_archive(url, target, remedy=REMEDY).read_bytes() == archive()
    assert mine.exists() == there
    assert not there or mine.read_bytes() == b"mine"


def test_compressed_records_are_not_unpacked(serve, tmp_path):
    _, url = serve(lambda handler: send(handler, archive(zipfile.ZIP_DEFLATED)))
    with pytest.raises(DownloadError, match="its records are compressed"):
        fetch_archive(url, tmp_path / "depth_pro.pt", remedy=REMEDY)


def test_what_a_server_says_is_shown(serve, tmp_path):
    def answer(handler):
        handler.send_response(403, "\x1b[2J" + "x" * 5000)
        handler.end_headers()

    _, url = serve(answer)
    with pytest.raises(DownloadError) as caught:
        fetch_archive(url, tmp_path / "depth_pro.pt", remedy=REMEDY)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500
