"""FIBO-VLM's network against transformers' Qwen3-VL: what it sees, what it computes, what it says."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from mlx.utils import tree_flatten
from safetensors.torch import load_file, save_file
from support.gpu import both_ways
from support.reference import COMPONENT, draw, normal, relative_error
from transformers import Qwen2VLImageProcessorPil
from transformers import Qwen3VLConfig as ReferenceConfig
from transformers import Qwen3VLForConditionalGeneration as Reference
from transformers.core_model_loading import revert_weight_conversion
from transformers.generation.logits_process import TopPLogitsWarper

from mflux.backend import mx
from mflux.checkpoints.loading import FileDifferences, layout_turns, load_component
from mflux.errors import CheckpointError
from mflux.models.common.networks.decoder import unused_patterns
from mflux.models.common.networks.image_processors import VLImageProcessor
from mflux.models.common.networks.qwen3_vl import (
    KeyValueCache,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    Qwen3VLTextConfig,
    Qwen3VLVisionConfig,
)
from mflux.models.common.networks.qwen_vl import VLDecoder, VLModel
from mflux.models.common.networks.vision import see
from mflux.models.fibo.vlm import weights
from mflux.models.fibo.vlm.generation import Sampling, choose, generate_tokens, likely_logits
from mflux.models.fibo.vlm.processor import MAX_PIXELS, MEAN, MIN_PIXELS, STD

VOCABULARY = 400
IMAGE, VIDEO, START, END = range(396, 400)
TOKENS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
}  # fmt: skip

# As published but small: a tied head, three deepstack layers, two query heads to a key.
TIED = TOKENS | {
    "tie_word_embeddings": True,
    "text_config": {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 5e6, "mrope_section": [3, 3, 2], "mrope_interleaved": True,
        },
    },
    "vision_config": {
        "depth": 4, "hidden_size": 24, "intermediate_size": 40, "num_heads": 3, "patch_size": 4,
        "temporal_patch_size": 2, "spatial_merge_size": 2, "out_hidden_size": 32, "num_position_embeddings": 25,
        "deepstack_visual_indexes": [0, 2, 3],
    },
}  # fmt: skip
# All that may differ does: an own head, biases, three query heads to a key, squares of nine patches, one frame, other
# activations, deepstack layers out of order.
UNTIED = TOKENS | {
    "tie_word_embeddings": False,
    "text_config": {
        "vocab_size": VOCABULARY, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "hidden_act": "gelu",
        "rms_norm_eps": 1e-5, "attention_bias": True, "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2, 1], "mrope_interleaved": True,
        },
    },
    "vision_config": {
        "depth": 3, "hidden_size": 32, "intermediate_size": 24, "num_heads": 2, "patch_size": 6,
        "temporal_patch_size": 1, "spatial_merge_size": 3, "out_hidden_size": 40, "num_position_embeddings": 49,
        "deepstack_visual_indexes": [2, 0], "hidden_act": "gelu",
    },
}  # fmt: skip
CONFIGS = {"tied": TIED, "untied": UNTIED}
# Sharp attention, so that an answer goes on to change instead of repeating one token; small embeddings in the tied
# head, so that a token is not its own likeliest successor.
GAINS = {"o_proj.weight": 2.0, "mlp.down_proj.weight": 2.0, "q_norm.weight": 2.0, "k_norm.weight": 2.0}

PUBLISHED = json.loads((Path(__file__).parents[2] / "data" / "fibo_vlm_config.json").read_text())


def reference_config(values: dict) -> ReferenceConfig:
    return ReferenceConfig(**json.loads(json.dumps({key: value for key, value in values.items() if key[0] != "_"})))


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory) -> tuple[Reference, Qwen3VLForConditionalGeneration]:
    """The reference with every tensor drawn at random, and ours from the files that it saves."""
    gains = GAINS | ({"embed_tokens.weight": 0.1} if request.param == "tied" else {})
    model = draw(Reference(reference_config(CONFIGS[request.param])), seed=2, gains=gains)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, weights.load(folder)


# ---- prompts

TEXT, ONE, TWO = (), ((6, 12),), ((6, 12), (12, 6))
PICTURES = {"text": TEXT, "one-picture": ONE, "two-pictures": TWO, "two-unlike": ((6, 6), (12, 18))}


def prompt(values: dict, grids) -> tuple[list[int], np.ndarray | None]:
    """Token ids, and patches for grids of so many rows and columns."""
    vision = values["vision_config"]
    ids = [1, 2]
    for number, (rows, columns) in enumerate(grids):
        ids += [START, *[IMAGE] * (rows * columns // vision["spatial_merge_size"] ** 2), END, 7 + number]
    ids += [5, 6, 9]
    size = 3 * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    return ids, normal(3, sum(rows * columns for rows, columns in grids), size) if grids else None


def for_reference(ids: list[int], patches, grids) -> dict[str, torch.Tensor]:
    tokens = torch.tensor([ids])
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if grids:
        inputs |= {
            "pixel_values": torch.tensor(patches),
            "image_grid_thw": torch.tensor([[1, *grid] for grid in grids]),
            "mm_token_type_ids": (tokens == IMAGE).int(),
        }
    return inputs


def values_of(model: Reference) -> dict:
    return TIED if model.config.tie_word_embeddings else UNTIED


# ---- what it is shown


@pytest.mark.parametrize("size", [(64, 48), (1000, 700), (17, 1000), (2000, 10), (1500, 1400)])
def test_images_become_the_reference_s_patches(size):
    values = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": MEAN, "image_std": STD}
    ours = VLImageProcessor(**values, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    theirs = Qwen2VLImageProcessorPil(**values, size={"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS})
    image = PIL.Image.fromarray(np.random.default_rng(5).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    expected = theirs(images=[image], return_tensors="np")
    patches, grids = ours.batch([image])
    assert [[1, *grid] for grid in grids] == expected["image_grid_thw"].tolist()
    assert np.abs(np.array(patches) - expected["pixel_values"]).max() < 1e-6


# ---- what it computes


@both_ways
@pytest.mark.parametrize("grids", [ONE, TWO, PICTURES["two-unlike"], ((6, 30),)])
def test_vision_features(pair, grids):
    model, ours = pair
    _, patches = prompt(values_of(model), grids)
    with torch.no_grad():
        expected = model.get_image_features(torch.tensor(patches), torch.tensor([[1, *grid] for grid in grids]))
    tokens, *deepstack = see(ours.model.visual, mx.array(patches), grids)
    assert relative_error(tokens, torch.cat(expected.pooler_output)) <= COMPONENT
    assert len(deepstack) == len(expected.deepstack_features) > 0
    for feature, theirs in zip(deepstack, expected.deepstack_features, strict=True):
        assert relative_error(feature, torch.cat(theirs)) <= COMPONENT


@both_ways
@pytest.mark.parametrize("grids", PICTURES.values(), ids=PICTURES)
def test_logits(pair, grids):
    model, ours = pair
    ids, patches = prompt(values_of(model), grids)
    model.model.rope_deltas = None
    with torch.no_grad():
        expected = model(**for_reference(ids, patches, grids)).logits
    logits = ours(ids, None if patches is None else mx.array(patches), grids)
    assert relative_error(logits, expected) <= COMPONENT


def test_pictures_matter(pair):
    """What the tests of equality stand on: another picture, or the same without deepstack, gives other logits."""
    model, ours = pair
    ids, patches = prompt(values_of(model), ONE)
    made = ours.prompt(ids, mx.array(patches), ONE)
    decoder = ours.model.language_model
    seen = ours.head(decoder(made.embeddings, made.positions, deepstack=made.deepstack))
    blind = ours.head(decoder(made.embeddings, made.positions))
    other = ours(ids, mx.array(patches[::-1].copy()), ONE)
    straight = mx.broadcast_to(mx.arange(len(ids)), (3, len(ids)))
    in_line = ours.head(decoder(made.embeddings, straight, deepstack=made.deepstack))
    for changed in (blind, other, in_line):
        assert relative_error(changed[0, -1], seen[0, -1]) > 0.01


# ---- as a text encoder


class TextEncoder(VLModel):
    """What an image model's text encoder of Qwen3-VL takes: hidden states of middle layers, and nothing above them."""

    config_class = Qwen3VLConfig
    wanted = (1, 2)

    def __init__(self, config: Qwen3VLConfig):
        super().__init__()
        self.config, depth = config, max(self.wanted)
        self.model = Qwen3VLModel(config)
        self.model.language_model = VLDecoder(config.text_config, depth, norm=False)
        layers = config.text_config.num_hidden_layers
        self.differences = FileDifferences(unused_patterns("model.language_model.", depth, layers, norm=False))

    @property
    def parts(self):
        return self.model.language_model, self.model.visual

    def __call__(self, ids) -> list[mx.array]:
        prompt, language = self.prompt(ids), self.model.language_model
        return language.hidden_states(prompt.embeddings, language.rotary(prompt.positions), "causal", self.wanted)


