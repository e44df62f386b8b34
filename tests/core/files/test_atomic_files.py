"""Files that are whole or absent: killed writers, names that are taken or too long, file systems without links."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import PIL.Image
import pytest

from mflux.backend import mx
from mflux.checkpoints.saving import new_folder
from mflux.checkpoints.writing import SafetensorsWriter
from mflux.errors import OutputError
from mflux.utils import atomic_files
from mflux.utils.atomic_files import Temporary, remove_abandoned, write_atomically
from mflux.utils.image_util import ImageUtil
from mflux.utils.picture_files import check_output


def write(path: Path, **options) -> Path:
    return write_atomically(path, lambda file: file.write(b"mine"), overwrite=False, **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def python(tmp_path):
    """Start a process that runs a program, and wait until it has said "ready"."""
    started = []

    def start(program: str, *words: object) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


# What writes a file, a folder, and weights, and is stopped in the middle.
WRITERS = {
    "file": """
import sys, time
from pathlib import Path
from mflux.utils.atomic_files import write_atomically
def write(file):
    file.write(b"half" * 1000)
    file.flush()
    print("ready", flush=True)
    time.sleep(60)
write_atomically(Path(sys.argv[1]) / "x.bin", write, overwrite=False)
""",
    "folder": """
import sys, time
from mflux.checkpoints.saving import new_folder
with new_folder(sys.argv[1] + "/model") as folder:
    (folder / "vae").mkdir()
    (folder / "vae" / "weights").write_bytes(b"half")
    print("ready", flush=True)
    time.sleep(60)
""",
    "weights": """
import sys, time
from mflux.backend import mx
from mflux.checkpoints.writing import SafetensorsWriter
with SafetensorsWriter(sys.argv[1] + "/x.safetensors", {"a": (mx.float32, (1000,))}):
    print("ready", flush=True)
    time.sleep(60)
