"""Files from strangers, whoever opens them: one message for one fault, and nothing that ends otherwise."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys

import pytest
from support.tokenizers import write_clip_tokenizer, write_t5_tokenizer
from support.torch_archives import archive, tensor

from mflux.backend import mx, nn
from mflux.checkpoints.folders import read_json, weight_files
from mflux.checkpoints.loading import FolderTensors, fill
from mflux.checkpoints.readers.opening import load_checkpoint, open_checkpoint
from mflux.checkpoints.readers.plain import LARGEST_TEXT, Unchanged, read_text
from mflux.checkpoints.readers.safetensors import SafetensorsFile, read_header
from mflux.errors import CheckpointError, MfluxError
from mflux.models.common.controls.depth_pro.weights import load as load_depth_pro
from mflux.models.common.saved_model import FILE_NAME, recorded_base_model
from mflux.models.common.tokenizers.prompt_tokenizers import clip_tokenizer, t5_tokenizer
from mflux.utils.strict_json import DEEPEST, NotJSON, parse

# ---- the same broken file, one message

INSTEAD = {
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
        "is a pointer of Git LFS, not the file itself: fetch it with `git lfs pull`",
    ),
    "page": (
        b"\n<!DOCTYPE html><html><body>Sign in</body></html>",
        "is a web page, not the file that belongs there: the download went wrong, fetch it again",
    ),
    "page with a mark": (
        b"\xef\xbb\xbf<html><body>Sign in</body></html>",
        "is a web page, not the file that belongs there: the download went wrong, fetch it again",
    ),
    "nothing": (b"", "is empty: fetch it again"),
    "zeros": (bytes(4096), "holds nothing but zeros where it begins: the download broke off, fetch it again"),
}
READERS = {
    "safetensors": ("model.safetensors", read_header),
    "folder of weights": ("model.safetensors", lambda path: FolderTensors(path.parent)),
    "any weights": ("model.safetensors", open_checkpoint),
    "torch": ("model.bin", open_checkpoint),
    "depth pro": ("depth_pro.pt", load_depth_pro),
    "configuration": ("config.json", read_json),
    "index": ("model.safetensors.index.json", weight_files),
    "clip vocabulary": ("vocab.json", lambda path: clip_tokenizer(path.parent)),
    "clip merges": ("merges.txt", lambda path: clip_tokenizer(path.parent)),
    "tokenizer settings": ("tokenizer_config.json", lambda path: clip_tokenizer(path.parent)),
    "t5": ("tokenizer.json", lambda path: t5_tokenizer(path.parent)),
}


@pytest.mark.parametrize("instead", INSTEAD)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_models_file_is_named_by_every_reader(tmp_path, instead, reader):
    content, told = INSTEAD[instead]
    name, read = READERS[reader]
    (write_t5_tokenizer if reader == "t5" else write_clip_tokenizer)(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path / name)
    assert str(caught.value) == f"{tmp_path / name} {told}"


@pytest.mark.parametrize("letter", b"<\n \t")
def test_a_header_whose_length_spells_a_web_page(tmp_path, letter):
    for length in (letter, 0x3C00 | letter, 0x683C, 0x213C):
        header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        path = tmp_path / "x.safetensors"
        if length < len(header):
            continue
        path.write_bytes(struct.pack("<Q", length) + header.ljust(length) + bytes(4))
        assert list(SafetensorsFile(path)) == list(open_checkpoint(path)) == ["a"]


# Settings that may be missing are missing then.
@pytest.mark.parametrize("reader", [reader for reader in READERS if reader != "tokenizer settings"])
def test_what_is_no_file_at_all(tmp_path, reader):
    name, read = READERS[reader]
    (write_t5_tokenizer if reader == "t5" else write_clip_tokenizer)(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    # To wait for somebody who writes into it would be to wait for ever.
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError):
        read(tmp_path / name)


def test_a_damaged_copy_in_the_cache_is_named(tmp_path):
    blob = tmp_path / "models--a--b" / "blobs" / "0123"
    link = tmp_path / "models--a--b" / "snapshots" / "main" / "vae" / "config.json"
    for path in (blob, link):
        path.parent.mkdir(parents=True)
    blob.write_text("{")
    link.symlink_to(blob)
    with pytest.raises(CheckpointError) as caught:
        read_json(link)
    assert str(caught.value).endswith(f"fetch it again (delete {blob}, and the same command does)")


# ---- JSON


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 100_000, "too deep"), ('{"a":' * 5000 + "1" + "}" * 5000, "too deep"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "too deep"), ("1" * 5000, "thousands of digits"),
        ("NaN", "NaN"), ('{"a": -Infinity}', "-Infinity"), ('{"a": 1, "a": 2}', "it says a twice"),
        ('{"a": 1, "a": true}', "it says a twice"), ('{"\\u001b": 1, "\\u001b": 2}', r"it says \\x1b twice"),
        ('{"a": 1', "truncated"), ('{"a": "x', "truncated"), ("[1, 2", "truncated"), ('{"a"', "truncated"),
        ("{]", "not JSON"), ("{'a': 1}", "not JSON"), ("", "not JSON"), ("{} {}", "not JSON"), (b"\xff{}", "not JSON"),
        (b"{\0}", "not JSON"), ('{"a": 1}'.encode("utf-16"), "not JSON"),
    ],
)  # fmt: skip
def test_what_is_no_json(text, told):
    with pytest.raises(NotJSON, match=told) as caught:
        parse(text)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "text",
    ['{"a": [1, 2.5, null, true, "x"]}', '{"a": 1, "a": 1}', "[" * DEEPEST + "]" * DEEPEST, "1" * 4000, " [1e5] \n"],
)
def test_what_is(text):
    assert parse(text) == json.loads(text)
    assert parse("\ufeff" + text) == parse(b"\xef\xbb\xbf" + text.encode()) == json.loads(text)
    if '"a": 1, "a"' in text:
        with pytest.raises(NotJSON, match="twice"):
            parse(text, repeated=False)


def test_endless_texts(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(LARGEST_TEXT + 1)
    with pytest.raises(CheckpointError, match=r"has 67\.1 MB, and its kind has at most 67\.1 MB"):
        read_text(path)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 300, "x" * 5000, ""])
def test_names_that_no_file_can_have(tmp_path, name):
    for read in (read_json, read_header, open_checkpoint, load_checkpoint, weight_files):
        try:
            read(tmp_path / name)
        except MfluxError as error:
            assert str(error).isprintable()


def test_shards_whose_names_no_file_can_have(tmp_path):
    for name in ("x" * 5000, "a\0b", "\ud800", "../x"):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(CheckpointError, match="1 of 1 weight files are missing") as caught:
            weight_files(tmp_path)
        assert str(caught.value).isprintable()


def test_mutated_configurations(tmp_path):
    sound = json.dumps({"a": [1, 2.5, {"b": "text", "c": None}], "d": True, "e": -1e5}).encode()
    path = tmp_path / "config.json"
    draw = random.Random(0)
    for _ in range(1000):
        data = bytearray(sound)
        for _ in range(draw.randint(1, 5)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(bytes(data[: draw.randint(0, len(data))] if draw.random() < 0.3 else data))
        try:
            read_json(path)
        except CheckpointError as error:
            assert str(error).isprintable()


@pytest.mark.parametrize(
    "content",
    ["[" * 10**5, "", "[]", '{"base_model": 5}', '{"base_model": {"a": 1}}', '{"base_model": "\\ud800"}', "\xff"],
)
def test_a_record_that_says_nothing(tmp_path, content):
    (tmp_path / FILE_NAME).write_bytes(content.encode("latin-1"))
    assert recorded_base_model(str(tmp_path)) is None


def test_a_record_with_a_byte_order_mark(tmp_path):
    (tmp_path / FILE_NAME).write_bytes(b"\xef\xbb\xbf" + json.dumps({"base_model": "schnell"}).encode())
    assert recorded_base_model(str(tmp_path)) == "schnell"


# ---- safetensors


def write(path, header, data=bytes(64)):
    text = header if isinstance(header, str) else json.dumps(header)
    path.write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + data)
    return path


def entry(start, end, dtype="F32"):
    return {"dtype": dtype, "shape": [(end - start) // 4], "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "entries",
    [
        {"a": entry(0, 16), "b": entry(12, 20)},
        {"a": entry(0, 16), "b": entry(0, 16)},
        {"a": entry(0, 64), "b": entry(16, 20)},
        {"a": entry(0, 64), "b": entry(4, 8), "c": entry(8, 12)},
        {f"{number}": entry(0, 64) for number in range(1000)},
    ],
)
def test_tensors_that_share_bytes(tmp_path, entries):
    path = write(tmp_path / "x.safetensors", entries)
    with pytest.raises(CheckpointError, match=r"is damaged: \w+ lies on the bytes of \w+; fetch it again"):
        SafetensorsFile(path)


def test_tensors_side_by_side(tmp_path):
    entries = {"a": entry(16, 32), "none": entry(16, 16), "b": entry(0, 16), "c": entry(40, 64), "last": entry(64, 64)}
    assert set(SafetensorsFile(write(tmp_path / "x.safetensors", entries))) == set(entries)


def test_a_tensor_that_stands_twice(tmp_path):
    one = json.dumps(entry(0, 16))
    path = write(tmp_path / "x.safetensors", f'{{"a": {one}, "a": {one}}}')
    with pytest.raises(CheckpointError, match="is damaged: it says a twice in its header; fetch it again"):
        SafetensorsFile(path)


def test_names_of_tensors_are_shown(tmp_path):
    for header in ({"\x1b[2J\u202e" + "x" * 10**6: {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}},
                   {"a": {"dtype": "\x1b" * 999, "shape": [1], "data_offsets": [0, 4]}}):  # fmt: skip
        with pytest.raises(CheckpointError) as caught:
            read_header(write(tmp_path / "x.safetensors", header))
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 500


def test_mutated_headers(tmp_path):
    sound = json.dumps({"__metadata__": {"format": "pt"}, "a": entry(0, 16), "b": entry(16, 64)}).encode()
    path = tmp_path / "x.safetensors"
    draw = random.Random(0)
    for _ in range(1000):
        data = bytearray(struct.pack("<Q", len(sound)) + sound + bytes(64))
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(bytes(data[: draw.randint(0, len(data))] if draw.random() < 0.2 else data))
        try:
            file = SafetensorsFile(path)
            mx.eval([file[name] for name in file])
        except MfluxError as error:
            assert str(error).isprintable()


# ---- files that change


def test_a_file_that_changes_while_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    mx.save_safetensors(str(path), {"a": mx.ones((64, 64)), "b": mx.ones((64, 64))})
    file = SafetensorsFile(path)
    mx.eval(file["a"])
    os.truncate(path, 5000)
    with pytest.raises(CheckpointError, match=r"x\.safetensors was changed while it was read"):
        file["b"]


def test_a_file_that_is_replaced_while_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    mx.save_safetensors(str(path), {"a": mx.ones((64, 64))})
    file = SafetensorsFile(path)
    mx.save_safetensors(str(tmp_path / "y"), {"a": mx.zeros((64, 64))})
    (tmp_path / "y.safetensors").replace(path)
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        file["a"]


def test_a_torch_file_that_changes_while_it_is_read(tmp_path):
    """Its pages are mapped: without a look at the file first, the process would end here."""
    path = tmp_path / "x.pt"
    path.write_bytes(archive({"a": tensor("0", (4096,))}, {"0": bytes(4 * 4096)}))
    file = open_checkpoint(path)
    os.truncate(path, 100)
    with pytest.raises(CheckpointError, match=r"x\.pt was changed while it was read"):
        file["a"]


def test_any_file_that_changes(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"1")
    watched = Unchanged(path)
    watched.check()
    path.write_bytes(b"12")
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        watched.check()
    watched = Unchanged(path)
    path.unlink()
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        watched.check()


def test_a_file_that_ends_early_under_mlx(tmp_path):
    """Behind the last look at it: MLX's own reader notices."""
    path = tmp_path / "x.safetensors"
    mx.save_safetensors(str(path), {"weight": mx.ones((64, 64)), "bias": mx.ones(64)})
    tensors = dict(SafetensorsFile(path).items())
    os.truncate(path, 5000)
    with pytest.raises(CheckpointError, match="x: a file ended early while it was read; fetch it again"):
        fill(nn.Linear(64, 64), tensors, source="x")


