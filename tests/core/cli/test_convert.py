"""`mflux-convert`: what it writes, what it says, and that a destination is complete or absent."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.torch_archives import archive, legacy, save, tensor

from mflux.backend import mx
from mflux.checkpoints import load_checkpoint, writing
from mflux.checkpoints.writing import SafetensorsWriter
from mflux.cli import convert
from mflux.cli.convert import main
from mflux.errors import OutputError

SIX = np.arange(6, dtype=np.float32)
ROOT = {
    "state_dict": {
        "a.weight": tensor("0"),
        "tied": tensor("0"),
        "half": tensor("1", (3,), kind="BFloat16Storage"),
        "count": tensor("2", (), kind="LongStorage"),
        "none": tensor("3", (0, 4)),
    },
    "epoch": 3,
    "optimizer": {"lr": 0.1},
}
HALF = np.array([0x3F80, 0x7F7F, 0x0001], "u2")  # 1, the largest bfloat16, the smallest
STORAGES = {"0": SIX.tobytes(), "1": HALF.tobytes(), "2": np.int64(7).tobytes(), "3": b""}


@pytest.fixture
def source(tmp_path) -> Path:
    return save(tmp_path / "weights.pt", archive(ROOT, STORAGES))


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "weights.pt")


def test_the_file_holds_the_tensors_and_the_summary_the_rest(source, tmp_path, capfd):
    assert main([str(source), str(tmp_path / "out.safetensors")]) == 0
    out, err = capfd.readouterr()
    assert out == f"{tmp_path / 'out.safetensors'}\n"
    assert "left out what is not a tensor: epoch, optimizer" in err
    found = load_checkpoint(tmp_path / "out.safetensors")
    assert set(found) == {"a.weight", "tied", "half", "count", "none"}
    assert np.array_equal(np.array(found["a.weight"]), SIX.reshape(2, 3))
    assert np.array_equal(np.array(found["tied"]), SIX.reshape(2, 3))
    assert np.array_equal(np.array(found["half"].view(mx.uint16)), HALF)
    assert found["count"].item() == 7
    assert found["none"].shape == (0, 4)


def test_the_file_is_laid_out_as_the_format_wants(source, tmp_path):
    main([str(source), str(tmp_path / "out")])
    raw = (tmp_path / "out.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt"}
    # Every byte of the data belongs to exactly one tensor, and each tensor is aligned.
    end = 0
    for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
        assert entry["data_offsets"][0] == end
        end = entry["data_offsets"][1]
    assert 8 + length + end == len(raw)
    widths = {"F32": 4, "BF16": 2, "I64": 8}
    assert all(entry["data_offsets"][0] % widths[entry["dtype"]] == 0 for entry in header.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_casts_floating_point_only(source, tmp_path, dtype, capfd):
    main([str(source), str(tmp_path / "out"), "--dtype", dtype])
    found = load_checkpoint(tmp_path / "out.safetensors")
    assert {str(found[name].dtype) for name in ("a.weight", "tied", "half")} == {f"mlx.core.{dtype}"}
    assert found["count"].dtype == mx.int64
    assert found["half"][0].item() == 1
    # What float16 cannot hold is said.
    assert ("became infinite in half; bfloat16 would hold them" in capfd.readouterr().err) == (dtype == "float16")


def test_list_prints_and_reads_no_data(source, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(
        "mflux.checkpoints.readers.pytorch.PytorchFile.__getitem__", lambda *_: pytest.fail("read data")
    )
    assert main([str(source), "--list"]) == 0
    out, err = capfd.readouterr()
    assert out.splitlines() == [
        "a.weight\tfloat32\t[2, 3]",
        "tied\tfloat32\t[2, 3]",
        "half\tbfloat16\t[3]",
        "count\tint64\t[]",
        "none\tfloat32\t[0, 4]",
    ]
    assert "epoch, optimizer" in err
    assert left_over(tmp_path) == []


def test_list_shows_names_that_are_not_fit_for_a_terminal_escaped(tmp_path, capfd):
    path = save(tmp_path / "w.pt", archive({"\x1b[2J\n\ud800": tensor("0")}, STORAGES))
    assert main([str(path), "--list"]) == 0
    assert capfd.readouterr().out == "\\x1b[2J\\n\\ud800\tfloat32\t[2, 3]\n"


def test_key_selects(tmp_path, capfd):
    path = save(tmp_path / "w.pt", archive({"model": {"w": tensor("0")}, "ema": {"v": tensor("0")}}, STORAGES))
    assert main([str(path), str(tmp_path / "o"), "--key", "ema"]) == 0
    assert list(load_checkpoint(tmp_path / "o.safetensors")) == ["v"]
    assert main([str(path), "--list", "--key", "model"]) == 0
    assert capfd.readouterr().out.splitlines()[-1].startswith("w\t")


def test_shards_become_one_file(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save(folder / "m-1.bin", archive({"a": tensor("0")}, STORAGES))
    save(folder / "m-2.bin", legacy({"b": tensor("0")}, {"0": (6, (-SIX).tobytes())}))
    (folder / "m.bin.index.json").write_text(json.dumps({"weight_map": {"a": "m-1.bin", "b": "m-2.bin"}}))
    assert main([str(folder), str(tmp_path / "one")]) == 0
    found = load_checkpoint(tmp_path / "one.safetensors")
    assert np.array_equal(np.array(found["b"]), -SIX.reshape(2, 3))
    # And safetensors themselves can be cast.
    assert main([str(tmp_path / "one.safetensors"), str(tmp_path / "two"), "--dtype", "float16"]) == 0
    assert load_checkpoint(tmp_path / "two.safetensors")["a"].dtype == mx.float16


def failing(argv: list, capfd, status: int) -> str:
    assert main([str(word) for word in argv]) == status
    out, err = capfd.readouterr()
    last = err.splitlines()[-1]
    assert out == ""
    assert last.startswith("error: ")
    return last


def test_an_existing_file_stays_without_force(source, tmp_path, capfd):
    (tmp_path / "out.safetensors").write_text("precious")
    assert "exists already" in failing([source, tmp_path / "out"], capfd, 1)
    assert (tmp_path / "out.safetensors").read_text() == "precious"
    assert main([str(source), str(tmp_path / "out"), "--force"]) == 0
    assert len(load_checkpoint(tmp_path / "out.safetensors")) == 5
    assert left_over(tmp_path) == ["out.safetensors"]


def test_a_link_is_not_written_through(source, tmp_path, capfd):
    (tmp_path / "target").write_text("precious")
    (tmp_path / "out.safetensors").symlink_to(tmp_path / "target")
    assert main([str(source), str(tmp_path / "out"), "--force"]) == 0
    assert (tmp_path / "target").read_text() == "precious"


def test_requests_that_make_no_sense(source, tmp_path, capfd):
    assert "name the file to write" in failing([source], capfd, 2)
    assert "leave DST out" in failing([source, tmp_path / "x", "--list"], capfd, 2)
    assert "invalid choice" in failing([source, tmp_path / "x", "--quantize", "7"], capfd, 2)
    assert "invalid choice" in failing([source, tmp_path / "x", "--dtype", "int8"], capfd, 2)
    assert "does not exist" in failing([source, tmp_path / "no" / "x"], capfd, 1)
    assert "No such file" in failing([tmp_path / "none.pt", tmp_path / "x"], capfd, 1)
    (tmp_path / "folder.safetensors").mkdir()
    assert "is a folder" in failing([source, tmp_path / "folder", "--force"], capfd, 1)
    main([str(source), str(tmp_path / "self")])
    capfd.readouterr()
    assert "the source itself" in failing([tmp_path / "self.safetensors", tmp_path / "self", "--force"], capfd, 1)
    assert left_over(tmp_path) == ["folder.safetensors", "self.safetensors"]


def test_names_that_the_format_cannot_hold(tmp_path, capfd):
    for name, words in (("__metadata__", "can be called __metadata__"), ("\ud800", "is no valid text")):
        path = save(tmp_path / "weights.pt", archive({name: tensor("0")}, STORAGES))
        assert words in failing([path, tmp_path / "o"], capfd, 1)
        assert left_over(tmp_path) == []


def test_a_damaged_tensor_leaves_nothing_behind(tmp_path, capfd):
    root = {"good": tensor("0"), "bad": tensor("1", (2,), kind="ComplexDoubleStorage")}
    path = save(tmp_path / "weights.pt", archive(root, {"0": SIX.tobytes(), "1": bytes(32)}))
    assert "complex128" in failing([path, tmp_path / "o"], capfd, 1)
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("when", [0, 1, 3])
def test_a_full_disk_leaves_nothing_behind(source, tmp_path, capfd, monkeypatch, when):
    calls = []

    def pwrite(*arguments):
        calls.append(arguments)
        if len(calls) > when:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    real = os.pwrite
    monkeypatch.setattr(writing.os, "pwrite", pwrite)
    assert "No space left on device" in failing([source, tmp_path / "o"], capfd, 1)
    assert left_over(tmp_path) == []


def test_too_little_room_is_seen_before_writing(source, tmp_path, capfd, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    assert "the disk has 10 left" in failing([source, tmp_path / "o"], capfd, 1)
    assert left_over(tmp_path) == []


def test_ctrl_c_leaves_nothing_behind(source, tmp_path, capfd, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "_converted", interrupt)
    failing([source, tmp_path / "o"], capfd, 130)
    assert left_over(tmp_path) == []


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom mflux.cli.convert import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('mlx', 'numpy', 'tqdm', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--key" in done.stdout


# ---- the writer by itself


def test_the_writer_takes_tensors_in_any_order_once_each(tmp_path):
    arrays = {
        "bytes": mx.arange(5).astype(mx.uint8),
        "turned": mx.arange(6).reshape(2, 3).T,
        "scalar": mx.array(2.5),
        "flags": mx.array([True, False]),
        "complex": mx.array([1 + 2j]),
    }
    specs = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    with SafetensorsWriter(tmp_path / "w.safetensors", specs) as writer:
        for name in reversed(arrays):
            writer.write(name, arrays[name])
            assert not (tmp_path / "w.safetensors").exists()
    found = mx.load(str(tmp_path / "w.safetensors"))
    assert set(found) == set(arrays)
    assert all(mx.array_equal(found[name], array).item() for name, array in arrays.items())
    assert all(found[name].dtype == array.dtype for name, array in arrays.items())


def test_the_writer_insists_on_what_was_announced(tmp_path):
    specs = {"a": (mx.float32, (2,)), "b": (mx.float32, (1,))}
    for steps, words in (
        ([("a", mx.zeros(3))], "was announced as"),
        ([("a", mx.zeros(2, mx.int32))], "was announced as"),
        ([("a", mx.zeros(2))], "1 tensors were announced and not written, such as b"),
    ):
        with pytest.raises(ValueError, match=words), SafetensorsWriter(tmp_path / "w.safetensors", specs) as writer:
            for name, array in steps:
                writer.write(name, array)
        assert list(tmp_path.iterdir()) == []


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(OutputError, match="exists already"), SafetensorsWriter(path, {"a": (mx.int8, (1,))}) as writer:
        writer.write("a", mx.zeros(1, mx.int8))
        path.write_text("precious")
    assert path.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["", " ", ".", "..", "/", "a/..", "~nobody-here/x"])
def test_names_that_are_no_files(cli, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    mx.save_safetensors("model.safetensors", {"a": mx.ones(2)})
    result = cli("convert", "model.safetensors", name)
    assert result.status == 2 and len(result.errors) == 1, result.err
    if name in (".", "a/.."):
        return  # this folder, which holds one file of weights
    result = cli("convert", name, "other.safetensors")
    assert result.status in (1, 2) and len(result.errors) == 1, result.err
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("ending", ["", "/"])
def test_a_folder_as_the_destination(source, tmp_path, capfd, ending):
    (tmp_path / "there").mkdir()
    before = left_over(tmp_path)
    assert "there" in failing([source, f"{tmp_path / 'there'}{ending}"], capfd, 2)
    assert "is a folder: name the file to write" in failing([source, f"{tmp_path / 'new'}/"], capfd, 2)
    assert left_over(tmp_path) == before
