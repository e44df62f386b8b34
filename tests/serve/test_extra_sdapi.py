"""AUTOMATIC1111's routes: what clients send, as they send it, and what they read of the answers."""

from __future__ import annotations

import base64
import io
import json
import threading

import PIL.Image
import pytest

from .conftest import PROMPT, Running, wait_for


@pytest.fixture
def client(shared: Running):
    with shared.client() as client:
        yield client


def image_of(text: str) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(base64.b64decode(text)))


# Open WebUI's image engine "automatic1111".
OPEN_WEBUI = {
    "prompt": PROMPT, "batch_size": 2, "width": 128, "height": 96, "steps": 4, "negative_prompt": "blurry",
    "cfg_scale": 7.0, "sampler_name": "Euler", "scheduler": "Karras",
}  # fmt: skip

# SillyTavern's source "Stable Diffusion Web UI", with everything that its extension sets.
SILLY_TAVERN = {
    "prompt": PROMPT, "negative_prompt": "lowres, bad anatomy", "sampler_name": "DPM++ 2M Karras",
    "scheduler": "Automatic", "steps": 3, "cfg_scale": 7, "width": 100, "height": 120, "restore_faces": False,
    "enable_hr": True, "hr_upscaler": "Latent", "hr_scale": 2, "hr_additional_modules": [], "denoising_strength": 0.7,
    "hr_second_pass_steps": 0, "seed": -1, "override_settings": {"CLIP_stop_at_last_layers": 1, "sd_vae": "Automatic"},
    "override_settings_restore_afterwards": True, "clip_skip": 1, "save_images": True, "send_images": True,
    "do_not_save_grid": False, "do_not_save_samples": False, "alwayson_scripts": {"ADetailer": {"args": [True]}},
}  # fmt: skip

# LibreChat's tool "stable-diffusion".
LIBRE_CHAT = {
    "prompt": PROMPT, "negative_prompt": "text", "cfg_scale": 4.5, "steps": 2, "width": 64, "height": 64,
    "sampler_index": "DPM++ 2M Karras", "sampler_name": "DPM++ 2M Karras",
}  # fmt: skip


def test_open_webui(client):
    assert [one["title"] for one in client.get("/sdapi/v1/sd-models").json()] == ["demo"]
    options = client.get("/sdapi/v1/options").json()
    # It sends all back that it got.
    options["sd_model_checkpoint"] = "demo"
    assert client.post("/sdapi/v1/options", json=options).status_code == 200
    answer = client.post("/sdapi/v1/txt2img", json=OPEN_WEBUI).json()
    assert [image_of(one).size for one in answer["images"]] == [(128, 96)] * 2
    assert json.loads(answer["info"])["all_seeds"][1] - json.loads(answer["info"])["seed"] == 1


def test_silly_tavern(client):
    for name in ("samplers", "schedulers", "sd-models"):
        assert client.get(f"/sdapi/v1/{name}").json()
    for name in ("upscalers", "latent-upscale-modes", "sd-vae"):
        assert client.get(f"/sdapi/v1/{name}").json() == []
    assert client.get("/sdapi/v1/samplers").json()[0]["name"]
    answer = client.post("/sdapi/v1/txt2img", json=SILLY_TAVERN)
    assert image_of(answer.json()["images"][0]).size == (96, 112)
    found = client.get("/sdapi/v1/progress").json()
    assert (found["progress"], found["state"]["job_count"]) == (0, 0)


def test_libre_chat(client):
    answer = client.post("/sdapi/v1/txt2img", json=LIBRE_CHAT).json()
    info = json.loads(answer["info"])
    assert info["infotexts"][0].startswith(f"{PROMPT}\nSteps: 2, Seed: {info['seed']}, Size: 64x64")
    assert (info["width"], info["height"]) == (64, 64)


def test_an_image_to_start_from(client):
    file = io.BytesIO()
    PIL.Image.new("RGB", (64, 96), "red").save(file, "PNG")
    image = base64.b64encode(file.getvalue()).decode()
    for one in (image, f"data:image/png;base64,{image}"):
        body = {"prompt": PROMPT, "init_images": [one], "denoising_strength": 0.5, "width": 64, "height": 96, "seed": 7}
        answer = client.post("/sdapi/v1/img2img", json=body).json()
        assert image_of(answer["images"][0]).size == (64, 96)
        assert "init_images" not in answer["parameters"]
        assert json.loads(answer["info"])["seed"] == 7


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("txt2img", {}, 400),
        ("txt2img", {"prompt": "x", "batch_size": 4, "n_iter": 4}, 400),
        ("txt2img", {"prompt": "x", "batch_size": "2"}, 400),
        ("txt2img", {"prompt": "x", "override_settings": {"sd_model_checkpoint": "schnell"}}, 404),
        ("img2img", {"prompt": "x"}, 400),
        ("img2img", {"prompt": "x", "init_images": ["http://example.org/x.png"]}, 400),
        ("img2img", {"prompt": "x", "init_images": ["x"]}, 400),
        ("img2img", {"prompt": "x", "init_images": ["eA=="], "denoising_strength": 2}, 400),
        ("options", {"sd_model_checkpoint": "schnell"}, 404),
        ("options", {"sd_model_checkpoint": 5}, 400),
    ],
)
def test_what_makes_no_sense(client, path, body, status):
    answer = client.post(f"/sdapi/v1/{path}", json=body)
    assert answer.status_code == status
    assert answer.json()["detail"] == answer.json()["error"]["message"]


def test_a_model_with_its_hash(client):
    body = {"prompt": "x", "steps": 1, "override_settings": {"sd_model_checkpoint": "demo.safetensors [abc123]"}}
    assert client.post("/sdapi/v1/txt2img", json=body).status_code == 200


def test_interrupting_ends_the_webuis_jobs_and_no_others(engine, serve, pace):
    pace.seconds = 0.1
    with serve(engine) as server, server.client() as client:
        found = []

        def ask() -> None:
            with server.client() as other:
                found.append(other.post("/sdapi/v1/txt2img", json={"prompt": "x", "steps": 150}))

        thread = threading.Thread(target=ask)
        thread.start()
        wait_for(lambda: engine.running and engine.running.step > 1)
        progress = client.get("/sdapi/v1/progress").json()
        assert 0 < progress["progress"] < 1
        assert (progress["state"]["job_count"], progress["state"]["sampling_steps"]) == (1, 150)
        other = client.post("/v1/jobs", json={"prompt": "x", "steps": 2}).json()
        assert client.post("/sdapi/v1/interrupt").status_code == 200
        thread.join(20)
        assert found[0].status_code == 410
        wait_for(lambda: engine.job(other["id"]).status == "done")
