"""Weights in 3 to 8 bits: which layers, what is said, and that every way to them gives the same arrays."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.tiny import published, write_checkpoint, write_json

from mflux.backend import mx, nn, tree_flatten
from mflux.checkpoints.loading import fill, load_component
from mflux.checkpoints.quantization import BITS, Quantization, inferred, layers, pack, packed_specs
from mflux.cli.convert import convert
from mflux.errors import CheckpointError, UsageError
from mflux.models.common.networks.layers import Linear
from mflux.models.common.networks.modulation import ModulationLinear
from mflux.models.common.networks.text_encoders.clip import CLIPTextEncoder
from mflux.models.common.networks.text_encoders.t5 import T5Encoder
from mflux.models.flux.model.transformer import FluxTransformer
from mflux.models.flux.variants.txt2img.flux import Flux1
from mflux.utils.metadata_reader import MetadataReader

PROMPT = "a red circle on a white background"


@pytest.fixture
def all_packed(monkeypatch):
    """What modulates as well, as in folders of before: here it is read late, and left as it is stored."""
    monkeypatch.setattr(ModulationLinear, "read_late", False)


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A tiny FLUX.1 model whose rows mostly divide into groups of 64; stored in bfloat16, as published ones are."""
    folder = tmp_path_factory.mktemp("models") / "wide-schnell"
    return write_checkpoint(folder, seed=3, guidance=False, dtype=mx.bfloat16, wide=True)


def arrays(module: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(module.parameters()))


