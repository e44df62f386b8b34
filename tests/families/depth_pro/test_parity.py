"""Depth Pro against transformers, from both published layouts, and both layouts' names at full size."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.gpu import both_ways
from support.reference import COMPONENT, draw, relative_error
from torch.nn import functional
from transformers import DepthProConfig as ReferenceConfig
from transformers import DepthProForDepthEstimation as Reference
from transformers.core_model_loading import revert_weight_conversion

from mflux.backend import mx, tree_flatten
from mflux.checkpoints.loading import layout_turns
from mflux.checkpoints.renamed import renamed
from mflux.cli import convert
from mflux.errors import CheckpointError
from mflux.models.common.controls.depth_pro import weights
from mflux.models.common.controls.depth_pro.depth_pro import DepthPro
from mflux.models.common.controls.depth_pro.network import DepthProConfig, DepthProForDepthEstimation, resize_bilinear


def vit(hidden_size: int, heads: int, layers: int, image_size: int, patch_size: int, mlp_ratio: int) -> dict:
    return {
        "model_type": "dinov2", "hidden_size": hidden_size, "num_attention_heads": heads, "num_hidden_layers": layers,
        "image_size": image_size, "patch_size": patch_size, "mlp_ratio": mlp_ratio, "use_mask_token": False,
    }  # fmt: skip


# As published but small: three scales, two hooks. The three encoders differ in every size that may differ.
SMALL = {
    "patch_size": 32, "fusion_hidden_size": 32, "intermediate_hook_ids": [2, 0], "intermediate_feature_dims": [32, 32],
    "scaled_images_feature_dims": [24, 20, 12], "use_fov_model": True,
    "patch_model_config": vit(24, 2, 3, 32, 4, 3), "image_model_config": vit(32, 4, 2, 32, 8, 2),
    "fov_model_config": vit(16, 2, 2, 32, 8, 4),
}  # fmt: skip
# Grids of seven, which no merging or halving divides; another depth, other widths, a wider overlap to drop.
ODD = {
    "patch_size": 28, "fusion_hidden_size": 12, "intermediate_hook_ids": [1, 0], "intermediate_feature_dims": [20, 12],
    "scaled_images_feature_dims": [16, 28, 8], "merge_padding_value": 1, "num_fov_head_layers": 1,
    "use_fov_model": True,
    "patch_model_config": vit(20, 5, 2, 28, 4, 2), "image_model_config": vit(18, 3, 1, 28, 4, 2),
    "fov_model_config": vit(12, 2, 3, 28, 4, 3),
}  # fmt: skip
# What no published file has, but a configuration may ask for: two scales, one hook of another width.
TWO_SCALES = {
    "patch_size": 28, "fusion_hidden_size": 12, "intermediate_hook_ids": [2], "intermediate_feature_dims": [20],
    "scaled_images_ratios": [0.5, 1], "scaled_images_overlap_ratios": [0.0, 0.25],
    "scaled_images_feature_dims": [24, 20], "use_bias_in_fusion_residual": False, "use_fov_model": True,
    "patch_model_config": vit(24, 2, 3, 28, 4, 3), "image_model_config": vit(32, 4, 3, 28, 4, 2),
    "fov_model_config": vit(16, 2, 2, 28, 4, 2),
}  # fmt: skip
# The values of apple/DepthPro-hf.
VIT_L = {**vit(1024, 16, 24, 384, 16, 4), "layer_norm_eps": 1e-6}
PUBLISHED = {
    "patch_size": 384, "fusion_hidden_size": 256, "intermediate_hook_ids": [11, 5], "merge_padding_value": 3,
    "intermediate_feature_dims": [256, 256], "scaled_images_ratios": [0.25, 0.5, 1], "num_fov_head_layers": 2,
    "scaled_images_overlap_ratios": [0.0, 0.5, 0.25], "scaled_images_feature_dims": [1024, 1024, 512],
    "use_batch_norm_in_fusion_residual": False, "use_bias_in_fusion_residual": True, "use_fov_model": True,
    "patch_model_config": VIT_L, "image_model_config": VIT_L, "fov_model_config": VIT_L,
}  # fmt: skip
PARAMETERS = 951_991_330
CONFIGS = {"small": SMALL, "odd": ODD, "two-scales": TWO_SCALES}


def build(config: dict, seed: int) -> Reference:
    """The reference with every tensor drawn at random."""
    gains = {"cls_token": 4, "position_embeddings": 8}
    model = draw(Reference(ReferenceConfig(**json.loads(json.dumps(config)))), seed, gains)
    # Of few channels none may be left after the last ReLU, and the angle would be the last bias alone. And it is one
    # number: if its terms cancelled, their rounding would be what is left.
    *layers, last = model.fov_model.head.layers[::2]
    for layer in layers:
        layer.bias += 0.7
    last.weight.abs_()
    last.bias.fill_(3)
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def reference(request, tmp_path_factory) -> tuple[Reference, Path]:
    model = build(CONFIGS[request.param], seed=len(request.param))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


def compare(model: Reference, path: Path, side: int, batch: int) -> None:
    generator = torch.Generator().manual_seed(side)
    pixels = torch.randn(batch, 3, side, side, generator=generator)
    with torch.no_grad():
        expected = model(pixels)
    network, _ = weights.load(path)
    depth, degrees = network(mx.array(pixels.permute(0, 2, 3, 1).numpy()))
    assert (expected.predicted_depth == 0).any() and (expected.predicted_depth > 0).any()
    assert relative_error(depth, expected.predicted_depth) <= COMPONENT
    assert ((expected.field_of_view - 3).abs() > 0.1).all()
    assert relative_error(degrees, expected.field_of_view) <= COMPONENT


@both_ways
@pytest.mark.parametrize("batch", [1, 3])
def test_transformers_layout(reference, batch):
    model, folder = reference
    config = DepthProConfig.from_dict(json.loads((folder / "config.json").read_text()))
    compare(model, folder, config.image_size, batch)


def test_pictures_larger_than_needed(reference):
    # Not much larger: with more windows the reference takes some of the smaller copies for the largest one's.
    model, folder = reference
    config = DepthProConfig.from_dict(json.loads((folder / "config.json").read_text()))
    compare(model, folder, config.image_size + 9, 1)


# ---- Apple's layout


def apple_layout(config: dict):
    """Apple's tensors from the structure of its published source: name, shape, and where transformers has the values.

    Levels count from fine to coarse: two taps of the patch encoder, then the pyramid's three scales.
    """
    fusion, scales = config["fusion_hidden_size"], len(config["scaled_images_feature_dims"])
    low, mid, high = config["scaled_images_feature_dims"]
    late, early = config["intermediate_feature_dims"]
    assert early == fusion, "Apple projects the finest level inside its encoder"

    def leaves(name, weight, source, bias=True):
        yield f"{name}.weight", weight, (f"{source}.weight",)
        if bias:
            yield f"{name}.bias", weight[:1], (f"{source}.bias",)

    def timm(name, source, vit):
        width, patch, inner = vit["hidden_size"], vit["patch_size"], vit["hidden_size"] * vit["mlp_ratio"]
        tokens = (vit["image_size"] // patch) ** 2 + 1
        yield f"{name}.cls_token", (1, 1, width), (f"{source}.embeddings.cls_token",)
        yield f"{name}.pos_embed", (1, tokens, width), (f"{source}.embeddings.position_embeddings",)
        projection = f"{source}.embeddings.patch_embeddings.projection"
        yield from leaves(f"{name}.patch_embed.proj", (width, 3, patch, patch), projection)
        for i in range(vit["num_hidden_layers"]):
            block, layer = f"{name}.blocks.{i}", f"{source}.encoder.layer.{i}"
            for leaf, shape in (("weight", (3 * width, width)), ("bias", (3 * width,))):
                parts = tuple(f"{layer}.attention.attention.{part}.{leaf}" for part in ("query", "key", "value"))
                yield f"{block}.attn.qkv.{leaf}", shape, parts
            yield from leaves(f"{block}.attn.proj", (width, width), f"{layer}.attention.output.dense")
            yield from leaves(f"{block}.mlp.fc1", (inner, width), f"{layer}.mlp.fc1")
            yield from leaves(f"{block}.mlp.fc2", (width, inner), f"{layer}.mlp.fc2")
            for j in (1, 2):
                yield from leaves(f"{block}.norm{j}", (width,), f"{layer}.norm{j}")
                yield f"{block}.ls{j}.gamma", (width,), (f"{layer}.layer_scale{j}.lambda1",)
        yield from leaves(f"{name}.norm", (width,), f"{source}.layernorm")

    def upsample(name, source, before, between, after, doublings):
        """A 1×1 projection, then transposed convolutions, none with a bias."""
        yield from leaves(f"{name}.0", (between, before, 1, 1), f"{source}.layers.0", bias=False)
        for i in range(doublings):
            shape = (between if i == 0 else after, after, 2, 2)
            yield from leaves(f"{name}.{i + 1}", shape, f"{source}.layers.{i + 1}", bias=False)

    patch, image = config["patch_model_config"], config["image_model_config"]
    yield from timm("encoder.patch_encoder", "depth_pro.encoder.patch_encoder.model", patch)
    yield from timm("encoder.image_encoder", "depth_pro.encoder.image_encoder.model", image)
    neck = "depth_pro.neck.feature_upsample"
    width = patch["hidden_size"]
    yield from upsample("encoder.upsample_latent0", f"{neck}.intermediate.1", width, early, early, 3)
    # Here Apple's block projects to its own output, transformers' to the fusion's width: the same as published.
    yield from upsample("encoder.upsample_latent1", f"{neck}.intermediate.0", width, fusion, late, 2)
    for level, dims in enumerate((high, mid, low)):
        source = f"{neck}.scaled_images.{scales - 1 - level}"
        yield from upsample(f"encoder.upsample{level}", source, width, dims, dims, 1)
    # A transposed convolution's kernel is (in, out, 2, 2); its bias has the output's width.
    yield "encoder.upsample_lowres.weight", (image["hidden_size"], low, 2, 2), (f"{neck}.image_block.layers.0.weight",)
    yield "encoder.upsample_lowres.bias", (low,), (f"{neck}.image_block.layers.0.bias",)
    yield from leaves("encoder.fuse_lowres", (low, 2 * low, 1, 1), "depth_pro.neck.fuse_image_with_low_res")

    for level, dims in enumerate((late, high, mid, low), start=1):
        source = f"depth_pro.neck.feature_projection.projections.{4 - level}"
        yield from leaves(f"decoder.convs.{level}", (fusion, dims, 3, 3), source, bias=False)
    for level in range(5):
        block = f"decoder.fusions.{level}"
        source = "fusion_stage.final" if level == 0 else f"fusion_stage.intermediate.{4 - level}"
        for i in (1, 2):
            for j, index in ((1, 1), (2, 3)):
                kernel = (fusion, fusion, 3, 3)
                yield from leaves(
                    f"{block}.resnet{i}.residual.{index}", kernel, f"{source}.residual_layer{i}.convolution{j}"
                )
        if level > 0:
            yield from leaves(f"{block}.deconv", (fusion, fusion, 2, 2), f"{source}.deconv", bias=False)
        yield from leaves(f"{block}.out_conv", (fusion, fusion, 1, 1), f"{source}.projection")

    half = fusion // 2
    yield from leaves("head.0", (half, fusion, 3, 3), "head.layers.0")
    yield from leaves("head.1", (half, half, 2, 2), "head.layers.1")
    yield from leaves("head.2", (32, half, 3, 3), "head.layers.2")
    yield from leaves("head.4", (1, 32, 1, 1), "head.layers.4")

    fov = config["fov_model_config"]
    yield from timm("fov.encoder.0", "fov_model.fov_encoder.model", fov)
    yield from leaves("fov.encoder.1", (half, fov["hidden_size"]), "fov_model.fov_encoder.neck")
    yield from leaves("fov.downsample.0", (half, fusion, 3, 3), "fov_model.conv")
    halvings = config.get("num_fov_head_layers", 2)
    for i in range(halvings):
        before, after = math.ceil(fusion / 2 ** (i + 1)), math.ceil(fusion / 2 ** (i + 2))
        yield from leaves(f"fov.head.{2 * i}", (after, before, 3, 3), f"fov_model.head.layers.{2 * i}")
    kernel = int((image["image_size"] // image["patch_size"] - 1) / 2**halvings + 1)
    last = (1, math.ceil(fusion / 2 ** (halvings + 1)), kernel, kernel)
    yield from leaves(f"fov.head.{2 * halvings}", last, f"fov_model.head.layers.{2 * halvings}")


def apple_state(folder: Path, config: dict) -> dict[str, torch.Tensor]:
    published = load_file(folder / "model.safetensors")
    state = {name: torch.cat([published.pop(part) for part in parts]) for name, _, parts in apple_layout(config)}
    assert not published
    for name, shape, _ in apple_layout(config):
        assert tuple(state[name].shape) == tuple(shape), name
    return state


@pytest.fixture(scope="module", params=["small", "odd"])
def apple(request, tmp_path_factory):
    model = build(CONFIGS[request.param], seed=7)
    folder = tmp_path_factory.mktemp("apple-" + request.param)
    model.save_pretrained(folder)
    return model, folder, apple_state(folder, CONFIGS[request.param])


def beside(folder: Path, place: Path) -> Path:
    """A folder for a file of Apple's, with the configuration of the small model beside it."""
    place.mkdir()
    (place / "config.json").write_bytes((folder / "config.json").read_bytes())
    return place


