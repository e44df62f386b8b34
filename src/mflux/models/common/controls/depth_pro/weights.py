"""Where Depth Pro's weights come from, and what Apple's file calls them.

Two layouts are published: `DepthPro-hf`, whose names the network's attributes carry, and Apple's `depth_pro.pt`, whose
names are translated by the tables below. Apple's file has no configuration: it is the published one, unless a
config.json of Depth Pro lies beside the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mflux.backend import mx
from mflux.checkpoints.folders import SUFFIXES, read_json
from mflux.checkpoints.loading import build, fill, fit
from mflux.checkpoints.quantization import Quantization
from mflux.checkpoints.readers.opening import open_checkpoint
from mflux.checkpoints.renamed import Place, parts, renamed
from mflux.errors import CheckpointError
from mflux.hub import resolve_model
from mflux.models.common.component_config import ComponentConfig
from mflux.models.common.controls.depth_pro.download import fetch_archive
from mflux.models.common.controls.depth_pro.network import DepthProConfig, DepthProForDepthEstimation
from mflux.utils.paths import cache_folder, is_file, is_there, user_path

APPLE_URL = "https://ml-site.cdn-apple.com/models/depth-pro/depth_pro.pt"
# What to fetch of a repository in the layout of DepthPro-hf, and what it must have.
_PATTERNS = ("config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json")
_REQUIRED = ("config.json", "*.safetensors")

# The beginnings of Apple's names, and what stands there in ours. Apple counts levels from fine to coarse.
_PLACES = {
    "encoder.patch_encoder.": "depth_pro.encoder.patch_encoder.model.",
    "encoder.image_encoder.": "depth_pro.encoder.image_encoder.model.",
    "encoder.upsample_latent0.": "depth_pro.neck.feature_upsample.intermediate.1.layers.",
    "encoder.upsample_latent1.": "depth_pro.neck.feature_upsample.intermediate.0.layers.",
    "encoder.upsample0.": "depth_pro.neck.feature_upsample.scaled_images.2.layers.",
    "encoder.upsample1.": "depth_pro.neck.feature_upsample.scaled_images.1.layers.",
    "encoder.upsample2.": "depth_pro.neck.feature_upsample.scaled_images.0.layers.",
    "encoder.upsample_lowres.": "depth_pro.neck.feature_upsample.image_block.layers.0.",
    "encoder.fuse_lowres.": "depth_pro.neck.fuse_image_with_low_res.",
    "decoder.convs.4.": "depth_pro.neck.feature_projection.projections.0.",
    "decoder.convs.3.": "depth_pro.neck.feature_projection.projections.1.",
    "decoder.convs.2.": "depth_pro.neck.feature_projection.projections.2.",
    "decoder.convs.1.": "depth_pro.neck.feature_projection.projections.3.",
    "decoder.fusions.4.": "fusion_stage.intermediate.0.",
    "decoder.fusions.3.": "fusion_stage.intermediate.1.",
    "decoder.fusions.2.": "fusion_stage.intermediate.2.",
    "decoder.fusions.1.": "fusion_stage.intermediate.3.",
    "decoder.fusions.0.": "fusion_stage.final.",
    "head.": "head.layers.",
    "fov.encoder.0.": "fov_model.fov_encoder.model.",
    "fov.encoder.1.": "fov_model.fov_encoder.neck.",
    "fov.downsample.0.": "fov_model.conv.",
    "fov.head.": "fov_model.head.layers.",
}

# What follows, as patterns: timm's vision transformer in the three encoders, then the fusion's blocks.
_ENDINGS = (
    (r"^cls_token$", r"embeddings.cls_token"),
    (r"^pos_embed$", r"embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", r"embeddings.patch_embeddings.projection."),
    (r"^blocks\.", r"encoder.layer."),
    (r"\.attn\.proj\.", r".attention.output.dense."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
    (r"^norm\.", r"layernorm."),
    (r"^resnet([12])\.residual\.1\.", r"residual_layer\1.convolution1."),
    (r"^resnet([12])\.residual\.3\.", r"residual_layer\1.convolution2."),
    (r"^out_conv\.", r"projection."),
)

# One tensor of Apple's holds the three projections of an attention layer, one after the other along its first axis.
_FUSED = ".attn.qkv."
_PARTS = (".attention.attention.query.", ".attention.attention.key.", ".attention.attention.value.")


def translate(name: str) -> tuple[str, ...]:
    """Our name for one of Apple's tensors, our three where it holds three, or the name as it is where it is unknown."""
    for place, ours in _PLACES.items():
        if name.startswith(place):
            rest = name.removeprefix(place)
            for pattern, replacement in _ENDINGS:
                rest = re.sub(pattern, replacement, rest)
            return tuple(ours + rest.replace(_FUSED, part) for part in _PARTS) if _FUSED in rest else (ours + rest,)
    return (name,)