# ---- numbers that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("keep_dtypes", [True, False])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_numbers_that_are_not_finite(value, dtype, keep_dtypes, name):
    tensors = {"weight": mx.ones((64, 64), dtype=dtype), "bias": mx.ones(64, dtype=dtype)}
    tensors[name][..., 63] = value
    with pytest.raises(CheckpointError, match=rf"^the folder: {name} holds numbers that are not finite"):
        fill(nn.Linear(64, 64), tensors, source="the folder", keep_dtypes=keep_dtypes)


def test_the_first_tensor_of_a_folder_is_named_by_its_name_in_the_file():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [nn.Conv2d(3, 4, 3) for _ in range(3)]

    tensors = {}
    for number in range(3):
        tensors |= {f"layers.{number}.weight": mx.ones((4, 3, 3, 3)), f"layers.{number}.bias": mx.ones(4)}
    tensors["layers.1.weight"][3, 2, 1, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"layers\.1\.weight holds"):
        fill(Block(), tensors, source="x")


@pytest.mark.parametrize("bits", [4, 8])
def test_not_finite_in_quantized_weights(bits):
    weight, scales, biases = mx.quantize(mx.random.normal((64, 64)), bits=bits)
    scales[5, 0] = float("inf")
    tensors = {"weight": weight, "scales": scales, "biases": biases, "bias": mx.ones(64)}

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(64, 64)

    with pytest.raises(CheckpointError, match=r"proj\.scales holds"):
        fill(One(), {f"proj.{name}": value for name, value in tensors.items()}, source="x")


