"""Qwen3 as a text encoder against transformers: every hidden state, padding, files in all their forms, full sizes."""

from __future__ import annotations

import json
import math
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.reference import COMPONENT, draw, relative_error
from transformers import Qwen3Config as ReferenceConfig
from transformers import Qwen3ForCausalLM, Qwen3Model

from mflux.backend import mx, tree_flatten
from mflux.checkpoints.loading import FolderTensors, load_component, match
from mflux.errors import CheckpointError
from mflux.models.common.networks.decoder import DecoderConfig, DecoderTextEncoder
from mflux.models.common.networks.text_encoders.qwen3 import Qwen3Config, Qwen3TextEncoder

# As published but small: two heads of queries to one of keys and values, a head wider than its share.
PLAIN = dict(
    vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=512, rms_norm_eps=1e-6, tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
)  # fmt: skip
# All that may differ does: odd numbers of heads, a head of its own, biases, other activations.
OTHER = dict(
    vocab_size=70, hidden_size=40, intermediate_size=24, num_hidden_layers=3, num_attention_heads=9,
    num_key_value_heads=3, head_dim=6, max_position_embeddings=512, rms_norm_eps=1e-4, tie_word_embeddings=False,
    attention_bias=True, hidden_act="gelu", rope_parameters={"rope_type": "default", "rope_theta": 500.0},
)  # fmt: skip
CONFIGS = {"plain": PLAIN, "other": OTHER}
# Sharp attention, so that who sees whom shows.
GAINS = {"q_norm.weight": 2.0, "k_norm.weight": 2.0}


def encoder(*wanted: int) -> type[Qwen3TextEncoder]:
    return type("Encoder", (Qwen3TextEncoder,), {"hidden_states": wanted})


@cache
def model_of(name: str) -> Qwen3ForCausalLM:
    return draw(Qwen3ForCausalLM(ReferenceConfig(**CONFIGS[name])), seed=4, gains=GAINS)


@pytest.fixture(scope="module", params=CONFIGS)
def model(request) -> Qwen3ForCausalLM:
    return model_of(request.param)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    model.save_pretrained(path)
    return path


def tokens(lengths: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(1).integers(0, 70, (len(lengths), max(lengths)))
    return ids, (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)


def expected(model, ids: np.ndarray, mask: np.ndarray | None) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        mask = None if mask is None else torch.tensor(mask)
        return model(torch.tensor(ids), attention_mask=mask, output_hidden_states=True).hidden_states


# ---- what it computes


@pytest.mark.parametrize("lengths", [(1,), (17,), (9, 9), (11, 3, 1)])
def test_hidden_states(model, folder, lengths):
    count = model.config.num_hidden_layers
    ids, mask = tokens(lengths)
    theirs = expected(model, ids, mask)
    assert len(theirs) == count + 1
    ours = load_component(encoder(*range(count + 1)), folder)(mx.array(ids), mx.array(mask))
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert relative_error(one, other) <= COMPONENT, f"hidden state {number}"


def test_without_a_mask(model, folder):
    ids, _ = tokens((12, 12))
    (ours,) = load_component(Qwen3TextEncoder, folder)(mx.array(ids))
    assert relative_error(ours, expected(model, ids, None)[-1]) <= COMPONENT
    assert relative_error(ours, model.model(torch.tensor(ids)).last_hidden_state) <= COMPONENT


def test_what_is_asked_for_in_that_order(model, folder):
    ids, mask = tokens((7, 5))
    theirs = expected(model, ids, mask)
    ours = load_component(encoder(-2, 1, 0, -2), folder)(mx.array(ids), mx.array(mask))
    for one, other in zip(ours, (theirs[-2], theirs[1], theirs[0], theirs[-2]), strict=True):
        assert relative_error(one, other) <= COMPONENT


def test_padding_changes_nothing_before_it_and_is_not_seen(model, folder):
    module = load_component(Qwen3TextEncoder, folder)
    ids, mask = tokens((9, 4))
    (both,) = module(mx.array(ids), mx.array(mask))
    (alone,) = module(mx.array(ids[1:, :4]))
    assert relative_error(both[1:, :4], alone) <= COMPONENT
    # The reference computes padding without its seeing other padding, and so does another token there.
    other = ids.copy()
    other[1, 6] = (other[1, 6] + 1) % 70
    (changed,) = module(mx.array(other), mx.array(mask))
    assert mx.array_equal(changed[1, 7:], both[1, 7:])
    (seen,) = module(mx.array(other), mx.ones_like(mx.array(mask)))
    assert relative_error(seen[1, 7:], both[1, 7:]) > 0.01


def test_order_matters(model, folder):
    """What the tests of equality stand on."""
    module = load_component(Qwen3TextEncoder, folder)
    ids, _ = tokens((8,))
    (one,), (other,) = module(mx.array(ids)), module(mx.array(np.roll(ids, 1)))
    assert relative_error(other[:, -1], one[:, -1]) > 0.05


# ---- files


def names_of(module) -> set[str]:
    return {name for name, _ in tree_flatten(module.parameters())}


@pytest.mark.parametrize(
    ("wanted", "depth", "has_norm"), [((0,), 0, False), ((1,), 1, False), ((0, -2), -1, False), ((1, -1), None, True)]
)
def test_nothing_above_the_last_one_asked_for(model, folder, wanted, depth, has_norm):
    count = model.config.num_hidden_layers
    depth = count if depth is None else depth % count
    asked = []

    class Noting(FolderTensors):
        def __getitem__(self, name):
            asked.append(name)
            return super().__getitem__(name)

    module = load_component(encoder(*wanted), folder, tensors=Noting(folder))
    built = names_of(module)
    assert {int(name.split(".")[2]) for name in built if ".layers." in name} == set(range(depth))
    assert ("model.norm.weight" in built) is has_norm
    # Nothing else is read, either; looking whether a name is there asks for it, too.
    assert set(asked) & set(FolderTensors(folder)) == built


def rewrite(source: Path, target: Path, change, **settings) -> Path:
    target.mkdir()
    save_file(change(load_file(source / "model.safetensors")), target / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | settings))
    return target


