"""float8, int8 and bitsandbytes in safetensors: what is read, what it becomes, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mflux.backend import mx, nn
from mflux.checkpoints.loading import FolderTensors, fill
from mflux.checkpoints.stored import tensors as stored
from mflux.errors import CheckpointError

RNG = np.random.default_rng(7)
# Ascending, with 0 in the eighth place.
NF4 = np.sort(np.append(RNG.uniform(-1, 1, 15), 0)).astype(np.float32)


def note(**entries) -> mx.array:
    return mx.array(np.frombuffer(json.dumps(entries).encode(), np.uint8))


def nf4(shape=(64, 128), block=64, nested=False) -> tuple[dict[str, mx.array], np.ndarray]:
    """A matrix as bitsandbytes packs it, and what it means."""
    count = int(np.prod(shape))
    codes = RNG.integers(0, 16, count).astype(np.uint8)
    absmax = RNG.uniform(0.5, 2, count // block).astype(np.float32)
    said = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": list(shape)}
    tensors = {
        "layer.weight": mx.array(codes[0::2] << 4 | codes[1::2])[:, None],
        "layer.weight.quant_map": mx.array(NF4),
    }
    if nested:
        table, outer = RNG.uniform(-1, 1, 256).astype(np.float32), RNG.uniform(0.5, 2, -(-len(absmax) // 4))
        inner = RNG.integers(0, 256, len(absmax)).astype(np.uint8)
        outer = outer.astype(np.float32)
        absmax = table[inner] * np.repeat(outer, 4)[: len(absmax)] + np.float32(0.75)
        said |= {"nested_blocksize": 4, "nested_offset": 0.75, "nested_dtype": "float32"}
        tensors |= {
            "layer.weight.absmax": mx.array(inner),
            "layer.weight.nested_absmax": mx.array(outer),
            "layer.weight.nested_quant_map": mx.array(table),
        }
    else:
        tensors["layer.weight.absmax"] = mx.array(absmax)
    tensors["layer.weight.quant_state.bitsandbytes__nf4"] = note(**said)
    return tensors, (NF4[codes] * np.repeat(absmax, block)).reshape(shape)


def int8(scales: str) -> tuple[dict[str, mx.array], np.ndarray]:
    q = RNG.integers(-128, 128, (200, 256)).astype(np.int8)
    tensors = {"layer.weight": mx.array(q)}
    if scales == "SCB":
        scale = RNG.uniform(0.5, 2, 200).astype(np.float32)
        return tensors | {"layer.SCB": mx.array(scale)}, q * (scale / np.float32(127))[:, None]
    if scales == "blocks":
        scale = RNG.uniform(0.5, 2, (2, 2)).astype(np.float32)
        tensors |= {"layer.weight_scale": mx.array(scale), "layer.comfy_quant": note(format="int8_blockwise")}
        return tensors, q * np.repeat(np.repeat(scale, 128, 0)[:200], 128, 1)
    scale = RNG.uniform(0.5, 2, 200 if scales == "rows" else ()).astype(np.float32)
    tensors |= {"layer.weight_scale": mx.array(scale), "layer.comfy_quant": note(format="int8_tensorwise")}
    return tensors, q * scale.reshape(-1, 1)


KINDS = {
    "NF4": (nf4, {}), "NF4, packed twice": (nf4, {"nested": True}), "int8 of bitsandbytes": (int8, {"scales": "SCB"}),
    "int8": (int8, {"scales": "one"}), "int8, a scale a row": (int8, {"scales": "rows"}),
    "int8 in blocks": (int8, {"scales": "blocks"}),
}  # fmt: skip


class Net(nn.Module):
    def __init__(self, shape: tuple[int, int]):
        super().__init__()
        self.layer = nn.Linear(shape[1], shape[0], bias=False)


@pytest.mark.parametrize(("make", "options"), KINDS.values(), ids=KINDS)
def test_what_a_layer_computes_with(make, options, tmp_path, caplog):
    tensors, expected = make(**options)
    mx.save_safetensors(str(tmp_path / "x.safetensors"), tensors)
    dense = FolderTensors(tmp_path, packs=False)
    assert set(dense) == {"layer.weight"} and np.allclose(np.array(dense["layer.weight"]), expected, rtol=1e-6)
    net = Net(expected.shape)
    stored._said.clear()
    fill(net, FolderTensors(tmp_path), source=tmp_path)
    assert isinstance(net.layer, nn.QuantizedLinear) and net.layer.bits == 8
    x = mx.array(RNG.standard_normal((3, expected.shape[1])).astype(np.float32))
    error = np.linalg.norm(np.array(net.layer(x)) - np.array(x) @ expected.T) / np.linalg.norm(np.array(x) @ expected.T)
    exact = make is int8
    assert error < (1e-5 if exact else 0.01)
    told = [record.getMessage() for record in caplog.records]
    assert bool(told) != exact and all("which MLX does not hold: they take 8.5 bits" in line for line in told)
    # Said once for a file.
    fill(Net(expected.shape), FolderTensors(tmp_path), source=tmp_path)
    assert len(caplog.records) == len(told)


def broken(change):
    def made() -> dict[str, mx.array]:
        tensors, _ = nf4()
        change(tensors)
        return tensors

    return made


def saying(**entries):
    return lambda tensors: tensors.update({
        "layer.weight.quant_state.bitsandbytes__nf4": note(
            **{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 128]} | entries)
    })  # fmt: skip


FP8 = mx.zeros((32, 64), mx.uint8)
REFUSED = {
    "no state": (broken(lambda t: t.pop("layer.weight.quant_state.bitsandbytes__nf4")), "what says how is missing"),
    "no JSON": (
        broken(lambda t: t.update({"layer.weight.quant_state.bitsandbytes__nf4": mx.zeros(9, mx.uint8)})), "JSON"),
    "another shape": (broken(saying(shape=[64, 1 << 40])), "makes no sense"),
    "a negative shape": (broken(saying(shape=[-64, -128])), "makes no sense"),
    "blocks of none": (broken(saying(blocksize=0)), "makes no sense"),
    "an unknown type": (broken(saying(quant_type="nf3")), "makes no sense"),
    "too few factors": (
        broken(lambda t: t.update({"layer.weight.absmax": mx.ones(3)})), "has 3 factors for 128 blocks"),
    "half packed twice": (
        broken(lambda t: t.update({"layer.weight.nested_absmax": mx.ones(3)})), "packed by bitsandbytes twice"),
    "GPTQ": (lambda: {"layer.qweight": FP8}, "is quantized by GPTQ or AWQ"),
    "Nunchaku": (lambda: {"layer.wscales": FP8}, "is quantized by SVDQuant"),
    "NVFP4": (lambda: {"layer.weight": FP8, "layer.weight_scale_2": mx.ones(1)}, "NVFP4 in a layout for tensor cores"),
    "a format that is not read": (
        lambda: {"layer.weight": FP8, "layer.comfy_quant": note(format="mxfp8")}, "packed as mxfp8, which"),
    "rotated": (
        lambda: {"layer.weight": FP8.astype(mx.int8), "layer.weight_scale": mx.ones(1),
                 "layer.comfy_quant": note(format="int8_tensorwise", convrot=True)}, "int8_tensorwise and rotated"),
    "without its scale": (
        lambda: {"layer.weight": FP8, "layer.comfy_quant": note(format="float8_e4m3fn")}, "that a scale belongs to"),
    "scales of another shape": (
        lambda: {"layer.weight": FP8, "layer.weight_scale": mx.ones(7),
                 "layer.comfy_quant": note(format="float8_e4m3fn")},
        r"has scales of shape \[7\]"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "told"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(make, told, tmp_path):
    mx.save_safetensors(str(tmp_path / "x.safetensors"), make())
    with pytest.raises(CheckpointError, match=told) as caught:
        FolderTensors(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_notes_in_the_header(tmp_path):
    tensors = {
        "model.diffusion_model.layer.weight": FP8 + 56,
        "model.diffusion_model.layer.weight_scale": mx.array(2.0),
    }
    said = json.dumps({"format_version": "1.0", "layers": {"layer": {"format": "float8_e4m3fn"}}})
    mx.save_safetensors(str(tmp_path / "x.safetensors"), tensors, metadata={"_quantization_metadata": said})
    found = FolderTensors(tmp_path, packs=False)
    assert set(found) == {"model.diffusion_model.layer.weight"}
    # 56 is 1.
    assert (np.array(found["model.diffusion_model.layer.weight"]) == 2).all()
