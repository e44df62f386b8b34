"""What computes: one place decides, by a variable, an option or a program's word."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from support.gpu import Call, Form, as_gpu, recording, refusal

from mflux import backend
from mflux.backend import UsageError, mx, nn
from mflux.cpu import work

TELL = (
    "import json; from mflux.backend import *; "
    "print(json.dumps([on_gpu(), has_gpu(), str(compute_dtype(mx.bfloat16)), str(mx.default_device().type)]))"
)
has_device = mx.is_available(mx.gpu)
no_gpu = pytest.mark.skipif(has_device, reason="there is a GPU")


def run(code: str, device: str | None) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "MFLUX_DEVICE"}
    if device is not None:
        environment["MFLUX_DEVICE"] = device
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("device", "told"),
    [
        ("cpu", '[false, false, "mlx.core.float32", "DeviceType.cpu"]'),
        ("as-gpu", '[false, true, "mlx.core.bfloat16", "DeviceType.cpu"]'),
        pytest.param("", '[false, false, "mlx.core.float32", "DeviceType.cpu"]', marks=no_gpu),
        pytest.param(None, '[false, false, "mlx.core.float32", "DeviceType.cpu"]', marks=no_gpu),
    ],
)
def test_the_variable_decides_before_anything_is_computed(device, told):
    done = run(TELL, device)
    assert (done.stdout.strip(), done.stderr) == (told, "")


@pytest.mark.parametrize(
    ("device", "told"),
    [
        ("metal", "error: MFLUX_DEVICE: there is no device 'metal': it is cpu or gpu\n"),
        pytest.param("gpu", "error: MFLUX_DEVICE: MLX finds no GPU here", marks=no_gpu),
    ],
)
def test_a_variable_that_names_none_is_one_sentence(cli_process, tmp_path, device, told):
    words = ("generate", "--model", "demo", "--prompt", "x", "--output", tmp_path / "a.png")
    result = cli_process(*words, env=os.environ | {"MFLUX_DEVICE": device})
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith(told) and len(result.err.splitlines()) == 1
    assert cli_process("generate", "--help", env=os.environ | {"MFLUX_DEVICE": device}).status == 0


@no_gpu
def test_a_gpu_that_is_not_there(cli, in_folder):
    result = cli("generate", "--model", "demo", "--prompt", "x", "--device", "gpu")
    assert result.status == 2
    assert result.errors == ["error: MLX finds no GPU here, and gpu was asked for: take cpu, or see mflux doctor"]
    assert list(in_folder.iterdir()) == []


def test_the_option_comes_before_the_variable(cli, in_folder):
    with as_gpu():
        assert backend.has_gpu()
        assert cli("generate", "--model", "demo", "--prompt", "x", "--steps", 1, "--device", "cpu").status == 0
        assert not backend.has_gpu()


def test_every_command_that_computes_has_the_option(cli):
    import importlib

    from mflux.cli.commands import COMMANDS

    without = []
    for name, command in COMMANDS.items():
        module = importlib.import_module(command.module)
        build = module.build_parser if hasattr(module, "build_parser") else module.COMMAND.build_parser
        parser = build()
        if "--device" not in parser._option_string_actions:
            without.append(name)
    assert sorted(without) == ["capabilities", "check", "completions", "doctor", "info", "lora-library"]


def test_a_program_is_told_that_a_device_is_the_process_s():
    from mflux.models.flux.cli.flux_generate import COMMAND

    with pytest.raises(UsageError, match="for the whole process"):
        COMMAND.plan({"prompt": "x", "model": "demo", "device": "cpu"})


def test_as_a_gpu_nothing_is_numpy_s():
    x = mx.random.normal((512, 512))
    layer = nn.Linear(512, 512)
    assert work.serves(x) == (not backend.has_gpu())
    with as_gpu(), recording() as calls:
        assert not work.serves(x)
        layer(x).sum().item()
    names = [call.name for call in calls]
    assert "addmm" in names and names[-1] == "array.item" and calls[-1].waits
    assert calls[names.index("addmm")].outputs == (Form(mx.float32, (512, 512)),)
    assert not any(call.waits for call in calls[:-1])


BF16 = Form(mx.bfloat16, (1, 2, 8, 64))


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (Call("add", (Form(mx.float64, (2,)),), ()), "float64"),
        (Call("multiply", (), (Form(mx.complex64, (2,)),)), "complex64"),
        (Call("array.__add__", (Form(mx.int64, (2,)),), (Form(mx.int64, (2,)),)), "64-bit integers"),
        (Call("array.__setitem__", (Form(mx.uint64, (2,)),), ()), "64-bit"),
        (Call("linalg.svd", (Form(mx.float32, (2, 2)),), ()), "factorisations"),
        (Call("zeros", (), (Form(mx.uint8, (1 << 16, 1 << 15)),)), "more than a buffer"),
        (Call("zeros", (), (Form(mx.float32, (1 << 15, 1 << 15)),)), "more than a buffer"),
        (Call("fast.scaled_dot_product_attention", (BF16, Form(mx.float32, BF16.shape), BF16), (BF16,)), "differ"),
        (
            Call("fast.scaled_dot_product_attention", (BF16,) * 3, (BF16,), {"mask": Form(mx.float32, (8, 8))}),
            "the mask is",
        ),
    ],
    ids=str,
)
def test_what_a_gpu_refuses_is_told(call, why):
    assert why in (refusal(call) or "")


def test_what_a_gpu_takes_is_not_refused():
    for call in (
        Call("fast.scaled_dot_product_attention", (BF16,) * 3, (BF16,), {"mask": Form(mx.bool_, (8, 8))}),
        Call("array.__getitem__", (Form(mx.float32, (9, 2)), Form(mx.int64, (3,))), (Form(mx.float32, (3, 2)),)),
        Call("zeros", (), (Form(mx.uint8, ((1 << 31) - 1,)),)),
        Call("linalg.norm", (Form(mx.float32, (2, 2)),), (Form(mx.float32, ()),)),
    ):
        assert refusal(call) is None