def without_prefix(tensors):
    return {name.removeprefix("model."): value for name, value in tensors.items() if name != "lm_head.weight"}


def with_head(tensors):
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


@pytest.mark.parametrize("change", [without_prefix, with_head], ids=["without prefix", "with a head"])
@pytest.mark.parametrize("wanted", [(-1,), (1, 2)])
def test_names_in_files(model, folder, tmp_path, change, wanted):
    ids, mask = (mx.array(values) for values in tokens((6, 3)))
    other = rewrite(folder, tmp_path / "other", change)
    for one, two in zip(
        load_component(encoder(*wanted), other)(ids, mask),
        load_component(encoder(*wanted), folder)(ids, mask),
        strict=True,
    ):
        assert mx.array_equal(one, two)


def test_saved_as_the_bare_model(model, folder, tmp_path):
    model.model.save_pretrained(tmp_path)
    assert "layers.0.mlp.up_proj.weight" in load_file(tmp_path / "model.safetensors")
    assert isinstance(Qwen3Model.from_pretrained(tmp_path), Qwen3Model)
    ids, mask = (mx.array(values) for values in tokens((6, 3)))
    (ours,), (same) = load_component(encoder(-1), tmp_path)(ids, mask), load_component(encoder(-1), folder)(ids, mask)
    assert mx.array_equal(ours, same[0])


def test_rotary_settings_of_transformers_4(model, folder, tmp_path):
    """`rope_theta` beside the rest, as the published files have it."""
    theta = model.config.rope_parameters["rope_theta"]
    flat = rewrite(
        folder, tmp_path / "flat", dict, rope_parameters=None, layer_types=None, rope_theta=theta, rope_scaling=None
    )
    assert json.loads((folder / "config.json").read_text())["rope_parameters"]["rope_theta"] == theta
    other = rewrite(folder, tmp_path / "other", dict, rope_parameters=None, rope_theta=theta / 3)
    ids = mx.array(tokens((6,))[0])
    (whole,), (ours,), (changed,) = (load_component(Qwen3TextEncoder, path)(ids) for path in (folder, flat, other))
    assert mx.array_equal(ours, whole)
    assert relative_error(changed, whole) > 1e-3


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized(tmp_path, bits):
    from mflux.checkpoints.saving import save_component

    wide = PLAIN | dict(hidden_size=64, intermediate_size=128, head_dim=32)
    draw(Qwen3ForCausalLM(ReferenceConfig(**wide)), seed=4).save_pretrained(tmp_path / "whole")
    whole = load_component(Qwen3TextEncoder, tmp_path / "whole", quantize=bits)
    save_component(whole, tmp_path / "packed", json.loads((tmp_path / "whole" / "config.json").read_text()))
    ids = mx.array(tokens((6,))[0])
    packed = load_component(encoder(2), tmp_path / "packed")
    direct = load_component(encoder(2), tmp_path / "whole", quantize=bits)
    assert mx.array_equal(packed(ids)[0], direct(ids)[0])
    exact = load_component(encoder(2), tmp_path / "whole")(ids)[0]
    assert 1e-4 < relative_error(direct(ids)[0], exact) < (0.05 if bits == 8 else 0.5)


