"""Every tensor of FLUX.1 at its published size: names, shapes and counts, without memory for any of them."""

from __future__ import annotations

from math import prod

import pytest
import torch
from diffusers import AutoencoderKL as ReferenceAutoencoder
from diffusers import FluxTransformer2DModel
from mlx.utils import tree_flatten
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from mflux.backend import mx
from mflux.checkpoints.loading import layout_turns, match
from mflux.models.common.autoencoders.kl import AutoencoderKL
from mflux.models.common.text_encoders.clip import CLIPTextEncoder
from mflux.models.common.text_encoders.t5 import T5Encoder
from mflux.models.flux.model.transformer import FluxTransformer

MODELS = ["FLUX.1-schnell", "FLUX.1-dev"]
OURS = {
    "text_encoder": CLIPTextEncoder,
    "text_encoder_2": T5Encoder,
    "transformer": FluxTransformer,
    "vae": AutoencoderKL,
}


def reference_shapes(component: str, config: dict) -> dict[str, tuple[int, ...]]:
    """The names and shapes that the published file has."""
    with torch.device("meta"):
        if component == "text_encoder":
            model = CLIPTextModel(CLIPTextConfig(**config))
            # transformers 5 takes the files' prefix off on loading.
            prefix = "text_model."
        elif component == "text_encoder_2":
            model, prefix = T5EncoderModel(T5Config(**config)), ""
        else:
            model = {"transformer": FluxTransformer2DModel, "vae": ReferenceAutoencoder}[component].from_config(config)
            prefix = ""
    # Parameters, not the state dict: that one would list a tied tensor twice.
    return {prefix + name.removeprefix(prefix): tuple(value.shape) for name, value in model.named_parameters()}


@pytest.mark.parametrize("component", OURS)
@pytest.mark.parametrize("model", MODELS)
def test_full_size(published, model, component):
    config, count = published[model][component]["config"], published[model][component]["parameters"]
    expected = reference_shapes(component, config)
    assert sum(prod(shape) for shape in expected.values()) == count

    before = mx.get_active_memory()
    module = OURS[component](OURS[component].config_class.from_dict(config))
    parameters = dict(tree_flatten(module.parameters()))
    turns = layout_turns(module)
    # Lazy on both sides: only shapes are asked for.
    as_loaded = {
        name: tuple(turns.get(name, lambda value: value)(mx.zeros(shape)).shape) for name, shape in expected.items()
    }
    assert {name: tuple(value.shape) for name, value in parameters.items()} == as_loaded
    assert sum(value.size for value in parameters.values()) == count
    assert match(module, parameters, expected, source="the published file") == {name: name for name in expected}
    assert mx.get_active_memory() - before < 10e6


@pytest.mark.parametrize("component", OURS)
def test_defaults_are_the_published_values(published, component):
    """A config.json that leaves a value out means the published model's."""
    config_class = OURS[component].config_class
    assert config_class() == config_class.from_dict(published["FLUX.1-dev"][component]["config"])
