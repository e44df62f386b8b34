"""LoRA without torch: which names are known, what is refused, scales, the library, quantized weights, the commands."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from mflux.backend import mx, nn, tree_flatten
from mflux.checkpoints.loading import load_component
from mflux.errors import CheckpointError, DownloadError, UsageError
from mflux.models.common.family import families, load_object
from mflux.models.common.lora.adapters import (
    Adapter,
    Difference,
    Kronecker,
    LoraLinear,
    LowRank,
    dense,
    linear_layers,
    merged,
    put_on,
    take_off,
)
from mflux.models.common.lora.library import find_lora, library, settle_scales
from mflux.models.common.lora.names import DOTTED, JOINED, Spelling, spelled
from mflux.models.common.lora.reading import Loras
from mflux.models.common.networks.text_encoders.clip import CLIPTextEncoder
from mflux.models.flux.lora_names import LORA
from mflux.models.flux.model.transformer import FluxTransformer
from mflux.models.flux.variants.txt2img.flux import Flux1
from mflux.utils.metadata_reader import MetadataReader

WIDTH = 32
TO_Q = "transformer.transformer_blocks.0.attn.to_q"


def noise(seed: int, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)) / math.sqrt(shape[-1])


def write(path: Path, tensors: dict[str, mx.array], metadata: dict[str, str] | None = None) -> Path:
    mx.save_safetensors(str(path), tensors, metadata=metadata or {})
    return path


def pair(stem: str = TO_Q, *, rank: int = 4, height: int = WIDTH, width: int = WIDTH, seed: int = 1) -> dict:
    return {
        f"{stem}.lora_A.weight": noise(seed, rank, width),
        f"{stem}.lora_B.weight": noise(seed + 1, height, rank),
    }


@pytest.fixture(scope="module")
def skeletons(tiny_schnell) -> dict[str, nn.Module]:
    parts = {"transformer": FluxTransformer, "text_encoder": CLIPTextEncoder}
    return {part: skeleton(module_class, tiny_schnell / part) for part, module_class in parts.items()}


def skeleton(module_class: type, folder: Path) -> nn.Module:
    values = json.loads((folder / "config.json").read_text())
    return module_class(module_class.config_class.from_dict(values))


@pytest.fixture
def match(skeletons):
    """Match one file with the tiny model."""

    def read(path: Path, scale: float = 1.0) -> Loras:
        return Loras([path], [scale], spellings=LORA.spellings, layouts=LORA.layouts, modules=skeletons)

    return read


def weights(loras: Loras, folder: Path, part: str = "transformer", **options) -> dict[str, np.ndarray]:
    """The linear layers' weights as they are with the LoRAs."""
    module_class = {"transformer": FluxTransformer, "text_encoder": CLIPTextEncoder}[part]
    module = loras.apply(part, lambda adjust: load_component(module_class, folder / part, adjust=adjust), bake=True)
    return {path: np.array(layer.weight) for path, layer in module.named_modules() if isinstance(layer, nn.Linear)}


def changed(loras: Loras, folder: Path, part: str = "transformer") -> dict[str, np.ndarray]:
    """By how much each layer differs from the file."""
    stored = mx.load(str(next((folder / part).glob("*.safetensors"))))
    after = weights(loras, folder, part)
    found = {path: weight - np.array(stored[f"{path}.weight"]) for path, weight in after.items()}
    return {path: change for path, change in found.items() if np.abs(change).max() > 0}


# ---- names


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("transformer.transformer_blocks.0.attn.to_out.0", ["transformer_blocks.0.attn.to_out.0"]),
        ("single_transformer_blocks.0.proj_mlp", ["single_transformer_blocks.0.proj_mlp"]),
        ("base_model.model.x_embedder", ["x_embedder"]),
        ("transformer.transformer_blocks.0.ff_context.linear2", ["transformer_blocks.0.ff_context.net.2"]),
        ("lora_unet_double_blocks_0_txt_mlp_0", ["transformer_blocks.0.ff_context.net.0.proj"]),
        (
            "diffusion_model.single_blocks.0.linear1",
            [f"single_transformer_blocks.0.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")],
        ),
        (
            "double_blocks.0.processor.qkv_lora2",
            [f"transformer_blocks.0.attn.add_{name}_proj" for name in "qkv"],
        ),
        ("lycoris_transformer_blocks_0_norm1_linear", ["transformer_blocks.0.norm1.linear"]),
        ("lycoris__context_embedder", ["context_embedder"]),
        ("lora_transformer_single_transformer_blocks_0_attn_to_v", ["single_transformer_blocks.0.attn.to_v"]),
        ("text_encoder.text_model.encoder.layers.1.mlp.fc1", ["text_model.encoder.layers.1.mlp.fc1"]),
        ("text_encoder.encoder.layers.1.mlp.fc1", ["text_model.encoder.layers.1.mlp.fc1"]),
        ("lora_te1_text_model_encoder_layers_0_self_attn_k_proj", ["text_model.encoder.layers.0.self_attn.k_proj"]),
        (
            "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.out_proj",
            ["text_model.encoder.layers.0.self_attn.out_proj"],
        ),
    ],
)
def test_a_name(skeletons, name, layers):
    names = spelled(LORA.spellings, {part: linear_layers(module) for part, module in skeletons.items()})
    assert [layer for layer, _ in names[name].parts] == layers


def test_names_of_what_the_model_does_not_have(skeletons):
    names = spelled(LORA.spellings, {part: linear_layers(module) for part, module in skeletons.items()})
    for name in (
        "transformer.transformer_blocks.1.attn.to_q",
        "lora_unet_guidance_in_in_layer",
        "lora_te2_encoder_block_0",
    ):
        assert name not in names
    # Each layer of the transformer has a name in each layout that has names for all.
    for prefix in ("transformer.", "lora_unet_double_", "diffusion_model.double_", "lycoris_", "lora_transformer_"):
        assert any(name.startswith(prefix) for name in names)
    every = {layer for name, target in names.items() if name.startswith("lora_unet_") for layer, _ in target.parts}
    assert every >= set(linear_layers(skeletons["transformer"]))


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("lora_A.weight", "lora_B.weight"),
        ("lora_A", "lora_B"),
        ("lora_A.default.weight", "lora_B.default.weight"),
        ("lora_down.weight", "lora_up.weight"),
        ("lora.down.weight", "lora.up.weight"),
        ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    ],
)
def test_how_the_two_parts_may_be_called(match, tiny_schnell, tmp_path, down, up):
    a, b = noise(1, 4, WIDTH), noise(2, WIDTH, 4)
    found = changed(match(write(tmp_path / "a.safetensors", {f"{TO_Q}.{down}": a, f"{TO_Q}.{up}": b})), tiny_schnell)
    assert found.keys() == {"transformer_blocks.0.attn.to_q"}
    assert np.allclose(found["transformer_blocks.0.attn.to_q"], np.array(b @ a), atol=1e-6)


# ---- what a file amounts to, multiplied out with numpy