def test_large_numbers_are_finite():
    for dtype, most in ((mx.float16, 65504.0), (mx.bfloat16, 3e38), (mx.float32, 3e38)):
        tensors = {"weight": mx.full((64, 64), most, dtype=dtype), "bias": mx.full(64, -most, dtype=dtype)}
        fill(nn.Linear(64, 64), tensors, source="x")


def test_an_empty_tensor_is_finite():
    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = mx.zeros((0, 4))

    fill(Empty(), {"weight": mx.zeros((0, 4))}, source="x")


def test_a_shape_without_end_is_cut_in_the_message(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1] * 5000, "data_offsets": [0, 8]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(CheckpointError, match="for the shape") as failure:
        load_checkpoint(path)
    assert len(str(failure.value)) < 1000


SHARDS_OF_ONE = """
import resource, sys
from pathlib import Path
from mflux.checkpoints import open_checkpoint
from mflux.errors import CheckpointError
resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(sys.argv[2])))
checkpoint = open_checkpoint(Path(sys.argv[1]))
try:
    kept = [checkpoint[name] for name in checkpoint]
except CheckpointError as error:
    print(error)
else:
    print(len(kept))
"""


@pytest.mark.parametrize("most", [64, 4096])
def test_more_files_than_may_be_open_are_no_damage(tmp_path, most):
    """A component in 80 shards, with a limit that the process may raise, and one that it may not."""
    for number in range(80):
        mx.save_safetensors(str(tmp_path / f"{number}.safetensors"), {f"w{number}": mx.ones(2)})
    table = {f"w{number}": f"{number}.safetensors" for number in range(80)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    call = [sys.executable, "-c", SHARDS_OF_ONE, tmp_path, str(most)]
    said = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    if most > 64:
        assert said == "80\n"
    else:
        assert "too many files are open at once; allow more, as `ulimit -n 10240` does" in said
        assert "damaged" not in said and "fetch" not in said
