"""Adapters from strangers: patterns that nobody compiles, and numbers that are none."""

from __future__ import annotations

import json
import re
import time

import pytest

from mflux.backend import mx
from mflux.errors import CheckpointError
from mflux.models.common.lora.names import Target
from mflux.models.common.lora.peft_patterns import Pattern
from mflux.models.common.lora.reading import read_lora

LAYERS = (
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.10.attn.to_q",
    "single_transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.ff.net.0.proj",
    "to_q",
    "Xto_q",
)


@pytest.mark.parametrize(
    "pattern",
    [
        "to_q",
        "attn.to_q",
        r"attn\.to_q",
        "^transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.to_q",
        r".*single_transformer_blocks\.\d+\.attn.*",
        r"transformer_blocks\.\d+\.attn\.to_q$",
        r"transformer_blocks\.\d\.attn\.to_q",
        "to_q|proj",
        "^to_q$",
        ".*",
        ".",
        "....",
        r"\w+",
        r"\w+_q",
        "",
        "x?to_q",
        "ne+t.0.pro?j",
    ],
)
def test_patterns_mean_what_they_mean_to_peft(pattern):
    for layer in LAYERS:
        expected = re.match(rf"(.*\.)?({pattern})$", layer) is not None
        assert Pattern(pattern).matches(layer) == expected, layer


@pytest.mark.parametrize("pattern", ["(a+)+$", "[a-z]*", "a{1,1000}", r"(?=x)y", r"\1", "a**", "*", "x" * 1001, "a^b"])
def test_other_patterns_are_refused(pattern):
    with pytest.raises(ValueError, match=r"not built|longer"):
        Pattern(pattern)


def test_no_pattern_takes_long():
    # For Python's matcher each of these would take longer than the universe has existed.
    name = "a" * 300 + "!"
    start = time.process_time()
    assert not Pattern("a?" * 300 + "a" * 300 + "b").matches(name)
    assert not Pattern(".*" * 300 + "b").matches(name)
    assert time.process_time() - start < 30


NAMES = {"layer": Target("transformer", (("layer", None),), (4, 4))}


def write(folder, tensors=None, **settings):
    path = folder / "adapter.safetensors"
    tensors = {"layer.lora_A.weight": mx.ones((2, 4)), "layer.lora_B.weight": mx.ones((4, 2))} | (tensors or {})
    mx.save_safetensors(str(path), tensors, metadata={"lora_adapter_metadata": json.dumps(settings)})
    return path


def test_the_settings_of_a_layer_come_from_its_pattern(tmp_path):
    path = write(tmp_path, r=2, lora_alpha=2, alpha_pattern={r"lay\w+": 6})
    adapter = read_lora(path, 1.0, NAMES, {})["transformer", "layer"]
    assert adapter.strength == 3


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"alpha_pattern": {"(a+)+$": 1}}, r"its alpha_pattern has \(a\+\)\+\$, which has \( in a place where"),
        ({"rank_pattern": {"\x1b[2J": 1}}, r"its rank_pattern has \\x1b\[2J, which has \["),
        ({"alpha_pattern": {str(n): 1 for n in range(5000)}}, "has 5,000 entries"),
        ({"alpha_pattern": [1]}, "make no sense"),
        ({"lora_alpha": 10**400}, "make no sense"),
        ({"lora_alpha": [1]}, "make no sense"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, settings, told):
    path = write(tmp_path, **({"r": 2, "lora_alpha": 2} | settings))
    with pytest.raises(CheckpointError, match=told):
        read_lora(path, 1.0, NAMES, {})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_numbers_that_are_not_finite_are_found_when_the_adapter_is_read(tmp_path, value, dtype):
    bad = mx.ones((4, 2), dtype=dtype)
    bad[3, 1] = value
    path = write(tmp_path, {"layer.lora_B.weight": bad})
    adapter = read_lora(path, 1.0, NAMES, {})["transformer", "layer"]
    with pytest.raises(CheckpointError, match=r"adapter\.safetensors: layer\.lora_B\.weight holds numbers that"):
        adapter.read()


def test_large_numbers_are_finite(tmp_path):
    path = write(tmp_path, {"layer.lora_B.weight": mx.full((4, 2), 60000.0, dtype=mx.float16)})
    read_lora(path, 1.0, NAMES, {})["transformer", "layer"].read()
    path = write(tmp_path, {"layer.lora_B.weight": mx.full((4, 2), 3e38)})
    read_lora(path, 1.0, NAMES, {})["transformer", "layer"].read()
