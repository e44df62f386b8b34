"""PyTorch files put together by hand: what comes out must be what numpy makes of the same bytes."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.torch_archives import (
    Call,
    Global,
    Persistent,
    Raw,
    archive,
    legacy,
    parameter,
    pickled,
    save,
    spelled,
    storage,
    tensor,
    tensor_v3,
    zipped,
)

from mflux.backend import mx
from mflux.checkpoints import load_checkpoint, open_checkpoint
from mflux.checkpoints.readers.pytorch import PytorchFile
from mflux.errors import CheckpointError, MissingExtraError, UnsafeCheckpointError

SIX = np.arange(6, dtype=np.float32)
ORDERED = Global("collections", "OrderedDict")

# torch's storage class → numpy's dtype, of which MLX has the same.
SAME = {
    "FloatStorage": "f4", "HalfStorage": "f2", "LongStorage": "i8", "IntStorage": "i4", "ShortStorage": "i2",
    "CharStorage": "i1", "ByteStorage": "u1", "ComplexFloatStorage": "c8",
}  # fmt: skip


def load(tmp_path, content: bytes, key: str | None = None) -> dict[str, mx.array]:
    return load_checkpoint(save(tmp_path / "weights.pt", content), key)


def some(code: str, count: int) -> np.ndarray:
    raw = np.random.default_rng(count).integers(0, 256, count * np.dtype(code).itemsize, dtype=np.uint8)
    return raw.view(code)


def same_bits(value: mx.array, expected: np.ndarray) -> bool:
    found = np.array(value.view(mx.uint16) if value.dtype == mx.bfloat16 else value)
    return found.shape == expected.shape and found.dtype == expected.dtype and found.tobytes() == expected.tobytes()


# ---- dtypes, byte orders, containers


@pytest.mark.parametrize("kind", SAME)
@pytest.mark.parametrize("container", ["little", "big", "unsaid", "legacy"])
def test_a_dtype_comes_out_bit_for_bit(tmp_path, kind, container):
    code = SAME[kind]
    values = some(code, 12)
    root = {"w": tensor("0", (3, 4), kind=kind)}
    if container == "legacy":
        content = legacy(root, {"0": (12, values.tobytes())})
    else:
        stored = values.astype(np.dtype(code).newbyteorder(">")) if container == "big" else values
        content = archive(root, {"0": stored.tobytes()}, None if container == "unsaid" else container)
    assert same_bits(load(tmp_path, content)["w"], values.reshape(3, 4))


@pytest.mark.parametrize("byteorder", ["little", "big"])
def test_bfloat16_keeps_its_bits(tmp_path, byteorder):
    bits = some("u2", 6)
    stored = bits.byteswap() if byteorder == "big" else bits
    value = load(tmp_path, archive({"w": tensor("0", kind="BFloat16Storage")}, {"0": stored.tobytes()}, byteorder))["w"]
    assert value.dtype == mx.bfloat16
    assert same_bits(value, bits.reshape(2, 3))


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64", "float32"])
@pytest.mark.parametrize("container", ["little", "big", "legacy"])
def test_dtypes_without_a_storage_class(tmp_path, dtype, container):
    values = some(dtype, 6)
    root = {"w": tensor_v3("0", dtype, (2, 3), values.nbytes)}
    if container == "legacy":
        content = legacy(root, {"0": (values.nbytes, values.tobytes())})
    else:
        stored = values.byteswap() if container == "big" else values
        content = archive(root, {"0": stored.tobytes()}, container)
    assert same_bits(load(tmp_path, content)["w"], values.reshape(2, 3))


def test_bool_takes_any_byte_but_zero_for_true(tmp_path):
    value = load(tmp_path, archive({"w": tensor("0", (4,), kind="BoolStorage")}, {"0": bytes([0, 1, 2, 255])}))["w"]
    assert value.dtype == mx.bool_
    assert value.tolist() == [False, True, True, True]


def test_float64_becomes_float32_and_says_so_once(tmp_path, caplog):
    values = np.array([0.1, -1e300, np.nan, 1e-50, np.inf])
    root = {"a": tensor("0", (5,), kind="DoubleStorage"), "b": tensor("0", (5,), kind="DoubleStorage")}
    with caplog.at_level(logging.WARNING, logger="mflux"):
        logging.getLogger("mflux").propagate = True
        file = PytorchFile(save(tmp_path / "w.pt", archive(root, {"0": values.tobytes()})))
        found = [file["a"], file["b"]]
    with np.errstate(over="ignore"):
        expected = values.astype(np.float32)
    assert all(same_bits(value, expected) for value in found)
    assert [record.message for record in caplog.records] == [f"{file.path}: its float64 tensors become float32"]


def test_float8_by_value(tmp_path):
    # Some values of each format by hand: source, Micikevicius et al. 2022, table 1.
    e4m3 = {0x00: 0.0, 0x01: 2**-9, 0x08: 2**-6, 0x38: 1.0, 0x39: 1.125, 0x7E: 448.0, 0xB8: -1.0}
    e5m2 = {0x00: 0.0, 0x01: 2**-16, 0x04: 2**-14, 0x3C: 1.0, 0x3D: 1.25, 0x7B: 57344.0, 0x7C: np.inf, 0xBC: -1.0}
    for dtype, values in (("float8_e4m3fn", e4m3), ("float8_e5m2", e5m2)):
        root = {"w": tensor_v3("0", dtype, (len(values),), len(values))}
        value = load(tmp_path, archive(root, {"0": bytes(values)}))["w"]
        assert value.dtype == mx.float32
        assert value.tolist() == list(values.values())


def test_dtypes_that_cannot_be_read_are_named(tmp_path):
    for kind, word in (("ComplexDoubleStorage", "complex128"), ("QInt8Storage", "qint8")):
        with pytest.raises(CheckpointError, match=f"layer.w has the dtype {word}"):
            load(tmp_path, archive({"layer.w": tensor("0", (2,), kind=kind)}, {"0": bytes(32)}))
    with pytest.raises(CheckpointError, match="float8_e8m0fnu"):
        load(tmp_path, archive({"w": tensor_v3("0", "float8_e8m0fnu", (2,), 2)}, {"0": bytes(2)}))


def test_conjugated_and_negated_views_are_resolved(tmp_path):
    values = np.array([1 + 2j, -3.5 + 0.25j, 7j], np.complex64)
    conjugated = tensor("0", (3,), kind="ComplexFloatStorage", metadata={"conj": True})
    negated = tensor("1", (3,), metadata={"neg": True})
    found = load(tmp_path, archive({"c": conjugated, "n": negated}, {"0": values.tobytes(), "1": SIX.tobytes()[:12]}))
    assert same_bits(found["c"], values.conj())
    assert same_bits(found["n"], -SIX[:3])


# ---- shapes


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_view_of_a_storage(tmp_path, data):
    shape = tuple(data.draw(st.lists(st.integers(0, 4), max_size=4)))
    strides = tuple(data.draw(st.lists(st.integers(0, 9), min_size=len(shape), max_size=len(shape))))
    offset = data.draw(st.integers(0, 9))
    code, kind = data.draw(st.sampled_from([("f4", "FloatStorage"), ("i8", "LongStorage"), ("f2", "HalfStorage")]))
    old = data.draw(st.booleans())
    count = offset + sum((length - 1) * step for length, step in zip(shape, strides, strict=True) if length) + 1
    values = some(code, max(count, 1))
    root = {"w": tensor("0", shape, strides, offset, kind=kind, count=values.size)}
    raw = values.tobytes()
    content = legacy(root, {"0": (values.size, raw)}) if old else archive(root, {"0": raw})
    steps = tuple(step * values.itemsize for step in strides)
    if 0 in shape:
        expected = np.empty(shape, code)
    else:
        expected = np.lib.stride_tricks.as_strided(values[offset:], shape, steps).copy()
    assert same_bits(load(tmp_path, content)["w"], expected)


def test_tied_names_share_memory_but_not_changes(tmp_path):
    root = {"a": tensor("0"), "b": tensor("0"), "t": tensor("0", (3, 2), (1, 3), count=6)}
    found = load(tmp_path, archive(root, {"0": SIX.tobytes()}))
    found["b"][0] = 9.0
    assert same_bits(found["a"], SIX.reshape(2, 3))
    assert same_bits(found["t"], SIX.reshape(2, 3).T.copy())
    assert found["b"][0].tolist() == [9.0, 9.0, 9.0]


def test_empty_neighbours_are_not_taken_for_one_another(tmp_path):
    root = {"e": tensor("0", (0, 3)), "f": tensor("1", (2,)), "g": tensor("1", (2, 1), count=2)}
    found = load(tmp_path, archive(root, {"0": b"", "1": SIX.tobytes()[:8]}))
    assert {name: value.shape for name, value in found.items()} == {"e": (0, 3), "f": (2,), "g": (2, 1)}


# ---- the tree and its names


def test_nested_dictionaries_and_lists_become_dotted_names(tmp_path):
    root = {"enc": {"layers": [tensor("0"), {"w": tensor("1")}]}, "3": {4: tensor("0")}, "head": parameter(tensor("1"))}
    found = load(tmp_path, archive(root, {"0": SIX.tobytes(), "1": (-SIX).tobytes()}))
    assert list(found) == ["enc.layers.0", "enc.layers.1.w", "3.4", "head"]
    assert same_bits(found["head"], -SIX.reshape(2, 3))


def test_odd_names_survive(tmp_path):
    names = ["", ".", "a.b", "ключ", "重み 🔑", "tab\there", "quote\"'", "null\0", "\ud800", "__metadata__"]
    found = load(tmp_path, archive({name: tensor("0") for name in names}, {"0": SIX.tobytes()}))
    assert list(found) == names


def test_names_that_would_collide_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"two tensors that would both be called a\.b"):
        load(tmp_path, archive({"a": {"b": tensor("0")}, "a.b": tensor("0")}, {"0": SIX.tobytes()}))


def test_a_repeated_key_takes_the_last_value(tmp_path):
    twice = Raw(b"}(" + spelled("w") + spelled(tensor("0")) + spelled("w") + spelled(tensor("1")) + b"u")
    found = load(tmp_path, archive(twice, {"0": SIX.tobytes(), "1": (-SIX).tobytes()}))
    assert same_bits(found["w"], -SIX.reshape(2, 3))


def test_what_is_no_tensor_is_dropped_and_named(tmp_path):
    scalar = Call(
        Global("numpy.core.multiarray", "scalar"),
        (Call(Global("numpy", "dtype"), ("f8", False, True)), Call(Global("_codecs", "encode"), ("x", "latin1"))),
    )
    root = {
        "w": tensor("0"),
        "epoch": 3,
        "best": scalar,
        "optimizer": {"state": {}, "groups": [{"lr": 0.1, "params": [0, 1]}]},
        "size": Call(Global("torch", "Size"), ((2, 3),)),
        "device": Call(Global("torch", "device"), ("cuda", 0)),
        "dtype": Global("torch", "bfloat16"),
        "names": Call(Global("__builtin__", "set"), (["a"],)),
        "bare": storage("0"),
        "mixed": {"note": "text", "w": tensor("0")},
    }
    file = PytorchFile(save(tmp_path / "w.pt", archive(root, {"0": SIX.tobytes()})))
    assert list(file) == ["w", "mixed.w"]
    assert file.dropped == ["epoch", "best", "optimizer", "size", "device", "dtype", "names", "bare", "mixed.note"]


def test_keys_that_make_no_name_lose_nothing(tmp_path):
    deep = Raw(b")" + b"\x85" * 50_000)
    root = Raw(b"}(" + spelled((1, 2)) + spelled(tensor("0")) + deep.code + spelled({"v": tensor("0")}) + b"u")
    file = PytorchFile(save(tmp_path / "w.pt", archive({"a": tensor("0"), "odd": root}, {"0": SIX.tobytes()})))
    assert list(file) == ["a", "odd.<tuple>", "odd.<tuple>.v"]


def test_a_file_of_nothing_but_numbers_holds_no_tensors(tmp_path):
    with pytest.raises(CheckpointError, match="holds no tensors"):
        load(tmp_path, archive({"epoch": 3}, {}))


def test_a_single_tensor_gets_a_name(tmp_path):
    assert same_bits(load(tmp_path, archive(tensor("0"), {"0": SIX.tobytes()}))["tensor"], SIX.reshape(2, 3))


WEIGHTS = {"a.w": tensor("0"), "b": tensor("0")}


@pytest.mark.parametrize(
    ("root", "key", "expected"),
    [
        (WEIGHTS, None, ["a.w", "b"]),
        ({"state_dict": WEIGHTS, "epoch": 1}, None, ["a.w", "b"]),
        ({"model": {"module": WEIGHTS}}, None, ["a.w", "b"]),
        ({"state_dict": {"module.a": tensor("0"), "module.b": tensor("0")}}, None, ["a", "b"]),
        # Names that a model may well have itself stay.
        ({"model.a": tensor("0"), "model.b": tensor("0")}, None, ["model.a", "model.b"]),
        ({"encoder": WEIGHTS}, None, ["encoder.a.w", "encoder.b"]),
        ({"module.a": tensor("0"), "b": tensor("0")}, None, ["module.a", "b"]),
        # Two candidates: nothing is taken off, nothing is lost.
        ({"model": {"w": tensor("0")}, "ema": {"w": tensor("0")}}, None, ["model.w", "ema.w"]),
        ({"model": {"w": tensor("0")}, "ema": {"w": tensor("0")}}, "ema", ["w"]),
        ({"state_dict": {"module.a": tensor("0")}}, "state_dict", ["module.a"]),
        ({"state_dict": {"module.a": tensor("0")}}, "state_dict.module.", ["a"]),
        ({"state_dict": WEIGHTS}, "", ["state_dict.a.w", "state_dict.b"]),
    ],
)
def test_wrappers(tmp_path, root, key, expected):
    assert list(load(tmp_path, archive(root, {"0": SIX.tobytes()}), key)) == expected


def test_a_key_that_is_not_there_is_told_what_is(tmp_path):
    with pytest.raises(CheckpointError, match=r"no tensors under ema; it has model, state_dict$"):
        load(tmp_path, archive({"state_dict": WEIGHTS, "model": WEIGHTS}, {"0": SIX.tobytes()}), "ema")


# ---- other spellings of the stream


def test_protocol_4(tmp_path):
    def text(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode() + b"\x94"

    def name(module: str, attribute: str) -> bytes:
        return text(module) + text(attribute) + b"\x93\x94"

    identity = b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x06t\x94Q"
    call = (
        name("torch._utils", "_rebuild_tensor_v2") + b"(" + identity + b"K\x00K\x02K\x03\x86\x94K\x03K\x01\x86\x94\x89"
    )
    call += name("collections", "OrderedDict") + b")R\x94t\x94R\x94"
    body = b"}\x94(" + text("w") + call + text("again") + b"h\x13" + b"u."
    stream = b"\x80\x04\x95" + len(body).to_bytes(8, "little") + body
    found = load(tmp_path, archive(stream, {"0": SIX.tobytes()}))
    assert same_bits(found["w"], SIX.reshape(2, 3))
    # The tensor was the twentieth value to be remembered, and is recalled by that number.
    assert same_bits(found["again"], SIX.reshape(2, 3))


def test_python_2_wrote_byte_strings_and_pairs_in_lists(tmp_path):
    def old(value: str) -> Raw:
        return Raw(b"U" + bytes([len(value)]) + value.encode())

    identity = Persistent((old("storage"), Global("torch", "FloatStorage"), old("7"), old("cpu"), 6, None))
    call = Call(Global("torch._utils", "_rebuild_tensor"), (identity, 0, (2, 3), (3, 1)))
    root = Call(ORDERED, ([[old("w"), call], [old("n"), Raw(b"L12345678901L\n")]],))
    found = load(tmp_path, legacy(root, {"7": (6, SIX.tobytes())}, [old("7")]))
    assert same_bits(found["w"], SIX.reshape(2, 3))


def test_ordered_dictionaries_carry_attributes_that_are_no_entries(tmp_path):
    state = Raw(
        spelled(Call(ORDERED, ())) + b"(" + spelled("w") + spelled(tensor("0")) + b"u" + spelled({"_meta": 1}) + b"b"
    )
    file = PytorchFile(save(tmp_path / "w.pt", archive(state, {"0": SIX.tobytes()})))
    assert list(file) == ["w"]
    assert file.dropped == []


def test_legacy_storages_may_be_parts_of_others(tmp_path):
    part = Persistent(("storage", Global("torch", "FloatStorage"), "0", "cpu", 6, ("view", 2, 4)))
    call = Call(Global("torch._utils", "_rebuild_tensor_v2"), (part, 1, (3,), (1,), False, Call(ORDERED, ())))
    found = load(tmp_path, legacy({"w": call, "all": tensor("0")}, {"0": (6, SIX.tobytes())}))
    assert same_bits(found["w"], SIX[3:6])


def test_legacy_storages_come_in_the_order_of_their_list(tmp_path):
    root = {"a": tensor("0"), "b": tensor("1", (2,), kind="HalfStorage")}
    content = legacy(root, {"1": (2, np.array([1, 2], "f2").tobytes()), "0": (6, SIX.tobytes())})
    found = load(tmp_path, content)
    assert same_bits(found["a"], SIX.reshape(2, 3))
    assert found["b"].tolist() == [1.0, 2.0]


def test_tensors_with_attributes(tmp_path):
    inner = tensor("0")
    kept = Call(
        Global("torch._tensor", "_rebuild_from_type_v2"),
        (inner.function, Global("torch", "Tensor"), inner.arguments, {"note": 1}),
    )
    state = Call(Global("torch._utils", "_rebuild_parameter_with_state"), (inner, True, Call(ORDERED, ()), {"tag": 2}))
    found = load(tmp_path, archive({"a": kept, "b": state}, {"0": SIX.tobytes()}))
    assert same_bits(found["a"], SIX.reshape(2, 3))
    assert same_bits(found["b"], SIX.reshape(2, 3))


# ---- folders and shards


def test_shards_by_their_index(tmp_path):
    save(tmp_path / "pytorch_model-1.bin", archive({"a": tensor("0")}, {"0": SIX.tobytes()}))
    save(tmp_path / "pytorch_model-2.bin", legacy({"b": tensor("0")}, {"0": (6, (-SIX).tobytes())}))
    save(tmp_path / "training_args.bin", b"not weights at all")
    index = {"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for path in (tmp_path, tmp_path / "pytorch_model.bin.index.json"):
        found = load_checkpoint(path)
        assert same_bits(found["a"], SIX.reshape(2, 3))
        assert same_bits(found["b"], -SIX.reshape(2, 3))
    (tmp_path / "pytorch_model-2.bin").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 2 weight files are missing, such as pytorch_model-2.bin"):
        open_checkpoint(tmp_path)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path):
    save(tmp_path / "w.bin", archive({"a": tensor("0")}, {"0": SIX.tobytes()}))
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "x.bin.index.json").write_text(json.dumps({"weight_map": {"a": "../w.bin"}}))
    with pytest.raises(CheckpointError, match="is incomplete"):
        open_checkpoint(tmp_path / "inner")


def test_a_folder_prefers_safetensors_and_content_beats_the_name(tmp_path):
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"s": mx.array([1.0])})
    save(tmp_path / "model.bin", archive({"a": tensor("0")}, {"0": SIX.tobytes()}))
    assert list(load_checkpoint(tmp_path)) == ["s"]
    (tmp_path / "model.safetensors").rename(tmp_path / "odd.ckpt")
    assert list(load_checkpoint(tmp_path / "odd.ckpt")) == ["s"]
    assert list(load_checkpoint(tmp_path)) == ["a"]


def test_a_folder_that_does_not_say_which_file(tmp_path):
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_checkpoint(tmp_path)
    for name in ("a.pt", "b.pt"):
        save(tmp_path / name, archive({"a": tensor("0")}, {"0": SIX.tobytes()}))
    with pytest.raises(CheckpointError, match=r"2 \.pt files and no index"):
        open_checkpoint(tmp_path)


# ---- the guard: what needs torch, and what is no PyTorch file


def declined(kind: str):
    if kind == "quantized":
        arguments = (storage("0", "QInt8Storage", 6), 0, (2, 3), (3, 1), (Global("torch", "per_tensor_affine"), 0.1, 0))
        return Call(Global("torch._utils", "_rebuild_qtensor"), (*arguments, False, Call(ORDERED, ())))
    if kind == "nested":
        return Call(Global("torch._utils", "_rebuild_nested_tensor"), tuple(tensor("0") for _ in range(4)))
    layout = Call(Global("torch.serialization", "_get_layout"), ("torch.sparse_coo",))
    parts = (tensor("0"), tensor("0"), Call(Global("torch", "Size"), ((9, 9),)), True)
    return Call(Global("torch._utils", "_rebuild_sparse_tensor"), (layout, parts))


@pytest.mark.parametrize("kind", ["sparse", "quantized", "nested"])
def test_without_torch_one_sentence_names_the_tensor_and_the_extra(tmp_path, monkeypatch, kind):
    monkeypatch.setitem(sys.modules, "torch", None)
    content = archive({"layer.q": declined(kind), "plain": tensor("0")}, {"0": SIX.tobytes()})
    path = save(tmp_path / "w.pt", content)
    with pytest.raises(MissingExtraError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert f"{path}: the {kind} tensor layer.q needs the package torch" in message
    assert 'pip install "mflux[torch-lite]"' in message
    assert "\n" not in message
    # The rest of the file needs nothing.
    assert same_bits(open_checkpoint(path)["plain"], SIX.reshape(2, 3))


def test_a_tensor_without_data_is_named(tmp_path):
    meta = Call(
        Global("torch._utils", "_rebuild_meta_tensor_no_storage"), (Global("torch", "float32"), (2,), (1,), False)
    )
    with pytest.raises(CheckpointError, match=r"lost\.w is a tensor without data"):
        load(tmp_path, archive({"lost.w": meta}, {}))


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as members:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            members.addfile(tarfile.TarInfo(name))
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (tar(), CheckpointError, "tar archive, which torch wrote before version 0.4"),
        (zipped({"data.pkl": pickled({}), "code/a.py": b""}), UnsafeCheckpointError, "TorchScript"),
        (zipped({"data.pkl": pickled({}), "constants.pkl": pickled(())}), UnsafeCheckpointError, "TorchScript"),
        (zipped({"arr_0.npy": b""}, ""), CheckpointError, "not one that torch.save wrote"),
        (pickled({"a": 1}), CheckpointError, "not one that torch.save wrote"),
        (b"", CheckpointError, "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", CheckpointError, "Git LFS"),
        (b"<!DOCTYPE html><html>", CheckpointError, "web page"),
        (b"what is this and more", CheckpointError, "neither a file of torch.save nor safetensors"),
    ],
)
def test_other_files_are_named_for_what_they_are(tmp_path, content, error, words):
    with pytest.raises(error, match=words) as caught:
        load(tmp_path, content)
    assert type(caught.value) is error


def test_a_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        load_checkpoint(tmp_path / "nowhere.pt")


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, mflux.checkpoints; print([m for m in ('mlx', 'numpy', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_reading_needs_no_torch(tmp_path):
    path = save(tmp_path / "w.pt", archive({"w": tensor("0")}, {"0": SIX.tobytes()}))
    code = (
        "import sys; sys.modules['torch'] = None; from mflux.checkpoints import load_checkpoint; "
        f"print(load_checkpoint({str(path)!r})['w'].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]", done.stderr