def assert_same(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = arrays(one), arrays(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert mx.array_equal(value, theirs[name]).item(), name


def pixels(path: Path | str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


# ---- which layers


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.usefixtures("all_packed")
def test_every_width_of_bits(wide, bits):
    module = load_component(FluxTransformer, wide / "transformer", quantize=bits)
    plain = load_component(FluxTransformer, wide / "transformer")
    kinds = {path: layer for path, layer in module.named_modules() if isinstance(layer, nn.QuantizedLinear)}
    assert kinds.keys() == layers(plain).keys()
    for path, layer in kinds.items():
        assert (layer.bits, layer.group_size) == (bits, 64)
        back = mx.dequantize(layer.weight, layer.scales, layer.biases, group_size=64, bits=bits)
        whole = arrays(plain)[f"{path}.weight"]
        # At most a step of a group: MLX shifts the steps so that zero is one of them.
        spread = (whole.max() - whole.min()).item()
        assert mx.abs(back - whole).max().item() <= spread / (2**bits - 1) + 0.01, path
        assert mx.array_equal(layer.bias, arrays(plain)[f"{path}.bias"]).item()


def test_the_arrays_are_those_of_the_stored_dtype(wide):
    """Quantized as the file has them, not after a cast: else saving would give other arrays than loading."""
    stored = mx.load(str(wide / "transformer" / "diffusion_pytorch_model.safetensors"))
    module = load_component(FluxTransformer, wide / "transformer", quantize=4)
    packed, scales, biases = mx.quantize(stored["x_embedder.weight"], group_size=64, bits=4)
    assert stored["x_embedder.weight"].dtype == scales.dtype == mx.bfloat16
    layer = module.x_embedder
    assert mx.array_equal(layer.weight, packed).item()
    assert mx.array_equal(layer.scales, scales.astype(layer.scales.dtype)).item()
    assert mx.array_equal(layer.biases, biases.astype(layer.biases.dtype)).item()


def test_odd_widths_are_kept_and_counted(wide, tiny_schnell, caplog):
    caplog.set_level(logging.INFO, "mflux")
    module = load_component(T5Encoder, wide / "text_encoder_2", quantize=8)
    # Of each of two blocks q, k, v, wi_0 and wi_1, and the token embedding; o is 16 wide, wo 96, the distances 2.
    assert caplog.messages == ["quantize 11 layers to 8 bits, keep 5 whose width 64 does not divide"]
    block = module.encoder.block[0].layer
    assert isinstance(module.shared, nn.QuantizedEmbedding)
    assert isinstance(block[0].SelfAttention.q, nn.QuantizedLinear)
    assert type(block[0].SelfAttention.o) is Linear
    assert type(block[1].DenseReluDense.wo) is Linear
    plain = load_component(T5Encoder, wide / "text_encoder_2")
    assert mx.array_equal(block[1].DenseReluDense.wo.weight, plain.encoder.block[0].layer[1].DenseReluDense.wo.weight)
    caplog.clear()
    load_component(CLIPTextEncoder, wide / "text_encoder", quantize=8)
    assert caplog.messages == ["quantize 14 layers to 8 bits"]
    caplog.clear()
    load_component(CLIPTextEncoder, tiny_schnell / "text_encoder", quantize=8)
    assert caplog.messages == ["quantize 0 layers to 8 bits, keep 14 whose width 64 does not divide"]


def test_nothing_is_quantized_unasked(wide, caplog):
    caplog.set_level(logging.INFO, "mflux")
    module = load_component(FluxTransformer, wide / "transformer")
    assert not any(isinstance(layer, nn.QuantizedLinear) for _, layer in module.named_modules())
    assert caplog.messages == []


@pytest.mark.parametrize("bits", [0, 1, 2, 7, 16, -4])
def test_wrong_bits(wide, bits):
    message = f"cannot quantize to {bits} bits: there are 3, 4, 5, 6, 8"
    with pytest.raises(UsageError, match=message):
        load_component(FluxTransformer, wide / "transformer", quantize=bits)
    with pytest.raises(UsageError, match=message):
        Flux1(quantize=bits, model_path=str(wide))


@pytest.mark.parametrize("bits", [2, *BITS])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_bits_and_groups_follow_from_the_shapes(bits, group):
    quantization = Quantization(bits, group)
    weight = mx.random.normal((3, 384), key=mx.random.key(bits)).astype(mx.float16)
    parts = pack(weight, quantization)
    assert {name: (part.dtype, part.shape) for name, part in parts.items()} == packed_specs(
        mx.float16, (3, 384), quantization
    )
    assert inferred(384, parts["weight"].shape, parts["scales"].shape) == quantization


@pytest.mark.parametrize(
    ("packed", "scales"), [((3, 384), (3, 6)), ((3, 48), (2, 6)), ((3, 48), (3, 5)), ((3, 48), (3, 0)), ((48,), (3, 6))]
)
def test_shapes_that_make_no_sense(packed, scales):
    assert inferred(384, packed, scales) is None


# ---- weights that are stored quantized


def store_quantized(source: Path, destination: Path, bits: int, *, entry: object = "own") -> Path:
    """Quantize a component's file as `mflux-convert` does, beside its configuration with an entry that says so."""
    destination.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    if entry is not None:
        config["quantization"] = {"bits": bits, "group_size": 64} if entry == "own" else entry
    write_json(destination / "config.json", config)
    convert(source, destination / "model.safetensors", quantize=bits)
    return destination


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("part", "module_class"),
    [("transformer", FluxTransformer), ("text_encoder", CLIPTextEncoder), ("text_encoder_2", T5Encoder)],
)
@pytest.mark.usefixtures("all_packed")
def test_stored_equals_on_load(wide, tmp_path, part, module_class, bits):
    stored = store_quantized(wide / part, tmp_path / "stored", bits)
    assert_same(load_component(module_class, stored), load_component(module_class, wide / part, quantize=bits))


@pytest.mark.usefixtures("all_packed")
def test_without_an_entry_the_shapes_tell(wide, tmp_path):
    stored = store_quantized(wide / "transformer", tmp_path / "stored", 5, entry=None)
    assert_same(
        load_component(FluxTransformer, stored), load_component(FluxTransformer, wide / "transformer", quantize=5)
    )


def test_stored_bits_win_and_a_warning_says_so(wide, tmp_path, caplog):
    stored = store_quantized(wide / "transformer", tmp_path / "stored", 4)
    module = load_component(FluxTransformer, stored, quantize=8)
    assert module.x_embedder.bits == 4
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        f"{stored} is stored in 4 bits: it stays so, not in 8"
    ]
    caplog.clear()
    load_component(FluxTransformer, stored, quantize=4)
    assert caplog.messages == []


def test_names_without_the_prefix_load_quantized_too(wide, tmp_path):
    """CLIP as transformers 5 saves it, then quantized."""
    renamed = tmp_path / "renamed"
    shutil.copytree(wide / "text_encoder", renamed)
    tensors = mx.load(str(renamed / "model.safetensors"))
    tensors = {name.removeprefix("text_model."): value for name, value in tensors.items()}
    mx.eval(tensors)  # they are read from the file that is about to be overwritten
    mx.save_safetensors(str(renamed / "model.safetensors"), tensors)
    stored = store_quantized(renamed, tmp_path / "stored", 8)
    assert_same(
        load_component(CLIPTextEncoder, stored), load_component(CLIPTextEncoder, wide / "text_encoder", quantize=8)
    )


def test_an_embedding_under_both_its_names_loads_quantized_too(wide, tmp_path):
    both = tmp_path / "both"
    shutil.copytree(wide / "text_encoder_2", both)
    tensors = mx.load(str(both / "model.safetensors"))
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    mx.eval(tensors)  # they are read from the file that is about to be overwritten
    mx.save_safetensors(str(both / "model.safetensors"), tensors)
    stored = store_quantized(both, tmp_path / "stored", 8)
    assert_same(load_component(T5Encoder, stored), load_component(T5Encoder, wide / "text_encoder_2", quantize=8))


@pytest.mark.parametrize(
    "entry", [8, "q8", [], {"bits": 8}, {"bits": "many", "group_size": 64}, {"bits": 7, "group_size": 64},
              {"bits": 8, "group_size": 48}, {"bits": None, "group_size": 64}],
)  # fmt: skip
def test_a_damaged_entry(wide, tmp_path, entry):
    stored = store_quantized(wide / "transformer", tmp_path / "stored", 8, entry=entry)
    with pytest.raises(CheckpointError, match=r"config\.json: its quantization .* makes no sense; fetch it again"):
        load_component(FluxTransformer, stored)


def test_an_entry_that_contradicts_the_weights(wide, tmp_path):
    stored = store_quantized(wide / "transformer", tmp_path / "stored", 8, entry={"bits": 4, "group_size": 32})
    with pytest.raises(CheckpointError, match="holds weights of 8 bits in groups of 64, not 4 in groups of 32"):
        load_component(FluxTransformer, stored)


def quantized_tensors(module: nn.Module) -> dict[str, mx.array]:
    tensors = published(module, seed=5)
    for path in layers(module):
        parts = pack(tensors.pop(f"{path}.weight"), Quantization(8))
        tensors |= {f"{path}.{leaf}": part for leaf, part in parts.items()}
    return tensors


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 128)
        self.second = nn.Linear(128, 64)