SINGLE = [f"single_transformer_blocks.0.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
IMAGE = [f"transformer_blocks.0.attn.to_{name}" for name in "qkv"]
TEXT = [f"transformer_blocks.0.attn.add_{name}_proj" for name in "qkv"]


def rows_of(change: np.ndarray, layers: list[str], skeletons) -> dict[str, np.ndarray]:
    """A fused matrix' rows by layer, one below the other."""
    heights = [linear_layers(skeletons["transformer"])[layer][0] for layer in layers]
    assert sum(heights) == len(change)
    return dict(zip(layers, np.split(change, np.cumsum(heights)[:-1]), strict=True))


@pytest.mark.parametrize(
    ("stem", "layers", "ends", "alpha"),
    [
        ("lora_unet_single_blocks_0_linear1", SINGLE, ("lora_down.weight", "lora_up.weight"), 3.0),
        ("lora_unet_double_blocks_0_img_attn_qkv", IMAGE, ("lora_down.weight", "lora_up.weight"), 1.0),
        ("diffusion_model.single_blocks.0.linear1", SINGLE, ("lora_A.weight", "lora_B.weight"), None),
        ("base_model.model.double_blocks.0.txt_attn.qkv", TEXT, ("lora_A.weight", "lora_B.weight"), None),
        ("single_blocks.0.processor.qkv_lora", SINGLE[:3], ("down.weight", "up.weight"), None),
        ("double_blocks.0.processor.qkv_lora1", IMAGE, ("down.weight", "up.weight"), None),
        ("lora_unet_final_layer_adaLN_modulation_1", ["norm_out.linear"], ("lora_down.weight", "lora_up.weight"), 8.0),
    ],
)
def test_fused_layers(match, skeletons, tiny_schnell, tmp_path, stem, layers, ends, alpha):
    sizes = linear_layers(skeletons["transformer"])
    height = sum(sizes[layer][0] for layer in layers)
    down, up = noise(1, 4, WIDTH), noise(2, height, 4)
    tensors = {f"{stem}.{ends[0]}": down, f"{stem}.{ends[1]}": up}
    if alpha is not None:
        tensors[f"{stem}.alpha"] = mx.array(alpha)
    found = changed(match(write(tmp_path / "a.safetensors", tensors), 0.7), tiny_schnell)
    change = 0.7 * (alpha / 4 if alpha else 1) * np.array(up) @ np.array(down)
    if layers == ["norm_out.linear"]:
        # Black Forest Labs' files have the shift first, diffusers' the scale.
        change = np.concatenate([change[WIDTH:], change[:WIDTH]])
    want = rows_of(change, layers, skeletons)
    assert found.keys() == want.keys()
    for layer, part in want.items():
        assert np.allclose(found[layer], part, atol=2e-6), layer


@pytest.mark.parametrize("magnitudes", [None, "rows", "columns"])
@pytest.mark.parametrize("form", ["whole", "w1", "w2", "both", "t2"])
@pytest.mark.parametrize(
    ("stem", "layers"),
    [("lycoris_transformer_blocks_0_attn_to_q", IMAGE[:1]), ("lora_unet_single_blocks_0_linear1", SINGLE)],
)
def test_lokr(match, skeletons, tiny_schnell, tmp_path, stem, layers, form, magnitudes):
    sizes = linear_layers(skeletons["transformer"])
    height = sum(sizes[layer][0] for layer in layers)
    random, rank, alpha, scale = np.random.default_rng(0), 3, 2.0, 0.7

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32) / shape[-1] ** 0.5

    tensors, inner, outer = {"alpha": np.float32(alpha)}, height // 4, WIDTH // 2
    w1, w2 = draw(4, 2), draw(inner, outer)
    if form in ("w1", "both"):
        a, b = draw(4, rank), draw(rank, 2)
        w1 = a @ b
        tensors |= {"lokr_w1_a": a, "lokr_w1_b": b}
    else:
        tensors["lokr_w1"] = w1
    if form in ("w2", "both"):
        a, b = draw(inner, rank), draw(rank, outer)
        w2 = a @ b
        tensors |= {"lokr_w2_a": a, "lokr_w2_b": b}
    elif form == "t2":
        core, a, b = draw(rank, rank, 1, 1), draw(rank, inner), draw(rank, outer)
        w2 = a.T @ core[:, :, 0, 0] @ b
        tensors |= {"lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b}
    else:
        tensors["lokr_w2"] = w2
    change = np.kron(w1, w2) * (1 if form == "whole" else alpha / rank)

    stored = mx.load(str(next((tiny_schnell / "transformer").glob("*.safetensors"))))
    weight = np.concatenate([np.array(stored[f"{layer}.weight"]) for layer in layers])
    if magnitudes:
        lengths = np.linalg.norm(weight + change, axis=1 if magnitudes == "rows" else 0, keepdims=True)
        tensors["dora_scale"] = (lengths * random.uniform(0.7, 1.3, lengths.shape)).astype(np.float32)
        change = (weight + change) * tensors["dora_scale"] / lengths - weight
    path = write(tmp_path / "a.safetensors", {f"{stem}.{part}": mx.array(value) for part, value in tensors.items()})
    if magnitudes == "columns" and len(layers) > 1:
        with pytest.raises(CheckpointError, match="scales the columns of several layers at once, which is not built"):
            match(path)
        return
    want = rows_of(scale * change, layers, skeletons)
    found = changed(match(path, scale), tiny_schnell)
    assert found.keys() == want.keys()
    for layer, part in want.items():
        assert np.allclose(found[layer], part, atol=5e-6), layer

    # The same, computed beside the weights.
    module = match(path, scale).apply(
        "transformer", lambda adjust: load_component(FluxTransformer, tiny_schnell / "transformer"), bake=False
    )
    wrapped = {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLinear)}
    assert wrapped.keys() == want.keys()
    x = draw(2, 5, WIDTH)
    for layer, part in want.items():
        weight, bias = (np.array(stored[f"{layer}.{leaf}"]) for leaf in ("weight", "bias"))
        assert np.allclose(np.array(wrapped[layer](mx.array(x))), x @ (weight + part).T + bias, atol=2e-5), layer


def beside(loras: Loras, folder: Path) -> dict[str, LoraLinear]:
    """The layers that compute adapters beside their weights."""
    module = loras.apply(
        "transformer", lambda adjust: load_component(FluxTransformer, folder / "transformer"), bake=False
    )
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLinear)}