def test_too_few_layers(model, folder):
    with pytest.raises(CheckpointError, match="hidden states 1, 27 are needed"):
        load_component(encoder(1, 27), folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "qwen2"}, "qwen2"),
        ({"hidden_act": "swoosh"}, "swoosh"),
        ({"num_key_value_heads": 5}, "cannot share 5"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "yarn"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "linear"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta -1"),
        ({"rope_parameters": {"rope_theta": "much"}}, "makes no sense"),
        ({"use_sliding_window": True}, "sliding window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
        ({"num_hidden_layers": 0}, "0 layers"),
        # Layers beyond those that config.json knows of are not passed over.
        ({"num_hidden_layers": 2}, "left over"),
        ({"num_hidden_layers": 9}, "num_hidden_layers is 9, and the weights are those of 3 at most"),
        ({"attention_bias": None}, "attention_bias is None, not true or false"),
    ],
)
def test_configurations_that_cannot_be_built(tmp_path, changes, says):
    model = model_of("other")
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(CheckpointError, match=says):
        load_component(Qwen3TextEncoder, rewrite(tmp_path / "whole", tmp_path / "changed", dict, **changes))


def test_a_layer_that_is_needed_must_be_there(folder, tmp_path):
    def change(tensors):
        return {name: value for name, value in tensors.items() if ".layers.1.mlp" not in name}

    lacking = rewrite(folder, tmp_path / "lacking", change)
    load_component(encoder(1), lacking)
    with pytest.raises(CheckpointError, match="3 tensors missing"):
        load_component(encoder(2), lacking)


# ---- where other decoders differ


class SmolLM3Config(DecoderConfig):
    qk_norm = False

    def has_positions(self, layer: int) -> bool:
        return (layer + 1) % 4 != 0


class Qwen2Config(DecoderConfig):
    kind = "qwen2"
    qk_norm = False
    output_bias = False


