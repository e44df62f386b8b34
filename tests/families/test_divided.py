"""A transformer divided among two processes: a step is the whole's, and each has its part of the weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.processes import launched
from support.tiny_models import TinyModel, pixels

from mflux.errors import UsageError
from mflux.models.common.memory import weight_bytes

# The first step's prediction of a model, and the bytes of its transformer, of each process.
PROGRAM = """
import json, sys
from pathlib import Path
import numpy as np
from mflux.backend import mx
from mflux.models.common.config import ModelConfig
from mflux.models.common.family import load_object
from mflux.models.common.memory import weight_bytes

kind, root, base, quantize = sys.argv[1:]
group = mx.distributed.init()
model = load_object(kind)(
    model_path=root, model_config=ModelConfig.from_name(root, base), quantize=int(quantize) or None
)
model.divided_among = group if group.size() > 1 else None
config = model.settings(seed=1, prompt="x", num_inference_steps=2, width=64, height=32, guidance=3.0)
latents = mx.random.normal((1, 8, 64), key=mx.random.key(1))
found = model.predictor(config, *model.encode_prompts("a red circle"))(latents, config.scheduler.sigmas[0])
np.save(f"step{group.size()}{group.rank()}.npy", np.array(found))
Path(f"bytes{group.size()}{group.rank()}.json").write_text(json.dumps(weight_bytes(model.transformer)))
"""


@pytest.mark.parametrize(
    ("tiny", "bits"), [("flux generate", 0), ("qwen generate-qwen", 0), ("qwen generate-qwen", 8)], indirect=["tiny"]
)
def test_a_step_is_the_wholes(tiny: TinyModel, in_folder, bits):
    root = tiny.folder(wide=bool(bits))
    Path("step.py").write_text(PROGRAM)
    words = [sys.executable, "step.py", tiny.case.pipeline, root, tiny.case.base_model, bits]
    alone = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=os.environ, timeout=120)
    assert alone.returncode == 0, alone.stderr
    launched(2, *words)
    whole, *parts = (np.load(f"step{name}.npy").astype(np.float64) for name in ("10", "20", "21"))
    assert np.array_equal(*parts)
    # Packed, a part's groups are the whole's, but for the last bits of what is added up.
    assert np.linalg.norm(parts[0] - whole) <= (1e-4 if bits else 1e-5) * np.linalg.norm(whole)
    assert np.linalg.norm(whole) > 0
    all_, *some = (json.loads(Path(f"bytes{name}.json").read_text()) for name in ("10", "20", "21"))
    assert some[0] == some[1] < 0.75 * all_


@pytest.mark.parametrize("tiny", ["flux generate"], indirect=True)
def test_the_command(tiny: TinyModel, cli, in_folder):
    words = ["--model", tiny.folder(), "--base-model", tiny.case.base_model, "--prompt", tiny.case.prompt]
    words += [
        "--steps",
        2,
        "--width",
        64,
        "--height",
        32,
        "--seed",
        1,
        2,
        "--output",
        "two.png",
        "--divide-transformer",
    ]
    launched(2, sys.executable, "-m", "mflux.cli.main", tiny.case.command, *words)
    one = tiny.run(*words[4:-3], "--output", "one.png")
    assert len(one.paths) == 2
    assert len(list(Path().glob("two*.png"))) == 2
    for path in one.paths:
        assert np.abs(pixels(path) - pixels(Path(str(path).replace("one", "two")))).max() <= 1
    alone = tiny.run(*words[4:])
    assert alone.status == 2
    assert "--divide-transformer divides it among the processes that mlx.launch starts" in alone.errors[0]


class Two:
    def rank(self) -> int:
        return 1

    def size(self) -> int:
        return 2


@pytest.mark.parametrize("tiny", ["flux generate"], indirect=True)
def test_what_cannot_be_divided(tiny: TinyModel, in_folder, monkeypatch):
    from mflux.cli.ranks import Part

    model = tiny.pipeline()
    whole = weight_bytes(model.transformer)
    assert whole > 0
    model.transformer = None
    monkeypatch.setattr(Two, "size", lambda _: 3)
    model.divided_among = Two()
    with pytest.raises(UsageError, match="cannot be divided among 3 processes"):
        _ = model.transformer
    saved = tiny.save("-q", 8, model=tiny.folder(wide=True)).resolve()
    monkeypatch.setattr(Two, "size", lambda _: 2)
    packed = tiny.pipeline(saved)
    packed.divided_among = Two()
    with pytest.raises(UsageError, match="stored quantized"):
        _ = packed.transformer
    model.lora_paths = ["a.safetensors"]
    with pytest.raises(UsageError, match="takes no LoRAs"):
        Part(None, together=Two(), divides=True).share(model)
    monkeypatch.setattr(type(model), "divides", False)
    with pytest.raises(UsageError, match=r"FLUX\.1 and Qwen-Image"):
        Part(None, together=Two(), divides=True).share(model)
