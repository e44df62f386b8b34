"""Folders of Hugging Face's cache that are given as models, wherever they lie."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from mflux.hub import resolve_model
from mflux.utils.paths import recorded_source, snapshot_in

COMMITS = ("0" * 40, "1" * 40)


@pytest.fixture
def entry(tmp_path, tiny_schnell) -> Path:
    """An entry with one snapshot, whose files are links into `blobs` as in the cache."""
    entry = tmp_path / "disk" / "models--black-forest-labs--FLUX.1-schnell"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text(COMMITS[0])
    (entry / "blobs").mkdir()
    for number, path in enumerate(sorted(path for path in tiny_schnell.rglob("*") if path.is_file())):
        blob = entry / "blobs" / f"{number:040x}"
        shutil.copyfile(path, blob)
        link = entry / "snapshots" / COMMITS[0] / path.relative_to(tiny_schnell)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return entry


def another(entry: Path) -> None:
    shutil.copytree(entry / "snapshots" / COMMITS[0], entry / "snapshots" / COMMITS[1], symlinks=True)


@pytest.mark.parametrize("inside", ["", "snapshots", f"snapshots/{COMMITS[0]}"])
def test_the_snapshot_that_main_names_is_taken(entry, inside, cli, in_folder):
    another(entry)
    words = ["--prompt", "x", "--width", 16, "--height", 16, "--steps", 1, "--seed", 1]
    result = cli("generate", "--model", entry / inside, *words)
    assert (result.status, result.errors) == (0, [])
    assert resolve_model(str(entry / inside), []) == entry / "snapshots" / COMMITS[0]
    checked = cli("check", "model", entry / inside)
    assert "check: pass" in checked.out and "model: schnell" in checked.out


def test_the_only_snapshot_is_taken_where_nothing_names_one(entry):
    (entry / "refs" / "main").write_text("gone")
    assert snapshot_in(entry) == entry / "snapshots" / COMMITS[0]
    (entry / "refs" / "main").unlink()
    assert snapshot_in(entry) == entry / "snapshots" / COMMITS[0]


@pytest.mark.parametrize("command", ["generate", "save", "check"])
@pytest.mark.parametrize("kind", ["several", "none", "blobs", "refs"])
def test_where_nothing_tells_which_is_meant(entry, kind, command, cli, in_folder):
    inside = kind if kind in ("blobs", "refs") else ""
    first = entry / "snapshots" / COMMITS[0]
    told = f"{entry / inside} holds files without their names: give the folder {first}"
    if kind == "several":
        another(entry)
        (entry / "refs" / "main").unlink()
        told = f"{entry} holds 2 snapshots: give one of them, as {first}"
    elif kind == "none":
        shutil.rmtree(first)
        told = f"{entry} is an entry of Hugging Face's cache without a snapshot: fetch the model again"
    words = {"generate": ["--prompt", "x"], "save": ["--path", "s"], "check": []}[command]
    asked = ["model"] if command == "check" else ["--model"]
    result = cli(command, *asked, entry / inside, *words)
    assert result.status in (1, 2) and result.errors == [f"error: {told}"]


@pytest.mark.parametrize("name", ["snapshots", "blobs", "mine", "models--a--b"])
def test_other_folders_are_themselves(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    assert snapshot_in(folder) == folder
    (folder / ("snapshots" if name == "mine" else "refs")).mkdir()
    assert snapshot_in(folder) == folder


@pytest.mark.parametrize("inside", ["", "/", "/snapshots", f"/snapshots/{COMMITS[0]}"])
def test_a_picture_names_the_repository(inside):
    assert recorded_source(f"/disk/models--org--name{inside}") == "org/name"