def test_as_a_text_encoder(pair, tmp_path):
    model, _ = pair
    model.save_pretrained(tmp_path)
    ids, _ = prompt(values_of(model), TEXT)
    model.model.rope_deltas = None
    with torch.no_grad():
        expected = model(**for_reference(ids, None, TEXT), output_hidden_states=True).hidden_states
    states = load_component(TextEncoder, tmp_path)(ids)
    for number, ours in zip(TextEncoder.wanted, states, strict=True):
        assert relative_error(ours, expected[number]) <= COMPONENT


# ---- what it says


@cache
def reference_answer(model: Reference, grids) -> list[int]:
    ids, patches = prompt(values_of(model), grids)
    model.model.rope_deltas = None
    said = model.generate(
        **for_reference(ids, patches, grids), do_sample=False, max_new_tokens=64, eos_token_id=None, pad_token_id=0
    )
    return said[0, len(ids) :].tolist()


def answer(ours, values, grids, count: int = 64, sampling: Sampling | None = None, **options) -> list[int]:
    ids, patches = prompt(values, grids)
    made = ours.prompt(ids, None if patches is None else mx.array(patches), grids)
    tokens = generate_tokens(ours, made, sampling or Sampling(temperature=0), **options)
    return [token for token, _ in zip(tokens, range(count), strict=False)]