@pytest.mark.parametrize("rank", [2, 20], ids=["small", "larger than the whole"])
@pytest.mark.parametrize("form", ["plain", "no alpha", "tucker", "magnitudes"])
@pytest.mark.parametrize(
    ("stem", "layers"),
    [("lycoris_transformer_blocks_0_attn_to_q", IMAGE[:1]), ("lora_unet_single_blocks_0_linear1", SINGLE)],
)
def test_loha(match, skeletons, tiny_schnell, tmp_path, stem, layers, form, rank):
    """(w1_a · w1_b) ∘ (w2_a · w2_b) · alpha / rank, as LyCORIS writes it; baked, and computed beside the weights."""
    sizes = linear_layers(skeletons["transformer"])
    height, alpha, scale = sum(sizes[layer][0] for layer in layers), 3.0, 0.7
    random = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32) / shape[-1] ** 0.5

    tensors: dict[str, np.ndarray] = {} if form == "no alpha" else {"alpha": np.float32(alpha)}
    change = np.ones((height, WIDTH))
    for number in (1, 2):
        if form == "tucker":
            a, b, core = draw(rank, height), draw(rank, WIDTH), draw(rank, rank, 1, 1)
            tensors |= {f"hada_w{number}_a": a, f"hada_w{number}_b": b, f"hada_t{number}": core}
            change = change * (a.T @ core[:, :, 0, 0] @ b)
        else:
            a, b = draw(height, rank), draw(rank, WIDTH)
            tensors |= {f"hada_w{number}_a": a, f"hada_w{number}_b": b}
            change = change * (a @ b)
    change = change * (1 if form == "no alpha" else alpha / rank)
    stored = mx.load(str(next((tiny_schnell / "transformer").glob("*.safetensors"))))
    if form == "magnitudes":
        weight = np.concatenate([np.array(stored[f"{layer}.weight"]) for layer in layers])
        lengths = np.linalg.norm(weight + change, axis=1, keepdims=True)
        tensors["dora_scale"] = (lengths * random.uniform(0.7, 1.3, lengths.shape)).astype(np.float32)
        change = (weight + change) * tensors["dora_scale"] / lengths - weight
    path = write(tmp_path / "a.safetensors", {f"{stem}.{part}": mx.array(value) for part, value in tensors.items()})
    want = rows_of(scale * change, layers, skeletons)
    found = changed(match(path, scale), tiny_schnell)
    assert found.keys() == want.keys()
    wrapped = beside(match(path, scale), tiny_schnell)
    assert wrapped.keys() == want.keys()
    x = draw(2, 5, WIDTH)
    for layer, part in want.items():
        assert np.abs(part).max() > 1e-3
        assert np.allclose(found[layer], part, atol=1e-5), layer
        weight, bias = (np.array(stored[f"{layer}.{leaf}"]) for leaf in ("weight", "bias"))
        assert np.allclose(np.array(wrapped[layer](mx.array(x))), x @ (weight + part).T + bias, atol=5e-5), layer


MAGNITUDES = (
    "lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.default",
    "lora_magnitude_vector.default.weight", "dora_scale",
)  # fmt: skip


@pytest.mark.parametrize("name", MAGNITUDES)
@pytest.mark.parametrize("columns", [False, True])
def test_dora_in_peft_s_layout(match, tiny_schnell, tmp_path, name, columns):
    """m · (W + s·B·A) / |W + s·B·A|, row by row (Liu et al. 2024); PEFT's m has one axis."""
    layer = IMAGE[0]
    stored = mx.load(str(next((tiny_schnell / "transformer").glob("*.safetensors"))))
    weight = np.array(stored[f"{layer}.weight"])
    tensors = pair()
    down, up = map(np.array, tensors.values())
    whole = weight + 2.0 * up @ down
    lengths = np.linalg.norm(whole, axis=1)
    magnitude = (lengths * np.random.default_rng(1).uniform(0.7, 1.3, lengths.shape)).astype(np.float32)
    shape = (WIDTH, 1) if columns else (WIDTH,)
    tensors |= {f"{TO_Q}.{name}": mx.array(magnitude.reshape(shape))}
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8, "transformer.r": 4})}
    path = write(tmp_path / "a.safetensors", tensors, metadata)
    want = magnitude[:, None] * whole / lengths[:, None]
    assert np.allclose(changed(match(path), tiny_schnell)[layer], want - weight, atol=1e-5)
    x = np.array(noise(3, 5, WIDTH))
    got = beside(match(path), tiny_schnell)[layer](mx.array(x))
    assert np.allclose(np.array(got), x @ want.T + np.array(stored[f"{layer}.bias"]), atol=3e-5)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"hada_w1_b": None}, f" is incomplete: {TO_Q} has no hada_w1_b"),
        ({"hada_w2_a": None}, f" is incomplete: {TO_Q} has no hada_w2_a"),
        ({"hada_w1_b": (3, WIDTH)}, f" is damaged: the factors of {TO_Q}'s hada_w1 do not fit"),
        ({"hada_w2_b": (2, WIDTH + 1)}, f" is damaged: the two products of {TO_Q} differ in shape"),
        ({"hada_t1": (2, 3, 1, 1)}, f" is damaged: {TO_Q}.hada_t1 does not fit its factors"),
        ({"hada_w1_a": (33, 2), "hada_w2_a": (33, 2)}, f" does not fit this model: {TO_Q} changes a matrix"),
        ({"lora_A.weight": (2, WIDTH), "lora_B.weight": (WIDTH, 2)}, f" changes {TO_Q} twice: as LoHa and as LoRA"),
        ({"lokr_w1": (2, 2)}, f" changes {TO_Q} twice: as LoHa and as LoKr"),
    ],
)
def test_a_damaged_loha(match, tmp_path, change, told):
    shapes = {"hada_w1_a": (WIDTH, 2), "hada_w1_b": (2, WIDTH), "hada_w2_a": (WIDTH, 2), "hada_w2_b": (2, WIDTH)}
    tensors = {f"{TO_Q}.{part}": noise(5, *shape) for part, shape in (shapes | change).items() if shape}
    assert refused(match, tmp_path, tensors).startswith(told)


def test_changes_of_norms_in_lycoris_layout(match, tiny_schnell, tmp_path):
    """Its module of norms adds `w_norm` and `b_norm` to what is there, as ComfyUI's `diff` and `diff_b`."""
    layer = "transformer_blocks.0.attn.norm_q"
    stored = mx.load(str(next((tiny_schnell / "transformer").glob("*.safetensors"))))
    value = noise(3, *stored[f"{layer}.weight"].shape)
    path = write(tmp_path / "a.safetensors", {f"lycoris_{layer.replace('.', '_')}.w_norm": value})
    loras = match(path, 0.5)
    module = loras.apply(
        "transformer",
        lambda adjust: load_component(FluxTransformer, tiny_schnell / "transformer", adjust=adjust),
        bake=True,
    )
    found = module.transformer_blocks[0].attn.norm_q.weight
    assert np.allclose(np.array(found), np.array(stored[f"{layer}.weight"] + 0.5 * value), atol=1e-6)


@pytest.mark.parametrize("family", [name for name, family in families().items() if family.lora])
def test_every_family_knows_every_prefix(family):
    """What one family's files may have before a name, every family's may."""
    names = load_object(families()[family].lora)
    found = spelled(names.spellings, {"transformer": {"blocks.0.attn": (2, 2)}})
    wanted = {f"{prefix}blocks.0.attn" for prefix in DOTTED} | {f"{prefix}blocks_0_attn" for prefix in JOINED}
    assert wanted <= found.keys()
    own = [one.prefixes for one in names.spellings if one.component == "transformer" and one.prefixes is not None]
    assert own == []


# ---- put on and taken off