""",
}


@pytest.mark.parametrize("kind", WRITERS)
def test_what_a_killed_run_leaves_goes_with_the_next(tmp_path, python, kind):
    process = python(WRITERS[kind], tmp_path)
    (left,) = names(tmp_path)
    assert left.startswith(".mflux-") and left.endswith(".part")
    # As long as its writer lives it stays, however long that takes.
    os.utime(tmp_path / left, (0, 0))
    assert names(write(tmp_path / "a.bin").parent) == [left, "a.bin"]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert left in names(tmp_path)
    check_output(tmp_path / "b.png")
    assert names(tmp_path) == ["a.bin"]


def test_every_writer_clears_up(tmp_path):
    def leave() -> None:
        (tmp_path / ".mflux-0.part").write_bytes(b"left")
        (tmp_path / ".mflux-1.partial").write_bytes(b"left")
        (tmp_path / ".mflux-2.part").mkdir()
        (tmp_path / ".mflux-2.part" / "x").write_bytes(b"left")

    leave()
    write(tmp_path / "a.bin")
    assert names(tmp_path) == ["a.bin"]
    leave()
    with new_folder(tmp_path / "b") as folder:
        (folder / "x").touch()
        # Its own is not taken for abandoned by another writer of this process.
        write(tmp_path / "c.bin")
    assert names(tmp_path) == ["a.bin", "b", "c.bin"]
    leave()
    with SafetensorsWriter(tmp_path / "d", {"a": (mx.float32, (2,))}) as writer:
        writer.write("a", mx.zeros(2))
        remove_abandoned(tmp_path)
    assert names(tmp_path) == ["a.bin", "b", "c.bin", "d"]


def test_what_only_looks_abandoned_stays(tmp_path):
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / ".mflux-link.part").symlink_to("elsewhere")
    (tmp_path / ".mflux-notes.txt").write_text("mine")
    (tmp_path / "x.part").write_text("mine")
    before = names(tmp_path)
    remove_abandoned(tmp_path)
    remove_abandoned(tmp_path / "none")
    assert names(tmp_path) == before


def test_a_pipe_among_them_does_not_wait(tmp_path):
    os.mkfifo(tmp_path / ".mflux-x.part")
    write(tmp_path / "a.bin")
    assert "a.bin" in names(tmp_path)


def test_a_temporary_that_is_taken_for_abandoned_before_it_is_locked(tmp_path, monkeypatch):
    """Another run may look between creating and locking; then a new one is made."""
    import fcntl

    lock, lost = fcntl.flock, []

    def flock(descriptor, how):
        if how == fcntl.LOCK_EX and not lost:
            lost.extend(tmp_path.glob(".mflux-*"))
            lost[0].unlink()
        return lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    temporary = Temporary(tmp_path)
    assert temporary.path != lost[0]
    assert temporary.path.is_file()
    temporary.discard()
    assert names(tmp_path) == []


def test_without_locks_files_are_written_and_nothing_is_removed(tmp_path, monkeypatch):
    import fcntl

    def refuse(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".mflux-0.part").write_bytes(b"perhaps another machine's")
    write(tmp_path / "a.bin")
    assert names(tmp_path) == [".mflux-0.part", "a.bin"]


# ---- names


@pytest.mark.parametrize("character", ["x", "ä", "円", "🔴"])
@pytest.mark.parametrize("sidecar", [False, True])
def test_the_longest_name_that_is_taken(tmp_path, character, sidecar):
    """The number takes the place of the name's end, and no character is cut in two."""
    width = len(character.encode())
    stem = character * (251 // width)
    wanted = tmp_path / f"{stem}{'y' * (251 - len(stem.encode()))}.png"
    assert len(os.fsencode(wanted.name)) == 255
    saved = [
        ImageUtil.save_image(PIL.Image.new("RGB", (2, 2)), wanted, {"seed": 1}, export_json_metadata=sidecar)
        for _ in range(12)
    ]
    assert len(set(saved)) == 12
    for path in saved:
        assert path.is_file()
        assert os.path.lexists(path.with_suffix(".metadata.json")) == sidecar
        assert set(path.stem) <= {character, "y", "_", *"0123456789"}
    assert saved[11].name.endswith("_11.png")
    assert (saved[0] == wanted) == (not sidecar)
    assert len(names(tmp_path)) == 12 * (1 + sidecar)


def test_the_longest_name_that_is_no_unicode(tmp_path):
    wanted = tmp_path / os.fsdecode(b"\xff" * 251 + b".bin")
    assert len({write(wanted), write(wanted), write(wanted)}) == 3


def test_a_name_that_is_too_long_is_told(tmp_path):
    for use in (write, check_output):
        with pytest.raises(
            OutputError, match=r"cannot write .*x: File name too long|cannot write .*\.png: File name too"
        ):
            use(tmp_path / ("x" * 300 + ".png"))
    with pytest.raises(OutputError, match="File name too long"), new_folder(tmp_path / ("x" * 300)):
        pass
    with pytest.raises(OutputError, match="File name too long"):
        SafetensorsWriter(tmp_path / ("x" * 300), {}).__enter__()
    assert names(tmp_path) == []


# ---- file systems without links

MANY = """
import os, sys
from pathlib import Path
def link(*args):
    raise OSError(95, "Operation not supported")
os.link = link
from mflux.utils.atomic_files import write_atomically
print("ready", flush=True)
while not Path(sys.argv[1], "go").exists():
    pass
for number in range(60):
    text = f"{sys.argv[2]} {number}".encode()
    print(write_atomically(Path(sys.argv[1], "x.bin"), lambda file: file.write(text), overwrite=False).name)
"""


def test_two_that_write_at_once_lose_nothing(tmp_path, python):
    writers = [python(MANY, tmp_path, who) for who in "ab"]
    (tmp_path / "go").touch()
    written = []
    for process in writers:
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        written += out.split()
    assert len(set(written)) == 120
    contents = {(tmp_path / name).read_text() for name in written}
    assert contents == {f"{who} {number}" for who in "ab" for number in range(60)}
    assert names(tmp_path) == sorted([*written, "go"])


def test_a_reservation_goes_with_what_it_was_for(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OutputError, match="Input/output error"):
        write(tmp_path / "x.bin")
    assert names(tmp_path) == []


def test_the_clock_is_not_asked(tmp_path, monkeypatch):
    """A writer may take days, and clocks differ between machines that share a folder."""
    monkeypatch.setattr(time, "time", lambda: 1e12)
    temporary = Temporary(tmp_path)
    os.utime(temporary.path, (0, 0))
    remove_abandoned(tmp_path)
    assert temporary.path.exists()
    temporary.discard()


def test_a_file_system_that_never_says_the_same_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic_files, "_is_same", lambda *_: False)
    with pytest.raises(OutputError, match="another file the next moment"):
        write_atomically(tmp_path / "a", lambda file: file.write(b"x"), overwrite=True)


def test_a_file_system_on_which_all_names_are_taken(tmp_path, monkeypatch):
    def link(*_: object) -> None:
        raise FileExistsError

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(OutputError, match="names that nothing has are taken there"):
        write_atomically(tmp_path / "a", lambda file: file.write(b"x"), overwrite=False)
    assert list(tmp_path.iterdir()) == []
