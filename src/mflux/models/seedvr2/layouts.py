"""Where SeedVR2's weights lie: the published files, which have no configuration; folders; and folders of mflux 0.24.

The published repository has one file for each transformer and one for the autoencoder. A folder with `transformer/` and
`vae/`, each with the published names and a `config.json`, is what mflux saves. Where there is no configuration it
follows from the shapes, and where no shape tells, it is the published one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from mflux.backend import mx
from mflux.checkpoints.loading import FolderTensors
from mflux.checkpoints.published import PublishedFolder
from mflux.checkpoints.quantization import Quantization
from mflux.checkpoints.saved_by_024 import FolderOf024, Layout024, PlainTensors, Shapes
from mflux.errors import CheckpointError
from mflux.hub import resolve_model
from mflux.models.seedvr2.model.transformer import SeedVR2TransformerConfig

# By the models' names in the registry.
TRANSFORMER_FILES = {
    "seedvr2-3b": "seedvr2_ema_3b_fp16.safetensors",
    "seedvr2-7b": "seedvr2_ema_7b_fp16.safetensors",
}
VAE_FILE = "ema_vae_fp16.safetensors"
_BLOCKS_OF_7B = 36


# ---- configurations from shapes


def transformer_config(tensors: Shapes) -> dict[str, Any]:
    """What `config.json` would say.

    Raises:
        KeyError, IndexError, ZeroDivisionError: these are no tensors of a transformer.
    """
    blocks = tensors.count(r"blocks\.(\d+)\.")
    separate = tensors.count(r"blocks\.(\d+)\.attn\.norm_q\.vid\.")
    first = "vid" if separate else "all"
    head = tensors.rows(f"blocks.0.attn.norm_q.{first}.weight")
    dim, pixels = tensors.rows("vid_in.proj.bias"), 4
    # Nothing else tells the two kinds apart: in the 3B kind the last block leaves the text as it is.
    is_7b = f"blocks.{blocks - 1}.mlp.txt.proj_in.weight" in tensors
    gated = f"blocks.0.mlp.{first}.proj_in_gate.weight" in tensors
    hidden = tensors.rows(f"blocks.0.mlp.{first}.proj_in.weight")
    return {
        "_class_name": "NaDiT",
        "vid_in_channels": tensors.width("vid_in.proj") // pixels,
        "vid_out_channels": tensors.rows("vid_out.proj.bias") // pixels,
        "vid_dim": dim,
        "txt_in_dim": tensors.width("txt_in") if "txt_in.weight" in tensors else dim,
        "txt_dim": dim,
        "emb_dim": tensors.rows("emb_in.proj_out.bias"),
        "heads": tensors.rows(f"blocks.0.attn.proj_qkv.{first}.weight") // (3 * head),
        "head_dim": head,
        # A gated one is rounded up to a multiple of 256.
        "expand_ratio": 4 if gated else hidden // dim,
        "norm_eps": 1e-5,
        "qk_bias": f"blocks.0.attn.proj_qkv.{first}.bias" in tensors,
        "patch_size": [1, 2, 2],
        "num_layers": blocks,
        "mm_layers": separate,
        "mlp_type": "swiglu" if gated else "normal",
        "rope_type": None if is_7b else "mmrope3d",
        "rope_dim": head // 2 if is_7b else head,
        "vid_out_norm": "fusedrms" if "vid_out_norm.weight" in tensors else None,
        "window": [4, 3, 3],
    }


def vae_config(tensors: Shapes) -> dict[str, Any]:
    """What `config.json` would say.

    Raises:
        KeyError, IndexError, ZeroDivisionError: these are no tensors of an autoencoder.
    """
    levels = tensors.count(r"encoder\.down_blocks\.(\d+)\.")
    widths = [tensors.rows(f"encoder.down_blocks.{level}.resnets.0.conv1.bias") for level in range(levels)]
    blocks = tensors.count(r"encoder\.down_blocks\.0\.resnets\.(\d+)\.")
    growth = [
        tensors.rows(f"decoder.up_blocks.{level}.upsamplers.0.upscale_conv.bias") // width
        for level, width in enumerate(widths[:0:-1])
    ]
    return {
        "_class_name": "VideoAutoencoderKLWrapper",
        "act_fn": "silu",
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock3D"] * levels,
        "up_block_types": ["UpDecoderBlock3D"] * levels,
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors.rows("decoder.conv_out.bias"),
        "latent_channels": tensors.rows("encoder.conv_out.bias") // 2,
        "layers_per_block": blocks,
        "decoder_layers_per_block": blocks + 1,
        "norm_num_groups": 32,
        # Squares of pixels are four times the channels, and two frames of them eight times.
        "temporal_scale_num": growth.count(8),
        "use_quant_conv": "quant_conv.bias" in tensors,
        "use_post_quant_conv": "post_quant_conv.bias" in tensors,
        "scaling_factor": 0.9152,
        "shift_factor": 0.0,
    }


_CONFIGS = {"transformer": transformer_config, "vae": vae_config}


# ---- as published


class SeedVR2Folder(PublishedFolder):
    """A folder with the published files, or with a folder for each component."""

    def has(self, part: str) -> bool:
        return super().has(part) or self._file(part) is not None

    def config(self, part: str) -> dict[str, Any]:
        if (self.root / part / "config.json").is_file():
            return super().config(part)
        try:
            return _CONFIGS[part](self.tensors(part))
        except (KeyError, IndexError, ZeroDivisionError) as error:
            raise CheckpointError(
                f"{self._file(part) or self.root / part} holds no {part} of SeedVR2 ({error} is missing or makes no "
                "sense), and there is no config.json beside it: take another file"
            ) from None

    def tensors(self, part: str) -> PlainTensors:
        if super().has(part):
            return PlainTensors(FolderTensors(self.root / part))
        file = self._file(part)
        if file is None:
            wanted = " or ".join(TRANSFORMER_FILES.values()) if part == "transformer" else VAE_FILE
            raise CheckpointError(
                f"{self.root} holds no {part} of SeedVR2: put {wanted} there, or a folder {part} with its config.json"
            )
        return PlainTensors(FolderTensors(self.root, [file]))

    def scheduler(self) -> dict[str, Any]:
        # One step from noise to the picture has no schedule.
        return {}

    def _file(self, part: str) -> Path | None:
        if part == "vae":
            file = self.root / VAE_FILE
            return file if file.is_file() else None
        # A cache may hold both; the model's name tells then.
        blocks = self.overrides.get("transformer", {}).get("num_layers")
        files = [file for name in TRANSFORMER_FILES.values() if (file := self.root / name).is_file()]
        return (files[-1] if blocks == _BLOCKS_OF_7B else files[0]) if files else None


# ---- saved by mflux 0.24

LAYOUT = Layout024(
    title="SeedVR2",
    names={
        "transformer": (
            (r"(\.attn\.\w+)_(vid|txt)\.", r"\1.\2."),
            (r"\.ada\.params_(vid|txt|all)\.", r".ada.\1."),
            (r"^out_(shift|scale)$", r"vid_out_ada.out_\1"),
        ),
        "vae": (),
    },
    configs=_CONFIGS,
    scheduler=lambda _: {},
    model_index={},
    square=(
        ("emb_in.proj_hid", "emb_in.proj_hid.bias"),
        ("decoder.mid_block.attentions.0.to_q", "decoder.mid_block.attentions.0.to_q.bias"),
    ),
    left_out=r"^blocks\.\d+\.attn\.rope\.freqs$",
)


class OnceTensors(Shapes):
    """A transformer without what 0.24 wrote twice: where picture and text share weights, the attention's stand under
    both their names, the rest under one."""

    def __init__(self, tensors: Shapes):
        self._tensors = tensors
        shared = {block[1] for name in tensors if (block := re.match(r"blocks\.(\d+)\.ada\.all\.", name))}
        self._theirs = {}
        for name in tensors:
            if (twice := re.match(r"blocks\.(\d+)\.attn\.\w+\.(vid|txt)\.", name)) and twice[1] in shared:
                if twice[2] == "vid":
                    self._theirs[name.replace(".vid.", ".all.")] = name
            else:
                self._theirs[name] = name

    @property
    def quantization(self) -> Quantization | None:
        return self._tensors.quantization

    def __getitem__(self, name: str) -> mx.array:
        return self._tensors[self._theirs[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._theirs)

    def __len__(self) -> int:
        return len(self._theirs)


class SeedVR2FolderOf024(FolderOf024):
    def config(self, part: str) -> dict[str, Any]:
        # What the registry says under mflux 0.24's names is no part of a configuration.
        return {name: value for name, value in super().config(part).items() if name not in self._only_024}

    @property
    def _only_024(self) -> set[str]:
        return set(self.overrides.get("transformer", ())) - {field.name for field in fields(SeedVR2TransformerConfig)}

    def tensors(self, part: str) -> Shapes:
        found = super().tensors(part)
        return OnceTensors(found) if part == "transformer" else found

    def lacking(self) -> dict[str, dict[str, Any]]:
        return {}


# ---- from a name to a folder


def open_folder(root: Path) -> PublishedFolder:
    """A model's folder, of whichever layout it is."""
    return SeedVR2Folder(root) if LAYOUT.open(root) is None else SeedVR2FolderOf024(root, LAYOUT)


def resolve_folder(name: str, key: str) -> Path:
    """The folder that holds a model, downloaded if need be.

    Args:
        name: a folder or a repository on Hugging Face, in any of the layouts.
        key: "seedvr2-3b" or "seedvr2-7b": which of the published transformers is fetched, where there are both.

    Raises:
        DownloadError: it cannot be had.
    """
    published = [TRANSFORMER_FILES[key], VAE_FILE]
    folders = [f"{part}/*{ending}" for part in _CONFIGS for ending in (".json", ".safetensors")]
    settings = ("config.json", "model.safetensors.index.json")
    alternatives = [[f"{part}/{file}" for part in _CONFIGS for file in (one, "*.safetensors")] for one in settings]
    return resolve_model(name, [*published, *folders], required=published, alternatives=alternatives)


def key_of(folder: PublishedFolder) -> str:
    """Which of the two models a folder holds, by the kind of its transformer, as a key of `registry.MODELS`."""
    source = folder.root / "transformer"
    config = SeedVR2TransformerConfig.from_dict(folder.config("transformer"), source=source)
    return "seedvr2-7b" if config.rope_type is None else "seedvr2-3b"
