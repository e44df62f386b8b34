"""The engine: a queue, one thread of MLX, what is in memory, and what becomes of jobs; with the wheel alone."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time

import numpy as np
import PIL.Image
import pytest

from mflux.errors import ImageError, MfluxError, UsageError
from mflux.models.common.config import ModelConfig
from mflux.models.flux.variants.txt2img.flux import Flux1
from mflux.serve import Engine
from mflux.serve.engine import QueueFullError, StoppingError
from mflux.serve.jobs import Changed, Ended, JobError, Preview
from mflux.serve.models import ModelNotFoundError, UnsupportedError, cached_models, served
from mflux.utils.metadata_reader import MetadataReader

from .conftest import PROMPT, wait_for


def pixels(picture) -> np.ndarray:
    return np.asarray(PIL.Image.open(io.BytesIO(picture.data)).convert("RGB"))


def test_it_generates_what_the_class_does(engine, in_folder):
    jobs = [engine.submit(prompt=PROMPT, seed=4), engine.submit(prompt=PROMPT, seed=4, n=2)]
    found = [picture for job in jobs for picture in job.wait(60)]
    expected = Flux1(model_config=ModelConfig.from_name("demo")).generate_image(4, PROMPT, num_inference_steps=8)
    assert np.array_equal(pixels(found[0]), np.asarray(expected.image))
    assert np.array_equal(pixels(found[1]), np.asarray(expected.image))
    assert [picture.seed for picture in found] == [4, 4, 5]
    assert not np.array_equal(pixels(found[1]), pixels(found[2]))
    # The file has its settings, and another format keeps them.
    for name in ("a.png", "a.jpg"):
        settings = MetadataReader.read_exif_metadata(found[2].save(name))
        assert (settings["prompt"], settings["seed"], settings["steps"]) == (PROMPT, 5, 8)
    assert (in_folder / "a.png").read_bytes() == found[2].data


def test_events_in_order(engine):
    events = list(engine.submit(prompt=PROMPT, seed=4, previews=3))
    assert isinstance(events[-1], Ended)
    assert events[-1].job["status"] == "done"
    assert events[-1].job["progress"] == 1
    steps = [event.job["step"] for event in events if isinstance(event, Changed)]
    assert steps == sorted(steps)
    previews = [event for event in events if isinstance(event, Preview)]
    assert [preview.number for preview in previews] == list(range(1, len(previews) + 1))
    assert all(PIL.Image.open(io.BytesIO(one.data)).size == (one.width, one.height) for one in previews)


def test_previews_are_as_many_as_are_wanted_and_change_nothing(engine):
    plain = engine.submit(prompt=PROMPT, seed=4, n=2).wait(60)
    for wanted in (1, 2, 3, 6):
        job = engine.submit(prompt=PROMPT, seed=4, n=2, previews=wanted)
        assert [one.data for one in map(pixels, job.wait(60))] == [one.data for one in map(pixels, plain)]
        # A preview may come after the image.
        wait_for(lambda job=job, wanted=wanted: len(job.previews) == wanted, 5)
    last = PIL.Image.open(io.BytesIO(job.previews[0].data)).convert("RGB")
    # It shows what comes: red in the middle, white at the corner.
    red, white = last.getpixel((last.width // 2, last.height // 2)), last.getpixel((2, 2))
    assert red[0] > red[1] + 60
    assert min(white) > 150


def test_previews_that_nobody_counts_come_when_steps_are_slow(engine, pace):
    engine.submit(prompt=PROMPT, seed=4, steps=4).wait(60)
    pace.seconds = 0.25
    job = engine.submit(prompt=PROMPT, seed=4, steps=12, previews=None)
    job.wait(60)
    assert job.previews


def test_source_images_of_any_kind(engine, tmp_path):
    image = PIL.Image.new("RGB", (96, 64), "red")
    image.save(tmp_path / "photo.png")
    data = (tmp_path / "photo.png").read_bytes()
    found = []
    for one in (image, data, io.BytesIO(data), tmp_path / "photo.png", [str(tmp_path / "photo.png")]):
        job = engine.submit(prompt=PROMPT, seed=4, images=one, image_strength=0.5)
        found.append(job.wait(60)[0])
        assert (job.steps, found[-1].size) == (4, (96, 64))
    assert len({picture.data[-2000:] for picture in found}) == 1
    # What was given is not kept with the job.
    assert not job.plan.images


@pytest.mark.parametrize(
    ("wanted", "error", "told"),
    [
        ({"prompt": ""}, UsageError, "prompt"),
        ({"steps": 0}, UsageError, "steps: 0 is too small"),
        ({"seed": "x"}, UsageError, "seed: 'x' is not a whole number"),
        ({"seed": 2**64}, UsageError, "seed"),
        ({"n": 0}, UsageError, "n: 0 is not a number of images"),
        ({"width": 10**6}, UsageError, "width"),
        ({"scheduler": "nope"}, UsageError, "nope"),
        ({"foo": 1}, UsageError, "no setting 'foo'"),
        ({"output_format": "gif"}, UsageError, "output_format: 'gif' is none of png, jpeg, webp"),
        ({"guidance": 3.0}, UnsupportedError, "demo has no use for guidance"),
        ({"negative_prompt": "blur"}, UnsupportedError, "no negative branch"),
        ({"image_strength": 0.5}, UnsupportedError, "there is no source image"),
        ({"mask": b"\0"}, UnsupportedError, "demo takes no mask"),
        ({"images": [b"\0", b"\0"]}, UnsupportedError, "at most 1 source image, and there are 2"),
        ({"images": b"\0 no image"}, ImageError, "not a picture"),
        ({"images": "/nowhere/photo.png"}, ImageError, "does not exist"),
        ({"images": 5}, UsageError, "images"),
        ({"model": "schnell"}, ModelNotFoundError, "there is no model 'schnell' here: demo is served"),
        ({"model": 5}, UsageError, "model is 5"),
        ({"loras": [("nope", 1.0)]}, MfluxError, "nope"),
        ({"loras": ["nope"]}, UsageError, "loras: names with their scales"),
        ({"output_format": ["png"]}, UsageError, "output_format"),
        ({"quality": 101}, UsageError, "quality"),
        ({"quality": "best"}, UsageError, "quality"),
        ({"previews": -1}, UsageError, "previews"),
        ({"previews": "all"}, UsageError, "previews"),
    ],
)
def test_what_makes_no_sense_is_told_at_once(engine, wanted, error, told):
    with pytest.raises(error, match=told):
        job = engine.submit(**{"prompt": PROMPT, **wanted})
        job.wait(30)
    # And nothing is left of it.
    engine.submit(prompt=PROMPT, seed=1, steps=1).wait(60)


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ({"queue": 0}, "queue"),
        ({"queue": "many"}, "queue"),
        ({"keep": "long"}, "keep"),
        ({"keep": -2}, "keep"),
        ({"memory_limit": "much"}, "memory_limit"),
        ({"nonsense": 4}, "no setting 'nonsense'"),
        ({"quantize": 7}, "quantize"),
    ],
)
def test_an_engine_that_makes_no_sense_is_none(wanted, told):
    threads = threading.active_count()
    with pytest.raises(UsageError, match=told):
        Engine(["demo"], **wanted)
    assert threading.active_count() == threads


def test_one_name_is_one_model():
    for names in ("demo", ["demo", "demo"]):
        with Engine(names) as engine:
            assert [model.id for model in engine.models] == ["demo"]


def test_the_queue_is_first_in_first_out_and_has_an_end(pace):
    pace.seconds = 0.2
    with Engine(["demo"], queue=2) as engine:
        first = engine.submit(prompt="first", steps=20)
        wait_for(lambda: first.status == "drawing")
        waiting = [engine.submit(prompt=str(number), steps=1) for number in range(2)]
        assert [job.as_json()["position"] for job in (first, *waiting)] == [0, 1, 2]
        with pytest.raises(QueueFullError, match="2 jobs are waiting") as full:
            engine.submit(prompt="one too many")
        assert 1 <= full.value.retry_after <= 60
        assert engine.jobs == [waiting[1], waiting[0], first]

        # One that waits leaves at once, the running one at its next step; what is left is generated.
        assert engine.cancel(waiting[0])
        assert waiting[0].status == "cancelled"
        assert engine.cancel(first)
        pace.seconds = 0
        assert waiting[1].wait(30)
        for job in (first, waiting[0]):
            with pytest.raises(JobError, match="cancelled") as ended:
                job.wait(30)
            assert ended.value.kind == "cancelled"
        assert 0 < first.step < 20
        assert not engine.cancel(first)


def test_after_a_cancelled_job_the_next_image_is_right(engine, pace):
    expected = pixels(engine.submit(prompt=PROMPT, seed=4).wait(60)[0])
    pace.seconds = 0.1
    job = engine.submit(prompt="something else", seed=9, n=3)
    wait_for(lambda: job.step >= 2)
    engine.cancel(job)
    pace.seconds = 0
    assert np.array_equal(pixels(engine.submit(prompt=PROMPT, seed=4).wait(60)[0]), expected)
    registry = next(iter(engine._loaded.values())).pipeline.callbacks
    assert not registry.in_loop


def test_a_model_that_fails_is_loaded_anew(engine, pace):
    expected = pixels(engine.submit(prompt=PROMPT, seed=4).wait(60)[0])
    for failure, told in (
        (RuntimeError("[METAL] something broke in /home/somebody"), r"the model failed \(RuntimeError\)"),
        (RuntimeError("[malloc] Unable to allocate 10 bytes"), "not enough memory"),
        (MemoryError(), "not enough memory"),
        (MfluxError("the weights are damaged"), "the weights are damaged"),
    ):
        pace.failure = failure
        with pytest.raises(JobError, match=told) as found:
            engine.submit(prompt=PROMPT, seed=4).wait(60)
        assert found.value.kind == "failed"
        assert "somebody" not in str(found.value)
        pace.failure = None
        assert np.array_equal(pixels(engine.submit(prompt=PROMPT, seed=4).wait(60)[0]), expected)


def test_all_of_mlx_is_in_one_thread(engine, pace, monkeypatch):
    seen = set()

    def spy(self, *args, **kwargs):
        seen.add(threading.current_thread().name)
        return load(self, *args, **kwargs)

    from mflux.models.common.model import Model

    load = Model.load
    monkeypatch.setattr(Model, "load", spy)
    jobs = []
    threads = [
        threading.Thread(target=lambda: jobs.append(engine.submit(prompt=PROMPT, seed=1, steps=1))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({job.wait(60)[0].data[-1000:] for job in jobs}) == 1
    assert seen == {"mflux-engine"}


def test_models_leave_when_nobody_needs_them():
    with Engine(["demo"], keep=0.2) as engine:
        engine.submit(prompt=PROMPT, steps=1).wait(60)
        wait_for(lambda: not engine.loaded())
        assert engine.submit(prompt=PROMPT, steps=1).wait(60)
        engine.load()
        assert engine.loaded()["demo"] > 1e6
        engine.unload("demo")
        assert engine.loaded() == {}
    with Engine(["demo"], keep=0) as engine:
        engine.submit(prompt=PROMPT, steps=1).wait(60)
        wait_for(lambda: not engine.loaded())


def test_memory_has_a_ceiling(tiny_schnell, tiny_dev):
    names = ["demo", str(tiny_schnell), str(tiny_dev)]
    with Engine(names) as engine:
        sizes = {}
        for name in names:
            engine.submit(name, prompt="x", steps=1, width=32, height=32).wait(60)
            one = next(one for one in engine._loaded.values() if one.model == name)
            sizes[name] = sum(one.needs.values())
        assert set(engine.loaded()) == set(names)
        # What was counted before loading is about what is there.
        assert engine.loaded()["demo"] == pytest.approx(sizes["demo"], rel=0.2)
    with Engine(names, memory_limit=int(sizes["demo"] * 1.01)) as engine:
        for name in (names[1], "demo"):
            engine.submit(name, prompt="x", steps=1, width=32, height=32).wait(60)
        assert list(engine.loaded()) == ["demo"]
    with Engine(names, memory_limit=1000) as engine, pytest.raises(MfluxError, match="models may have 1 kB here"):
        engine.submit(prompt="x", steps=1).wait(60)


def test_all_parts_stay_where_there_is_room(engine):
    engine.submit(prompt=PROMPT, steps=1).wait(60)
    pipeline = next(iter(engine._loaded.values())).pipeline
    parts = {name: id(part) for name, part in pipeline.loaded().items()}
    assert set(parts) == {component.name for component in pipeline.components}
    engine.submit(prompt="another prompt", steps=1).wait(60)
    assert {name: id(part) for name, part in pipeline.loaded().items()} == parts
    with Engine(["demo"], low_ram=True) as saving:
        saving.submit(prompt=PROMPT, steps=1).wait(60)
        assert sum(saving.loaded().values()) < sum(engine.loaded().values())


def test_loras_come_and_go_with_requests(monkeypatch):
    from pathlib import Path

    folder = Path(__file__).parents[1] / "data"
    monkeypatch.setenv("LORA_LIBRARY_PATH", str(folder))
    with Engine(["demo"]) as engine:
        plain = engine.submit(prompt=PROMPT, seed=4).wait(60)[0]
        [pipeline] = [one.pipeline for one in engine._loaded.values()]
        transformer = pipeline.transformer
        with_lora = engine.submit(prompt=PROMPT, seed=4, loras=[("demo_square_lora", 1.0)]).wait(60)[0]
        again = engine.submit(prompt=PROMPT, seed=4).wait(60)[0]
        # Taken off and put on; the weights stay where they are.
        assert pipeline.transformer is transformer
        assert not np.array_equal(pixels(plain), pixels(with_lora))
        assert np.array_equal(pixels(plain), pixels(again))
        assert with_lora.settings["lora_paths"] == ["demo_square_lora"]
        # One model, whatever it wears.
        assert len(engine._loaded) == 1
    with Engine(["demo"], lora_paths=["demo_square_lora"]) as engine:
        assert np.array_equal(pixels(engine.submit(prompt=PROMPT, seed=4).wait(60)[0]), pixels(with_lora))
        without = engine.submit(prompt=PROMPT, seed=4, loras=[]).wait(60)[0]
        assert np.array_equal(pixels(without), pixels(plain))
    # What the image says of itself makes the same one; in the weights it differs by what is rounded there.
    assert with_lora.settings["bake_lora"] is False
    lora = {"lora_paths": [str(folder / "demo_square_lora.safetensors")], "model_config": ModelConfig.from_name("demo")}
    for bake, most in ((False, 0), (True, 1)):
        alone = Flux1(**lora, bake_lora=bake).generate_image(seed=4, prompt=PROMPT, num_inference_steps=8)
        assert np.abs(np.asarray(alone.image).astype(int) - pixels(with_lora).astype(int)).max() <= most
    with Engine(["demo"], lora_paths=["demo_square_lora"], bake_lora=True) as engine:
        baked = engine.submit(prompt=PROMPT, seed=4).wait(60)[0]
        assert np.array_equal(pixels(baked), np.asarray(alone.image)) and "bake_lora" not in baked.settings


def test_closing_ends_everything(pace):
    pace.seconds = 0.1
    engine = Engine(["demo"])
    first, second = engine.submit(prompt=PROMPT, steps=100), engine.submit(prompt=PROMPT)
    wait_for(lambda: first.step > 1)
    started = time.monotonic()
    engine.close(grace=0.2)
    assert time.monotonic() - started < 5
    assert (first.status, second.status) == ("cancelled", "cancelled")
    assert second.error.kind == "stopping"
    with pytest.raises(StoppingError):
        engine.submit(prompt=PROMPT)
    with pytest.raises(StoppingError):
        engine.load()
    engine.close()


def test_closing_lets_a_short_job_finish(pace):
    pace.seconds = 0.05
    engine = Engine(["demo"])
    job = engine.submit(prompt=PROMPT, steps=5)
    wait_for(lambda: job.step > 0)
    engine.close(grace=20)
    assert job.status == "done"


def test_jobs_are_not_kept_for_ever(engine, monkeypatch):
    monkeypatch.setattr("mflux.serve.engine._KEPT_PICTURES", 3)
    jobs = [engine.submit(prompt=PROMPT, steps=1) for _ in range(5)]
    for job in jobs:
        job.wait(60)
    assert engine.jobs == jobs[:1:-1]
    assert engine.job(jobs[0].id) is None
    monkeypatch.setattr("mflux.serve.engine._KEPT_SECONDS", -1)
    assert engine.jobs == []


def test_images_go_to_a_folder_as_well(engine, tmp_path):
    engine.output = tmp_path
    job = engine.submit(prompt=PROMPT, seed=4, n=2)
    job.wait(60)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name.rpartition("-")[2] for name in names] == ["4.png", "5.png"]
    assert (tmp_path / names[0]).read_bytes() == job.pictures[0].data
    # A folder that is gone costs nobody an image.
    engine.output = tmp_path / names[0] / "below"
    assert engine.submit(prompt=PROMPT, steps=1).wait(60)


@pytest.mark.parametrize(
    ("name", "images", "mask", "guidance", "negative", "strength"),
    [
        ("demo", (0, 1), False, False, False, True),
        ("dev", (0, 1), False, True, False, True),
        ("dev-kontext", (1, 1), False, True, False, False),
        ("dev-fill", (1, 1), True, True, False, False),
        ("dev-redux", (1, 16), False, True, False, False),
        ("dev-controlnet-canny", (1, 1), False, True, False, False),
        ("flux2-klein-4b", (0, 16), False, False, False, True),
        ("qwen-image", (0, 1), False, True, True, True),
        ("qwen-image-edit", (1, 16), False, True, True, False),
        ("z-image-turbo", (0, 1), False, False, False, True),
    ],
)
def test_what_a_model_takes_follows_from_its_command(name, images, mask, guidance, negative, strength):
    model = served(name, {})
    found = (
        model.images,
        model.takes_mask,
        model.takes_guidance,
        model.takes_negative_prompt,
        any(one.has_strength for one in model.variants),
    )
    assert found == (images, mask, guidance, negative, strength)


def test_a_model_that_edits_does_so_with_images():
    model = served("flux2-klein-4b", {})
    source = PIL.Image.new("RGB", (64, 64))
    from mflux.utils.given_image import GivenImage

    names = [
        model.plan({"prompt": "x", **more}, [GivenImage(source)] * count)[0].command.name
        for count, more in ((0, {}), (1, {}), (2, {}), (1, {"image_strength": 0.5}))
    ]
    assert names == ["generate-flux2", "generate-flux2-edit", "generate-flux2-edit", "generate-flux2"]


def test_what_cannot_be_served_is_refused():
    for name in ("dev-fill-catvton", "z-image-turbo-controlnet-union-2.1"):
        with pytest.raises(UsageError, match=f"{name} cannot be served"):
            served(name, {})
    with pytest.raises(MfluxError, match="no-such-model"):
        Engine(["no-such-model"])


def test_without_a_name_the_models_that_are_there():
    assert cached_models()[-1] == "demo"


def test_a_process_ends_in_order(tmp_path):
    code = f"""
from mflux.serve import Engine
engine = Engine(["demo"])
job = engine.submit(prompt={PROMPT!r}, seed=4, steps=200)
next(iter(job))
"""
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")


def test_importing_it_loads_nothing_heavy():
    code = """
import sys
from mflux.serve import Engine
print([name for name in ("mlx", "PIL", "numpy", "starlette") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n"