@pytest.mark.parametrize("bits", [None, 8])
def test_what_is_taken_off_leaves_nothing(bits):
    """Products, magnitudes, biases and norms; and where one of them is beyond numbers, none is put on."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [nn.Linear(64, 96), nn.Linear(96, 64)]
            self.norm = nn.LayerNorm(64)

        def __call__(self, x):
            return self.norm(self.layers[1](self.layers[0](x)))

    net, x = Net(), noise(1, 3, 64)
    if bits:
        nn.quantize(net, 32, bits)
    before, plain = dict(tree_flatten(net.parameters())), net(x)

    def read():
        return LowRank(noise(2, 4, 64), noise(3, 96, 4)), mx.abs(noise(4, 96, 1))

    adapters = {
        "layers.0": [Adapter(0.5, 2.0, read, lambda: noise(5, 96))],
        "layers.1": [Adapter(0.5, 1.0, None, lambda: noise(6, 64))],
        "norm": [Adapter(1.0, 1.0, lambda: (Difference(noise(7, 64)), None), lambda: noise(8, 64))],
    }

    def is_as_before() -> bool:
        now = dict(tree_flatten(net.parameters()))
        return now.keys() == before.keys() and all(value is before[name] for name, value in now.items())

    for _ in range(2):
        put_on(net, adapters)
        assert isinstance(net.layers[0], LoraLinear) and not is_as_before()
        assert float(mx.abs(net(x) - plain).max()) > 0.1
        take_off(net)
        assert is_as_before() and mx.array_equal(net(x), plain)
    for place, shape in (("layers.0", (96, 64)), ("layers.1", (64, 96)), ("norm", (64,))):
        endless = Difference(mx.full(shape, math.inf))
        others = {name: found for name, found in adapters.items() if name != place}
        with pytest.raises(CheckpointError, match="not finite"):
            put_on(net, others | {place: [Adapter(1.0, 1.0, lambda endless=endless: (endless, None))]})
        assert is_as_before()
        take_off(net)
        assert is_as_before()


# ---- biases


@pytest.mark.parametrize("adapter", ["", ".default"])
def test_biases_come_along(match, tiny_schnell, tmp_path, adapter):
    """PEFT's `lora_bias`: multiplied as the product is; of three layers in one, each has its part. Baked and beside."""
    fused = "diffusion_model.double_blocks.0.img_attn.qkv"
    tensors = pair(fused, height=3 * WIDTH) | {f"{fused}.alpha": mx.array(2.0)}
    bias = noise(7, 3 * WIDTH)
    tensors[f"{fused}.lora_B{adapter}.bias"] = bias
    path = write(tmp_path / "a.safetensors", tensors)
    stored = mx.load(str(next((tiny_schnell / "transformer").glob("*.safetensors"))))

    def load(adjust):
        return load_component(FluxTransformer, tiny_schnell / "transformer", adjust=adjust)

    for bake in (True, False):
        module = match(path, 0.6).apply("transformer", load, bake=bake)
        biases = {path: layer.bias for path, layer in module.named_modules() if "bias" in layer}
        assert sum(isinstance(layer, LoraLinear) for _, layer in module.named_modules()) == (0 if bake else 3)
        for number, name in enumerate("qkv"):
            layer = f"transformer_blocks.0.attn.to_{name}"
            part = np.array(bias)[number * WIDTH : (number + 1) * WIDTH]
            want = np.array(stored[f"{layer}.bias"]) + 0.6 * 2 / 4 * part
            assert np.allclose(np.array(biases.pop(layer)), want, atol=1e-6)
        assert all(
            np.array_equal(np.array(value), np.array(stored[f"{layer}.bias"]))
            for layer, value in biases.items()
            if f"{layer}.bias" in stored
        )