@both_ways
@pytest.mark.parametrize("grids", [TEXT, ONE, TWO], ids=["text", "one-picture", "two-pictures"])
def test_greedy_answers(pair, grids):
    model, ours = pair
    expected = reference_answer(model, grids)
    assert len(expected) == 64
    assert len(set(expected)) >= 16
    assert answer(ours, values_of(model), grids) == expected


@pytest.mark.parametrize("prefill", [1, 5, 1000])
def test_prefill_in_parts(pair, prefill):
    # Parts of five end within pictures and within rows of them.
    model, ours = pair
    values = values_of(model)
    ids, patches = prompt(values, TWO)
    made = ours.prompt(ids, mx.array(patches), TWO)
    cache = ours.new_cache()
    decoder = ours.model.language_model
    parts = [decoder(part, positions, cache, added) for part, positions, added in made.parts(prefill)]
    whole = decoder(made.embeddings, made.positions, deepstack=made.deepstack)
    assert relative_error(mx.concatenate(parts, axis=1), whole) <= COMPONENT
    assert answer(ours, values, TWO, prefill=prefill) == reference_answer(model, TWO)


@pytest.mark.parametrize("grids", [TEXT, TWO], ids=["text", "two-pictures"])
def test_one_by_one_is_all_at_once(pair, grids, monkeypatch):
    """Decoding with a cache, over more tokens than its room grows by, equals computing everything anew."""
    monkeypatch.setattr(KeyValueCache, "step", 16)
    model, ours = pair
    ids, patches = prompt(values_of(model), grids)
    patches = None if patches is None else mx.array(patches)
    said = np.random.default_rng(4).integers(0, 390, 40).tolist()
    made, decoder, cache = ours.prompt(ids, patches, grids), ours.model.language_model, ours.new_cache()
    decoder(made.embeddings, made.positions, cache, made.deepstack)
    step = []
    for number, token in enumerate(said):
        position = mx.full((3, 1), made.next_position + number)
        step.append(decoder(decoder.embed_tokens(mx.array([[token]])), position, cache))
        mx.eval(step[-1])
    assert cache[0].length == len(ids) + len(said) > 2 * cache[0].step
    whole = ours.prompt(ids + said, patches, grids)
    full = decoder(whole.embeddings, whole.positions, deepstack=whole.deepstack)
    assert relative_error(mx.concatenate(step, axis=1), full[:, len(ids) :]) <= COMPONENT


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.9, 0.999, 1.0])
def test_top_p(top_p):
    # The reference keeps at least one token, and sorts from the other end: in float64 the sums cannot round apart.
    logits = normal(5, 300) * 3
    expected = TopPLogitsWarper(top_p)(None, torch.tensor(logits, dtype=torch.float64)[None])[0].numpy()
    kept, order = likely_logits(mx.array(logits), top_p)
    restored = np.empty(300)
    restored[np.array(order)] = np.array(kept)
    assert (np.isfinite(restored) == np.isfinite(expected)).all()
    assert np.array_equal(restored[np.isfinite(expected)], expected[np.isfinite(expected)].astype(np.float32))