def image_size(folder: Path) -> int:
    return DepthProConfig.from_dict(json.loads((folder / "config.json").read_text())).image_size


def test_apple_layout_as_safetensors(apple, tmp_path):
    model, folder, state = apple
    path = beside(folder, tmp_path / "apple") / "depth_pro.safetensors"
    save_file(state, path)
    compare(model, path, image_size(folder), 1)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_apple_layout_as_published(apple, tmp_path, zipped):
    model, folder, state = apple
    path = beside(folder, tmp_path / "apple") / "depth_pro.pt"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    compare(model, path, image_size(folder), 2)
    # The folder alone says it too.
    compare(model, path.parent, image_size(folder), 1)


def test_apple_layout_through_mflux_convert(apple, tmp_path):
    model, folder, state = apple
    place = beside(folder, tmp_path / "apple")
    torch.save(state, tmp_path / "depth_pro.pt")
    assert convert.main([str(tmp_path / "depth_pro.pt"), str(place / "depth_pro.safetensors")]) == 0
    compare(model, place / "depth_pro.safetensors", image_size(folder), 1)


def test_half_precision_file_is_computed_in_float32_on_the_cpu(apple, tmp_path):
    _, folder, state = apple
    path = beside(folder, tmp_path / "apple") / "depth_pro.pt"
    torch.save({name: value.half() for name, value in state.items()}, path)
    rounded = build(SMALL if image_size(folder) == 128 else ODD, seed=7)
    with torch.no_grad():
        for value in rounded.parameters():
            value.copy_(value.half().float())
    compare(rounded, path, image_size(folder), 1)


