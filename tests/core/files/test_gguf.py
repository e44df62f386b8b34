"""GGUF files from strangers: what is read, and the sentence that everything else gets."""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest
from support.gguf_files import entry, f32, q8_0, random_blocks, text, write_gguf

from mflux.backend import mx
from mflux.checkpoints.loading import FolderTensors
from mflux.checkpoints.readers.gguf import GgufFile, read_header
from mflux.errors import CheckpointError, MfluxError, MissingExtraError

VALUES = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)


def head(tensors: int = 1, entries: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries)


def tensor(name: str = "x", shape=(32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def listed(inner: int, count: int) -> bytes:
    return text("k") + struct.pack("<IIQ", 9, inner, count)


HOSTILE = {
    "nothing behind the magic": (b"GGUF", "is truncated: its version should take 4 bytes and 0 are left"),
    "version 1": (head(version=1), "is of version 1 of GGUF, and mflux reads 2 and 3"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(40), "is a GGUF file for big-endian machines"),
    "2^40 tensors": (head(tensors=1 << 40) + bytes(99), "is said to hold 1,099,511,627,776 tensors"),
    "2^63 entries": (head(entries=1 << 63) + bytes(99), "entries in"),
    "a text of 2^63 bytes": (
        head(0, 1) + text("k") + struct.pack("<IQ", 8, 1 << 63) + bytes(99), "should take 9,223,372,036,854,775,808"),
    "a key of a megabyte": (head(0, 1) + text("k" * (1 << 20)) + bytes(99), "is 1,048,576 bytes long"),
    "a list of 2^40 numbers": (head(0, 1) + listed(4, 1 << 40) + bytes(99), "should take 4,398,046,511,104 bytes"),
    "a list of 2^40 texts": (head(0, 1) + listed(8, 1 << 40) + bytes(99), "is said to have 1,099,511,627,776 entries"),
    "a list of lists": (head(0, 1) + listed(9, 4) + bytes(99), "is a list of lists"),
    "no such type": (head(0, 1) + text("k") + struct.pack("<I", 99) + bytes(99), "has the type 99, which there is not"),
    "a name that is no text": (head() + struct.pack("<Q", 2) + b"\xff\xfe" + bytes(99), "is not UTF-8"),
    "2^31 dimensions": (head() + text("x") + struct.pack("<I", 1 << 31) + bytes(99), "has 2,147,483,648 dimensions"),
    "no dimensions": (head() + text("x") + struct.pack("<I", 0) + bytes(99), "has 0 dimensions"),
    "a side of 2^40": (head() + tensor(shape=(1 << 40,)) + bytes(99), "has the shape"),
    "a product above 2^64": (head() + tensor(shape=(1 << 30, 1 << 30, 1 << 30)) + bytes(99), "should end at byte"),
    "an unknown kind": (head() + tensor(kind=77) + bytes(999), "is stored as ggml's type 77"),
    "half a block": (head() + tensor(shape=(48,), kind=2) + bytes(999), "which Q4_0 cannot have"),
    "an offset before the data": (head() + tensor(offset=(1 << 64) - 32) + bytes(999), "should end at byte"),
    "an offset behind the end": (head() + tensor(offset=4096) + bytes(999), "should end at byte"),
    "cut short": (head() + tensor(shape=(64, 64)) + bytes(999), "is truncated"),
    "one name twice": (head(2) + tensor() + tensor(offset=128) + bytes(999), "x stands in it twice"),
    "one on the other": (head(2) + tensor() + tensor("y", offset=64) + bytes(999), "lies on the bytes of x"),
    "an alignment of 24": (
        head(0, 1) + entry("general.alignment", ("u32", 24)) + bytes(99), "its alignment of 24 makes no sense"),
    "an alignment of 0": (head(0, 1) + entry("general.alignment", ("u32", 0)) + bytes(99), "its alignment of 0 makes"),
    "another shape": (
        head(1, 1) + entry("comfy.gguf.orig_shape.x", ("i32", [5, 7])) + tensor() + bytes(999), "is said to be"),
    "a shape below zero": (
        head(1, 1) + entry("comfy.gguf.orig_shape.x", ("i32", [-4, -8])) + tensor() + bytes(999), "is said to be"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "told"), HOSTILE.values(), ids=HOSTILE)
def test_what_cannot_be_is_refused_before_anything_is_allocated(tmp_path, content, told):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=told.replace("(", r"\(")) as caught:
        GgufFile(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_changed_bytes_end_in_a_sentence(tmp_path):
    path = write_gguf(
        tmp_path / "x.gguf",
        {"a.weight": q8_0(VALUES), "b": f32(VALUES), "c.weight": random_blocks("Q4_K", (2, 256))},
        {"general.name": "x", "tags": ("i32", [1, 2, 3]), "comfy.gguf.orig_shape.b": ("i32", [2, 128])},
    )
    whole = path.read_bytes()
    rng = random.Random(1)
    for _ in range(1500):
        changed = bytearray(whole[: rng.choice((len(whole), rng.randrange(len(whole))))])
        for _ in range(rng.randrange(1, 4)):
            if changed:
                changed[rng.randrange(min(len(changed), 400))] = rng.choice((0, 1, 255, rng.randrange(256)))
        path.write_bytes(changed)
        try:
            tensors = FolderTensors(tmp_path, [path])
            mx.eval([tensors[name] for name in tensors])
        except MfluxError as error:
            assert "\n" not in str(error) and str(error).isprintable()


def test_shapes_that_converters_write_down(tmp_path):
    values = np.arange(2 * 3 * 4 * 5 * 8, dtype=np.float32)
    path = write_gguf(
        tmp_path / "x.gguf",
        {"conv.weight": f32(values.reshape(40, 24)), "wide.weight": q8_0(VALUES.reshape(2, 128))},
        {
            "comfy.gguf.orig_shape.conv.weight": ("i32", [2, 3, 4, 5, 8]),
            "comfy.gguf.orig_shape.wide.weight": ("i32", [8, 32]),
        },
    )
    tensors = FolderTensors(tmp_path, [path])
    assert np.array_equal(np.array(tensors["conv.weight"]), values.reshape(2, 3, 4, 5, 8))
    assert tensors["wide.weight"].shape == (8, 8) and tensors["wide.scales"].shape == (8, 1)
    dense = np.array(FolderTensors(tmp_path, [path], packs=False)["wide.weight"])
    assert np.abs(dense - VALUES.reshape(8, 32)).max() < 0.05


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [32, 256])
def test_versions_and_alignments(tmp_path, version, alignment):
    path = write_gguf(
        tmp_path / "x.gguf", {"a": f32(VALUES[0]), "b": f32(VALUES)}, version=version, alignment=alignment
    )
    tensors = FolderTensors(tmp_path, [path])
    assert np.array_equal(np.array(tensors["a"]), VALUES[0]) and np.array_equal(np.array(tensors["b"]), VALUES)


def test_long_lists_are_counted_and_not_kept(tmp_path):
    words = b"".join(text(f"word {number}") for number in range(5000))
    path = tmp_path / "x.gguf"
    path.write_bytes(head(0, 1) + listed(8, 5000) + words)
    assert read_header(path)[1] == {"k": 5000}


def test_a_split_file_is_read_whole(tmp_path):
    for number in (1, 2, 3):
        content = {f"{number}.weight": f32(VALUES * number)}
        said = {"split.no": ("u16", number - 1), "split.count": ("u16", 3), "split.tensors.count": ("i32", 3)}
        write_gguf(tmp_path / f"m-{number:05}-of-00003.gguf", content, said)
    tensors = FolderTensors(tmp_path, [tmp_path / "m-00002-of-00003.gguf"])
    assert all(np.array_equal(np.array(tensors[f"{n}.weight"]), VALUES * n) for n in (1, 2, 3))
    (tmp_path / "m-00003-of-00003.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"is one of 3 files, and 1 of them are not beside it, such as m-00003"):
        GgufFile(tmp_path / "m-00001-of-00003.gguf")


def test_kinds_that_need_a_package_name_it(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "x.gguf", {"a.weight": random_blocks("IQ2_XS", (2, 256))})
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    tensors = FolderTensors(tmp_path, [path])
    assert set(tensors) == {"a.weight", "a.scales", "a.biases"}
    with pytest.raises(MissingExtraError, match=r'type IQ2_XS needs the package gguf, .*pip install "mflux\[gguf\]"'):
        tensors["a.weight"]