def test_choosing_follows_the_probabilities():
    logits = np.log(np.array([0.5, 0.05, 0.25, 0.2], np.float32))
    draws = [
        choose(mx.array(logits), Sampling(temperature=0.5, top_p=0.9), key).item()
        for key in mx.random.split(mx.random.key(1), 500)
    ]
    # At half the temperature probabilities are squared: 0.25, 0.0625 and 0.04 of 0.355; the smallest is out.
    shares = np.bincount(draws, minlength=4) / len(draws)
    assert shares[1] == 0
    assert np.allclose(shares[[0, 2, 3]], np.array([0.25, 0.0625, 0.04]) / 0.3525, atol=0.06)
    assert choose(mx.array(logits), Sampling(temperature=1, top_p=0), mx.random.key(0)).item() == 0
    assert choose(mx.array(logits), Sampling(temperature=0), mx.random.key(0)).item() == 0


def test_seeds(pair):
    model, ours = pair
    values = values_of(model)
    said = [answer(ours, values, ONE, 24, Sampling(1.0, 0.95, seed)) for seed in (3, 3, 4)]
    assert said[0] == said[1] != said[2]
    assert said[0] != reference_answer(model, ONE)[:24]


# ---- files

# As they stand in the published index.
PUBLISHED_NAMES = (
    "model.language_model.embed_tokens.weight",
    "model.language_model.layers.35.self_attn.q_norm.weight",
    "model.language_model.layers.0.mlp.gate_proj.weight",
    "model.language_model.norm.weight",
    "model.visual.patch_embed.proj.bias",
    "model.visual.pos_embed.weight",
    "model.visual.blocks.23.attn.qkv.bias",
    "model.visual.blocks.0.mlp.linear_fc1.weight",
    "model.visual.merger.norm.weight",
    "model.visual.deepstack_merger_list.2.linear_fc2.weight",
)


def laid_out(network, tensors) -> dict[str, tuple[int, ...]]:
    turns = layout_turns(network)
    return {
        name: tuple((turns[name](mx.zeros(shape)) if name in turns else mx.zeros(shape)).shape)
        for name, shape in tensors.items()
    }


def test_full_size():
    config = Qwen3VLConfig.from_dict(PUBLISHED)
    assert config.vision_config == Qwen3VLVisionConfig()
    assert replace(config.text_config, rope_scaling=None) == Qwen3VLTextConfig()
    assert (config.text_config.rope["rope_theta"], config.text_config.mrope_section) == (5_000_000, (24, 20, 20))
    network = Qwen3VLForConditionalGeneration(config)
    ours = {name: tuple(value.shape) for name, value in tree_flatten(network.parameters())}
    with torch.device("meta"):
        model = Reference(reference_config(PUBLISHED))
    theirs = {name: tuple(value.shape) for name, value in revert_weight_conversion(model, model.state_dict()).items()}
    # The tied head is the embedding under a second name.
    assert theirs.pop("lm_head.weight") == theirs["model.language_model.embed_tokens.weight"]
    assert laid_out(network, theirs) == ours
    assert sum(math.prod(shape) for shape in ours.values()) == PUBLISHED["_parameters"] == 4_437_815_808
    assert set(PUBLISHED_NAMES) <= ours.keys()