def test_biases_of_packed_layers_come_along_once(match, tiny_schnell, tmp_path):
    """Where weights are stored quantized, their biases are in full precision, and baked; the product is beside."""
    name = "transformer_blocks.0.ff.net.2"
    width = 4 * WIDTH
    bias = noise(7, WIDTH)
    tensors = pair(f"transformer.{name}", width=width) | {f"transformer.{name}.lora_B.bias": bias}
    path = write(tmp_path / "a.safetensors", tensors)
    stored = mx.load(str(next((tiny_schnell / "transformer").glob("*.safetensors"))))
    weight = stored.pop(f"{name}.weight")
    parts = ("weight", "scales", "biases")
    stored |= {f"{name}.{part}": value for part, value in zip(parts, mx.quantize(weight, bits=8), strict=True)}
    (tmp_path / "transformer").mkdir()
    config = (tiny_schnell / "transformer" / "config.json").read_text()
    (tmp_path / "transformer" / "config.json").write_text(config)
    write(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors", stored)
    module = match(path).apply(
        "transformer",
        lambda adjust: load_component(FluxTransformer, tmp_path / "transformer", adjust=adjust),
        bake=True,
    )
    layer = module.transformer_blocks[0].ff.net[2]
    assert isinstance(layer, LoraLinear)
    x = noise(8, 3, width)
    down, up = (tensors[f"transformer.{name}.lora_{side}.weight"] for side in "AB")
    packed = mx.dequantize(*mx.quantize(weight, bits=8), bits=8)
    want = x @ (packed + up @ down).T + stored[f"{name}.bias"] + bias
    assert np.allclose(np.array(layer(x)), np.array(want), atol=2e-5)


def test_a_bias_for_a_layer_without_one(tmp_path):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.only = nn.Linear(WIDTH, WIDTH, bias=False)

    path = write(tmp_path / "a.safetensors", pair("only") | {"only.lora_B.bias": mx.zeros(WIDTH)})
    told = f"{path} changes the bias of only, which has none in this model"
    with pytest.raises(CheckpointError, match=re.escape(told)):
        Loras([path], [1.0], spellings=[Spelling("x", ("",))], layouts=LORA.layouts, modules={"x": Plain()})


def test_a_bias_alone_is_no_adapter(match, tmp_path, caplog):
    other = "transformer.transformer_blocks.0.attn.to_k"
    match(write(tmp_path / "a.safetensors", pair() | {f"{other}.lora_B.bias": mx.zeros(WIDTH)}))
    assert caplog.messages == [f"a.safetensors: 1 of 3 tensors belong to no layer: {other}.lora_B.bias"]


# ---- strength


def strength(match, folder: Path, path: Path, stem: str = TO_Q) -> float:
    """By how much the product of the two parts is multiplied."""
    tensors = mx.load(str(path))
    product = np.array(tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"])
    change = next(iter(changed(match(path), folder).values()))
    return float((change * product).sum() / (product * product).sum())


@pytest.mark.parametrize(
    ("alpha", "metadata", "expected"),
    [
        (None, None, 1.0),
        (2.0, None, 0.5),
        (None, {"transformer.lora_alpha": 8}, 2.0),
        (None, {"lora_alpha": 8}, 2.0),
        (None, {"lora_alpha": 8, "use_rslora": True}, 4.0),
        (None, {"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"attn.to_q": 12}}, 3.0),
        (None, {"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"o_q": 12}}, 2.0),
        (None, {"transformer.lora_alpha": 8, "transformer.alpha_pattern": {r"^transformer_blocks\.\d+.*": 2}}, 0.5),
        (None, {"text_encoder.lora_alpha": 8}, 1.0),
        # The layer's own word is the last.
        (2.0, {"transformer.lora_alpha": 8}, 0.5),
    ],
)
def test_strength(match, tiny_schnell, tmp_path, alpha, metadata, expected):
    tensors = pair()
    if alpha is not None:
        tensors[f"{TO_Q}.alpha"] = mx.array(alpha)
    header = {"lora_adapter_metadata": json.dumps(metadata)} if metadata else None
    path = write(tmp_path / "a.safetensors", tensors, header)
    assert strength(match, tiny_schnell, path) == pytest.approx(expected, rel=1e-4)


def test_what_peft_writes_beside_its_file(match, tiny_schnell, tmp_path):
    stem = "base_model.model.transformer_blocks.0.attn.to_q"
    path = write(tmp_path / "adapter_model.safetensors", pair(stem))
    assert strength(match, tiny_schnell, path, stem) == pytest.approx(1, rel=1e-4)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 12, "r": 4, "alpha_pattern": {}}))
    assert strength(match, tiny_schnell, path, stem) == pytest.approx(3, rel=1e-4)
    # The folder means the same, and a file of another name there is not PEFT's.
    assert changed(match(tmp_path), tiny_schnell).keys() == {"transformer_blocks.0.attn.to_q"}
    other = write(tmp_path / "other.safetensors", pair(stem))
    assert strength(match, tiny_schnell, other, stem) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize(
    ("alpha", "metadata", "expected"),
    [
        (None, None, 1.0),
        # LyCORIS takes alpha for the rank where both factors are whole; PEFT divides by its rank all the same.
        (2.0, None, 1.0),
        (None, {"transformer.alpha": 6, "transformer.r": 4}, 1.5),
        (None, {"alpha": 6, "r": 4, "rank_pattern": {"to_q": 12}}, 0.5),
        (None, {"alpha": 6, "r": 4, "alpha_pattern": {"attn.to_q": 10}, "rank_pattern": {"to_k": 12}}, 2.5),
        (None, {"alpha": 6}, 1.0),
        (2.0, {"alpha": 6, "r": 4}, 1.0),
    ],
)
def test_strength_of_a_whole_lokr(match, tiny_schnell, tmp_path, alpha, metadata, expected):
    w1, w2 = noise(1, 4, 2), noise(2, WIDTH // 4, WIDTH // 2)
    tensors = {f"{TO_Q}.lokr_w1": w1, f"{TO_Q}.lokr_w2": w2}
    if alpha is not None:
        tensors[f"{TO_Q}.alpha"] = mx.array(alpha)
    header = {"lora_adapter_metadata": json.dumps(metadata)} if metadata else None
    found = changed(match(write(tmp_path / "a.safetensors", tensors, header)), tiny_schnell)
    assert np.allclose(found["transformer_blocks.0.attn.to_q"], expected * np.array(mx.kron(w1, w2)), atol=1e-6)


@pytest.mark.parametrize("rank", [0, -4])
def test_a_rank_of_nothing(match, tmp_path, rank):
    tensors = {f"{TO_Q}.lokr_w1": noise(1, 4, 2), f"{TO_Q}.lokr_w2": noise(2, WIDTH // 4, WIDTH // 2)}
    header = {"lora_adapter_metadata": json.dumps({"alpha": 6, "r": rank, "use_rslora": True})}
    assert refused(match, tmp_path, tensors, header) == f": the strength of {TO_Q} is not a finite number"


# ---- what is refused


def refused(match, tmp_path, tensors: dict, metadata: dict | None = None) -> str:
    path = write(tmp_path / "a.safetensors", tensors, metadata)
    with pytest.raises(CheckpointError) as caught:
        match(path)
    assert str(caught.value).startswith(str(path))
    return str(caught.value).removeprefix(str(path))


def test_a_file_for_another_model_shows_its_names_and_the_known_layouts(match, tmp_path):
    told = refused(match, tmp_path, pair("lora_unet_down_blocks_0_attentions_0") | pair("other.layer"))
    assert (
        "changes no layer of this model: its names are like lora_unet_down_blocks_0_attentions_0.lora_A.weight" in told
    )
    for layout, example in LORA.layouts.items():
        assert f"{layout}: {example}" in told


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({f"{TO_Q}.lora_B.weight": None}, f" is incomplete: it has {TO_Q}.lora_A.weight without its up part"),
        ({f"{TO_Q}.lora_A.weight": None}, f" is incomplete: it has {TO_Q}.lora_B.weight without its down part"),
        (
            {f"{TO_Q}.lora_A.weight": (4, 48)},
            f" does not fit this model: {TO_Q} changes a matrix of 32 × 48, and here it has 32 × 32",
        ),
        (
            {f"{TO_Q}.lora_A.weight": (3, 32)},
            f" is damaged: {TO_Q}.lora_A.weight has the rank 3 and {TO_Q}.lora_B.weight 4",
        ),
        ({f"{TO_Q}.lora_A.weight": (32,)}, f": {TO_Q}.lora_A.weight has the shape [32], and is no matrix"),
        ({f"{TO_Q}.alpha": (2,)}, f": {TO_Q}.alpha is not one number"),
        ({f"{TO_Q}.alpha": math.inf}, f": the strength of {TO_Q} is not a finite number"),
        ({f"{TO_Q}.lora_down.weight": (4, 32)}, f" holds {TO_Q} twice: as {TO_Q}.lora_A.weight and as "),
        ({"lycoris_transformer_blocks_0_attn_to_k.lokr_w1": (2, 2)}, " is incomplete: lycoris_"),
        ({f"{TO_Q}.lora_B.bias": (8,)}, f": {TO_Q}.lora_B.bias has the shape [8] for a layer of 32 outputs"),
    ],
)
def test_a_damaged_file(match, tmp_path, change, told):
    tensors = pair()
    for name, value in change.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = noise(5, *value) if isinstance(value, tuple) else mx.array(value)
    assert refused(match, tmp_path, tensors).startswith(told)


OTHER_KINDS = {
    "OFT or BOFT": ("oft_blocks", "oft_R.weight", "oft_r", "boft_R", "oft_diag"),
    "GLoRA": ("a1.weight", "b2.weight"),
    "(IA)³": ("ia3_l", "on_input"),
    "AdaLoRA": ("lora_E",),
    "VeRA": ("vera_lambda_b",),
    "FourierFT": ("fourierft_spectrum",),
    "HRA": ("hra_u",),
    "Bone or MiSS": ("bone_block",),
    "LoRA with a middle factor (LoCon with CP)": ("lora_mid.weight",),
    "whole weights in place of the model's": ("set_weight", "reshape_weight"),
}


@pytest.mark.parametrize(("kind", "part"), [(kind, part) for kind, parts in OTHER_KINDS.items() for part in parts])
@pytest.mark.parametrize("stem", [TO_Q, "lora_unet_double_blocks_0_img_attn_qkv"])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_kind_that_is_not_built_is_refused_by_its_name(match, tmp_path, kind, part, stem, mixed):
    """Also where other layers have a LoRA: half of a change is not what was trained."""
    tensors = {f"{stem}.{part}": mx.zeros((2, 2))} | (pair() if mixed else {})
    told = f" holds {kind} ({stem}.{part}), which this version does not apply: take a LoRA, LoHa, LoKr or DoRA of it"
    assert refused(match, tmp_path, tensors) == told


@pytest.mark.parametrize("metadata", ["{", "[]", '{"lora_alpha": "x"}'])
def test_settings_that_make_no_sense(match, tmp_path, metadata):
    told = refused(match, tmp_path, pair(), {"lora_adapter_metadata": metadata})
    assert told == ": the settings that PEFT wrote of this LoRA make no sense"


def test_a_layer_that_two_layouts_change(match, tiny_schnell, tmp_path):
    """diffusers takes its own names then; where neither is its own, nobody knows."""
    kohya = pair("lora_unet_double_blocks_0_img_attn_proj", seed=5)
    own = pair("transformer.transformer_blocks.0.attn.to_out.0", seed=9)
    found = changed(match(write(tmp_path / "a.safetensors", kohya | own)), tiny_schnell)
    down, up = own.values()
    product = np.array(up @ down)
    assert np.allclose(found["transformer_blocks.0.attn.to_out.0"], product, atol=1e-6)
    other = pair("transformer_blocks.0.attn.to_out.0", seed=9)
    assert " changes the layer transformer_blocks.0.attn.to_out.0 twice" in refused(match, tmp_path, kohya | other)


def test_what_belongs_to_no_layer_is_told(match, tmp_path, caplog):
    extra = {"lora_te2_encoder_block_0_layer_0.alpha": mx.array(1.0), f"{TO_Q}.strange": mx.zeros((2, 2))}
    match(write(tmp_path / "a.safetensors", pair() | extra))
    assert caplog.messages == [
        f"a.safetensors: 2 of 4 tensors belong to no layer: lora_te2_encoder_block_0_layer_0.alpha, {TO_Q}.strange"
    ]


# ---- layers


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_a_layer_computes_what_its_merged_weights_would(bits):
    """Several adapters on one layer, magnitudes among them, on weights that are quantized or not."""
    linear = nn.Linear(64, 96)
    if bits:
        linear = nn.QuantizedLinear.from_linear(linear, bits=bits)
    weight, bias = dense(linear), linear.bias
    x = noise(1, 2, 5, 64)
    low = Adapter(0.7, 0.5, lambda: (LowRank(noise(2, 4, 64), noise(3, 96, 4)), None))
    rows = 1 + 0.2 * noise(4, 96, 1) * 1
    columns = 1 + 0.2 * noise(5, 1, 64)
    adapters = [
        low,
        Adapter(0.6, 1.5, lambda: (Kronecker(noise(6, 4, 8), noise(7, 24, 8)), rows)),
        Adapter(0.0, 9.0, lambda: (LowRank(noise(8, 4, 64), noise(9, 96, 4)), None)),
        Adapter(-0.4, 1.0, lambda: (LowRank(noise(10, 2, 64), noise(11, 96, 2)), columns)),
        Adapter(1.0, 1.0, lambda: (Kronecker(noise(12, 4, 8), noise(13, 24, 8), ((48, 96), (0, 48))), None)),
    ]
    want = x @ merged(weight, adapters).T + bias
    got = LoraLinear(linear, adapters)(x)
    assert float(mx.abs(got - want).max()) < 1e-4 * float(mx.abs(want).max())
    assert float(mx.abs(x @ weight.T + bias - want).max()) > 0.1


def test_a_scale_of_nothing_leaves_everything_as_it_is(match, tiny_schnell, tmp_path):
    path = write(tmp_path / "a.safetensors", pair())
    assert changed(match(path, 0.0), tiny_schnell) == {}
    loras = match(path, 0.0)
    module = loras.apply(
        "transformer", lambda adjust: load_component(FluxTransformer, tiny_schnell / "transformer"), bake=False
    )
    assert not any(isinstance(layer, LoraLinear) for layer in module.modules())


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_what_is_packed_is_what_would_be_saved_and_packed(match, tmp_path, dtype):
    """Baked in float32, rounded to the stored dtype, then quantized: the same bits as in two steps."""
    from support.tiny import write_checkpoint

    folder = write_checkpoint(tmp_path / "model", seed=1, guidance=False, dtype=dtype)
    path = write(tmp_path / "a.safetensors", pair())
    stem = "transformer_blocks.0.attn.to_q"

    def load(adjust, **options):
        return load_component(FluxTransformer, folder / "transformer", adjust=adjust, **options)

    kept = match(path).apply("transformer", lambda adjust: load(adjust, keep_dtypes=True), bake=True)
    layer = kept.transformer_blocks[0].attn.to_q
    assert layer.weight.dtype == dtype
    stored = mx.load(str(next((folder / "transformer").glob("*.safetensors"))))[f"{stem}.weight"]
    tensors = mx.load(str(path))
    exact = stored.astype(mx.float32) + tensors[f"{TO_Q}.lora_B.weight"] @ tensors[f"{TO_Q}.lora_A.weight"]
    assert mx.array_equal(layer.weight, exact.astype(dtype))


def test_baked_before_it_is_quantized(match, tmp_path):
    """With rows of 64 the tiny model quantizes; baking first, the change is in the packed weights."""
    from support.tiny import published, write_json

    settings = dict(num_layers=1, num_single_layers=1, in_channels=64, num_attention_heads=4, attention_head_dim=16)
    settings |= dict(axes_dims_rope=[4, 6, 6], joint_attention_dim=64, pooled_projection_dim=64, guidance_embeds=False)
    folder = tmp_path / "transformer"
    write_json(folder / "config.json", settings)
    module = skeleton(FluxTransformer, folder)
    tensors = published(module, seed=3)
    write(folder / "model.safetensors", tensors)
    path = write(tmp_path / "a.safetensors", pair(height=64, width=64))
    loras = Loras([path], [0.7], spellings=LORA.spellings, layouts=LORA.layouts, modules={"transformer": module})

    def load(adjust):
        return load_component(FluxTransformer, folder, adjust=adjust, quantize=4)

    baked = loras.apply("transformer", load, bake=True).transformer_blocks[0].attn.to_q
    lora = mx.load(str(path))
    change = 0.7 * (lora[f"{TO_Q}.lora_B.weight"] @ lora[f"{TO_Q}.lora_A.weight"])
    packed, scales, _ = mx.quantize(tensors["transformer_blocks.0.attn.to_q.weight"] + change, 64, 4)
    assert isinstance(baked, nn.QuantizedLinear) and mx.array_equal(baked.weight, packed)
    assert mx.array_equal(baked.scales, scales)
    # Without baking, and where the folder is quantized already, the packed weights stay and the change is beside them.
    beside = loras.apply("transformer", load, bake=False).transformer_blocks[0].attn.to_q
    assert isinstance(beside, LoraLinear) and beside.linear.bits == 4
    x = noise(5, 1, 3, 64)
    plain = load(None).transformer_blocks[0].attn.to_q
    want = plain(x) + x @ change.T
    assert float(mx.abs(beside(x) - want).max()) < 1e-5
    assert float(mx.abs(plain(x) - want).max()) > 0.01


# ---- where LoRAs lie


@pytest.fixture
def shelves(tmp_path, monkeypatch) -> list[Path]:
    for name in ("one/a", "one/sub/b", "two/a", "two/c", "two/transformer/0", "two/transformer/real"):
        path = tmp_path / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, pair())
    monkeypatch.setenv("LORA_LIBRARY_PATH", f"{tmp_path}/one:{tmp_path}/two: :{tmp_path}/three")
    return [tmp_path / "one", tmp_path / "two"]


def test_the_library(shelves):
    assert library(shelves) == {
        "a": shelves[0] / "a.safetensors",
        "b": shelves[0] / "sub/b.safetensors",
        "c": shelves[1] / "c.safetensors",
        "real": shelves[1] / "transformer/real.safetensors",
    }
    assert find_lora("c") == shelves[1] / "c.safetensors"


def test_a_file_here_comes_before_the_library(shelves, in_folder):
    (in_folder / "a").write_bytes(b"")
    assert find_lora("a") == Path("a")


@pytest.mark.parametrize(
    "name, file",
    [
        ("b", "one/sub/b"),
        ("b.safetensors", "one/sub/b"),
        ("sub/b", "one/sub/b"),
        ("sub/b.safetensors", "one/sub/b"),
        ("transformer/real", "two/transformer/real"),
        ("a.safetensors", "one/a"),
    ],
)
def test_what_the_library_has_is_found_before_a_folder_and_hugging_face(shelves, in_folder, monkeypatch, name, file):
    from mflux import hub

    monkeypatch.setattr(hub, "fetch_only_file", None)
    monkeypatch.setattr(hub, "fetch_file", None)
    (in_folder / name).mkdir(parents=True)
    assert find_lora(name) == in_folder / f"{file}.safetensors"
    # A path says what it means.
    assert find_lora(f"./{name}") == Path(name)


def test_everything_that_is_listed_is_found(cli, shelves):
    for line in cli("lora-library", "list").out.splitlines():
        name, _, path = line.partition(" -> ")
        assert find_lora(name) == find_lora(f"{name}.safetensors") == Path(path)


def test_a_name_that_is_not_in_the_library(shelves, monkeypatch):
    with pytest.raises(
        DownloadError, match="there is no file x here, and no LoRA of that name in LORA_LIBRARY_PATH: it has a, b"
    ):
        find_lora("x")
    monkeypatch.delenv("LORA_LIBRARY_PATH")
    with pytest.raises(DownloadError, match="there is no file c here, and LORA_LIBRARY_PATH is not set"):
        find_lora("c")


@pytest.mark.parametrize("name", ["./a.safetensors", "/none/a.safetensors", "~/no/a", "sub/a.safetensors", "a/b/c"])
def test_a_path_that_leads_nowhere(name):
    with pytest.raises(DownloadError, match=f"there is no LoRA {re.escape(name)}: check the path"):
        find_lora(name)


def test_an_empty_path():
    with pytest.raises(DownloadError, match="the path of a LoRA is empty"):
        find_lora(" ")


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("org/name:a.safetensors", ("org/name", "a.safetensors")),
        ("org/name@v1:sub/a.safetensors", ("org/name@v1", "sub/a.safetensors")),
        ("hf:org/name/sub/a.safetensors", ("org/name", "sub/a.safetensors")),
        ("hf:org/name:a.safetensors", ("org/name", "a.safetensors")),
        ("org/name", ("org/name", ".safetensors")),
        ("hf:org/name", ("org/name", ".safetensors")),
    ],
)
def test_a_file_on_hugging_face(monkeypatch, name, call):
    calls = []

    def fetch(*words, **_):
        calls.append(words)
        return Path("fetched.safetensors")

    monkeypatch.setattr("mflux.hub.fetch_file", fetch)
    monkeypatch.setattr("mflux.hub.fetch_only_file", fetch)
    assert find_lora(name) == Path("fetched.safetensors")
    assert calls == [call]


def test_scales(caplog):
    assert settle_scales(None, 2) == [1, 1]
    assert settle_scales([0.5, 0], 2) == [0.5, 0]
    assert caplog.messages == []
    assert settle_scales([0.5], 2) == [0.5, 1]
    assert caplog.messages == ["there are 1 LoRA scales for 2 LoRAs: the others have 1"]
    with pytest.raises(UsageError, match="there are 2 LoRA scales for 1 LoRAs"):
        settle_scales([1, 2], 1)


# ---- the commands

BASIC = ("--prompt", "a red circle", "--seed", 1, "--steps", 1, "--width", 32, "--height", 32)


@pytest.fixture
def draw(cli, in_folder, tiny_schnell):
    def run(*words: object, basic=BASIC):
        return cli("generate", "--model", tiny_schnell, "--base-model", "schnell", *basic, *words)

    return run


def pixels(path: str) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path)).astype(int)


