"""What decoders as text encoders have beside Qwen3: YaRN, a last state that is not normed, towers that no text sees."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from support.gpu import WAYS, computing
from support.reference import COMPONENT, draw, relative_error
from transformers import Mistral3Config, Mistral3Model, Qwen3VLConfig, Qwen3VLModel

from mflux.backend import mx, tree_flatten
from mflux.checkpoints.loading import load_component
from mflux.errors import CheckpointError
from mflux.models.common.networks.decoder import DecoderConfig, DecoderTextEncoder
from mflux.models.common.networks.text_encoders.qwen3_vl import Qwen3VLTextEncoder
from mflux.models.common.networks.yarn import yarn_frequencies, yarn_scale

YARN = dict(
    rope_type="yarn", rope_theta=1e6, factor=16.0, original_max_position_embeddings=256, beta_fast=32.0, beta_slow=1.0,
    mscale=1.0, mscale_all_dim=1.0,
)  # fmt: skip
# As published; the ramp's ends unrounded and other bounds; a scale that follows from the factor; one that is said.
ROPES = {
    "published": YARN | dict(original_max_position_embeddings=16384),
    "early": YARN,
    "unrounded": YARN | dict(truncate=False, beta_fast=8.0, beta_slow=2.0, factor=4.0),
    "scaled": YARN | dict(mscale=None, mscale_all_dim=None),
    "two scales": YARN | dict(mscale=1.5, mscale_all_dim=0.5),
    "said": YARN | dict(attention_factor=1.25),
}
SIZES = dict(
    vocab_size=60, hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16,
)  # fmt: skip
IDS = np.random.default_rng(3).integers(0, 60, (2, 33))


class Config(DecoderConfig):
    kind = "mistral"
    part = "text_config"
    qk_norm = False
    rope_types = ("default", "yarn")


class Mistral(DecoderTextEncoder):
    config_class = Config
    place = "language_model.model"
    beside = ("vision_tower.", "multi_modal_projector.")


def mistral(rope) -> Mistral3Model:
    vision = dict(
        model_type="pixtral", hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=28, patch_size=14, head_dim=8,
    )  # fmt: skip
    text = SIZES | dict(model_type="mistral", rope_parameters=dict(rope), rms_norm_eps=1e-5, sliding_window=None)
    return draw(Mistral3Model(Mistral3Config(text_config=text, vision_config=vision)), seed=2)


def qwen3_vl() -> Qwen3VLModel:
    rope = {"mrope_interleaved": True, "mrope_section": [3, 3, 2], "rope_type": "default", "rope_theta": 5000.0}
    vision = dict(
        depth=2, hidden_size=16, intermediate_size=16, num_heads=2, patch_size=4, out_hidden_size=24,
        num_position_embeddings=16, deepstack_visual_indexes=[0, 1],
    )  # fmt: skip
    text = SIZES | dict(rope_scaling=rope, rope_parameters=rope)
    return draw(Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)), seed=5)


def states(model) -> list[np.ndarray]:
    """All hidden states, the last one before the final norm, and that one normed."""
    kept = []
    hook = model.language_model.norm.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    with torch.no_grad():
        found = model(input_ids=torch.tensor(IDS), output_hidden_states=True).hidden_states
    hook.remove()
    return [value.numpy() for value in (*found[:-1], *kept, found[-1])]


@pytest.mark.parametrize("name", ROPES)
def test_yarn(tmp_path, name):
    model = mistral(ROPES[name])
    rotary = model.language_model.rotary_emb
    ours = yarn_frequencies(SIZES["head_dim"], ROPES[name])
    assert relative_error(ours, rotary.inv_freq) <= 1e-6
    assert math.isclose(yarn_scale(ROPES[name]), rotary.attention_scaling, rel_tol=1e-6)
    model.save_pretrained(tmp_path)
    expected = states(model)
    module = load_component(type("All", (Mistral,), {"hidden_states": (1, 3, 4)}), tmp_path)
    for way in WAYS:
        with computing(way):
            for one, other in zip(module(mx.array(IDS)), (expected[1], expected[3], expected[5]), strict=True):
                assert relative_error(one, other) <= COMPONENT, way


def test_plain_positions_are_others(tmp_path):
    """What the test above stands on."""
    model = mistral(YARN)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    (plain,) = load_component(Mistral, tmp_path, config=config)(mx.array(IDS))
    (ours,) = load_component(Mistral, tmp_path)(mx.array(IDS))
    assert relative_error(plain, ours) > 0.01


@pytest.mark.parametrize(
    "change",
    [
        {"factor": "16"}, {"factor": 0}, {"rope_theta": 1.0}, {"original_max_position_embeddings": None},
        {"original_max_position_embeddings": math.inf}, {"beta_fast": -1.0}, {"mscale": "x"},
        {"attention_factor": math.nan},
    ],
    ids=repr,
)  # fmt: skip
def test_settings_that_make_no_sense(change):
    with pytest.raises(CheckpointError, match=r"rotary positions|rope_theta|\.\w+ is (inf|nan), not a finite number"):
        Config.from_dict({"model_type": "mistral", "rope_parameters": YARN | change})


def test_a_model_without_yarn_refuses_it():
    with pytest.raises(CheckpointError, match="of type 'yarn' are not built"):
        DecoderConfig.from_dict({"rope_parameters": YARN})


@pytest.mark.parametrize("kind, build", [(Mistral, lambda: mistral(YARN)), (Qwen3VLTextEncoder, qwen3_vl)])
def test_the_last_state_before_the_norm(tmp_path, kind, build):
    model = build()
    model.save_pretrained(tmp_path)
    expected = states(model)
    for norms_last, last in ((False, expected[-2]), (True, expected[-1])):
        encoder = type("Encoder", (kind,), {"hidden_states": (2, -1), "norms_last": norms_last})
        module = load_component(encoder, tmp_path)
        names = {name for name, _ in tree_flatten(module.parameters())}
        assert (f"{kind.place}.norm.weight" in names) is norms_last
        # The published names are the module's, and nothing of the towers is.
        assert all(name.startswith(f"{kind.place}.") for name in names)
        middle, end = module(mx.array(IDS))
        assert relative_error(middle, expected[2]) <= COMPONENT
        assert relative_error(end, last) <= COMPONENT
    assert relative_error(expected[-1], expected[-2]) > 0.1


@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_re_saved_without_towers_and_prefix(tmp_path, prefix):
    model = qwen3_vl()
    text = {f"{prefix}{name}": mx.array(value.numpy()) for name, value in model.language_model.state_dict().items()}
    model.config.save_pretrained(tmp_path)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), text)
    (ours,) = load_component(Qwen3VLTextEncoder, tmp_path)(mx.array(IDS))
    assert relative_error(ours, states(model)[-1]) <= COMPONENT


@pytest.mark.parametrize("text", ["mistral", {"model_type": "qwen3_vl_text", "rope_scaling": {"mrope_section": [1]}}])
def test_a_part_that_is_no_such_model_is_refused(text):
    with pytest.raises(CheckpointError, match="text_config"):
        Qwen3VLTextEncoder.config_class.from_dict({"model_type": "qwen3_vl", "text_config": text})


# ---- FLUX.2's autoencoder in other families' hands


@pytest.mark.parametrize("epsilon, square_first", [(1e-5, False), (None, True), (0.3, True)])
def test_latents_as_others_count_them(tmp_path, epsilon, square_first):
    from families.flux2.cases import vae_inputs, vae_reference

    from mflux.models.common.networks.autoencoders.flux2 import AutoencoderKLFlux2

    model = draw(vae_reference(latent_channels=3), seed=1)
    with torch.no_grad():
        model.bn.running_var.copy_(torch.linspace(1e-4, 1e-3, 12))
        model.bn.running_mean.copy_(torch.linspace(-1, 1, 12))
    model.save_pretrained(tmp_path)
    own = {"epsilon": epsilon, "square_first": square_first}
    module = load_component(type("Own", (AutoencoderKLFlux2,), own), tmp_path)
    inputs = {name: torch.tensor(value) for name, value in vae_inputs(model, 0).items()}
    deviation = (model.bn.running_var + (model.config.batch_norm_eps if epsilon is None else epsilon)).sqrt()
    scale, mean = deviation[None, :, None, None], model.bn.running_mean[None, :, None, None]
    with torch.no_grad():
        clean = model.encode(inputs["image"]).latent_dist.mode()
        squares = torch.stack([clean[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], dim=1 if square_first else 2)
        encoded = (squares.flatten(1, 2) - mean) / scale
        given = inputs["latents"] * scale + mean
        apart = given.unflatten(1, (4, 3) if square_first else (3, 4)).movedim(1 if square_first else 2, 0)
        latents = torch.zeros(*apart.shape[1:3], *(2 * side for side in apart.shape[3:]))
        for place, square in enumerate(apart):
            latents[:, :, place // 2 :: 2, place % 2 :: 2] = square
        decoded = model.decode(latents).sample
    for way in WAYS:
        with computing(way):
            assert relative_error(module.encode(mx.array(inputs["image"].numpy())), encoded) <= COMPONENT
            assert relative_error(module.decode(mx.array(inputs["latents"].numpy())), decoded) <= COMPONENT
