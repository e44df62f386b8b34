"""What a user's editor and type checker see of the package: mypy reads a program that uses the public classes.

Here, because the checker comes with the reference implementations.
"""

from __future__ import annotations

import re
import subprocess
import sys

PROGRAM = """\
import mflux
from mflux.models.common.config import ModelConfig
from mflux.models.fibo_vlm.model.fibo_vlm import FiboVLM
from mflux.models.flux.variants.kontext.flux_kontext import Flux1Kontext
from mflux.models.flux.variants.txt2img.flux import Flux1
from mflux.models.z_image import ZImageTurbo

flux = Flux1(model_config=ModelConfig.from_name("schnell"), quantize=4, lora_paths=["a.safetensors"])
reveal_type(flux.transformer)  # FluxTransformer
reveal_type(flux.transformer.config.num_layers)  # int
reveal_type(flux.vae)  # AutoencoderKL
flux.transformer = None
image = flux.generate_image(seed=1, prompt="x", num_inference_steps=4)
reveal_type(image)  # GeneratedImage
reveal_type(image.image)  # Image
reveal_type(image.save("a.png"))  # Path
reveal_type(Flux1Kontext.from_name("dev-kontext"))  # Flux1Kontext
reveal_type(ZImageTurbo(quantize=8).text_encoder)  # ZImageTextEncoder
reveal_type(mflux.load("z-image-turbo", quantize=4))  # ZImage
reveal_type(mflux.load("schnell").generate_image(1, "x"))  # GeneratedImage
reveal_type(mflux.load("qwen-image-edit").vae)  # AutoencoderWan
FiboVLM()
flux.generate_image(seed="1", prompt="x")  # error: arg-type
flux.generate_image(seed=1, prompt="x", stepps=4)  # error: call-arg
flux.transformers  # error: attr-defined
mflux.load("schnell").text_encoder  # error: attr-defined
mflux.lode("schnell")  # error: attr-defined
"""


def test_a_program_is_checked_as_an_editor_would(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    call = [sys.executable, "-m", "mypy", "--no-error-summary", "--no-incremental", "program.py"]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True)
    told: dict[int, str] = {}
    for line in done.stdout.splitlines():
        if match := re.match(r"program\.py:(\d+): (note|error): (.*)", line):
            # The first note of a line is its own; others explain it.
            told.setdefault(int(match[1]), match[3])
    for number, line in enumerate(PROGRAM.splitlines(), start=1):
        code, _, expected = line.partition("  # ")
        if expected.startswith("error: "):
            assert told.pop(number, "").endswith(f"[{expected.removeprefix('error: ')}]"), code
        elif expected:
            assert re.search(rf"[\".]{expected}\"$", told.pop(number, "")), code
    assert told == {}, done.stdout