# Other decoders' numbers of layers, so that one of SmolLM3's knows no positions.
OTHERS = {
    "SmolLM3": (SmolLM3Config, transformers.SmolLM3ForCausalLM, transformers.SmolLM3Config, dict(
        num_hidden_layers=5, pad_token_id=None, model_type="smollm3",
    )),
    "Qwen2": (Qwen2Config, transformers.Qwen2ForCausalLM, transformers.Qwen2Config, dict(attention_bias=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_decoders(name, tmp_path):
    ours_config, model_class, config_class, changes = OTHERS[name]
    settings = {key: value for key, value in PLAIN.items() if key != "head_dim"} | changes
    model = draw(model_class(config_class(**{key: value for key, value in settings.items() if key != "model_type"})), 5)
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | changes | {"head_dim": None, "layer_types": None}
    encoder_class = type("Encoder", (DecoderTextEncoder,), {"config_class": ours_config, "hidden_states": (0, 1, -1)})
    module = load_component(encoder_class, tmp_path, config=values)
    names = names_of(module)
    assert not any("q_norm" in name or "o_proj.bias" in name for name in names)
    assert any("k_proj.bias" in name for name in names) is (name == "Qwen2")
    ids, mask = tokens((9, 4))
    theirs = expected(model, ids, mask)
    for one, other in zip(module(mx.array(ids), mx.array(mask)), (theirs[0], theirs[1], theirs[-1]), strict=True):
        assert relative_error(one, other) <= COMPONENT


# ---- full sizes

SIZES = {
    "Z-Image, FLUX.2 klein 4B": (dict(), 4_022_468_096),
    "FLUX.2 klein 9B": (dict(hidden_size=4096, intermediate_size=12288, tie_word_embeddings=False), 8_190_735_360),
    "0.6B": (
        dict(hidden_size=1024, intermediate_size=3072, num_attention_heads=16, num_hidden_layers=28), 596_049_920
    ),
}  # fmt: skip
# Fields of config.json as published that change nothing.
BESIDE = dict(
    architectures=["Qwen3ForCausalLM"], model_type="qwen3", bos_token_id=151643, eos_token_id=151645,
    max_position_embeddings=40960, max_window_layers=36, rope_scaling=None, rope_theta=1000000, sliding_window=None,
    use_sliding_window=False, attention_bias=False, hidden_act="silu", tie_word_embeddings=True,
)  # fmt: skip
# As they stand in the published index.
PUBLISHED_NAMES = {
    "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight",
    "model.layers.27.self_attn.q_norm.weight", "model.layers.3.post_attention_layernorm.weight",
    "model.layers.9.mlp.gate_proj.weight",
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_full_size(size):
    values, count = SIZES[size]
    module = Qwen3TextEncoder(Qwen3Config.from_dict(BESIDE | values))
    ours = {name: tuple(value.shape) for name, value in tree_flatten(module.parameters())}
    plain = dict(vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, head_dim=128)
    plain |= dict(num_attention_heads=32, num_key_value_heads=8)
    with torch.device("meta"):
        theirs = Qwen3Model(ReferenceConfig(**plain | values))
    assert ours == {f"model.{name}": tuple(value.shape) for name, value in theirs.state_dict().items()}
    # The published count of the 9B size has a head that is not the embedding.
    head = 0 if values.get("tie_word_embeddings", True) else math.prod(ours["model.embed_tokens.weight"])
    assert sum(math.prod(shape) for shape in ours.values()) + head == count
    assert ours.keys() >= PUBLISHED_NAMES


def test_published_defaults():
    assert Qwen3Config.from_dict(BESIDE) == Qwen3Config()
    # Z-Image's and FLUX.2's hidden states leave out so many layers.
    for wanted, depth in (((-2,), 35), ((9, 18, 27), 27)):
        names = names_of(encoder(*wanted)(Qwen3Config()))
        assert len({name.split(".")[2] for name in names if ".layers." in name}) == depth
        assert "model.norm.weight" not in names


# ---- tensors in the wrong place: see test_families.py

MARGIN = 50


@pytest.mark.parametrize("bias", [False, True])
def test_swapping_two_tensors_shows(tmp_path, bias):
    # All widths equal where the architecture allows it, so that as many tensors as can be are of the same shape.
    settings = dict(
        hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        num_hidden_layers=2, vocab_size=70, attention_bias=bias,
    )  # fmt: skip
    model = draw(Qwen3ForCausalLM(ReferenceConfig(**PLAIN | settings)), seed=6, gains=GAINS)
    model.save_pretrained(tmp_path)
    module = load_component(encoder(1, 2), tmp_path)
    names = sorted(match(module, names_of(module), FolderTensors(tmp_path), source=tmp_path))
    ids, mask = tokens((9, 5))
    theirs = expected(model, ids, mask)[1:]

    def error() -> float:
        states = module(mx.array(ids), mx.array(mask))
        return max(relative_error(one, other) for one, other in zip(states, theirs, strict=True))

    def place(name: str):
        *path, leaf = name.split(".")
        holder = module
        for step in path:
            holder = holder[int(step)] if isinstance(holder, list) else holder[step]
        return holder, leaf

    def swap(first: str, second: str) -> None:
        (one, leaf), (other, other_leaf) = place(first), place(second)
        one[leaf], other[other_leaf] = other[other_leaf], one[leaf]

    shapes = {name: place(name)[0][place(name)[1]].shape for name in names}
    pairs = [pair for pair in combinations(names, 2) if shapes[pair[0]] == shapes[pair[1]]]
    assert len(pairs) > 60
    assert error() <= COMPONENT
    unseen = []
    for pair in pairs:
        swap(*pair)
        if error() <= MARGIN * COMPONENT:
            unseen.append(pair)
        swap(*pair)
    assert not unseen
    assert error() <= COMPONENT
