"""A setting that has no effect with the others as they are is told, whatever the family, and only then."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import pytest
from support.tiny_models import EVERY_TINY

from mflux.models.common.config import ModelConfig
from mflux.models.common.pipeline import Pipeline

# Other classes take no strength, or refuse it.
FROM_NOISE_OR_AN_IMAGE = ("generate", "generate-fibo", "generate-flux2", "generate-qwen", "generate-z-image-turbo")


class Reached(Exception):
    """All settings were taken."""


@EVERY_TINY
def test_each_class(tiny, monkeypatch, caplog):
    def reached(*_: object, **__: object) -> None:
        raise Reached

    monkeypatch.setattr(Pipeline, "denoise", reached)
    cls, folder = tiny.case.pipeline_class(), str(tiny.folder())
    known = inspect.signature(cls.generate_image).parameters
    if "prompt" not in known:
        pytest.skip("it has none of these settings")
    model = cls(model_path=folder, model_config=ModelConfig.from_name(folder, tiny.case.base_model))
    plain = {"seed": 1, "num_inference_steps": 1, "width": 64, "height": 32, "prompt": tiny.case.prompt}
    plain |= dict(tiny.case.generate)

    def told(**more: Any) -> list[str]:
        caplog.clear()
        with pytest.raises(Reached):
            model.generate_image(**plain | more)
        return [record.getMessage() for record in caplog.records if "is ignored" in record.getMessage()]

    caplog.set_level(logging.WARNING)
    assert told() == []
    if "negative_prompt" in known:
        above = model.negative_above
        words = "blue" if not tiny.case.prompt.startswith("{") else '{"a": 1}'
        low = told(negative_prompt=words, guidance=above or 0.0)
        assert len(low) == 1 and low[0].startswith("the negative prompt is ignored: ")
        assert told(negative_prompt="", guidance=above or 0.0) == []
        if above is not None and model.registered.supports_guidance:
            assert told(negative_prompt=words, guidance=above + 3) == []
    for name in {"cfg_normalization", "cfg_truncation"} & known.keys():
        lines = told(**{name: 0.5, "guidance": 0.0})
        assert any(line.startswith(f"{name} is ignored: without guidance") for line in lines)
    if tiny.case.command in FROM_NOISE_OR_AN_IMAGE:
        (line,) = told(image_path=None, image_strength=0.5)
        assert line.startswith("image_strength is ignored: there is no image_path")
        assert told(image_path=None, image_strength=None) == []
    if "bake_lora" in inspect.signature(cls).parameters:
        caplog.clear()
        cls(model_path=folder, model_config=ModelConfig.from_name(folder, tiny.case.base_model), bake_lora=False)
        assert caplog.messages == ["bake_lora (--no-bake-lora) is ignored: there is no LoRA"]


@pytest.mark.parametrize("tiny", ["z_image generate-z-image-turbo"], indirect=True)
def test_options_of_the_autoencoder(tiny):
    words = ["--prompt", "x", "--steps", 1, "--width", 64, "--height", 32, "--seed", 1]
    told = ["warning: --vae-tiling is ignored: --vae-full-precision decodes the whole image at once"]
    assert tiny.run(*words, "--vae-full-precision", "--vae-tiling").warnings == told
    assert tiny.run(*words, "--vae-full-precision").warnings == []
    assert tiny.run(*words, "--vae-tiling").warnings == []
