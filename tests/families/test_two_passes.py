"""The two passes of guidance in two processes: each computes one, and the image is that of a single process."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from support.processes import launched
from support.tiny_models import FIRST, TinyModel, pixels

from mflux.backend import mx
from mflux.models.common.pipeline import Pipeline

# What has no second pass, whatever is asked for, and one that has in the place of one that has not.
_WITHOUT = ("flux ", "seedvr2 ", "z_image ")
GUIDED = [*(name for name in FIRST if not name.startswith(_WITHOUT)), "z_image generate-z-image"]


@dataclass
class Process:
    """One of two, whose other one's predictions are known from a run of a single process."""

    number: int
    known: list[tuple[mx.array, mx.array]]
    asked: int = 0

    def rank(self) -> int:
        return self.number

    def gathered(self, own: mx.array, group: Process) -> mx.array:
        both = group.known[group.asked]
        group.asked += 1
        assert mx.array_equal(own[0], both[group.number]).item()
        return mx.stack(both)


@pytest.mark.parametrize("tiny", GUIDED, indirect=True)
def test_each_process_computes_one(tiny: TinyModel, monkeypatch):
    model = tiny.pipeline()
    # Some were made without guidance, others of the same class with it.
    vars(model)["is_distilled"] = False
    taken = inspect.signature(type(model).generate_image).parameters
    settings = {"guidance": 3.0, "negative_prompt": "blur"}
    settings = {name: value for name, value in settings.items() if name in taken}
    known: list[tuple[mx.array, mx.array]] = []
    both = Pipeline.both

    def watched(self, *passes, **options):
        found = both(self, *passes, **options)
        known.append(found)
        return found

    monkeypatch.setattr(Pipeline, "both", watched)
    alone = np.asarray(tiny.generate(model, **settings).image)
    assert len(known) == 2, "a pass a step"
    monkeypatch.undo()
    computed: list[int] = []

    def counted(self, first, second, **options):
        def of(number, one):
            return lambda: computed.append(number) or one()

        return both(self, of(0, first), of(1, second), **options)

    monkeypatch.setattr(Pipeline, "both", counted)
    for number in (0, 1):
        model.shares_guidance = Process(number, known)
        monkeypatch.setattr(mx.distributed, "all_gather", model.shares_guidance.gathered)
        computed.clear()
        assert np.array_equal(np.asarray(tiny.generate(model, **settings).image), alone)
        assert computed == [number] * 2


@pytest.mark.parametrize("tiny", [name for name in FIRST if name.startswith("qwen ")], indirect=True)
@pytest.mark.parametrize("guided", [True, False])
def test_two_real_processes(tiny: TinyModel, in_folder, guided):
    words = [
        "--model",
        tiny.folder(),
        "--base-model",
        tiny.case.base_model,
        *tiny.case.words,
        "--prompt",
        tiny.case.prompt,
    ]
    words += ["--steps", 2, "--width", 64, "--height", 32, "--seed", 1, "--guidance", 4 if guided else 1]
    words += ["--negative-prompt", "blur"] if guided else []
    launched(2, sys.executable, "-m", "mflux.cli.main", tiny.case.command, *words, "--output", "two.png")
    one = tiny.run(*words[4:], "--output", "one.png")
    assert one.status == 0, one.err
    assert np.array_equal(pixels(Path("two.png")), pixels(Path("one.png")))
    assert [path.name for path in Path().glob("two*.png")] == ["two.png"]