def test_damaged_quantized_weights():
    tensors = quantized_tensors(TwoLayers())
    fill(TwoLayers(), tensors, source="good")
    for name, message in (
        ("second.scales", r"second\.biases"),  # without scales it is no quantized layer: biases are left over
        ("second.biases", r"1 tensor missing \(second\.biases\)"),
        ("second.weight", r"second\.weight"),
    ):
        without = {key: value for key, value in tensors.items() if key != name}
        with pytest.raises(CheckpointError, match=message):
            fill(TwoLayers(), without, source="bad")
    with pytest.raises(CheckpointError, match="do not make rows of 128"):
        fill(TwoLayers(), tensors | {"second.scales": mx.zeros((64, 3))}, source="bad")
    with pytest.raises(CheckpointError, match=r"second\.biases has the shape \[64, 1\] instead of \[64, 2\]"):
        fill(TwoLayers(), tensors | {"second.biases": mx.zeros((64, 1))}, source="bad")
    with pytest.raises(CheckpointError, match=r"left over \(third\.scales\)"):
        fill(TwoLayers(), tensors | {"third.scales": mx.zeros((64, 2))}, source="bad")


# ---- the command


def test_the_command_draws_quantized_and_says_so(cli, in_folder, wide):
    call = ["generate", "--model", wide, "--prompt", PROMPT, "--seed", 3, "--steps", 2, "--width", 48, "--height", 32]
    result = cli(*call, "-q", 3, "--output", "three.png", "--metadata")
    assert result.status == 0, result.err
    # The two text encoders, the transformer, the autoencoder.
    kept = ", keep {} whose width 64 does not divide"
    assert [line for line in result.err.splitlines() if line.startswith("quantize ")] == [
        f"quantize {words}"
        for words in (
            f"11 layers to 3 bits{kept.format(5)}",
            "14 layers to 3 bits",
            "24 layers to 3 bits",
            f"0 layers to 3 bits{kept.format(8)}",
        )
    ]
    assert MetadataReader.read_exif_metadata("three.png")["quantize"] == 3
    assert json.loads(Path("three.metadata.json").read_text())["quantize"] == 3
    assert cli(*call, "--output", "whole.png").status == 0
    assert cli(*call, "--quantize", 8, "--output", "eight.png").status == 0
    whole, eight, three = (pixels(f"{name}.png") for name in ("whole", "eight", "three"))
    assert 0 < abs(eight - whole).mean() < abs(three - whole).mean()
    assert abs(eight - whole).mean() < 4
    assert "Quantization (bits): 3\n" in cli("info", "three.png").out