def test_apple_file_that_does_not_fit_names_apples_tensors(apple, tmp_path):
    _, folder, state = apple
    path = beside(folder, tmp_path / "apple") / "depth_pro.pt"
    torch.save({**state, "encoder.surplus.weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=r"encoder\.surplus\.weight"):
        weights.load(path)
    state = dict(state)
    name = "encoder.patch_encoder.blocks.1.attn.qkv.weight"
    torch.save({**state, name: state[name][:-1]}, path)
    with pytest.raises(CheckpointError, match=r"blocks\.1\.attn\.qkv\.weight"):
        weights.load(path)
    del state["fov.head.0.weight"]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"1 tensor missing"):
        weights.load(path)


# ---- the whole way from a photo to metres


@both_ways
@pytest.mark.parametrize("size", [(97, 150), (310, 203)], ids=["enlarged", "shrunk"])
def test_photo_to_metres(reference, tmp_path, size):
    model, folder = reference
    generator = np.random.default_rng(sum(size))
    photo = generator.integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")

    # Metres are inverses: next to zero they would magnify rounding, so here all depths are well above it; and the
    # angle is one that a camera may have.
    biases = model.head.layers[4].bias, model.fov_model.head.layers[-1].bias
    with torch.no_grad():
        before = [bias.clone() for bias in biases]
        for bias, shifted in zip(biases, (25, 55), strict=True):
            bias.fill_(shifted)
        pixels = (torch.from_numpy(photo).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5
        side = image_size(folder)
        pixels = functional.interpolate(
            pixels, size=(side, side), mode="bilinear", align_corners=False, antialias=False
        )
        expected = model(pixels)
        # As transformers' image processor turns them into metres.
        focal = 0.5 * size[1] / torch.tan(0.5 * torch.deg2rad(expected.field_of_view[0]))
        inverse = functional.interpolate(
            expected.predicted_depth[None] * size[1] / focal, size=size, mode="bilinear", align_corners=False
        )
        metres = 1 / torch.clamp(inverse[0, 0], min=1e-4, max=1e4)
        place = tmp_path / "model"
        model.save_pretrained(place)
        for bias, original in zip(biases, before, strict=True):
            bias.copy_(original)
    assert (expected.predicted_depth > 5).all()

    result = DepthPro(model_path=place).create_depth_map(tmp_path / "photo.png")
    assert relative_error(result.depth_array[:, 0], expected.predicted_depth) <= COMPONENT
    assert result.focal_length_px == pytest.approx(focal.item(), rel=1e-6)
    assert relative_error(result.metric_depth, metres) <= COMPONENT
    assert result.depth_image.size == (size[1], size[0])
    spread = (expected.predicted_depth[0] - expected.predicted_depth.min()) / np.ptp(expected.predicted_depth.numpy())
    # mflux rounds before it resizes, this after: a level or so apart.
    shades = Image.fromarray((spread.numpy() * 255).astype(np.uint8)).resize((size[1], size[0]))
    assert np.abs(np.asarray(shades).astype(int) - np.asarray(result.depth_image).astype(int)).max() <= 2


@pytest.mark.parametrize(("height", "width", "new"), [(37, 53, (96, 96)), (211, 4032, (96, 96)), (5, 7, (1, 20))])
def test_bilinear_resizing_is_torchs(height, width, new):
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(height))
    expected = functional.interpolate(x, size=new, mode="bilinear", align_corners=False)
    got = resize_bilinear(mx.array(x.permute(0, 2, 3, 1).numpy()), new)
    assert relative_error(np.array(got).transpose(0, 3, 1, 2), expected) <= COMPONENT
    # With a factor torch rounds the size down but steps by the factor.
    expected = functional.interpolate(x, scale_factor=0.3, mode="bilinear", align_corners=False)
    got = resize_bilinear(mx.array(x.permute(0, 2, 3, 1).numpy()), tuple(expected.shape[2:]), ratio=0.3)
    assert relative_error(np.array(got).transpose(0, 3, 1, 2), expected) <= COMPONENT


# ---- names and shapes at full size


def laid_out_as_mlx(tensors) -> dict[str, tuple[int, ...]]:
    """Shapes of arrays with our names once `fill` has turned them; zeros that nothing evaluates take no memory."""
    turns = layout_turns(published_network())
    return {name: tuple(turns.get(name, lambda kernel: kernel)(value).shape) for name, value in tensors.items()}


@cache
def published_network() -> DepthProForDepthEstimation:
    return DepthProForDepthEstimation(DepthProConfig())


def our_shapes() -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tree_flatten(published_network().parameters())}