def strong(seed: int) -> dict:
    tensors = {}
    for layer in ("x_embedder", "proj_out"):
        height = 64 if layer == "proj_out" else WIDTH
        tensors |= pair(f"transformer.{layer}", height=height, width=WIDTH if layer == "proj_out" else 64, seed=seed)
    return tensors


def test_pictures_with_loras(draw, in_folder):
    write(in_folder / "a.safetensors", strong(1))
    write(in_folder / "b.safetensors", strong(5))
    runs = {
        "plain.png": (),
        "none.png": ("--lora", "a.safetensors", 0),
        "half.png": ("--lora", "a.safetensors", 0.5),
        "both.png": ("--lora", "a.safetensors", 0.5, "--lora", "b.safetensors"),
        "paths.png": ("--lora-paths", "a.safetensors", "b.safetensors", "--lora-scales", 0.5, 1),
        "steps.png": ("--lora", "a.safetensors", 0.5, "--lora", "b.safetensors", "--no-bake-lora"),
    }
    for name, words in runs.items():
        result = draw(*words, "--output", name)
        assert (result.status, result.out, result.warnings) == (0, f"{name}\n", []), result.err
    found = {name: pixels(name) for name in runs}
    assert np.array_equal(found["none.png"], found["plain.png"])
    assert np.array_equal(found["paths.png"], found["both.png"])
    assert np.abs(found["steps.png"] - found["both.png"]).max() <= 2
    for one, other in (("half.png", "plain.png"), ("both.png", "half.png")):
        assert np.abs(found[one] - found[other]).max() > 10

    settings = MetadataReader.read_exif_metadata("steps.png")
    assert settings["lora_paths"] == ["a.safetensors", "b.safetensors"]
    assert (settings["lora_scales"], settings["bake_lora"]) == ([0.5, 1.0], False)
    assert "bake_lora" not in MetadataReader.read_exif_metadata("both.png")


