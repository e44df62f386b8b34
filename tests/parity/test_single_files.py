"""Names in single files at full size, beside those that diffusers makes of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import gguf
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_ldm_vae_checkpoint,
    convert_wan_vae_to_diffusers,
)
from families.flux.test_other_files import authors_autoencoder
from families.flux.test_single_file import original

from mflux.backend import mx
from mflux.models.flux.layouts import LAYOUT as FLUX
from mflux.models.flux2.layouts import LAYOUT as FLUX2
from mflux.models.krea2.layouts import LAYOUT as KREA2
from mflux.models.qwen.layouts import LAYOUT as QWEN
from mflux.models.z_image.layouts import LAYOUT as Z_IMAGE

CONFIGS = json.loads((Path(__file__).parents[1] / "data/surface/configs.json").read_text())


def shapes_of(reference: type, entry: str) -> dict[str, tuple[int, ...]]:
    config = {name: value for name, value in CONFIGS[entry].items() if not name.startswith("_")}
    with torch.device("meta"):
        module = reference.from_config(config)
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def arrays(shapes: dict[str, tuple[int, ...]]) -> dict[str, mx.array]:
    """None of them is computed."""
    return {name: mx.zeros(shape) for name, shape in shapes.items()}


def on_meta(tensors: dict[str, mx.array]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(value.shape, device="meta") for name, value in tensors.items()}


@pytest.mark.parametrize(("entry", "count"), [("FLUX.1-dev/transformer", 780), ("FLUX.1-schnell/transformer", 776)])
def test_the_transformer(entry, count):
    published = shapes_of(FluxTransformer2DModel, entry)
    theirs = original(arrays(published), "model.diffusion_model.")
    assert len(theirs) == count
    converted = convert_flux_transformer_checkpoint_to_diffusers(on_meta(theirs))
    assert {name: tuple(value.shape) for name, value in converted.items()} == published
    ours = FLUX.renamed("transformer", FLUX.chosen("transformer", theirs), "")
    assert {name: ours.spec(name).shape for name in ours} == published
    told = FLUX.settings_in("transformer", theirs)
    wanted = CONFIGS[entry]
    assert {name: value for name, value in told.items() if value != wanted.get(name, value)} == {}


def test_the_autoencoder():
    published = shapes_of(AutoencoderKL, "FLUX.1/vae")
    theirs = authors_autoencoder(arrays(published))
    config = {name: value for name, value in CONFIGS["FLUX.1/vae"].items() if not name.startswith("_")}
    converted = convert_ldm_vae_checkpoint(on_meta(theirs), config)
    assert {name: tuple(value.shape) for name, value in converted.items()} == published
    ours = FLUX.renamed("vae", FLUX.chosen("vae", theirs), "")
    assert {name: ours.spec(name).shape for name in ours} == published


_RESIDUAL = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
_WAN = (
    (r"^quant_conv\.", "conv1."), (r"^post_quant_conv\.", "conv2."), (r"coder\.conv_in\.", "coder.conv1."),
    (r"\.norm_out\.", ".head.0."), (r"\.conv_out\.", ".head.2."), (r"^encoder\.down_blocks\.", "encoder.downsamples."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."), (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."), (r"\.conv_shortcut\.", ".shortcut."),
)  # fmt: skip


def wan(name: str) -> str:
    """A published name as Wan's authors have it."""
    for ours, theirs in _RESIDUAL.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    for pattern, new in _WAN:
        name = re.sub(pattern, new, name)
    found = re.match(r"decoder\.up_blocks\.(\d)\.(resnets\.(\d)|upsamplers\.0)\.(.*)", name)
    return name if found is None else f"decoder.upsamples.{4 * int(found[1]) + int(found[3] or 3)}.{found[4]}"


def test_the_autoencoder_of_qwen_image():
    published = shapes_of(AutoencoderKLQwenImage, "Qwen-Image/vae")
    theirs = arrays({wan(name): shape for name, shape in published.items()})
    converted = convert_wan_vae_to_diffusers(on_meta(theirs))
    assert {name: tuple(value.shape) for name, value in converted.items()} == published
    ours = QWEN.renamed("vae", QWEN.chosen("vae", theirs), "")
    assert {name: ours.spec(name).shape for name in ours} == published


def llama_names(arch: gguf.MODEL_ARCH, published: list[str]) -> dict[str, str]:
    """Published names → llama.cpp's, by the package gguf's own table."""
    table = gguf.get_tensor_name_map(arch, 64)
    found = {}
    for name in published:
        stem, _, leaf = name.rpartition(".")
        told = table.get_name(stem)
        assert told is not None, name
        found[name] = f"{told}.{leaf}"
    return found


T5 = [
    "shared.weight", "encoder.final_layer_norm.weight",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    *(f"encoder.block.23.layer.0.SelfAttention.{part}.weight" for part in "qkvo"),
    "encoder.block.23.layer.0.layer_norm.weight", "encoder.block.23.layer.1.layer_norm.weight",
    *(f"encoder.block.23.layer.1.DenseReluDense.{part}.weight" for part in ("wi_0", "wi_1", "wo")),
]  # fmt: skip
_LAYER = "model.layers.35"
QWEN2 = [
    "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
    *(f"{_LAYER}.self_attn.{part}_proj.{leaf}" for part in "qkv" for leaf in ("weight", "bias")),
    f"{_LAYER}.self_attn.o_proj.weight", f"{_LAYER}.input_layernorm.weight",
    f"{_LAYER}.post_attention_layernorm.weight",
    *(f"{_LAYER}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
]  # fmt: skip
QWEN3 = [name for name in QWEN2 if not name.endswith("bias")]
QWEN3 += [f"{_LAYER}.self_attn.{part}_norm.weight" for part in "qk"]
QWEN3_VL = [name.replace("model.", "language_model.", 1) for name in QWEN3 if name != "lm_head.weight"]


@pytest.mark.parametrize(
    ("arch", "published", "layout", "part"),
    [
        (gguf.MODEL_ARCH.T5ENCODER, T5, FLUX, "text_encoder_2"),
        (gguf.MODEL_ARCH.QWEN2VL, QWEN2, QWEN, "text_encoder"),
        (gguf.MODEL_ARCH.QWEN3, QWEN3, FLUX2, "text_encoder"),
        (gguf.MODEL_ARCH.QWEN3, QWEN3, Z_IMAGE, "text_encoder"),
        (gguf.MODEL_ARCH.QWEN3VL, QWEN3_VL, KREA2, "text_encoder"),
    ],
    ids=["T5", "Qwen2.5-VL", "Qwen3 of FLUX.2", "Qwen3 of Z-Image", "Qwen3-VL of Krea 2"],
)
def test_text_encoders_in_gguf(arch, published, layout, part):
    plain = [name.replace("language_model.", "model.") for name in published]
    theirs = dict(zip(published, llama_names(arch, plain).values(), strict=True))
    assert len(set(theirs.values())) == len(published)
    places = layout.files[part](list(theirs.values()))
    assert {ours: place.name for ours, place in places.items()} == theirs