def test_our_defaults_are_the_published_configuration():
    assert DepthProConfig.from_dict(PUBLISHED) == DepthProConfig()
    assert sum(math.prod(shape) for shape in our_shapes().values()) == PARAMETERS


def test_full_size_transformers_layout():
    with torch.device("meta"):
        model = Reference(ReferenceConfig(**json.loads(json.dumps(PUBLISHED))))
    assert sum(value.numel() for value in model.parameters()) == PARAMETERS
    # Published files carry the names from before transformers renamed DINOv2's attention.
    published = revert_weight_conversion(model, model.state_dict())
    assert "fov_model.fov_encoder.model.encoder.layer.23.attention.attention.query.weight" in published
    assert laid_out_as_mlx({name: mx.zeros(tuple(value.shape)) for name, value in published.items()}) == our_shapes()


def test_full_size_apple_layout():
    theirs = {name: mx.zeros(shape) for name, shape, _ in apple_layout(PUBLISHED)}
    assert sum(value.size for value in theirs.values()) == PARAMETERS
    assert theirs["encoder.patch_encoder.blocks.23.attn.qkv.weight"].shape == (3072, 1024)
    assert theirs["fov.head.4.weight"].shape == (1, 32, 6, 6)
    assert laid_out_as_mlx(dict(renamed(theirs, weights.places, source="depth_pro.pt"))) == our_shapes()
    # Each of our names comes from the tensor that the structure says.
    for name, _, parts in apple_layout(PUBLISHED):
        assert weights.translate(name) == parts