def test_the_settings_of_a_picture_bring_its_bits(cli, in_folder, wide):
    (in_folder / wide.name).symlink_to(wide)
    call = ["generate", "--model", wide, "--prompt", PROMPT, "--seed", 3, "--steps", 2, "--width", 48, "--height", 32]
    assert cli(*call, "-q", 4, "--output", "four.png").status == 0
    again = cli("generate", "-C", "four.png", "--output", "again.png")
    assert again.status == 0, again.err
    assert (pixels("again.png") == pixels("four.png")).all()
    assert MetadataReader.read_exif_metadata("again.png")["quantize"] == 4
    assert cli("generate", "-C", "four.png", "-q", 8, "--output", "eight.png").status == 0
    assert MetadataReader.read_exif_metadata("eight.png")["quantize"] == 8


@pytest.mark.parametrize(
    ("value", "told"),
    [(7, "7 is not one of 3, 4, 5, 6, 8"), ("8", "'8' is not a number"), (True, "'True' is not a number")],
)
def test_bits_in_settings_that_make_no_sense(cli, in_folder, value, told):
    settings = {"model": "schnell", "prompt": "x", "quantize": value}
    Path("old.json").write_text(json.dumps(settings))
    result = cli("generate", "-C", "old.json")
    assert result.status == 2
    assert result.err == f"error: old.json: its quantize makes no sense, {told}: say --quantize yourself\n"


# ---- mflux-convert


def test_convert_quantizes_matrices_that_are_weights(tmp_path, caplog):
    caplog.set_level(logging.INFO, "mflux")
    tensors = {
        "layer.weight": mx.random.normal((2, 64), key=mx.random.key(1)),
        "tied.weight": mx.random.normal((2, 128), key=mx.random.key(2)).astype(mx.bfloat16),
        "odd.weight": mx.zeros((2, 65)),
        "positions": mx.zeros((2, 64)),
        "norm.weight": mx.ones(64),
        "kernel.weight": mx.zeros((2, 2, 1, 64)),
        "count.weight": mx.zeros((2, 64), dtype=mx.int32),
    }
    mx.save_safetensors(str(tmp_path / "in.safetensors"), tensors)
    convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", quantize=6)
    assert caplog.messages == ["quantize 2 tensors to 6 bits, keep 5"]
    found = mx.load(str(tmp_path / "out.safetensors"))
    expected = {name: value for name, value in tensors.items() if name not in ("layer.weight", "tied.weight")}
    for path in ("layer", "tied"):
        parts = pack(tensors[f"{path}.weight"], Quantization(6))
        expected |= {f"{path}.{leaf}": part for leaf, part in parts.items()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert mx.array_equal(found[name], value).item(), name


def test_convert_refuses_what_is_quantized_already(cli, in_folder):
    mx.save_safetensors("in.safetensors", {"layer.weight": mx.zeros((2, 64))})
    assert cli("convert", "in.safetensors", "four.safetensors", "-q", 4).status == 0
    result = cli("convert", "four.safetensors", "eight.safetensors", "-q", 8)
    assert result.status == 2
    assert result.errors == [
        "error: four.safetensors holds nothing to quantize, or is quantized already: leave --quantize out"
    ]
    assert not Path("eight.safetensors").exists()
