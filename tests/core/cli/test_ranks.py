"""Several processes of one command, as `mlx.launch` starts them: together they do what one does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from support.processes import launched

PROMPT = "a large red circle on a white background"


def generated(folder: Path, processes: int, *words: object) -> subprocess.CompletedProcess[str]:
    """`mlx.launch` of `mflux generate` on this machine."""
    call = [sys.executable, "-m", "mflux.cli.main", "generate", "--model", "demo", "--prompt", PROMPT, *words]
    return launched(processes, *call, folder=folder)


def pixels(path: Path) -> np.ndarray:
    with PIL.Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize("seeds", [(1, 2, 3), (7,)])
def test_each_image_is_generated_once_and_the_same(cli, in_folder, seeds):
    done = generated(in_folder, 2, "--seed", *seeds, "--output", "many.png")
    assert done.returncode == 0, done.stderr
    one = cli("generate", "--model", "demo", "--prompt", PROMPT, "--seed", *seeds, "--output", "one.png")
    names = {str(path): str(path).replace("one", "many") for path in one.paths}
    assert {path.name for path in in_folder.glob("many*.png")} == set(names.values())
    for here, there in names.items():
        assert np.array_equal(pixels(in_folder / here), pixels(in_folder / there))


def test_seeds_at_random_are_shared(in_folder):
    done = generated(in_folder, 2, "--auto-seeds", 4, "--steps", 1)
    assert done.returncode == 0, done.stderr
    assert len(list(in_folder.glob("image_seed_*.png"))) == 4


def test_a_variable_alone_changes_nothing(cli, in_folder, monkeypatch):
    monkeypatch.setenv("MLX_RANK", "0")
    done = cli("generate", "--model", "demo", "--prompt", PROMPT, "--seed", 1, 2, "--steps", 1)
    assert len(done.paths) == 2
