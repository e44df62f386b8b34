"""Training the embedded model: what a configuration says, going on as if nothing had been, and what is written."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest

from mflux.backend import mx, named_arrays
from mflux.checkpoints.readers.safetensors import SafetensorsFile
from mflux.errors import CheckpointError, MfluxError, OutputError, UsageError
from mflux.models.common.training import checkpoint, lora, objective, plot
from mflux.models.common.training.checkpoint import Checkpoint, Losses
from mflux.models.common.training.data import Dataset, Iterator
from mflux.models.common.training.loop import Loop
from mflux.models.common.training.optimizer import Optimizer
from mflux.models.common.training.session import TrainingSession
from mflux.models.common.training.spec import (
    LoraTargetSpec,
    OptimizerSpec,
    TrainingLoopSpec,
    TrainingSpec,
)

TARGETS = [
    {"module_path": "transformer_blocks.{block}.attn.to_q", "blocks": "all", "rank": 4, "alpha": 8},
    {"module_path": "single_transformer_blocks.{block}.proj_out", "blocks": {"indices": [0]}, "rank": 2},
]


def write_data(folder: Path, sizes=((32, 32), (48, 32), (32, 32))) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, (width, height) in enumerate(sizes):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a red circle {number}")
    return folder


def configuration(folder: Path, **changes) -> dict:
    config = {
        "model": "demo",
        "data": "data",
        "seed": 4,
        "steps": 8,
        "training_loop": {"num_epochs": 3, "batch_size": 2},
        "optimizer": {"name": "AdamW", "learning_rate": 1e-3, "max_grad_norm": 1.0},
        "checkpoint": {"save_frequency": 2, "output_path": str(folder / "out")},
        "lora_layers": {"targets": TARGETS},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            config[section] = config[section] | {name: value}
        else:
            config[section] = value
    return {key: value for key, value in config.items() if value is not ...}


def spec_of(folder: Path, **changes) -> TrainingSpec:
    write_data(folder / "data")
    return TrainingSpec.from_conf(configuration(folder, **changes), folder / "c.json", create_output_dir=False)


def write_config(folder: Path, **changes) -> Path:
    write_data(folder / "data")
    path = folder / "c.json"
    path.write_text(json.dumps(configuration(folder, **changes)))
    return path


# ---- images that are not learned from


def test_held_out_images_are_looked_at_and_not_learned_from(tmp_path, cli):
    write_data(tmp_path / "held", sizes=((48, 48), (32, 32)))
    monitoring = {"generate_image_frequency": 1000, "plot_frequency": 2, "preview_width": 32, "preview_height": 32}
    watched = {"monitoring": monitoring | {"held_out": "held"}}
    path = write_config(tmp_path, **watched)
    assert "3 images, 2 held out" in cli("train", "--config", path, "--dry-run").out
    plain = Loop(TrainingSession(spec_of(tmp_path, monitoring=monitoring)))
    plain.run()
    loop = Loop(TrainingSession(spec_of(tmp_path, checkpoint__output_path=str(tmp_path / "two"), **watched)))
    loop.run()
    # Nothing of it is learned, and no number is drawn for it that another would have had.
    mine, other = loop.session.lora_weights(), plain.session.lora_weights()
    assert all(mx.array_equal(mine[name], other[name]) for name in other)
    told = [entry["loss"] for entry in loop.losses.held_out_loss]
    assert [entry["step"] for entry in loop.losses.held_out_loss] == [0, 2, 4, 6] and len(set(told)) == 4
    # The same noise each time, and the mean over images.
    loop._look()
    assert loop.losses.held_out_loss[-1]["loss"] == told[-1]
    page = (tmp_path / "two" / "loss" / "loss.html").read_text()
    assert "not learned from" in page and page.count("<polyline") == 3
    assert "not learned from" not in (tmp_path / "out" / "loss" / "loss.html").read_text()
    # A checkpoint has them, and goes on with the folder where it is.
    found = Checkpoint(loop.written.checkpoint)
    assert [entry["loss"] for entry in found.losses().held_out_loss] == told
    assert found.configuration["monitoring"]["held_out"] == str(tmp_path / "held")


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("none", "monitoring: held_out: there is no folder"),
        ("data", "monitoring: held_out: 0.png is learned from as well"),
        ("pairs", "holds pairs, and single images are learned from"),
    ],
)
def test_held_out_images_that_make_no_sense(folder, message, tmp_path):
    write_data(tmp_path / "pairs", sizes=((32, 32), (32, 32)))
    for number, name in enumerate(("a_in", "a_out")):
        (tmp_path / "pairs" / f"{number}.png").rename(tmp_path / "pairs" / f"{name}.png")
        (tmp_path / "pairs" / f"{number}.txt").rename(tmp_path / "pairs" / f"{name}.txt")
    with pytest.raises(UsageError, match=message):
        spec_of(tmp_path, monitoring={"generate_image_frequency": 5, "held_out": folder})


# ---- what a configuration may say


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_grad": 1}, "max_grad is not known"),
        ({"seeed": 1}, "seeed is not known: did you mean seed"),
        ({"optimizer__max_grad_nrom": 1}, "optimizer: max_grad_nrom is not known: did you mean max_grad_norm"),
        ({"optimizer__state_path": "x"}, "optimizer: state_path is not known"),
        ({"training_loop__iterator_state_path": "x"}, "training_loop: iterator_state_path is not known"),
        ({"seed": ...}, "it lacks seed"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 1844"),
        ({"steps": 0}, "steps is 0"),
        ({"quantize": 7}, "quantize is 7"),
        ({"max_resolution": 0}, "max_resolution is 0"),
        ({"cache_limit_gb": 0}, "cache_limit_gb is 0"),
        ({"low_ram": 1}, "low_ram is 1, not true or false"),
        ({"gradient_checkpointing": "yes"}, "gradient_checkpointing is 'yes'"),
        ({"training_loop__num_epochs": 0}, "num_epochs is 0"),
        ({"training_loop__num_epochs": 10**400}, r"training_loop\.num_epochs is 1000.*not a finite number"),
        ({"checkpoint__output_path": f"{__file__}/out"}, r"output_path: .*test_training\.py is no folder"),
        ({"training_loop__batch_size": -1}, "batch_size is -1"),
        ({"training_loop__timestep_type": "stile"}, "it is uniform, sigmoid, content, style"),
        ({"training_loop__timestep_low": 8}, "low < high"),
        ({"training_loop__timestep_high": 9}, "high at most steps"),
        ({"optimizer__name": "SGD"}, "it is Adam, AdamW, Adafactor, Lion"),
        ({"optimizer__learning_rate": 0}, "has to be above 0"),
        ({"optimizer__learning_rate": None}, "only Adafactor"),
        ({"optimizer__lr_schedule": "cosin"}, "it is cosine or null"),
        ({"optimizer__optimizer_params": {"weight_deacy": 1}}, "did you mean weight_decay"),
        ({"optimizer__optimizer_params": {"betas": [0.9, 1.0]}}, "betas is"),
        ({"optimizer__max_grad_norm": 0}, "max_grad_norm is 0"),
        ({"optimizer__gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0"),
        ({"checkpoint__save_frequency": 0}, "save_frequency is 0"),
        ({"monitoring": {}}, "it lacks generate_image_frequency"),
        ({"monitoring": {"generate_image_frequency": 5, "preview_prompt": "x"}}, "preview.*txt .*took its place"),
        ({"monitoring": {"generate_image_frequency": 5, "preview_width": 8}}, "preview_width is 8"),
        ({"lora_layers": {"targets": []}}, "targets is empty"),
        ({"lora_layers": {"targets": [{"module_path": "a.{block}", "rank": 1}]}}, "no blocks"),
        ({"lora_layers": {"targets": [{"module_path": "a", "rank": 0}]}}, "rank is 0"),
        ({"lora_layers": {"targets": [{"module_path": "a", "rank": 1, "alpha": 0}]}}, "alpha is 0"),
        ({"lora_layers": {"targets": [{"module_path": "a.{block}", "rank": 1, "blocks": {"from": 0}}]}}, "from is not"),
        ({"data": "nowhere"}, "there is no folder"),
        ({"examples": []}, "mflux 0.16 or older: say data"),
        ({"model": "dev-fill"}, "cannot be trained for dev-fill"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_before_anything_is_loaded(changes, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        spec_of(tmp_path, **changes)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("transformer_blocks.0.attn.to_qq", "did you mean transformer_blocks.0.attn.to_q"),
        ("transformer_blocks.7.attn.to_q", "no linear layer"),
        ("transformer_blocks.0.attn.norm_q", "no linear layer"),
    ],
)
def test_a_layer_that_does_not_exist_is_told_before_the_weights_are_read(path, message, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingSession, "_encoded", lambda *_: pytest.fail("something was encoded"))
    spec = spec_of(tmp_path, lora_layers={"targets": [{"module_path": path, "rank": 1}]})
    with pytest.raises(UsageError, match=message):
        TrainingSession(spec)


def test_a_layer_that_is_named_twice(tmp_path):
    shapes = {"blocks.0.a": (4, 4), "blocks.1.a": (4, 4)}
    target = LoraTargetSpec("blocks.{block}.a", 2, "all")
    assert [layer.path for layer in lora.chosen([target], (), shapes, {})] == list(shapes)
    with pytest.raises(UsageError, match="named twice"):
        lora.chosen([target, LoraTargetSpec("blocks.1.a", 2)], (), shapes, {})
    with pytest.raises(UsageError, match="rank of 5"):
        lora.chosen([LoraTargetSpec("blocks.1.a", 5)], (), shapes, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: (data / "1.txt").unlink(), "1.png has no caption: write 1.txt"),
        (lambda data: (data / "1.txt").write_text(" \n"), "1.txt is empty"),
        (lambda data: (data / "1.png").write_bytes(b"no image"), "1.png is not a picture"),
        (lambda data: PIL.Image.new("RGB", (15, 100)).save(data / "1.png"), "too small or too narrow"),
        (lambda data: (data / "9.png").symlink_to(data / "gone.png"), "a link to one that is gone"),
        (lambda data: (data / "1.png").rename(data / "1_out.png"), "half of no pair"),
    ],
)
def test_data_that_cannot_be_learned_from(change, message, tmp_path):
    change(write_data(tmp_path / "data"))
    with pytest.raises(MfluxError, match=message):
        TrainingSpec.from_conf(configuration(tmp_path), tmp_path / "c.json", create_output_dir=False)


def test_what_a_folder_holds(tmp_path):
    data = write_data(tmp_path / "data", ((70, 50), (130, 120)))
    (data / "preview_b.txt").write_text("b")
    (data / "preview_a.txt").write_text("a")
    config = configuration(tmp_path, max_resolution=64, monitoring={"generate_image_frequency": 5})
    spec = TrainingSpec.from_conf(config, tmp_path / "c.json", create_output_dir=False)
    assert [(item.width, item.height) for item in spec.data] == [(64, 48), (64, 48)]
    assert spec.monitoring.preview_prompt_names == ["preview_a", "preview_b"]
    assert spec.monitoring.preview_prompts == ["a", "b"]
    # Without previews an image of that name is no data either.
    PIL.Image.new("RGB", (32, 32)).save(data / "preview.png")
    assert (
        len(TrainingSpec.from_conf(config | {"monitoring": None}, tmp_path / "c.json", create_output_dir=False).data)
        == 2
    )
    with pytest.raises(UsageError, match="only supported for edit training"):
        TrainingSpec.from_conf(config, tmp_path / "c.json", create_output_dir=False)


def test_a_dry_run_loads_no_mlx_and_writes_nothing(tmp_path):
    path = write_config(tmp_path)
    code = (
        "import sys; from mflux.models.common.cli.train import main; status = main(sys.argv[1:]); "
        "assert 'mlx.core' not in sys.modules; sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--config", str(path), "--dry-run"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "") and "3 images, 6 batches of 2, demo" in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --config FILE"),
        (["--config", "a.json", "--resume", "b.zip"], "not allowed with"),
        (["--resume", "b.zip"], "there is no checkpoint b.zip"),
    ],
)
def test_one_of_config_and_resume(words, message, cli):
    result = cli("train", *words)
    assert result.status in (1, 2) and message in result.err and result.err.count("\n") == 1


# ---- noise levels


def test_noise_levels_are_drawn_as_0_24_draws_them(tmp_path):
    session = TrainingSession(spec_of(tmp_path))
    config = session.config_of(session.items[0])
    loop = TrainingLoopSpec(1, 1)
    rng, again = random.Random(3), random.Random(3)
    sigma, noise = objective.draw(rng, loop, config, (1, 4, 64), continuous=False)
    time_seed, noise_seed = again.randint(0, 2**32 - 1), again.randint(0, 2**32 - 1)
    step = mx.random.randint(0, 8, [], key=mx.random.key(time_seed)).item()
    assert sigma == pytest.approx(config.scheduler.sigmas[step].item())
    theirs = mx.random.normal((1, 4, 64), mx.bfloat16, key=mx.random.key(noise_seed))
    assert mx.array_equal(noise, theirs.astype(mx.float32)) and rng.getstate() == again.getstate()


@pytest.mark.parametrize("kind", [None, "uniform", "sigmoid", "content", "style"])
@pytest.mark.parametrize("continuous", [True, False])
def test_how_often_each_noise_level_is(kind, continuous, tmp_path):
    config = SimpleNamespace(
        num_inference_steps=10,
        scheduler=SimpleNamespace(sigmas=np.linspace(1, 0, 11)),
        model_config=SimpleNamespace(requires_sigma_shift=False, sigma_shift=3.0),
    )
    rng = random.Random(0)
    loop = TrainingLoopSpec(1, 1, timestep_low=2, timestep_high=8, timestep_type=kind)
    drawn = [objective.draw(rng, loop, config, (1,), continuous=continuous)[0] for _ in range(1500)]
    # Moved by the checkpoint's shift, so moved back.
    levels = np.array([sigma / (3 - 2 * sigma) for sigma in drawn] if continuous else drawn)
    assert levels.min() >= (0.2 if continuous else 0.3) - 1e-6 and levels.max() <= 0.8 + 1e-6
    middle = 0.5 if continuous else 0.55
    share = (levels > middle).mean()
    # "content" is near the beginning, where there is much noise; "style" is near the end.
    expected = {"content": 0.5 ** (1 / 3), "style": 1 - 0.5 ** (1 / 3)}.get(kind, 0.5)
    assert share == pytest.approx(expected, abs=0.04)
    assert (np.abs(levels - middle) < 0.1).mean() == pytest.approx(
        {"sigmoid": 0.51 if continuous else 0.5, "content": 0.18, "style": 0.18}.get(kind, 1 / 3), abs=0.05
    )


# ---- the optimizer


def test_rates(tmp_path):
    weights = {"a.lora_A.weight": mx.zeros((2, 3))}
    spec = OptimizerSpec("AdamW", 1.0, "cosine", lr_warmup_steps=4, lr_total_steps=12)
    optimizer = Optimizer(spec, weights)
    rates = [optimizer.rate(step) for step in range(13)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[8] == pytest.approx(0.5) and rates[12] == pytest.approx(0) and rates[5:] == sorted(rates[5:])[::-1]


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Adafactor", "Lion"])
def test_what_is_not_finite_changes_nothing_and_a_state_is_read_back(name):
    drawn = {"a.lora_A.weight": mx.random.normal((2, 5), key=mx.random.key(1)), "a.lora_B.weight": mx.zeros((3, 2))}
    gradients = {key: mx.random.normal(value.shape, key=mx.random.key(2)) for key, value in drawn.items()}
    optimizer = Optimizer(OptimizerSpec(name, 1e-2, max_grad_norm=1.0), drawn)
    weights = optimizer.apply(drawn, gradients)
    before = dict(named_arrays(optimizer.arrays()))
    for wrong in (float("nan"), float("inf"), 1e30):
        poisoned = gradients | {"a.lora_B.weight": mx.full((3, 2), wrong)}
        assert optimizer.apply(weights, poisoned) is None
    assert all(mx.array_equal(before[key], value) for key, value in optimizer.arrays().items())
    other = Optimizer(OptimizerSpec(name, 1e-2, max_grad_norm=1.0), drawn)
    other.read(optimizer.arrays())
    assert other.taken == 1
    one, two = optimizer.apply(weights, gradients), other.apply(weights, gradients)
    assert all(mx.array_equal(one[key], two[key]) for key in one)
    with pytest.raises(CheckpointError, match="another one's"):
        other.read({"step": mx.array(1)})


def test_adafactor_takes_the_rate_that_is_given():
    weights = {"a.lora_A.weight": mx.ones((4, 4))}
    gradients = {"a.lora_A.weight": mx.ones((4, 4))}
    params = {"scale_parameter": False}
    small = Optimizer(OptimizerSpec("Adafactor", 1e-4, optimizer_params=params), weights).apply(weights, gradients)
    large = Optimizer(OptimizerSpec("Adafactor", 1e-2, optimizer_params=params), weights).apply(weights, gradients)
    assert (1 - large["a.lora_A.weight"]).max() > 50 * (1 - small["a.lora_A.weight"]).max()
    assert Optimizer(OptimizerSpec("Adafactor", None), weights).apply(weights, gradients) is not None


# ---- going on


class Ends(Exception):
    pass


def ended_after(batches: int):
    """Ends a run as Ctrl-C would, after so many batches."""
    left = [batches]

    def after() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    return after


def final(folder: Path) -> dict[str, mx.array]:
    (path,) = folder.glob("*_adapter.safetensors")
    file = SafetensorsFile(path)
    return {name: file[name] for name in file}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer__gradient_accumulation_steps": 4, "optimizer__name": "Adafactor"},
        {
            "gradient_checkpointing": True,
            "low_ram": True,
            "training_loop__timestep_type": "sigmoid",
            "optimizer__lr_schedule": "cosine",
        },
    ],
)
def test_a_run_that_was_stopped_goes_on_as_if_nothing_had_been(changes, tmp_path):
    whole = spec_of(tmp_path, **changes, checkpoint__output_path=str(tmp_path / "whole"))
    Loop(TrainingSession(whole)).run()
    stopped = spec_of(tmp_path, **changes, checkpoint__output_path=str(tmp_path / "stopped"))
    with pytest.raises(KeyboardInterrupt):
        Loop(TrainingSession(stopped), ended_after(3)).run()
    assert not list((tmp_path / "stopped").glob("*_adapter.safetensors"))
    zips = sorted((tmp_path / "stopped" / "checkpoints").glob("*.zip"))
    assert zips[-1].name == "0000003_checkpoint.zip"
    again = TrainingSpec.resolve(None, zips[-1])
    assert again.checkpoint.output_path == str(tmp_path / "stopped")
    Loop(TrainingSession(again)).run()
    one, two = final(tmp_path / "whole"), final(tmp_path / "stopped")
    assert one.keys() == two.keys() and all(mx.array_equal(one[name], two[name]) for name in one)
    losses = [
        [(entry["step"], entry["loss"]) for entry in Checkpoint(path).losses().step_loss]
        for path in (sorted((tmp_path / name / "checkpoints").glob("*.zip"))[-1] for name in ("whole", "stopped"))
    ]
    assert losses[0] == losses[1] and [step for step, _ in losses[0]] == list(range(1, 7))


def test_an_interruption_within_a_batch_leaves_the_batch_before(tmp_path, monkeypatch):
    spec = spec_of(tmp_path)
    loop = Loop(TrainingSession(spec))
    true, taken = loop.session.apply, []

    def apply(gradients):
        done = true(gradients)
        taken.append(loop.session.lora_weights())
        if len(taken) == 3:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(loop.session, "apply", apply)
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    found = Checkpoint(loop.written.checkpoint)
    assert loop.written.checkpoint.name == "0000002_checkpoint.zip" and found.iterator()["num_iterations"] == 2
    session = TrainingSession(TrainingSpec.resolve(None, found.path))
    found.put_into(session)
    assert all(mx.array_equal(value, taken[1][name]) for name, value in session.lora_weights().items())


def test_batches_without_a_finite_loss_teach_nothing_and_end_the_run_at_last(tmp_path, monkeypatch):
    spec = spec_of(tmp_path, training_loop__num_epochs=20)
    loop = Loop(TrainingSession(spec))
    before = loop.session.lora_weights()
    monkeypatch.setattr(objective, "losses", lambda velocity, clean, noise: velocity.sum(axis=(1, 2)) * float("nan"))
    with pytest.raises(MfluxError, match="nothing is learned any more"):
        loop.run()
    assert all(mx.array_equal(before[name], value) for name, value in loop.session.lora_weights().items())
    assert loop.session.optimizer.taken == 0


def test_a_last_window_that_is_not_full_is_applied(tmp_path):
    spec = spec_of(tmp_path, optimizer__gradient_accumulation_steps=4)
    loop = Loop(TrainingSession(spec))
    loop.run()
    assert loop.total == 6 and loop.session.optimizer.taken == 2


def test_a_full_disk_loses_nothing_that_finds_room_later(tmp_path, monkeypatch):
    true, calls = checkpoint.write, []

    def write(*args):
        calls.append(args)
        if len(calls) == 1:
            raise OutputError("cannot write: No space left on device")
        return true(*args)

    monkeypatch.setattr(checkpoint, "write", write)
    monitoring = {"generate_image_frequency": 4, "preview_width": 32, "preview_height": 32}
    loop = Loop(TrainingSession(spec_of(tmp_path, monitoring=monitoring)))
    true_preview, seen = loop.session.preview, []

    def preview(*args):
        seen.append(args)
        if len(seen) == 2:
            raise OSError(28, "No space left on device")
        return true_preview(*args)

    monkeypatch.setattr(loop.session, "preview", preview)
    assert loop.run().checkpoint.name == "0000006_checkpoint.zip" and len(calls) == 4 and len(seen) == 2
    assert sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir()) == [
        "0000004_checkpoint.zip", "0000006_checkpoint.zip",
    ]  # fmt: skip


def test_only_the_newest_are_kept(tmp_path):
    Loop(TrainingSession(spec_of(tmp_path, checkpoint__keep=2, checkpoint__save_frequency=1))).run()
    names = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert names == ["0000005_checkpoint.zip", "0000006_checkpoint.zip"]


def run_train(*words: str) -> subprocess.Popen:
    # Tests that run in the background are started with Ctrl-C ignored, and hand that on.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from mflux.models.common.cli.train import main; sys.exit(main())"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_signal_leaves_a_checkpoint_and_no_half_file(number, status, tmp_path):
    path = write_config(tmp_path, training_loop__num_epochs=100_000, checkpoint__save_frequency=3)
    process = run_train("--config", str(path))
    folder = tmp_path / "out" / "checkpoints"
    deadline = time.monotonic() + 240
    while not list(folder.glob("*.zip")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=240)
    assert process.returncode == status, err
    found = sorted(folder.glob("*.zip"))
    assert found and out == ""
    for one in found:
        Checkpoint(one)
        assert zipfile.ZipFile(one).testzip() is None
    if number != signal.SIGKILL:
        assert "error: stopped" in err and found[-1].name in err
    TrainingSpec.resolve(None, found[-1])


def test_a_run_of_the_command(tmp_path, cli):
    path = write_config(tmp_path, model="schnell")
    done = cli("train", "--config", str(path), "--model", "demo", "--low-ram", "-q", "4", "--vae-tile-size", "128")
    assert done.status == 0, done.err
    zip_path, adapter = done.out.splitlines()
    assert zip_path.endswith("0000006_checkpoint.zip") and adapter.endswith("0000006_adapter.safetensors")
    assert "6/6 [" in done.err and "loss=" in done.err and f"--lora {adapter}" in done.err
    config = Checkpoint(Path(zip_path)).configuration
    assert (config["model"], config["quantize"], config["low_ram"], config["vae_tile_size"]) == ("demo", 4, True, 128)
    assert (tmp_path / "out" / "loss" / "loss.html").stat().st_size > 1000
    for words in (["--quantize", "8"], ["--model", "dev"], ["--base-model", "dev"]):
        result = cli("train", "--resume", zip_path, *words)
        assert result.status == 2 and "would change what" in result.err
    # It is done: nothing is left to learn, and the same comes out.
    assert cli("train", "--resume", zip_path).out.splitlines() == [zip_path, adapter]
    # The folder is the first run's: another gets one beside it.
    assert cli("train", "--config", str(path), "--model", "demo").out.startswith(str(tmp_path / "out_2"))


# ---- checkpoints of strangers


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    return Loop(TrainingSession(spec_of(folder))).run().checkpoint


def changed(source: Path, target: Path, change) -> Path:
    """The same ZIP with other members: `change` gets and gives a table of bytes by name."""
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in change(members).items():
            archive.writestr(name, content)
    return target


def replaced(ending: str, **values):
    def change(members):
        name = next(name for name in members if name.endswith(ending))
        return members | {name: json.dumps(json.loads(members[name]) | values).encode()}

    return change


@pytest.mark.parametrize(
    "change",
    [
        replaced("iterator.json", rng_state=[3, [1] * 624, None]),
        replaced("iterator.json", rng_state=[3, [2**32] * 625, None]),
        replaced("iterator.json", rng_state=["x", [], None]),
        replaced("iterator.json", current_permutation=[0, 0, 1]),
        replaced("iterator.json", position=99),
        replaced("iterator.json", batch_size=0),
        replaced("iterator.json", start_date_time="now"),
        replaced("loss.json", step_loss=[{"step": 1}]),
        replaced("checkpoint.json", files={"config": "../../etc/passwd"}),
        replaced("run.json", data_root="/nowhere", data_root_relative=None),
        replaced("run.json", data_fingerprint={"count": 7}),
        replaced("config.json", optimizer={"name": "AdamW", "learning_rate": 1e-3, "nothing": 1}),
        lambda members: {name: b"" if name.endswith("adapter.safetensors") else one for name, one in members.items()},
        lambda members: {name: one[:-9] if name.endswith("optimizer.safetensors") else one
                         for name, one in members.items()},
        lambda members: {name: one for name, one in members.items() if "optimizer" not in name},
        lambda members: members | {f"{number}.json": b"{}" for number in range(200)},
        lambda members: members | {"folder/run.json": b"{}"},
        lambda members: {name: b"\0" * (200 << 20) if name.endswith("adapter.safetensors") else one
                         for name, one in members.items()},
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_one_sentence(change, written, tmp_path):
    path = changed(written, tmp_path / "c.zip", change)
    with pytest.raises(MfluxError):
        Loop(TrainingSession(TrainingSpec.resolve(None, path, create_output_dir=False)))
    assert [one.name for one in tmp_path.iterdir()] == ["c.zip"]


def test_a_checkpoint_that_is_cut_is_one_sentence(written, tmp_path):
    content = written.read_bytes()
    for length in (0, 30, len(content) // 2, len(content) - 4):
        path = tmp_path / "c.zip"
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            Checkpoint(path)


def test_members_are_found_by_the_last_part_of_their_names(written, tmp_path):
    path = changed(written, tmp_path / "c.zip", lambda members: {f"../x/{name}": one for name, one in members.items()})
    session = TrainingSession(TrainingSpec.resolve(None, path, create_output_dir=False))
    Checkpoint(path).put_into(session)
    assert session.optimizer.taken == 6
    assert not (tmp_path.parent / "x").exists()


def test_data_that_changed_are_told(tmp_path):
    loop = Loop(TrainingSession(spec_of(tmp_path)))
    path = loop.run().checkpoint
    (tmp_path / "data" / "1.txt").write_text("something else")
    with pytest.raises(CheckpointError, match=r"^1\.txt changed in"):
        TrainingSpec.resolve(None, path)
    PIL.Image.new("RGB", (32, 32)).save(tmp_path / "data" / "7.png")
    (tmp_path / "data" / "7.txt").write_text("one more")
    with pytest.raises(CheckpointError, match="not what"):
        TrainingSpec.resolve(None, path)


def test_what_0_24_wrote_is_read(written, tmp_path):
    """Its run.json has no hashes, its factors no alpha, and its losses were a list once."""

    def change(members):
        run = json.loads(members["run.json"])
        del run["mflux_version"], run["data_fingerprint"]["hashes"]
        loss = next(name for name in members if name.endswith("loss.json"))
        entries = [{"step": 1, "loss": 0.5, "time": "2026-01-01 00:00:00"}]
        return members | {"run.json": json.dumps(run).encode(), loss: json.dumps(entries).encode()}

    checkpoint = Checkpoint(changed(written, tmp_path / "c.zip", change))
    assert checkpoint.is_of_024 and not Checkpoint(written).is_of_024
    assert checkpoint.losses() == Losses([], [{"step": 1, "loss": 0.5, "time": "2026-01-01 00:00:00"}])
    spec = TrainingSpec.from_checkpoint(checkpoint, create_output_dir=False)
    Loop(TrainingSession(spec))


def test_the_names_in_an_optimizer_s_file_are_0_24_s(written):
    with zipfile.ZipFile(written) as archive:
        content = archive.read("0000006_optimizer.safetensors")
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["transformer.transformer_blocks.0.attn.to_q.lora_A.m"]["shape"][1] == 4
    assert {"step", "learning_rate"} <= header.keys()


# ---- what comes of it


def test_a_preview_is_what_the_command_draws(tmp_path, cli, in_folder):
    monitoring = {"generate_image_frequency": 6, "preview_width": 64, "preview_height": 48, "plot_frequency": 3}
    path = write_config(tmp_path, monitoring=monitoring, optimizer__learning_rate=0.02, seed=11)
    (tmp_path / "data" / "preview.txt").write_text("a large blue square on a white background")
    done = cli("train", "--config", str(path))
    assert done.status == 0, done.err
    adapter = done.out.splitlines()[1]
    previews = sorted((tmp_path / "out" / "preview").iterdir())
    assert [one.name for one in previews] == [f"{n:07d}_preview_image_preview.png" for n in (0, 6)]
    drawn = cli(
        "generate", "--model", "demo", "--lora", adapter, "--steps", "8", "--seed", "11", "--width", "64", "--height",
        "48", "--prompt", "a large blue square on a white background", "--output", str(tmp_path / "drawn.png"),
    )  # fmt: skip
    assert drawn.status == 0, drawn.err
    ours, theirs = (np.asarray(PIL.Image.open(one)) for one in (previews[1], tmp_path / "drawn.png"))
    assert np.array_equal(ours, theirs)
    assert not np.array_equal(ours, np.asarray(PIL.Image.open(previews[0])))
    page = (tmp_path / "out" / "loss" / "loss.html").read_text()
    assert page.count("data:image/jpeg") == 2 and "<polyline" in page
    assert "http" not in page.replace("http://www.w3.org", "") and "<script" not in page


def test_a_preview_changes_nothing_of_the_run(tmp_path):
    monitoring = {"generate_image_frequency": 2, "preview_width": 32, "preview_height": 32, "plot_frequency": 1}
    Loop(TrainingSession(spec_of(tmp_path, checkpoint__output_path=str(tmp_path / "without")))).run()
    seen = spec_of(tmp_path, checkpoint__output_path=str(tmp_path / "with"), monitoring=monitoring)
    Loop(TrainingSession(seen)).run()
    one, two = final(tmp_path / "without"), final(tmp_path / "with")
    assert all(mx.array_equal(one[name], two[name]) for name in one)


def test_what_a_page_says_is_escaped(tmp_path):
    spec = spec_of(tmp_path)
    spec.configuration["model"] = "<script>alert(1)</script>"
    page = plot.page(spec, Losses([Losses.entry(1, 0.5)], []), [], done=1, total=2)
    assert "<script" not in page and "&lt;script&gt;" in page


def test_smoothing():
    assert plot.smoothed([(1, 1.0), (2, 3.0), (3, 5.0)], 2) == [(1, 1.0), (2, 2.0), (3, 4.0)]


def test_the_order_of_the_data_is_0_24_s():
    rng = random.Random(9)
    order = list(range(5))
    rng.shuffle(order)

    class Item(int):
        pass

    iterator = Iterator(Dataset([Item(number) for number in range(5)]), 2, 2, 9)
    assert [list(next(iterator).data) for _ in range(3)] == [order[:2], order[2:4], order[4:]]
    rng.shuffle(second := list(range(5)))
    assert [int(item) for batch in iterator for item in batch.data] == second
    assert iterator.total_number_of_steps() == 6


def test_weights_are_set_whole_or_not_at_all(tmp_path):
    session = TrainingSession(spec_of(tmp_path))
    weights = session.lora_weights()
    name = min(weights)
    for wrong in (
        {key: value for key, value in weights.items() if key != name},
        weights | {"nothing.lora_A.weight": mx.zeros((1, 1))},
        weights | {name: mx.zeros((1, 1))},
        weights | {name: mx.full(weights[name].shape, float("nan"))},
    ):
        with pytest.raises(CheckpointError):
            session.set_lora_weights(wrong)
    assert all(mx.array_equal(value, weights[key]) for key, value in session.lora_weights().items())


def test_an_assistant_stands_beside_while_training_alone(written, tmp_path, monkeypatch):
    with zipfile.ZipFile(written) as archive:
        (tmp_path / "assistant.safetensors").write_bytes(archive.read("0000006_adapter.safetensors"))
    assistant = {"path": str(tmp_path / "assistant.safetensors"), "scale": 20}
    plain, assisted = (TrainingSession(spec_of(tmp_path, assistant_lora=one)) for one in (None, assistant))
    noise = [mx.random.normal(item.clean_latents.shape, key=mx.random.key(1)) for item in plain.items]
    losses = [float(one.loss(one.items, [0.5] * 3, noise)) for one in (plain, assisted)]
    assert losses[0] != losses[1]
    drawn = [np.asarray(one.preview("a red circle", None, 32, 32).image) for one in (plain, assisted)]
    assert np.array_equal(*drawn)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MfluxError, match='"assistant_lora": null trains without'):
        TrainingSession(spec_of(tmp_path, assistant_lora="nobody/has:this.safetensors"))


# ---- memory


def test_recomputing_takes_less_memory_with_our_kernels(tmp_path, monkeypatch):
    """On a stack of blocks, every kernel that computes at once being asked to."""
    from mflux.backend import nn
    from mflux.cpu import first_order, work
    from mflux.models.common.networks.mmdit import SingleTransformerBlock
    from mflux.models.common.training.recompute import forget

    monkeypatch.setattr(work, "LEAST", 1)

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = [SingleTransformerBlock(4, 32) for _ in range(16)]

        def __call__(self, x, condition, rotary):
            for block in self.blocks:
                x = block(x, condition, rotary)
            return x

    peaks, gradients = [], []
    for recomputes in (False, True):
        mx.random.seed(1)
        stack = Stack()
        stack.freeze()
        shapes = {f"blocks.{number}.attn.to_q": (128, 128) for number in range(16)}
        layers = [lora.Layer(path, 4, 4.0) for path in shapes]
        trained = lora.inject(stack, layers, shapes, 0)
        drawn = {name: mx.random.normal(value.shape, key=mx.random.key(number)) * 0.1
                 for number, (name, value) in enumerate(lora.weights_of(trained).items())}  # fmt: skip
        if recomputes:
            forget(stack, ["blocks"])
        x, condition = mx.random.normal((1, 512, 128)), mx.random.normal((1, 128))
        rotary = (mx.ones((512, 16)), mx.zeros((512, 16)))
        mx.eval(x, condition, rotary, drawn, stack.parameters() if not recomputes else [])

        def loss(weights, stack=stack, trained=trained, x=x, condition=condition, rotary=rotary):
            lora.put_weights(trained, weights)
            return mx.square(stack(x, condition, rotary)).mean()

        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        with first_order():
            value, found = mx.value_and_grad(loss)(drawn)
        mx.eval(value, found)
        peaks.append(mx.get_peak_memory() - before)
        gradients.append({name: np.array(one) for name, one in found.items()})
    assert peaks[1] < 0.5 * peaks[0]
    for name, value in gradients[0].items():
        np.testing.assert_allclose(gradients[1][name], value, rtol=1e-3, atol=1e-5 * np.abs(value).max())


def test_encoders_are_released_and_data_lie_on_the_disk(tmp_path):
    (tmp_path / "out").mkdir()
    spec = spec_of(tmp_path, low_ram=True, checkpoint__output_path=str(tmp_path / "new"))
    spec.checkpoint.output_path = str(tmp_path / "out")
    session = TrainingSession(spec)
    assert list(session.pipeline.loaded()) == ["transformer"]
    stores = [one for one in (tmp_path / "out").iterdir() if one.name.startswith(".mflux-")]
    assert len(stores) == 1
    whole = TrainingSession(spec_of(tmp_path))
    for one, other in zip(session.items, whole.items, strict=True):
        assert mx.array_equal(one.clean_latents, other.clean_latents) and one.cond.keys() == other.cond.keys()
        assert all(mx.array_equal(value, other.cond[name]) for name, value in one.cond.items())
    session.close()
    assert not stores[0].exists()


def test_a_model_that_does_not_fit_is_refused_with_what_to_change(tmp_path, monkeypatch):
    from mflux.models.common.training import estimate
    from mflux.utils.memory import Memory

    monkeypatch.setattr(estimate, "machine_memory", lambda: Memory(5_000_000))
    with pytest.raises(UsageError, match='try "gradient_checkpointing": true .* then "quantize": 4'):
        TrainingSession(spec_of(tmp_path))


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 8])
def test_a_quantized_base_learns(bits, tmp_path):
    session = TrainingSession(spec_of(tmp_path, quantize=bits, optimizer__learning_rate=1e-2))
    noise = [mx.random.normal(item.clean_latents.shape, key=mx.random.key(1)) for item in session.items]
    losses = []
    for _ in range(8):
        loss, gradients = session.loss_and_gradients(session.items, [0.5] * 3, noise)
        assert session.apply(gradients)
        losses.append(float(loss))
    assert losses[-1] < losses[0]


def test_what_is_imported_from_0_24_s_paths():
    from mflux.models.common.training.adapters.base import TrainingAdapter
    from mflux.models.common.training.dataset.batch import Batch, DataItem
    from mflux.models.common.training.optimization.optimizer import Optimizers
    from mflux.models.common.training.state.training_spec import BlockRange
    from mflux.models.common.training.state.training_spec import TrainingSpec as Theirs

    from mflux.models.common.training.lora import expand_module_paths, get_at_path, inject_lora_targets, set_at_path
    from mflux.models.common.training.runner import TrainingRunner

    assert Theirs is TrainingSpec and Optimizers.from_alias("Lion").__name__ == "Lion"
    target = LoraTargetSpec("a.{block}.b", 2, BlockRange(0, 2))
    assert expand_module_paths(target) == ["a.0.b", "a.1.b"]
    assert all((TrainingAdapter, Batch, DataItem, get_at_path, inject_lora_targets, set_at_path, TrainingRunner))


def test_a_file_is_written_whole(tmp_path, written):
    assert checkpoint.in_words(3661) == "1 hour and 1 minute and 1 second" and checkpoint.in_words(0) == "0 seconds"
    assert not [one for one in written.parent.iterdir() if one.name.startswith(".")]
    assert io.BytesIO(written.read_bytes()).read(2) == b"PK" and os.access(written, os.R_OK)


# ---- what a newcomer met


def test_a_reader_that_goes_away_ends_nothing(tmp_path):
    """`2>&1 | head`: what was to be told goes nowhere, and what was learned is written."""
    path = write_config(tmp_path, training_loop__num_epochs=3, checkpoint__save_frequency=1000)
    process = run_train("--config", str(path))
    seen = ""
    while "loss=" not in seen:
        seen += (piece := process.stderr.read(1))
        assert piece, seen
    process.stderr.close()
    process.stdout.close()
    process.wait(timeout=240)
    assert (tmp_path / "out" / "checkpoints" / "0000006_checkpoint.zip").is_file()
    assert (tmp_path / "out" / "0000006_adapter.safetensors").is_file()


def test_whatever_ends_a_run_what_was_learned_is_written(tmp_path, monkeypatch):
    loop = Loop(TrainingSession(spec_of(tmp_path, checkpoint__save_frequency=1000)))

    def fails():
        if loop.iterator.num_iterations == 3:
            raise ZeroDivisionError

    loop.after_batch = fails
    with pytest.raises(ZeroDivisionError):
        loop.run()
    assert Checkpoint(loop.written.checkpoint).iterator()["num_iterations"] == 3


def test_what_was_written_last_is_kept(tmp_path):
    """Also where older ones have higher numbers: a run that went on from the middle once more."""
    spec = spec_of(tmp_path, checkpoint__keep=1, checkpoint__save_frequency=1)
    Loop(TrainingSession(spec)).run()
    folder = tmp_path / "out" / "checkpoints"
    assert [one.name for one in folder.iterdir()] == ["0000006_checkpoint.zip"]
    again = Loop(TrainingSession(spec))
    again._batch(next(again.iterator))
    again._save()
    assert sorted(one.name for one in folder.iterdir()) == ["0000001_checkpoint.zip", "0000006_checkpoint.zip"]


def test_a_start_that_fails_leaves_no_folder(tmp_path, cli):
    layers = {"targets": [{"module_path": "layers.{block}.attention.to_q", "blocks": "all", "rank": 4}]}
    done = cli("train", "--config", str(write_config(tmp_path, lora_layers=layers)))
    assert done.status == 2 and "transformer_blocks.{block}.attn.to_q" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("content", "status"), [("a red circle".encode("utf-16"), 2), ("a café".encode("latin-1"), 0)])
def test_captions_that_are_no_utf_8(content, status, tmp_path, cli):
    path = write_config(tmp_path)
    (tmp_path / "data" / "1.txt").write_bytes(content)
    done = cli("train", "--config", str(path), "--dry-run")
    assert done.status == status and "1.txt" in done.err and "UTF-8" in done.err


def test_a_run_that_has_ended_says_so(written, cli, tmp_path):
    copied = tmp_path / "run" / "checkpoints" / written.name
    copied.parent.mkdir(parents=True)
    copied.write_bytes(written.read_bytes())
    done = cli("train", "--resume", str(copied))
    assert done.status == 0 and "this run has ended" in done.err
    # It goes on where the file lies, and not where it says.
    assert list((tmp_path / "run").glob("*_adapter.safetensors"))


@pytest.mark.parametrize(
    "change", [{"start_date_time": "0001-01-01 00:00:00"}, {"num_iterations": 10**400}, {"num_epochs": 10**12}]
)
def test_a_place_in_the_data_that_makes_no_sense(written, tmp_path, change):
    def other(members):
        name = next(name for name in members if name.endswith("iterator.json"))
        return members | {name: json.dumps(json.loads(members[name]) | change).encode()}

    path = changed(written, tmp_path / "c.zip", other)
    with pytest.raises(CheckpointError, match="makes no sense"):
        TrainingSpec.resolve(None, path, create_output_dir=False)