def places(names: Iterable[str]) -> dict[str, Place]:
    """Where our tensors stand in a file with Apple's names."""
    return {ours: place for name in names for ours, place in parts(name, translate(name)).items()}


@dataclass(frozen=True)
class Preprocessing(ComponentConfig):
    """How a photo becomes the network's input, as preprocessor_config.json says it."""

    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255
    size: Mapping[str, int] | None = None
    resample: int = 2
    antialias: bool = False

    def check(self) -> str | None:
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or 0 in self.image_std:
            return "image_mean and image_std must hold three numbers, and image_std no zero"
        if self.size is not None and self.size["height"] != self.size["width"]:
            return "Depth Pro works on square pictures, so the size's height and width must be equal"
        if self.resample != 2 or self.antialias:
            return "only bilinear resizing without antialiasing is built"
        return None

    def side(self, config: DepthProConfig) -> int:
        """The side in pixels of the picture that the network gets."""
        return self.size["height"] if self.size else config.image_size


def locate(model_path: str | Path | None = None) -> Path:
    """The file or folder that holds the weights, fetched if need be.

    Args:
        model_path: a file of either layout, a folder, a Hugging Face repository, or None for Apple's published file,
            which is kept in `cache_folder()`.

    Raises:
        CheckpointError: the path does not exist.
        DownloadError: the weights cannot be fetched.
    """
    if model_path is None:
        remedy = "fetch that file by other means and name it with --model (in Python: model_path)"
        return fetch_archive(APPLE_URL, cache_folder() / "depth_pro" / Path(APPLE_URL).name, remedy=remedy)
    path = user_path(model_path)
    if is_file(path):
        return path
    if path.suffix in SUFFIXES and not is_there(path):
        raise CheckpointError(f"there is no file {path}: check the path, or leave it out for Apple's published weights")
    return resolve_model(model_path, _PATTERNS, required=_REQUIRED)


def load(path: Path, quantize: int | None = None) -> tuple[DepthProForDepthEstimation, Preprocessing]:
    """The network with its weights, from a file or folder of either layout, quantized (by mflux) or not.

    Args:
        path: the file or folder.
        quantize: bits for the weights of linear layers, quantized one by one while they are read.

    Raises:
        CheckpointError: a file is damaged, is not Depth Pro, or does not fit its configuration.
        UsageError: no such number of bits.
    """
    wanted = Quantization.asked(quantize)
    network, tensors, preprocessing = _opened(path)
    fill(network, tensors, source=path, quantization=wanted)
    return network, preprocessing


def check(path: Path) -> bool:
    """Whether a file or folder is Depth Pro; its numbers are not read.

    Raises:
        CheckpointError: it is, and something is wrong with it.
    """
    try:
        is_it = (
            read_json(path / "config.json").get("model_type") == "depth_pro"
            if path.is_dir()
            else any(
                name.startswith(("encoder.patch_encoder.", "depth_pro.encoder.")) for name in open_checkpoint(path)
            )
        )
    except CheckpointError:
        # What is damaged is told by whoever looks at files alone.
        return False
    if not is_it:
        return False
    network, tensors, _ = _opened(path)
    fit(network, tensors, source=path)
    return True


def _opened(path: Path) -> tuple[DepthProForDepthEstimation, Mapping[str, mx.array], Preprocessing]:
    """The network without its weights, these by its names, and the settings beside them."""
    config, preprocessing = _settings(path if path.is_dir() else path.parent)
    tensors: Mapping[str, mx.array] = open_checkpoint(path)
    if any(name.startswith("encoder.patch_encoder.") for name in tensors):
        tensors = renamed(tensors, places, source=path)
    elif not any(name.startswith("depth_pro.encoder.") for name in tensors):
        raise CheckpointError(
            f"{path} does not hold Depth Pro: give Apple's depth_pro.pt or a copy of apple/DepthPro-hf, or leave it out"
        )
    return build(DepthProForDepthEstimation, config, tensors, source=path), tensors, preprocessing


def _settings(folder: Path) -> tuple[DepthProConfig, Preprocessing]:
    """The settings beside the weights; the published ones where there are none of Depth Pro's."""
    config, preprocessor = folder / "config.json", folder / "preprocessor_config.json"
    values = read_json(config) if config.is_file() else {}
    if values.get("model_type") != "depth_pro":
        return DepthProConfig(), Preprocessing()
    preprocessing: dict[str, Any] = read_json(preprocessor) if preprocessor.is_file() else {}
    return (
        DepthProConfig.from_dict(values, source=config),
        Preprocessing.from_dict(preprocessing, source=preprocessor),
    )