def test_settings_are_replayed(draw, cli, in_folder, tiny_schnell):
    (in_folder / "tiny-schnell").symlink_to(tiny_schnell)
    write(in_folder / "a.safetensors", strong(1))
    draw("--lora", "a.safetensors", 0.5, "--output", "first.png")
    draw("--lora", "a.safetensors", 1, "--output", "full.png")
    draw("--output", "plain.png")
    for words, like in (
        ((), "first.png"),
        (("--lora-scales", 1), "full.png"),
        (("--lora", "a.safetensors"), "full.png"),
        (("--lora-paths",), "plain.png"),
    ):
        result = cli("generate", "-C", "first.png", *words, "--output", "again.png")
        assert result.status == 0, result.err
        assert np.array_equal(pixels(result.paths[0]), pixels(like)), words
        result.paths[0].unlink()


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (
            ["--lora", "a", "1", "b"],
            2,
            "--lora takes a path and a scale, not 3 values: --lora a 0.7; say it again for ",
        ),
        (["--lora", "a", "b"], 2, "the scale of --lora a: 'b' is not a number"),
        (["--lora", "a", "nan"], 2, "the scale of --lora a: 'nan' is not a number"),
        (["--lora", "a", "--lora-scales", "1"], 2, "--lora says what --lora-paths and --lora-scales say"),
        (["--lora-scales", "1"], 2, "there are 1 LoRA scales for 0 LoRAs"),
        (["--lora-style", "x"], 2, "argument --lora-style: invalid choice: 'x'"),
        (["--lora", "none.safetensors"], 1, "there is no file none.safetensors here, and LORA_LIBRARY_PATH is not set"),
        (["--lora", "org/name:a.safetensors"], 1, "org/name is not in the cache"),
        (["--lora-style", "portrait"], 1, "ali-vilab/In-Context-LoRA is not in the cache"),
    ],
)
def test_what_a_person_gets_wrong(draw, monkeypatch, words, status, message):
    monkeypatch.delenv("LORA_LIBRARY_PATH", raising=False)
    result = draw(*words)
    assert (result.status, result.out) == (status, "")
    assert len(result.errors) == 1 and result.errors[0].startswith(f"error: {message}"), result.err


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"lora_paths": "a"}, "lora_paths makes no sense, a is not a list: say --lora"),
        ({"lora_paths": [1]}, "lora_paths makes no sense, 1 is not text: say --lora"),
        ({"lora_scales": ["x"]}, "lora_scales makes no sense, 'x' is not a number: say --lora-scales"),
        ({"bake_lora": 1}, "bake_lora makes no sense, 1 is neither true nor false: say --bake-lora"),
    ],
)
def test_settings_of_another_kind(draw, in_folder, setting, told):
    (in_folder / "old.json").write_text(json.dumps(setting))
    result = draw("-C", "old.json")
    assert (result.status, result.errors) == (2, [f"error: old.json: its {told} yourself"])


