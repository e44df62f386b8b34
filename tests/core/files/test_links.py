"""Whatever a link says: nothing outside is written, replaced or removed, and nothing outside is published."""

from __future__ import annotations

import ast
import io
import os
import stat
from hashlib import sha256
from pathlib import Path

import PIL.Image
import pytest

import mflux
from mflux.backend import mx, nn
from mflux.checkpoints.folders import read_json
from mflux.checkpoints.saving import copy_beside, new_folder, save_component, write_json
from mflux.checkpoints.writing import SafetensorsWriter
from mflux.cli.completions import complete
from mflux.cli.convert import convert
from mflux.errors import CheckpointError, OutputError
from mflux.hub.cache import Broken, broken_entries, repair
from mflux.utils.atomic_files import remove_within, write_atomically
from mflux.utils.picture_files import save_picture

SOURCE = Path(mflux.__file__).parent


@pytest.fixture
def outside(tmp_path):
    """Somebody's file, and a name in the same folder that nothing has."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "mine").write_bytes(b"mine")
    return folder


def links(outside: Path, paths: list[Path]) -> None:
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(outside / ("mine" if number % 2 else "new"))


def untouched(outside: Path) -> bool:
    return [(path.name, path.read_bytes()) for path in outside.iterdir()] == [("mine", b"mine")]


def save_a_component(folder: Path) -> None:
    save_component(nn.Linear(2, 2), folder, {"a": 1}, stem="stem", shard_bytes=1)


def write_safetensors(folder: Path) -> None:
    specs = {"a": (mx.float32, (2,))}
    with SafetensorsWriter(folder / "a.safetensors", specs, overwrite=True) as writer:
        writer.write("a", mx.ones(2))


def convert_a_file(folder: Path) -> None:
    source = folder.parent / "source.safetensors"
    mx.save_safetensors(str(source), {"a": mx.ones(2)})
    convert(source, folder / "b.safetensors", force=True)


def save_a_picture(folder: Path) -> None:
    image = PIL.Image.new("RGB", (4, 4))
    save_picture(image, folder / "a.png", {"seed": 1}, export_json_metadata=True, overwrite=True)


WRITERS = {
    "a component": (
        save_a_component,
        ["stem-00001-of-00002.safetensors", "stem-00002-of-00002.safetensors", "model.safetensors.index.json",
         "stem.safetensors.index.json", "config.json"],
    ),
    "JSON": (lambda folder: write_json(folder / "a.json", {"a": 1}), ["a.json"]),
    "safetensors": (write_safetensors, ["a.safetensors"]),
    "a converted file": (convert_a_file, ["b.safetensors"]),
    "a picture": (save_a_picture, ["a.png", "a.metadata.json"]),
    "completions": (lambda folder: complete(["--shell", "bash", "--dir", str(folder)]), ["mflux"]),
    "any file": (lambda folder: write_atomically(folder / "a", lambda f: f.write(b"x"), overwrite=True), ["a"]),
    "any new file": (lambda folder: write_atomically(folder / "a", lambda f: f.write(b"x"), overwrite=False), ["a"]),
    "files beside": (
        lambda folder: copy_beside(model_folder(folder.parent), folder, ("tokenizer", "index.json")),
        ["tokenizer/a.json", "tokenizer/b/c.txt", "index.json"],
    ),
}  # fmt: skip


def model_folder(root: Path) -> Path:
    source = root / "model"
    (source / "tokenizer" / "b").mkdir(parents=True)
    for name in ("tokenizer/a.json", "tokenizer/b/c.txt", "index.json"):
        (source / name).write_text("{}")
    return source


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("shifted", [False, True])
def test_no_name_is_written_through(tmp_path, outside, name, shifted, capsys):
    """Once with each name as a link to a file, once as a link to nothing."""
    write, names = WRITERS[name]
    folder = tmp_path / "folder"
    folder.mkdir()
    links(outside, [folder / "unused"] * shifted + [folder / one for one in names])
    try:
        write(folder)
    except OutputError:
        assert name == "a component"  # its weights replace nothing, not even a link
    assert untouched(outside)


def test_a_new_folder_is_new(tmp_path, outside):
    (tmp_path / "saved").symlink_to(outside)
    with pytest.raises(OutputError, match="exists already"), new_folder(tmp_path / "saved"):
        pass
    assert untouched(outside)


# ---- what is copied


@pytest.mark.parametrize("name", ["tokenizer/a.json", "tokenizer/b/c.txt", "index.json"])
def test_no_file_from_elsewhere_is_saved_with_a_model(tmp_path, outside, name):
    source = model_folder(tmp_path)
    (source / name).unlink()
    (source / name).symlink_to(outside / "mine")
    with pytest.raises(OutputError, match=f"{name} leads out of the model's folder, to {outside / 'mine'}"):
        copy_beside(source, tmp_path / "saved", ("tokenizer", "index.json"))


def test_a_pipe_among_a_models_files(tmp_path):
    source = model_folder(tmp_path)
    os.mkfifo(source / "tokenizer" / "pipe.json")
    with pytest.raises(CheckpointError, match="is a pipe or a device"):
        copy_beside(source, tmp_path / "saved", ("tokenizer",))


def test_a_cached_model_is_saved_and_belongs_to_this_user(tmp_path):
    """Every file is a link there; whatever its permissions, the copy has those of any new file."""
    holder = tmp_path / "models--a--b"
    (holder / "blobs").mkdir(parents=True)
    (tmp_path / "blobs" / "ab").mkdir(parents=True)
    snapshot = holder / "snapshots" / ("0" * 40)
    (snapshot / "tokenizer").mkdir(parents=True)
    for number, blob in enumerate((holder / "blobs" / "x", tmp_path / "blobs" / "ab" / "shared")):
        blob.write_text("{}")
        blob.chmod(0o400 if number else 0o777)
        (snapshot / "tokenizer" / f"{number}.json").symlink_to(os.path.relpath(blob, snapshot / "tokenizer"))
    before = os.umask(0o027)
    try:
        copy_beside(snapshot, tmp_path / "saved", ("tokenizer",))
    finally:
        os.umask(before)
    saved = sorted((tmp_path / "saved" / "tokenizer").iterdir())
    assert [path.name for path in saved] == ["0.json", "1.json"]
    assert {stat.S_IMODE(path.lstat().st_mode) for path in saved} == {0o640}


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
@pytest.mark.parametrize("name", [name for name in WRITERS if name != "files beside"])
def test_everything_written_obeys_the_umask(tmp_path, name, mask, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    before = os.umask(mask)
    try:
        WRITERS[name][0](folder)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~mask}


# ---- Hugging Face's cache


def cached(root: Path) -> Path:
    holder = root / "models--a--b"
    for number in "ab":
        (holder / "snapshots" / (number * 40)).mkdir(parents=True)
    (holder / "blobs").mkdir()
    return holder


def test_what_is_brought_back_is_written_through_no_link(tmp_path, outside):
    holder = cached(tmp_path)
    name = sha256(b"evil").hexdigest()
    blob = holder / "blobs" / name
    (holder / "snapshots" / ("a" * 40) / "x.json").write_bytes(b"evil")
    (holder / "snapshots" / ("b" * 40) / "x.json").symlink_to(f"../../blobs/{name}")
    links(outside, [blob.with_name(f"{name}{end}") for end in (".mflux.incomplete", ".incomplete", ".part", ".tmp")])
    done = repair(holder, [Broken(holder / "snapshots" / ("b" * 40) / "x.json", "is a link to nothing", ())])
    assert done and blob.read_bytes() == b"evil" and not blob.is_symlink()
    assert untouched(outside)


@pytest.mark.parametrize("through", ["file", "blob", "folder", "two links", "circle"])
def test_a_repair_removes_nothing_outside(tmp_path, outside, through):
    holder = cached(tmp_path)
    snapshot = holder / "snapshots" / ("a" * 40)
    (outside / "mine").write_bytes(b"")
    entry = snapshot / "x.json"
    if through == "file":
        entry.symlink_to(outside / "mine")
    elif through == "blob":
        (holder / "blobs" / "x").symlink_to(outside / "mine")
        entry.symlink_to("../../blobs/x")
    elif through == "folder":
        (outside / "x.json").write_bytes(b"")
        (snapshot / "vae").symlink_to(outside)
        entry = snapshot / "vae" / "x.json"
    elif through == "two links":
        (snapshot / "y.json").symlink_to(outside / "mine")
        entry.symlink_to("y.json")
    else:
        (snapshot / "y.json").symlink_to("x.json")
        entry.symlink_to("y.json")
    before = sorted(path.name for path in outside.iterdir())
    for found in (broken_entries(holder), [Broken(entry, "is empty", (entry,))]):
        repair(holder, found)
    assert sorted(path.name for path in outside.iterdir()) == before
    if through != "folder":
        assert not entry.is_symlink()


@pytest.mark.parametrize("name", ["../outside/mine", "a/../../outside/mine"])
def test_names_that_lead_out_remove_nothing(tmp_path, outside, name):
    (tmp_path / "root" / "a").mkdir(parents=True)
    for follow in (False, True):
        assert remove_within(tmp_path / "root" / name, tmp_path / "root", follow=follow) == []
    assert untouched(outside)


def test_what_a_leftover_leads_to_stays(tmp_path):
    holder = cached(tmp_path)
    good = holder / "blobs" / "good"
    good.write_bytes(b"good")
    for link in (holder / "blobs" / "x.incomplete", holder / "refs" / "main"):
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(good)
    found = broken_entries(holder)
    assert len(found) == 2
    repair(holder, found)
    assert good.read_bytes() == b"good" and not list(holder.glob("refs/*")) and not list(holder.glob("blobs/*.inc*"))


@pytest.mark.parametrize("inside", [True, False])
def test_nobody_is_told_to_delete_what_a_link_leads_to_outside(tmp_path, outside, inside):
    holder = cached(tmp_path)
    target = holder / "blobs" / "x" if inside else outside / "mine"
    target.write_bytes(b"no JSON")
    entry = holder / "snapshots" / ("a" * 40) / "config.json"
    entry.symlink_to(target)
    with pytest.raises(CheckpointError) as caught:
        read_json(entry)
    assert f"(delete {target if inside else entry}, and the same command does)" in str(caught.value)


# ---- one place


# What opens files for writing, makes or removes them, and where it may: elsewhere `atomic_files` is called.
_WRITING = {
    "write_text", "write_bytes", "unlink", "rmdir", "rename", "symlink_to", "hardlink_to", "copyfile", "copy", "copy2",
    "copytree", "rmtree", "move", "remove", "removedirs", "truncate", "touch", "chmod",
}  # fmt: skip
_ALLOWED = {
    "utils/atomic_files.py": "the one place",
    "hub/guard.py": "removes links in Hugging Face's cache before huggingface_hub writes there",
    "hub/resolve.py": "removes what a download that broke off has left",
    "checkpoints/saving.py": "moves a folder that is complete to its name",
    "checkpoints/writing.py": "lengthens its own temporary file",
    "models/common/training/checkpoint.py": "opens members of a ZIP that the one place writes",
    "models/common/controls/depth_pro/download.py": "appends to its own file, which it opens with O_NOFOLLOW",
}


def test_one_place_writes_and_removes():
    found = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            modes = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            opens = name == "open" and any(set(mode) & set("wax+") and set(mode) <= set("rwaxbt+") for mode in modes)
            named = name in _WRITING and not _is_list_or_array(node)
            if opens or named:
                found.add(path.relative_to(SOURCE).as_posix())
    assert found - {"cli/process.py"} == set(_ALLOWED), "cli/process.py opens /dev/null"


def _is_list_or_array(node: ast.Call) -> bool:
    """`copy` of the module of that name, of an image or a dict, and `remove` of a list."""
    text = ast.unparse(node.func)
    return text.rpartition(".")[2] in ("copy", "remove") and not text.startswith(("shutil.", "os."))


def test_the_rule_itself(tmp_path):
    """Nothing but a temporary file is open while it is written, and it is nobody else's."""
    seen = []

    def write(file: io.BufferedIOBase) -> None:
        seen.extend(path.name for path in tmp_path.iterdir())
        file.write(b"x")

    write_atomically(tmp_path / "a", write, overwrite=True)
    assert len(seen) == 1 and seen[0].startswith(".mflux-")
