"""Where SeedVR2's weights lie: the published files, which have no configuration; folders; and folders of mflux 0.24.

The published repository has one file for each transformer and one for the autoencoder. A folder with `transformer/` and
`vae/`, each with the published names and a `config.json`, is what mflux saves. Where there is no configuration it
follows from the shapes, and where no shape tells, it is the published one.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from mflux.checkpoints.published import Layout, PublishedFolder
from mflux.checkpoints.renamed import Place, Renamed, as_published, by_patterns
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


def transformer_config(tensors: Renamed) -> dict[str, Any]:
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


def vae_config(tensors: Renamed) -> dict[str, Any]:
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


def _files(root: Path, settings: Mapping[str, Any]) -> dict[str, Path]:
    """The published files in a folder. A cache may hold both transformers; the model's settings tell then."""
    there = {name: root / name for name in (*TRANSFORMER_FILES.values(), VAE_FILE) if (root / name).is_file()}
    files = {"vae": there.pop(VAE_FILE)} if VAE_FILE in there else {}
    if there:
        files["transformer"] = list(there.values())[-1 if settings.get("num_layers") == _BLOCKS_OF_7B else 0]
    return files


# ---- saved by mflux 0.24

_SPELLED = by_patterns(
    (r"(\.attn\.\w+)_(vid|txt)\.", r"\1.\2."),
    (r"\.ada\.params_(vid|txt|all)\.", r".ada.\1."),
    (r"^out_(shift|scale)$", r"vid_out_ada.out_\1"),
    left_out=r"blocks\.\d+\.attn\.rope\.freqs$",
)


def _once(names: Iterable[str]) -> dict[str, Place]:
    """Without what 0.24 wrote twice: where picture and text share weights, the attention's stand under both their
    names, the rest under one."""
    places = _SPELLED(names) or {}
    shared = {block[1] for name in places if (block := re.match(r"blocks\.(\d+)\.ada\.all\.", name))}
    found = {}
    for name, place in places.items():
        twice = re.match(r"blocks\.(\d+)\.attn\.\w+\.(vid|txt)\.", name)
        if not twice or twice[1] not in shared:
            found[name] = place
        elif twice[2] == "vid":
            found[name.replace(".vid.", ".all.")] = place
    return found


LAYOUT = Layout(
    title="SeedVR2",
    configs=_CONFIGS,
    files={"transformer": as_published, "vae": as_published},
    config_optional=("transformer", "vae"),
    published=_files,
    wanted={"transformer": " or ".join(TRANSFORMER_FILES.values()), "vae": VAE_FILE},
    names={"transformer": _once},
    square=(
        ("emb_in.proj_hid", "emb_in.proj_hid.bias"),
        ("decoder.mid_block.attentions.0.to_q", "decoder.mid_block.attentions.0.to_q.bias"),
    ),
    # It says them in mflux 0.24's words.
    takes_overrides=False,
)


# ---- from a name to a folder


def resolve_folder(name: str, key: str, elsewhere: Container[str] = ()) -> Path:
    """The folder that holds a model, downloaded if need be.

    Args:
        name: a folder or a repository on Hugging Face, in any of the layouts.
        key: "seedvr2-3b" or "seedvr2-7b": which of the published transformers is fetched, where there are both.
        elsewhere: components that are not needed.

    Raises:
        DownloadError: it cannot be had.
    """
    files = {"transformer": TRANSFORMER_FILES[key], "vae": VAE_FILE}
    files = {part: file for part, file in files.items() if part not in elsewhere}
    published = [*files.values()]
    folders = [f"{part}/*{ending}" for part in files for ending in (".json", ".safetensors")]
    settings = ("config.json", "model.safetensors.index.json")
    alternatives = [[f"{part}/{file}" for part in files for file in (one, "*.safetensors")] for one in settings]
    return resolve_model(name, [*published, *folders], required=published, alternatives=alternatives)


def key_of(folder: PublishedFolder) -> str:
    """Which of the two models a folder holds, by the kind of its transformer, as a key of `registry.MODELS`."""
    source = folder.root / "transformer"
    config = SeedVR2TransformerConfig.from_dict(folder.config("transformer"), source=source)
    return "seedvr2-7b" if config.rope_type is None else "seedvr2-3b"