def rewrite(source: Path, folder: Path, change, **settings) -> Path:
    """A copy of a model with other tensors and settings."""
    folder.mkdir()
    tensors = change(load_file(source / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


@pytest.fixture
def tied_folder(tmp_path) -> Path:
    model = draw(Reference(reference_config(TIED)), seed=2)
    model.save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


def test_a_tied_head_in_the_file(tied_folder, tmp_path):
    """The head may stand in the file as well, as long as it is the embedding."""
    embedding = "model.language_model.embed_tokens.weight"
    assert "lm_head.weight" not in load_file(tied_folder / "model.safetensors")
    twice = rewrite(tied_folder, tmp_path / "twice", lambda all: all | {"lm_head.weight": all[embedding].clone()})
    other = rewrite(tied_folder, tmp_path / "other", lambda all: all | {"lm_head.weight": 2 * all[embedding]})
    untied = rewrite(
        tied_folder,
        tmp_path / "untied",
        lambda all: all | {"lm_head.weight": 2 * all[embedding]},
        tie_word_embeddings=False,
    )
    logits = weights.load(tied_folder)([1, 2, 3])
    assert mx.array_equal(weights.load(twice)([1, 2, 3]), logits)
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        weights.load(other)
    assert relative_error(weights.load(untied)([1, 2, 3]), 2 * logits) <= COMPONENT


def test_rotary_settings_of_transformers_4(tied_folder, tmp_path):
    config = json.loads((tied_folder / "config.json").read_text())
    text = config["text_config"]
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = rope
    config["vision_config"].pop("rope_parameters")
    older = rewrite(tied_folder, tmp_path / "older", lambda all: all, **config)
    assert "rope_parameters" not in (older / "config.json").read_text()
    ids, patches = prompt(TIED, ONE)
    expected = weights.load(tied_folder)(ids, mx.array(patches), ONE)
    assert mx.array_equal(weights.load(older)(ids, mx.array(patches), ONE), expected)


def test_bfloat16_beyond_float16(tied_folder, tmp_path):
    def change(tensors):
        tensors = {name: value.bfloat16() for name, value in tensors.items()}
        tensors["model.language_model.norm.weight"][0] = 3e5
        tensors["model.language_model.norm.weight"][1] = 3e-9
        return tensors

    network = weights.load(rewrite(tied_folder, tmp_path / "large", change))
    norm = network.model.language_model.norm.weight
    assert norm[0].item() == torch.tensor(3e5).bfloat16().item()
    assert norm[1].item() == pytest.approx(torch.tensor(3e-9).bfloat16().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "qwen2_5_vl"}, "qwen2_5_vl"),
        ({"text_config": None}, "text_config"),
        ({"text_config": {**TIED["text_config"], "hidden_act": "swoosh"}}, "swoosh"),
        ({"text_config": {**TIED["text_config"], "num_key_value_heads": 3}}, "4 heads cannot share 3"),
        ({"text_config": {**TIED["text_config"], "rope_parameters": {"rope_type": "yarn"}}}, "yarn"),
        ({"vision_config": {**TIED["vision_config"], "out_hidden_size": 64}}, "out_hidden_size"),
        ({"vision_config": {**TIED["vision_config"], "num_position_embeddings": 24}}, "24 position embeddings"),
        ({"vision_config": {**TIED["vision_config"], "deepstack_visual_indexes": [9]}}, "deepstack_visual_indexes"),
        ({"vision_config": {**TIED["vision_config"], "deepstack_visual_indexes": [0]}}, "left over"),
    ],
)
def test_configurations_that_cannot_be_built(tied_folder, tmp_path, changes, says):
    with pytest.raises(CheckpointError, match=says):
        weights.load(rewrite(tied_folder, tmp_path / "changed", lambda all: all, **changes))
