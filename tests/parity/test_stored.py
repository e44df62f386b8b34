"""What files store in ways of their own, beside those that read it elsewhere: the package gguf, torch's float8."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from support.gguf_files import random_blocks, write_gguf

from mflux.backend import mx
from mflux.checkpoints.loading import FolderTensors
from mflux.checkpoints.readers.gguf import KINDS
from mflux.checkpoints.stored.blocks import FORMS
from mflux.checkpoints.stored.opened import _PLAIN

# What the tables of these are is the package's own business.
BY_PACKAGE = ("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_M", "TQ1_0")
SHAPE = (6, 512)


def test_every_kind_is_here():
    assert {*FORMS, *BY_PACKAGE, *_PLAIN} == {name for name, _, _ in KINDS.values()}
    for number, (name, size, width) in KINDS.items():
        kind = gguf.GGMLQuantizationType(number)
        assert kind.name == name and gguf.GGML_QUANT_SIZES[kind] == (size, width)


@pytest.mark.parametrize("kind", [*FORMS, *BY_PACKAGE])
def test_blocks_mean_what_gguf_says(kind, tmp_path):
    content = random_blocks(kind, SHAPE, seed=3)
    blocks = np.frombuffer(content[2], np.uint8).reshape(SHAPE[0], -1)
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    if kind == "IQ1_M":
        # Its scale stands in four places.
        expected = np.where(np.isfinite(expected), expected, 0)
    file = write_gguf(tmp_path / "x.gguf", {"layer.weight": content})
    dense = np.array(FolderTensors(tmp_path, [file], packs=False)["layer.weight"])
    dense = np.where(np.isfinite(dense), dense, 0)
    assert dense.dtype == np.float32 and np.array_equal(dense, expected)


@pytest.mark.parametrize("kind", FORMS)
def test_what_mlx_holds_has_the_same_numbers(kind, tmp_path):
    content = random_blocks(kind, SHAPE, seed=4)
    file = write_gguf(tmp_path / "x.gguf", {"layer.weight": content})
    dense = np.array(FolderTensors(tmp_path, [file], packs=False)["layer.weight"])
    tensors = FolderTensors(tmp_path, [file])
    told = {name: (tensors.spec(name).dtype, tensors.spec(name).shape) for name in tensors}
    parts = {name.rpartition(".")[2]: tensors[name] for name in tensors}
    assert {name: told[f"layer.{name}"][1] for name in parts} == {name: part.shape for name, part in parts.items()}
    form = tensors.stored["layer.weight"].becomes
    scales = parts["scales"] if form.mode != "affine" else parts["scales"].astype(mx.float32)
    biases = parts["biases"].astype(mx.float32) if "biases" in parts else None
    got = mx.dequantize(
        parts["weight"], scales, biases, group_size=form.group_size, bits=form.bits, mode=form.mode, dtype=mx.float32
    )
    if FORMS[kind].held is not None:
        assert np.array_equal(np.array(got), dense)
    else:
        assert np.linalg.norm(np.array(got) - dense) < 0.01 * np.linalg.norm(dense)


@pytest.mark.parametrize("quantization", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "BF16", "F16"])
def test_a_file_that_gguf_writes(quantization, tmp_path):
    rng = np.random.default_rng(5)
    values = {
        "a.weight": rng.standard_normal((8, 96), np.float32),
        "b.weight": rng.standard_normal((4, 64), np.float32),
    }
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "flux")
    writer.add_array("tokenizer.ggml.tokens", [f"word {number}" for number in range(3000)])
    writer.add_array("general.tags", ["a", "ü"])
    writer.add_custom_alignment(64)
    kind = gguf.GGMLQuantizationType[quantization]
    for name, value in values.items():
        writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = FolderTensors(tmp_path, [tmp_path / "x.gguf"], packs=False)
    for name, value in values.items():
        expected = gguf.quants.dequantize(gguf.quants.quantize(value, kind), kind)
        assert np.array_equal(np.array(tensors[name].astype(mx.float32)), expected)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scaled", ["", "scale_weight", "weight_scale", "rows", "weight_scale_inv"])
def test_float8(dtype, scaled, tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    weight = (torch.randn(160, 256) * 0.3).to(dtype)
    tensors, expected = {"layer.weight": weight}, weight.float()
    if scaled == "weight_scale_inv":
        blocks = torch.rand(2, 2) + 0.5
        expected = expected * blocks.repeat_interleave(128, 0)[:160].repeat_interleave(128, 1)
        tensors["layer.weight_scale_inv"] = blocks
    elif scaled:
        scale = torch.rand(160, 1) + 0.5 if scaled == "rows" else torch.tensor(0.37)
        tensors["layer.weight_scale" if scaled == "rows" else f"layer.{scaled}"] = scale
        expected = expected * scale
    if scaled == "scale_weight":
        tensors |= {"scaled_fp8": torch.zeros(2).to(dtype), "layer.scale_input": torch.ones(1)}
    save_file(tensors, str(tmp_path / "x.safetensors"))
    dense = FolderTensors(tmp_path, packs=False)
    assert set(dense) == {"layer.weight"}
    assert np.array_equal(np.array(dense["layer.weight"]), expected.numpy())
    packed = FolderTensors(tmp_path)
    form = packed.stored["layer.weight"].becomes
    exact = dtype == torch.float8_e4m3fn and not scaled
    assert (form.mode == "mxfp8") == exact
    parts = [packed[f"layer.{leaf}"] for leaf in ("weight", "scales")]
    biases = packed["layer.biases"].astype(mx.float32) if "layer.biases" in packed else None
    scales = parts[1].astype(mx.float32) if biases is not None else parts[1]
    got = np.array(
        mx.dequantize(parts[0], scales, biases, group_size=form.group_size, bits=8, mode=form.mode, dtype=mx.float32)
    )
    error = np.linalg.norm(got - expected.numpy()) / np.linalg.norm(expected.numpy())
    assert error == 0 if exact else error < 0.008
