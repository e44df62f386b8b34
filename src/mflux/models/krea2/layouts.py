"""Krea 2 in other layouts than the published one: the authors' single file, and what mflux 0.24 fetched or saved.

mflux 0.24 fetches `turbo.safetensors`, which lies at the root of Turbo's repository beside the published folders, and
neither those of the transformer nor the settings of the whole. What it saves has the transformer's files at the root.
Configurations follow from the shapes, and where no shape tells, they are the published ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mflux.backend import mx
from mflux.checkpoints.published import Layout, PublishedFolder
from mflux.checkpoints.renamed import Names, Renamed, Table, as_published, by_patterns, either, where
from mflux.models.common.networks.autoencoders import wan_024
from mflux.models.common.networks.text_encoders import qwen3_024
from mflux.models.krea2.lora_names import NORMS, ORIGINAL

# At the root of a folder, the distilled one first.
SINGLE_FILES = ("turbo.safetensors", "raw.safetensors")
_MODULATION = {"blocks.{i}.mod": ("transformer_blocks.{i}",), "last.modulation": ("final_layer",)}
_LEAVES = {"scale": "weight", "lin": "scale_shift_table"}
_AUTHORS = Table(
    ORIGINAL | NORMS | _MODULATION,
    leaves=_LEAVES,
    # Left from training.
    left_out=("last.up.weight", "last.down.weight"),
)
_BY_024 = Table(
    ORIGINAL
    | NORMS
    | _MODULATION
    | {
        "tmlp.linear_in": ("time_embed.linear_1",),
        "tmlp.linear_out": ("time_embed.linear_2",),
        "tproj.linear": ("time_mod_proj",),
        "txtmlp.norm": ("txt_in.norm",),
        "txtmlp.linear_in": ("txt_in.linear_1",),
        "txtmlp.linear_out": ("txt_in.linear_2",),
    },
    leaves=_LEAVES,
)
_TEXT = "language_model"
_NAMES: dict[str, Names] = {
    "transformer": _BY_024,
    "text_encoder": by_patterns((r"^", f"{_TEXT}.")),
    "vae": wan_024.NAMES,
}
_MODEL_INDEX = {
    "_class_name": "Krea2Pipeline",
    "patch_size": 2,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3VLModel"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "Krea2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage"],
}


def _scheduler(_: PublishedFolder) -> dict[str, Any]:
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0,
        "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
        "max_image_seq_len": 6400, "time_shift_type": "exponential",
    }  # fmt: skip


def _transformer(tensors: Renamed) -> dict[str, Any]:
    block, text = "transformer_blocks.0.attn", "text_fusion.layerwise_blocks.0"
    head, width = tensors.rows(f"{block}.norm_q.weight"), tensors.rows("img_in.bias")
    text_head, text_width = tensors.rows(f"{text}.attn.norm_q.weight"), tensors.rows("txt_in.norm.weight")
    return {
        "_class_name": "Krea2Transformer2DModel",
        "in_channels": tensors.rows("final_layer.linear.bias"),
        "num_layers": tensors.count(r"transformer_blocks\.(\d+)\."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "num_key_value_heads": tensors.rows(f"{block}.to_k.weight") // head,
        "intermediate_size": tensors.rows("transformer_blocks.0.ff.gate.weight"),
        "timestep_embed_dim": tensors.width("time_embed.linear_1"),
        "text_hidden_dim": text_width,
        "num_text_layers": tensors.width("text_fusion.projector"),
        "text_num_attention_heads": text_width // text_head,
        "text_num_key_value_heads": tensors.rows(f"{text}.attn.to_k.weight") // text_head,
        "text_intermediate_size": tensors.rows(f"{text}.ff.gate.weight"),
        "num_layerwise_text_blocks": tensors.count(r"text_fusion\.layerwise_blocks\.(\d+)\."),
        "num_refiner_text_blocks": tensors.count(r"text_fusion\.refiner_blocks\.(\d+)\."),
        # No shape tells how a head is shared out; in the published proportion.
        "axes_dims_rope": [head // 4, head * 3 // 8, head * 3 // 8],
        "rope_theta": 1000.0,
        "norm_eps": 1e-5,
    }


def _text_encoder(tensors: Renamed) -> dict[str, Any]:
    text = qwen3_024.shape(tensors, _TEXT)
    del text["architectures"]
    pairs = text["head_dim"] // 2
    # Text counts all three axes as one, so that a smaller model than is published may share them out in any way.
    sections = [24, 20, 20] if pairs >= 64 else [pairs, 0, 0]
    rope = {"mrope_interleaved": True, "mrope_section": sections, "rope_type": "default"}
    return {
        "architectures": ["Qwen3VLModel"],
        "model_type": "qwen3_vl",
        "tie_word_embeddings": True,
        "text_config": text
        | {"model_type": "qwen3_vl_text", "rms_norm_eps": 1e-6, "rope_theta": 5e6, "rope_scaling": rope},
    }


def _controlnet(tensors: Renamed) -> dict[str, Any]:
    """The values of a depth ControlNet, which is published without any."""
    return {
        "width": tensors.rows("first.bias"),
        "in_channels": tensors.width("first") // 2,
        "key_width": tensors.rows("blocks.0.attn.wk.B"),
        "hidden": tensors.rows("blocks.0.mlp.gate.B"),
        "rank": tensors.rows("blocks.0.attn.wq.A"),
        "num_layers": tensors.count(r"blocks\.(\d+)\."),
    }


def _files(root: Path, _: Mapping[str, Any]) -> dict[str, Path]:
    file = next((root / name for name in SINGLE_FILES if (root / name).is_file()), None)
    return {} if file is None else {"transformer": file}


def as_tables(name: str, value: mx.array) -> mx.array:
    """The authors write a block's table in one row."""
    if name.endswith(".scale_shift_table") and value.ndim == 1:
        return value.reshape(2 if name.startswith("final_layer.") else 6, -1)
    return wan_024.with_axes(name, value)


# As newer versions of transformers call what is in a Qwen3-VL with a head.
_WITH_HEAD = where(
    rf"^model\.{_TEXT}\.", by_patterns((rf"^model\.{_TEXT}\.", f"{_TEXT}."), (r"^model\.visual\.", "visual."))
)

LAYOUT = Layout(
    title="Krea 2",
    files={
        "transformer": _AUTHORS,
        "text_encoder": either(_WITH_HEAD, qwen3_024.gguf(_TEXT)),
        "vae": wan_024.SINGLE_FILE,
        "controlnet": as_published,
    },
    config_optional=("controlnet",),
    inside={"vae": ("vae.", "first_stage_model.")},
    changes={"transformer": as_tables},
    published=_files,
    told_beside=("text_encoder",),
    wanted={"transformer": f"the authors' {SINGLE_FILES[0]}"},
    # Raw and Turbo have the same tensors.
    models=lambda _: ("krea-2", "krea-2-raw", "krea-2-controlnet-depth"),
    names=_NAMES,
    lies_in={"transformer": ""},
    configs={
        "transformer": _transformer,
        "text_encoder": _text_encoder,
        "vae": wan_024.config,
        "controlnet": _controlnet,
    },
    scheduler=_scheduler,
    model_index=_MODEL_INDEX,
    square=(("transformer_blocks.0.attn.to_q", "transformer_blocks.0.norm1.weight"),),
    reshape=as_tables,
)
