"""HTTP: OpenAI's routes with its own client, jobs, and every way to be refused."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import openai
import PIL.Image
import pytest

from mflux.serve import Engine
from mflux.utils.metadata_reader import MetadataReader

from .conftest import PROMPT, Running, wait_for


def png(width: int = 64, height: int = 64, colour: str = "red", mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    PIL.Image.new(mode, (width, height), colour).save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def image_of(text: str) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(base64.b64decode(text)))


@pytest.fixture
def client(shared: Running):
    with shared.client() as client:
        yield client


# ---- OpenAI's client, unmodified


def test_the_client_generates(shared: Running):
    client = shared.openai()
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "mflux"
    found = client.images.generate(prompt=PROMPT, model="demo", n=2, size="64x96", extra_body={"seed": 4})
    assert (found.size, found.output_format, len(found.data)) == ("64x96", "png", 2)
    for number, one in enumerate(found.data):
        image = image_of(one.b64_json)
        assert (image.format, image.size) == ("PNG", (64, 96))
        settings = MetadataReader.read_exif_metadata(io.BytesIO(base64.b64decode(one.b64_json)))
        assert (settings["prompt"], settings["seed"]) == (PROMPT, 4 + number)


@pytest.mark.parametrize("model", ["gpt-image-1", "dall-e-3", "demo", None])
def test_what_clients_have_built_in(shared: Running, model):
    more = {} if model is None else {"model": model}
    found = shared.openai().images.generate(
        prompt=PROMPT, quality="auto", background="auto", moderation="auto", user="me", size="auto",
        output_format="jpeg", output_compression=30, response_format="b64_json", extra_body={"steps": 1}, **more,
    )  # fmt: skip
    assert image_of(found.data[0].b64_json).format == "JPEG"


def test_the_client_edits(shared: Running):
    client = shared.openai()
    upload = ("a.png", png(96, 64), "image/png")
    found = client.images.edit(image=upload, prompt=PROMPT, model="gpt-image-1", extra_body={"image_strength": 0.6})
    assert found.size == "96x64"
    # The same as a list, which is sent under another name.
    found = client.images.edit(image=[upload], prompt=PROMPT)
    assert found.size == "96x64"
    with pytest.raises(openai.BadRequestError) as error:
        client.images.edit(image=[upload, upload], prompt=PROMPT)
    assert (error.value.code, error.value.param) == ("unsupported", "image")
    with pytest.raises(openai.BadRequestError) as error:
        client.images.edit(image=upload, mask=upload, prompt=PROMPT)
    assert (error.value.code, error.value.param) == ("unsupported", "mask")


def test_the_client_streams(shared: Running):
    client = shared.openai()
    events = list(client.images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body={"seed": 4}))
    assert [event.type for event in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert image_of(events[0].b64_json).size[0] > 16
    assert image_of(events[2].b64_json).size == (128, 128)
    plain = client.images.generate(prompt=PROMPT, extra_body={"seed": 4})
    assert image_of(events[2].b64_json).tobytes() == image_of(plain.data[0].b64_json).tobytes()
    events = list(client.images.edit(image=("a.png", png(), "image/png"), prompt=PROMPT, stream=True))
    assert [event.type for event in events] == ["image_edit.completed"]


def test_an_error_in_a_stream_is_raised(engine, serve, pace):
    with serve(engine) as server:
        pace.failure = RuntimeError("broken")
        with pytest.raises(openai.APIError, match="the model failed"):
            list(server.openai().images.generate(prompt=PROMPT, stream=True))
        with pytest.raises(openai.InternalServerError) as error:
            server.openai(max_retries=2).images.generate(prompt=PROMPT)
        # It is not tried again.
        assert error.value.response.headers["x-should-retry"] == "false"
        assert len(engine.jobs) == 2


def test_an_address_in_place_of_the_image(shared: Running, client):
    found = shared.openai().images.generate(prompt=PROMPT, response_format="url", extra_body={"steps": 1})
    url = found.data[0].url
    assert url.startswith(f"{shared.url}/v1/images/files/")
    assert re.fullmatch(r"[0-9a-f]{32}\.png", url.rpartition("/")[2])
    answer = client.get(url)
    assert answer.headers["content-type"] == "image/png"
    assert PIL.Image.open(io.BytesIO(answer.content)).size == (128, 128)
    assert client.get(f"{shared.url}/v1/images/files/{'0' * 32}.png").status_code == 404


# ---- what a request may say


def test_both_spellings_and_images_in_json(client):
    body = {
        "prompt": PROMPT, "num_inference_steps": 2, "width": 64, "height": 64, "images": [data_url(png())],
        "image_strength": 0.0, "seed": 1,
    }  # fmt: skip
    assert client.post("/v1/images/generations", json=body).json()["size"] == "64x64"
    body = {"prompt": PROMPT, "images": [{"image_url": data_url(png())}], "image": None}
    assert client.post("/v1/images/edits", json=body).json()["size"] == "64x64"


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "prompt", "missing"),
        ({"prompt": ""}, "prompt", "missing"),
        ({"prompt": " \n"}, "prompt", "missing"),
        ({"prompt": 5}, "prompt", "invalid_value"),
        ({"prompt": "x" * 32_001}, "prompt", "invalid_value"),
        ({"prompt": "a\0b"}, "prompt", "invalid_value"),
        ({"prompt": "half \ud83d"}, "prompt", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 11}, "n", "invalid_value"),
        ({"n": "2"}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_value"),
        ({"size": "100x128"}, "size", "invalid_value"),
        ({"size": "0x0"}, "size", "invalid_value"),
        ({"size": "99999x16"}, "size", "invalid_value"),
        ({"size": "large"}, "size", "invalid_value"),
        ({"size": 128}, "size", "invalid_value"),
        ({"size": "64x64", "width": 128}, "size", "invalid_value"),
        ({"width": 64}, "height", "missing"),
        ({"width": 64.5, "height": 64}, "width", "invalid_value"),
        ({"steps": 0}, "steps", "invalid_value"),
        ({"steps": "many"}, "steps", "invalid_value"),
        ({"steps": 4, "num_inference_steps": 5}, "num_inference_steps", "invalid_value"),
        ({"seed": -1}, "seed", "invalid_value"),
        ({"seed": 2**64}, "seed", "invalid_value"),
        ({"seed": 1.5}, "seed", "invalid_value"),
        ({"guidance": 4}, "guidance", "unsupported"),
        ({"negative_prompt": "blur"}, "negative_prompt", "unsupported"),
        ({"image_strength": 0.5}, "image_strength", "unsupported"),
        ({"scheduler": "os.path.Join"}, "scheduler", "invalid_value"),
        ({"scheduler": "nope"}, "scheduler", "invalid_value"),
        ({"background": "transparent"}, "background", "unsupported"),
        ({"output_format": "gif"}, "output_format", "invalid_value"),
        ({"output_format": "svg"}, "output_format", "invalid_value"),
        ({"output_compression": 101}, "output_compression", "invalid_value"),
        ({"response_format": "file"}, "response_format", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_value"),
        ({"stream": True, "partial_images": 4}, "partial_images", "invalid_value"),
        ({"partial_images": 1}, "partial_images", "invalid_value"),
        ({"previews": 2}, "previews", "unsupported"),
        ({"loras": "x"}, "loras", "invalid_value"),
        ({"loras": ["x"]}, "loras", "invalid_value"),
        ({"loras": [{"name": "/etc/passwd"}]}, "loras", "invalid_value"),
        ({"loras": [{"name": "org/name"}]}, "loras", "invalid_value"),
        ({"lora_paths": ["/etc/passwd"]}, "lora_paths", "unknown_field"),
        ({"image_path": "/etc/passwd"}, "image_path", "unknown_field"),
        ({"output": "/etc/passwd"}, "output", "unknown_field"),
        ({"model_path": "/etc"}, "model_path", "unknown_field"),
        ({"quantize": 4}, "quantize", "unknown_field"),
        ({"prompt_file": "/etc/passwd"}, "prompt_file", "unknown_field"),
        ({"nonsense": 1}, "nonsense", "unknown_field"),
        ({"images": ["https://example.org/a.png"]}, "image", "url_not_allowed"),
        ({"images": ["file:///etc/passwd"]}, "image", "url_not_allowed"),
        ({"images": ["/etc/passwd"]}, "image", "invalid_image"),
        ({"images": ["data:image/png;base64,%%%"]}, "image", "invalid_image"),
        ({"images": [data_url(b"no image")]}, "image", "invalid_image"),
        ({"images": [data_url(png()[:100])]}, "image", "invalid_image"),
        ({"images": [data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>")]}, "image", "invalid_image"),
        ({"images": [data_url(b"%!PS-Adobe-3.0 EPSF-3.0")]}, "image", "invalid_image"),
        ({"images": [data_url(png(1, 1))]}, "image", "invalid_image"),
        ({"images": [5]}, "image", "invalid_image"),
        ({"images": [data_url(png())] * 17}, "image", "invalid_value"),
        ({"mask": data_url(png())}, "mask", "unsupported"),
    ],
)
def test_a_request_that_makes_no_sense(client, shared: Running, body, param, code):
    before = len(shared.engine.jobs)
    # As bytes, whatever the client would rather not send.
    content = json.dumps({"prompt": PROMPT, **body} if body else {})
    headers = {"content-type": "application/json"}
    answer = client.post("/v1/images/generations", content=content, headers=headers)
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"].startswith("req_")
    assert "\n" not in error["message"]
    assert "Traceback" not in error["message"]
    assert len(shared.engine.jobs) == before


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"x"', b'{"prompt": "a", "prompt": "b"}', b'{"n": NaN}', b"\xff\xfe", b"[" * 5000, b"null"],
)
def test_a_body_that_is_no_json(client, body):
    answer = client.post("/v1/images/generations", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


def test_forms_that_are_none(client):
    for content, kind in (
        (b"x", "multipart/form-data"),
        (b"x", "multipart/form-data; boundary=abc"),
        (b"--abc\r\nnonsense\r\n", "multipart/form-data; boundary=abc"),
    ):
        answer = client.post("/v1/images/edits", content=content, headers={"content-type": kind})
        assert answer.status_code == 400, answer.text
    many = {f"field{number}": "x" for number in range(100)}
    answer = client.post("/v1/images/edits", data=many, files={"image": png()})
    assert answer.status_code == 400
    answer = client.post("/v1/images/edits", data={"prompt": "x"}, files={"photo": png()})
    assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == ("unknown_field", "photo")
    answer = client.post("/v1/images/edits", data={"prompt": PROMPT, "n": "1"})
    assert answer.status_code == 415
    answer = client.post("/v1/images/edits", files={"prompt": (None, PROMPT)})
    assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == ("missing", "image")


def test_other_types_other_methods_other_paths(client):
    answer = client.post("/v1/images/generations", content=b'{"prompt": "x"}', headers={"content-type": "text/plain"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
    answer = client.get("/v1/images/generations")
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    assert set(client.put("/v1/jobs").headers["allow"].split(", ")) == {"GET", "HEAD", "POST"}
    for path in ("/v1", "/v1/images/variations", "/v1/models/", "/page/../app.py", "/page/%2e%2e/app.py", "/docs"):
        answer = client.post(path) if "variations" in path else client.get(path)
        assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error"), path
    answer = client.post("/v1/images/generations", json={"prompt": "x", "model": "schnell"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "demo" in error["message"]
    for method, path in (("GET", "/v1/jobs/nope"), ("DELETE", "/v1/jobs/nope"), ("GET", "/v1/jobs/nope/events")):
        answer = client.request(method, path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "job_not_found")


def test_pixels_are_counted_before_one_is_decoded(engine, serve):
    # A small file of many pixels.
    large = png(5000, 5000)
    with serve(engine, most_pixels=10**6) as server, server.client() as client:
        for name in ("/v1/images/generations", "/v1/jobs"):
            answer = client.post(name, json={"prompt": "x", "images": [data_url(large)]})
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "too_many_pixels")


# ---- jobs


def events_of(client, path: str) -> list[tuple[str, dict]]:
    found = []
    with client.stream("GET", path) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store"
        name = ""
        for line in answer.iter_lines():
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                found.append((name, json.loads(line[6:])))
    return found


def test_a_job_from_its_beginning_to_its_end(client):
    answer = client.post("/v1/jobs", json={"prompt": PROMPT, "seed": 4, "n": 2, "previews": 4})
    job = answer.json()
    assert (answer.status_code, job["object"], job["model"], job["n"]) == (202, "image.job", "demo", 2)
    assert re.fullmatch(r"job_[0-9a-f]{32}", job["id"])
    events = events_of(client, f"/v1/jobs/{job['id']}/events")
    assert events[0][0] in ("job", "preview")
    assert (events[-1][0], events[-1][1]["status"], events[-1][1]["progress"]) == ("end", "done", 1)
    assert {name for name, _ in events} <= {"job", "preview", "end"}
    for name, data in events:
        if name == "preview":
            assert image_of(data["b64_json"]).size == (data["width"], data["height"])
    found = client.get(f"/v1/jobs/{job['id']}").json()
    assert found == events[-1][1]
    assert [(one["seed"], one["size"]) for one in found["images"]] == [(4, "128x128"), (5, "128x128")]
    assert (found["position"], found["eta_seconds"], found["error"]) == (None, None, None)
    answer = client.get(found["images"][1]["url"])
    assert answer.headers["content-disposition"] == 'inline; filename="mflux-5.png"'
    assert "immutable" in answer.headers["cache-control"]
    assert PIL.Image.open(io.BytesIO(answer.content)).size == (128, 128)
    assert client.get(f"/v1/jobs/{job['id']}/images/2").status_code == 404
    assert client.get("/v1/jobs").json()["data"][0]["id"] == job["id"]
    # Who comes back gets the present state.
    assert [name for name, _ in events_of(client, f"/v1/jobs/{job['id']}/events")] == ["end"]
    # Its images are forgotten, once.
    assert client.delete(f"/v1/jobs/{job['id']}").status_code == 200
    assert client.delete(f"/v1/jobs/{job['id']}").status_code == 404


def test_a_job_is_cancelled(engine, serve, pace):
    pace.seconds = 0.1
    with serve(engine) as server, server.client() as client:
        first, second = (client.post("/v1/jobs", json={"prompt": "x", "steps": 100}).json() for _ in range(2))
        wait_for(lambda: client.get(f"/v1/jobs/{first['id']}").json()["step"] > 0)
        assert client.get(f"/v1/jobs/{second['id']}").json()["position"] == 1
        for job in (second, first):
            answer = client.delete(f"/v1/jobs/{job['id']}")
            assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
        assert client.post("/v1/jobs", json={"prompt": "x", "stream": True}).json()["error"]["param"] == "stream"


def test_who_waits_is_told_that_somebody_cancelled(engine, serve, pace):
    pace.seconds = 0.1
    with serve(engine) as server, server.client() as client:
        found = []
        thread = threading.Thread(
            target=lambda: found.append(server.client().post("/v1/images/generations", json={"prompt": "x"}))
        )
        thread.start()
        job = wait_for(lambda: client.get("/v1/jobs").json()["data"])[0]
        client.delete(f"/v1/jobs/{job['id']}")
        thread.join(20)
        error = found[0].json()["error"]
        assert (found[0].status_code, error["type"], error["code"]) == (410, "cancelled_error", "cancelled")


def test_the_settings_of_an_image(client):
    job = client.post("/v1/images/generations", json={"prompt": PROMPT, "seed": 4, "steps": 2}).json()
    data = base64.b64decode(job["data"][0]["b64_json"])
    answer = client.post("/v1/settings", content=data, headers={"content-type": "image/png"})
    assert answer.json()["settings"]["seed"] == 4
    assert client.post("/v1/settings", content=png()).status_code == 400
    assert client.post("/v1/settings", content=b"").json()["error"]["code"] == "invalid_image"


# ---- the queue, and clients that leave


def test_a_full_queue(serve, pace):
    pace.seconds = 0.2
    with Engine(["demo"], queue=1) as engine, serve(engine) as server, server.client() as client:
        first = client.post("/v1/jobs", json={"prompt": "x", "steps": 50}).json()
        wait_for(lambda: client.get(f"/v1/jobs/{first['id']}").json()["status"] == "drawing")
        assert client.post("/v1/jobs", json={"prompt": "x"}).status_code == 202
        answer = client.post("/v1/images/generations", json={"prompt": "x"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        with pytest.raises(openai.RateLimitError):
            server.openai().images.generate(prompt="x")
        assert client.get("/health").json()["queue"] == {"waiting": 1, "running": 1, "limit": 1}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_jobs(engine, serve, pace, stream):
    pace.seconds = 0.1
    with serve(engine) as server:
        body = json.dumps({"prompt": "x", "steps": 200, "stream": stream}).encode()
        head = (
            "POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        connections = []
        for _ in range(2):
            connection = socket.create_connection(("127.0.0.1", server.port))
            connection.sendall(head.encode() + body)
            connections.append(connection)
            wait_for(lambda: len(engine.jobs) == len(connections))
        running, waiting = engine.jobs[::-1]
        wait_for(lambda: running.status == "drawing")
        connections[1].close()
        wait_for(lambda: waiting.status == "cancelled")
        assert running.status == "drawing"
        connections[0].close()
        wait_for(lambda: running.status == "cancelled")
        # A job of its own outlives its client.
        with server.client() as client:
            job = client.post("/v1/jobs", json={"prompt": "x", "steps": 2}).json()
        wait_for(lambda: engine.job(job["id"]).status == "done")


# ---- who may ask


@pytest.mark.parametrize("host", ["example.org", "127.0.0.1.example.org", "", "localhost.", "127.0.0.1@example.org"])
def test_another_name_than_ours(client, host):
    for path in ("/health", "/", "/v1/models", "/sdapi/v1/interrupt"):
        answer = client.get(path, headers={"host": host})
        assert answer.status_code in (400, 403)
        if answer.status_code == 403:
            assert answer.json()["error"]["code"] == "host_not_allowed"


def test_names_that_are_ours(shared: Running, client):
    for host in ("127.0.0.1", f"localhost:{shared.port}", "[::1]:80", "host.docker.internal:7860", "LOCALHOST"):
        assert client.get("/health", headers={"host": host}).status_code == 200


def test_pages_of_others(shared: Running, client):
    for headers in (
        {"origin": "https://example.org"},
        {"origin": "null"},
        {"origin": "file://"},
        {"origin": "http://["},
        {"origin": f"http://127.0.0.1:{shared.port + 1}"},
        {"sec-fetch-site": "cross-site"},
    ):
        for method, path in (("GET", "/v1/jobs"), ("POST", "/sdapi/v1/interrupt"), ("GET", "/health")):
            answer = client.request(method, path, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin_not_allowed")
            assert "access-control-allow-origin" not in answer.headers
    # A link to the page from anywhere, and our own page.
    assert client.get("/", headers={"sec-fetch-site": "cross-site"}).status_code == 200
    assert client.get("/v1/jobs", headers={"origin": shared.url, "sec-fetch-site": "same-origin"}).status_code == 200


def test_pages_that_may_ask(engine, serve):
    with serve(engine, origins={"https://example.org"}) as server, server.client() as client:
        headers = {"origin": "https://example.org", "sec-fetch-site": "cross-site"}
        answer = client.get("/v1/models", headers=headers)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://example.org")
        answer = client.options("/v1/jobs", headers=headers)
        assert (answer.status_code, answer.headers["access-control-allow-headers"]) == (
            204,
            "authorization, content-type",
        )


def test_a_key(engine, serve):
    with serve(engine, key="secret") as server, server.client() as client:
        began = time.monotonic()
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Bearer"},
            {"authorization": "secret"},
            {"authorization": "Token secret"},
            {"authorization": "Basic " + base64.b64encode(b"x:secret").decode()},
            {"authorization": "Bearer sécret".encode("latin-1")},
        ):
            answer = client.get("/v1/models", headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
        assert time.monotonic() - began > 1
        assert client.get("/v1/models", headers={"authorization": "bearer secret"}).status_code == 200
        basic = {"authorization": "Basic " + base64.b64encode(b"x:secret").decode()}
        assert client.get("/sdapi/v1/options", headers=basic).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            server.openai().models.list()
        openai_client = server.openai(api_key="secret")
        assert openai_client.models.list().data
        # Open without one: the page, whether it lives, and files whose names are the permission.
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/").status_code == client.get("/page/style.css").status_code == 200
        url = openai_client.images.generate(prompt="x", response_format="url", extra_body={"steps": 1}).data[0].url
        assert client.get(url).status_code == 200
        assert client.get("/metrics").status_code == 401


# ---- limits


def test_a_body_that_is_too_large(engine, serve):
    with serve(engine, most_bytes=100_000) as server, server.client() as client:
        large = b'{"prompt": "' + b"x" * 200_000 + b'"}'
        kind = {"content-type": "application/json"}
        answer = client.post("/v1/images/generations", content=large, headers=kind)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")

        def in_parts():
            for _ in range(50):
                yield b"x" * 10_000

        # The same without a length; the connection may be closed before all was sent.
        import httpx2

        try:
            answer = client.post("/v1/images/generations", content=in_parts(), headers=kind)
        except httpx2.TransportError:
            answer = None
        assert answer is None or (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        assert client.get("/health").status_code == 200


def test_a_body_that_does_not_come(engine, serve):
    with serve(engine, body_seconds=0.3) as server:
        with closing(socket.create_connection(("127.0.0.1", server.port), timeout=10)) as connection:
            connection.sendall(
                b"POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                b"Content-Length: 1000\r\n\r\n{"
            )
            answer = b""
            while part := connection.recv(10_000):
                answer += part
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"x-should-retry: false" in answer
        assert b"body_timeout" in answer


def test_a_head_that_does_not_come(engine, serve):
    with serve(engine, head_seconds=0.3) as server:
        for begun in (b"", b"GET / HTTP/1.1\r\nHo"):
            with closing(socket.create_connection(("127.0.0.1", server.port), timeout=10)) as connection:
                if begun:
                    connection.sendall(begun)
                while connection.recv(10_000):
                    pass
        # One that only takes its time over the next request is left alone.
        with server.client() as client:
            assert client.get("/health").status_code == 200


def test_nonsense_on_the_line(engine, serve, caplog):
    with serve(engine) as server:
        for garbage in (
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"GET / HTTP/9.9\r\n\r\n",
            b"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n"
            b"Content-Type: application/json\r\n\r\nnonsense\r\n\r\n",
            b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
            b"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: 50\r\n\r\n{",
            b"GET /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        ):
            with closing(socket.create_connection(("127.0.0.1", server.port), timeout=10)) as connection:
                connection.sendall(garbage)
                connection.shutdown(socket.SHUT_WR)
                answer = b""
                while part := connection.recv(10_000):
                    answer += part
            if not garbage.startswith((b"POST", b"GET /v1")):
                # In the form of all errors.
                head, _, body = answer.partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 4")
                assert {"message", "type", "param", "code"} == json.loads(body)["error"].keys()
        with server.client() as client:
            assert client.get("/health").status_code == 200
            assert client.get("/v1/jobs").json()["data"] == []
    assert "Traceback" not in caplog.text


def test_more_connections_than_are_kept(engine, serve):
    """Those that have waited longest without a head go; who asks is answered, and what is left is bounded."""
    with serve(engine, most_connections=20) as server, closing_all() as connections:
        for number in range(100):
            connections.append(socket.create_connection(("127.0.0.1", server.port), timeout=10))
            if number % 2:
                connections[-1].sendall(b"GET /health HTTP/1.1\r\nHo")
            if number % 33 == 32:
                with server.client() as client:
                    assert client.get("/health").status_code == 200
        gone = 0
        for connection in connections:
            connection.settimeout(0.01)
            try:
                gone += connection.recv(1) == b""
            except TimeoutError:
                pass
            except ConnectionError:
                gone += 1
        assert 80 <= gone < 100
        with server.client() as client:
            assert client.post("/v1/images/generations", json={"prompt": "x", "steps": 1}).status_code == 200


def test_a_full_disk_loses_no_image(engine, serve, monkeypatch, tmp_path, caplog):
    engine.output = tmp_path

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mflux.utils.atomic_files.Temporary", full)
    with serve(engine) as server, server.client() as client:
        found = client.post("/v1/images/generations", json={"prompt": "x", "steps": 1, "n": 2, "seed": 1})
        job = client.post("/v1/jobs", json={"prompt": "x", "steps": 1, "seed": 1}).json()
        wait_for(lambda: client.get(f"/v1/jobs/{job['id']}").json()["status"] == "done")
        contents = [base64.b64decode(one["b64_json"]) for one in found.json()["data"]]
        image = client.get(f"/v1/jobs/{job['id']}/images/0").content
    assert found.status_code == 200
    sizes = [PIL.Image.open(io.BytesIO(data)).size for data in (*contents, image)]
    assert sizes == [(128, 128)] * 3
    assert list(tmp_path.iterdir()) == []
    told = [record.getMessage() for record in caplog.records if "No space left on device" in record.getMessage()]
    assert len(told) == 3 and all("cannot write" in line for line in told)


@contextmanager
def closing_all() -> Iterator[list[socket.socket]]:
    connections: list[socket.socket] = []
    try:
        yield connections
    finally:
        for connection in connections:
            connection.close()


def test_too_many_at_once(engine, serve, pace, monkeypatch):
    monkeypatch.setattr("mflux.serve.guard.MOST_REQUESTS", 2)
    pace.seconds = 0.2
    with serve(engine) as server, server.client() as client:
        job = client.post("/v1/jobs", json={"prompt": "x", "steps": 50}).json()
        path = f"/v1/jobs/{job['id']}/events"
        with server.client() as one, server.client() as two, one.stream("GET", path), two.stream("GET", path):
            answer = client.get("/health")
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "too_many_connections")
            assert answer.headers["retry-after"] == "1"
        engine.cancel(engine.jobs[0])
        wait_for(lambda: client.get("/health").status_code == 200)


def test_two_hundred_requests_from_twenty_threads(engine, serve):
    """Malformed, broken off and good ones: nothing is lost, and the server stands."""
    answers: list[int] = []

    def ask(number: int) -> None:
        with server.client() as client:
            for turn in range(10):
                kind = (number + turn) % 4
                if kind == 0:
                    answers.append(client.post("/v1/images/generations", json={"prompt": "x", "steps": 1}).status_code)
                elif kind == 1:
                    answers.append(client.post("/v1/images/generations", json={"nonsense": 1}).status_code)
                elif kind == 2:
                    with socket.create_connection(("127.0.0.1", server.port)) as connection:
                        connection.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\n{")
                else:
                    answers.append(client.get("/v1/jobs").status_code)

    with serve(engine) as server:
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        with server.client() as client:
            assert client.get("/health").json()["queue"]["waiting"] == 0
    assert len(answers) == 150
    assert set(answers) <= {200, 400, 429}
    assert answers.count(200) >= 60


# ---- the server itself


def test_models(client, shared: Running):
    found = client.get("/v1/models").json()["data"][0]
    assert found["mflux"] == {
        "loaded": "demo" in shared.engine.loaded(), "default": True, "command": "mflux-generate", "size": "128x128",
        "steps": 8, "guidance": None, "negative_prompt": False, "lora": True, "images": [0, 1], "mask": False,
        "strength": True,
    }  # fmt: skip
    assert client.post("/v1/models/demo/load").json()["mflux"]["loaded"] is True
    assert client.post("/v1/models/demo/unload").json()["mflux"]["loaded"] is False
    assert client.get("/v1/models/org/name").json()["error"]["code"] == "model_not_found"


def test_numbers_for_prometheus(engine, serve):
    from prometheus_client.parser import text_string_to_metric_families

    with serve(engine) as server, server.client() as client:
        client.post("/v1/images/generations", json={"prompt": PROMPT, "steps": 3, "n": 2})
        client.get("/v1/nonsense")
        answer = client.get("/metrics")
        families = {family.name: family.samples for family in text_string_to_metric_families(answer.text)}
        counts = {(one.labels["route"], one.labels["status"]): one.value for one in families["mflux_requests"]}
        assert counts["/v1/images/generations", "200"] == 1
        assert counts["other", "404"] == 1
        assert next(one.value for one in families["mflux_pictures"] if one.name.endswith("_total")) == 2
        stages = families["mflux_stage_seconds"]
        steps = {one.labels["stage"]: one.value for one in stages if one.name.endswith("_count")}
        assert (steps["step"], steps["decode"], steps["wait"], steps["load"]) == (6, 2, 1, 1)
        assert next(one.value for one in families["mflux_model_bytes"]) > 1e6
        assert next(one.value for one in families["mflux_queue_jobs"]) == 0


def test_what_browsers_may_do(client):
    answer = client.get("/")
    assert "script-src 'self'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    for path in ("/", "/v1/models", "/nothing"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "server" not in headers


def test_a_line_for_each_request_and_no_secrets(engine, serve, caplog):
    caplog.set_level("INFO", "mflux")
    with serve(engine, key="the-secret") as server, server.client() as client:
        headers = {"authorization": "Bearer the-secret"}
        body = {"prompt": "a private matter", "steps": 2}
        client.post("/v1/images/generations?x=the-secret", json=body, headers=headers)
        client.get("/a%0A%1b[31mb", headers=headers)
    lines = [record.getMessage() for record in caplog.records if record.name == "mflux.serve.guard"]
    assert re.fullmatch(r"POST /v1/images/generations 200 \d+ ms job_[0-9a-f]{32} demo 128x128 2 steps", lines[0])
    assert lines[1].startswith("GET /a\\n\\x1b[31mb 404")
    assert "private" not in caplog.text
    assert "secret" not in caplog.text
    with serve(engine, log_prompts=True) as server, server.client() as client:
        client.post("/v1/images/generations", json={"prompt": "a public matter", "steps": 1})
    assert "a public matter" in caplog.text


def test_without_a_page_and_without_the_webuis_routes(engine, serve):
    with serve(engine, page=False, sdapi=False) as server, server.client() as client:
        assert client.get("/").status_code == 404
        assert client.get("/sdapi/v1/options").status_code == 404


def test_stopping(engine, serve, pace):
    pace.seconds = 0.1
    with serve(engine) as server, server.client() as client:
        job = client.post("/v1/jobs", json={"prompt": "x", "steps": 100}).json()
        wait_for(lambda: engine.job(job["id"]).step > 0)
        found = []
        follower = threading.Thread(
            target=lambda: found.extend(events_of(server.client(), f"/v1/jobs/{job['id']}/events"))
        )
        follower.start()
        wait_for(lambda: engine.job(job["id"])._watchers)
        closing_thread = threading.Thread(target=engine.close, args=(0.5,))
        closing_thread.start()
        wait_for(lambda: engine.is_stopping)
        answer = client.get("/health")
        assert (answer.status_code, answer.json()) == (503, {"status": "stopping"})
        answer = client.post("/v1/jobs", json={"prompt": "x"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "stopping")
        assert "retry-after" in answer.headers
        follower.join(20)
        assert (found[-1][0], found[-1][1]["status"]) == ("end", "cancelled")
        closing_thread.join(20)