def test_a_saved_model_holds_its_loras(draw, cli, in_folder, tiny_schnell):
    write(in_folder / "a.safetensors", strong(1))
    base = ("--model", tiny_schnell, "--base-model", "schnell")
    result = cli("save", *base, "--path", "saved", "--lora", "a.safetensors", 0.5)
    assert (result.status, result.out) == (0, "saved\n"), result.err
    loras = json.loads((in_folder / "saved" / "mflux_model.json").read_text())["loras"]
    assert [(lora["source"], lora["scale"], len(lora["sha256"])) for lora in loras] == [("a.safetensors", 0.5, 64)]
    draw("--lora", "a.safetensors", 0.5, "--output", "with.png")
    result = cli("generate", "--model", "saved", *BASIC, "--output", "saved.png")
    assert result.status == 0, result.err
    assert np.array_equal(pixels("saved.png"), pixels("with.png"))
    result = cli("save", *base, "--path", "other", "--lora", "a.safetensors", "--no-bake-lora")
    assert (result.status, result.errors) == (
        2, ["error: a saved model holds its LoRAs in its weights: leave --no-bake-lora out"],
    )  # fmt: skip
    assert not (in_folder / "other").exists()


def test_saved_models_with_loras_are_numbered(cli, in_folder, tiny_schnell, monkeypatch):
    write(in_folder / "a.safetensors", strong(1))
    (in_folder / "models").mkdir()
    monkeypatch.setenv("MFLUX_MODELS_DIR", str(in_folder / "models"))
    for number in ("01", "02"):
        result = cli("save", "--model", tiny_schnell, "--base-model", "schnell", "--lora", "a.safetensors")
        assert result.out == f"{in_folder}/models/tiny-schnell-mflux-bf16-lora{number}\n", result.err


def test_the_class(tiny_schnell, tmp_path):
    path = write(tmp_path / "a.safetensors", strong(1))
    flux = Flux1(model_path=str(tiny_schnell), lora_paths=[path], lora_scales=[0.5])
    assert (flux.lora_paths, flux.lora_scales) == ([str(path)], [0.5])
    with pytest.raises(UsageError, match="there are 2 LoRA scales"):
        Flux1(model_path=str(tiny_schnell), lora_paths=[path], lora_scales=[0.5, 1])
    flux = Flux1(model_path=str(tiny_schnell))
    assert (flux.lora_paths, flux.lora_scales) == (None, None)


# ---- mflux-lora-library


def test_listing_the_library(cli, shelves):
    result = cli("lora-library", "list")
    assert result.status == 0
    found = library(shelves)
    assert result.out.splitlines() == [f"{name} -> {path}" for name, path in sorted(found.items())]
    assert result.warnings == [f"warning: {shelves[0].parent}/three is not a folder"]
    result = cli("lora-library", "list", "--paths", shelves[1])
    assert [line.split()[0] for line in result.out.splitlines()] == ["a", "c", "real"]
    assert result.warnings == []


def test_a_library_that_is_not_there(cli, monkeypatch, tmp_path):
    monkeypatch.delenv("LORA_LIBRARY_PATH", raising=False)
    told = "error: LORA_LIBRARY_PATH is not set: set it to folders with LoRAs, or name some with --paths"
    result = cli("lora-library", "list")
    assert (result.status, result.errors) == (2, [told])
    result = cli("lora-library", "list", "--paths", tmp_path / "x")
    assert result.errors == ["error: none of the folders of --paths is there: check their paths"]
    result = cli("lora-library")
    assert result.status == 2 and len(result.errors) == 1


# ---- what makes numbers that are not finite, and who is blamed for it


def _huge(form: str) -> dict[str, mx.array]:
    tensors = pair()
    if form == "alpha":
        return tensors | {f"{TO_Q}.alpha": mx.array(3e38)}
    if form == "factors":
        return {name: value * 1e30 for name, value in tensors.items()}
    if form == "lokr":
        return {f"{TO_Q}.lokr_w1": mx.full((2, 2), 1e30), f"{TO_Q}.lokr_w2": mx.full((16, 16), 1e30)}
    if form == "diff":
        return {f"{TO_Q}.diff": mx.full((WIDTH, WIDTH), 3e38)}
    return tensors | {f"{TO_Q}.lora_B.bias": mx.full((WIDTH,), 3e38)}


@pytest.mark.parametrize("form", ["alpha", "factors", "lokr", "diff", "bias"])
@pytest.mark.parametrize("bake", [True, False])
def test_a_lora_beyond_numbers_is_blamed_by_its_name(match, tiny_schnell, tmp_path, form, bake):
    path = write(tmp_path / "loud.safetensors", _huge(form))
    folder = tiny_schnell / "transformer"
    with pytest.raises(CheckpointError, match=r"the LoRA .*loud\.safetensors at the scale 4 .*lower its scale"):
        match(path, 4.0).apply(
            "transformer", lambda adjust: load_component(FluxTransformer, folder, adjust=adjust), bake=bake
        )


def test_what_was_not_finite_before_is_not_the_lora_s(match, tiny_schnell, tmp_path):
    weight = mx.array([[float("nan"), 1.0]])
    adapter = Adapter(1.0, 1.0, lambda: (LowRank(mx.ones((1, 2)), mx.ones((1, 1))), None))
    assert merged(weight, [adapter]).shape == weight.shape


@pytest.mark.parametrize("ending", ["lora_A.weight", "lora_B.weight"])
def test_complex_numbers(match, tmp_path, ending):
    tensors = pair()
    tensors[f"{TO_Q}.{ending}"] = tensors[f"{TO_Q}.{ending}"].astype(mx.complex64)
    assert "holds complex numbers" in refused(match, tmp_path, tensors)


@pytest.mark.parametrize("side", ["w1", "w2"])
def test_a_factor_in_full_and_by_factors(match, tmp_path, side):
    sizes = {"w1": 2, "w2": 16}
    tensors = {f"{TO_Q}.lokr_{name}": noise(1, size, size) for name, size in sizes.items()}
    tensors |= {
        f"{TO_Q}.lokr_{side}_a": noise(2, sizes[side], 1),
        f"{TO_Q}.lokr_{side}_b": noise(3, 1, sizes[side]),
    }
    assert f"twice: as {TO_Q}.lokr_{side} and as {TO_Q}.lokr_{side}_a" in refused(match, tmp_path, tensors)


@pytest.mark.parametrize(
    "prefix",
    ["unet.", "model.", "net.", "pipe.dit.", "module.", "_orig_mod.", "base_model.model.diffusion_model.",
     "model.transformer.", "transformer.module.", "lora_dit_"],
)  # fmt: skip
def test_more_that_may_stand_before_a_name(skeletons, prefix):
    names = spelled(LORA.spellings, {part: linear_layers(module) for part, module in skeletons.items()})
    layer = "transformer_blocks.0.attn.to_q"
    written = layer.replace(".", "_") if prefix.endswith("dit_") else layer
    assert names[prefix + written].parts == ((layer, None),)
