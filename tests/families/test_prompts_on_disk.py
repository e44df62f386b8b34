"""Encoded prompts on disk: another command reads no encoder, and what anything follows from changes what is found."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
from support.tiny_models import FIRST, TinyModel, pixels

from mflux.backend import mx
from mflux.models.common import encoded_on_disk
from mflux.models.common.encoded_on_disk import EncodedOnDisk, Unstorable, key_of
from mflux.models.common.model import Model

EVERY_FAMILY = pytest.mark.parametrize("tiny", [name for name in FIRST if "seedvr2" not in name], indirect=True)
ONE = pytest.mark.parametrize("tiny", ["flux generate"], indirect=True)
_opened: list[str] = []
sys.addaudithook(lambda event, args: _opened.append(str(args[0])) if event == "open" else None)


@pytest.fixture
def folder(monkeypatch, tmp_path) -> Path:
    """Where entries go; a file counts as settled at once."""
    monkeypatch.setenv("MFLUX_PROMPT_CACHE", "1")
    monkeypatch.setenv("MFLUX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(encoded_on_disk, "SETTLED_SECONDS", 0.0)
    return tmp_path / "cache" / "prompts"


@pytest.fixture
def loaded(monkeypatch) -> list[str]:
    """The encoders that are loaded from now on."""
    found: list[str] = []
    real = Model.load

    def load(model, component, **options):
        if component.stage == "encode":
            found.append(component.name)
        return real(model, component, **options)

    monkeypatch.setattr(Model, "load", load)
    return found


def copy_of(tiny: TinyModel, folder: Path) -> Path:
    shutil.copytree(tiny.folder(), folder)
    return folder


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.prompt"))


@EVERY_FAMILY
def test_a_second_command_reads_no_encoder(tiny, folder, loaded, in_folder):
    first = pixels(tiny.draw("--seed", 1))
    assert loaded and entries(folder)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in entries(folder)}
    assert (modes, stat.S_IMODE(folder.stat().st_mode)) == ({0o600}, 0o700)
    loaded.clear()
    _opened.clear()
    second = pixels(tiny.draw("--seed", 1, "--output", "second.png"))
    assert np.array_equal(first, second)
    assert loaded == []
    parts = [f"/{one.folder}/" for one in tiny.pipeline().components if one.stage == "encode"]
    assert not [path for path in _opened if path.endswith(".safetensors") and any(part in path for part in parts)]
    # Another prompt is another one's; without the cache, and by a program, nothing is looked up.
    for words in (("--no-prompt-cache",), ("--prompt", tiny.case.prompt.replace("a", "e", 1))):
        loaded.clear()
        before = entries(folder)
        assert tiny.run("--prompt", tiny.case.prompt, "--steps", 2, "--width", 64, "--height", 32, *words).status == 0
        assert loaded and (entries(folder) == before) is (len(words) == 1)


@ONE
def test_whatever_it_follows_from_is_another_entry(tiny, folder, loaded, in_folder, monkeypatch):
    root = copy_of(tiny, in_folder / "model")

    def is_found(*words: object) -> bool:
        loaded.clear()
        result = tiny.run("--prompt", "x", "--steps", 2, "--width", 64, "--height", 32, *words, model=root)
        assert result.status == 0, result.err
        return not loaded

    assert not is_found()
    assert is_found()
    weights = root / "text_encoder_2" / "model.safetensors"
    config, tokenizer = root / "text_encoder" / "config.json", root / "tokenizer_2" / "tokenizer.json"
    assert weights.is_file() and config.is_file() and tokenizer.is_file()
    # Written in place or exchanged, with the same size and the same time.
    for file, exchanged in ((weights, False), (weights, True), (config, False), (tokenizer, True)):
        data, seen = file.read_bytes(), file.stat()
        if exchanged:
            file.unlink()
        file.write_bytes(data)
        os.utime(file, ns=(seen.st_atime_ns, seen.st_mtime_ns))
        assert not is_found(), (file, exchanged)
    assert is_found()
    assert not is_found("-q", 8) and is_found("-q", 8) and is_found()
    # Not that of the transformer, of the seed, or of the size.
    (root / "transformer" / "README.md").write_text("x")
    assert is_found("--seed", 3) and is_found("--steps", 3)
    monkeypatch.setenv("MFLUX_PROMPT_CACHE", "0")
    assert not is_found()


@ONE
def test_what_is_damaged_or_somebody_elses_is_replaced(tiny, folder, loaded, in_folder):
    def draw() -> tuple[bool, np.ndarray]:
        loaded.clear()
        image = pixels(tiny.draw("--seed", 1))
        return not loaded, image

    _, right = draw()
    [entry] = entries(folder)
    whole = entry.read_bytes()
    other = EncodedOnDisk(folder)
    other.put("0" * 64, [mx.ones((2, 2))])
    wrong = [b"", whole[:-1], (folder / ("0" * 64 + ".prompt")).read_bytes()]
    wrong += [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in (0, 30, 60, len(whole) // 2)]
    for data in wrong:
        entry.write_bytes(data)
        found, image = draw()
        assert not found and np.array_equal(image, right)
        assert entry.read_bytes() == whole
    # A link, a pipe, and what others may read.
    outside = in_folder / "outside"
    outside.write_bytes(whole)
    outside.chmod(0o600)
    for spoil in (lambda: entry.symlink_to(outside), lambda: os.mkfifo(entry), lambda: entry.mkdir()):
        entry.unlink()
        spoil()
        found, image = draw()
        assert not found and np.array_equal(image, right)
        if entry.is_dir():
            entry.rmdir()
            draw()
    assert outside.read_bytes() == whole
    entry.chmod(0o644)
    assert not draw()[0] and stat.S_IMODE(entry.stat().st_mode) == 0o600
    folder.chmod(0o755)
    entry.unlink()
    draw()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and draw()[0]
    # No place for it is no harm.
    shutil.rmtree(folder)
    folder.write_text("mine")
    assert not draw()[0] and folder.read_text() == "mine"


@ONE
def test_a_prompt_that_is_warned_of_is_encoded_each_time(tiny, folder, in_folder):
    words = ("--prompt", "a red circle " * 400, "--steps", 2, "--width", 64, "--height", 32)
    assert [len(tiny.run(*words).warnings) for _ in range(2)] == [1, 1]
    assert not entries(folder)


def test_the_oldest_go(folder, monkeypatch):
    monkeypatch.setattr(encoded_on_disk, "MOST_ENTRIES", 3)
    kept = EncodedOnDisk()
    (folder.parent).mkdir()
    folder.mkdir(0o700)
    (folder / "mine.txt").write_text("mine")
    for number in range(5):
        kept.put(str(number), (mx.full((8,), number), None, [True, 2, "x"]))
        os.utime(folder / f"{number}.prompt", ns=(number, number))
        if number == 2:
            assert kept.get("0") is not None
    assert [path.name for path in entries(folder)] == ["0.prompt", "3.prompt", "4.prompt"]
    [(array, nothing, others)] = kept.get("4")
    assert array.tolist() == [4] * 8 and nothing is None and others == [True, 2, "x"]
    monkeypatch.setattr(encoded_on_disk, "MOST_BYTES", entries(folder)[0].stat().st_size)
    kept.put("5", (mx.full((8,), 5), None, [True, 2, "x"]))
    assert [path.name for path in entries(folder)] == ["5.prompt"]
    monkeypatch.setattr(encoded_on_disk, "LARGEST", 100)
    kept.put("6", mx.zeros((200,)))
    kept.put("7", object())
    assert [path.name for path in entries(folder)] == ["5.prompt"] and (folder / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32, mx.int32, mx.bool_])
def test_arrays_come_back_as_they_were(folder, dtype):
    kept = EncodedOnDisk()
    value = (mx.random.normal((3, 5, 7), key=mx.random.key(1)) * 3).astype(dtype).transpose(2, 0, 1)
    kept.put("a", [value])
    [[found]] = kept.get("a")
    assert found.dtype == dtype and mx.array_equal(found, value).item()


def test_names(tmp_path, monkeypatch):
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"x")
    # It may be written to once more without another time.
    assert key_of([file], "prompt") is None
    monkeypatch.setattr(encoded_on_disk, "SETTLED_SECONDS", 0.0)
    tuples = [("a",), ("a", "b"), (("a", "b"),), (b"a",), ("1",), (1,), (True,), (1.0,), ("a,b",), ("a", None)]
    names = [key_of([file], *facts) for facts in [*tuples, ("\ud800",)]]
    assert None not in names and len(set(names)) == len(names)
    assert key_of([file], object()) is None and key_of([tmp_path / "none"], "a") is None
    with pytest.raises(Unstorable):
        encoded_on_disk._told({})
