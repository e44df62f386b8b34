"""Anima in other layouts than diffusers': its own repository's files, which ComfyUI reads, and folders that mflux 0.24
saved.

In both the text conditioner stands in the transformer's file. The configurations follow from the shapes, and where no
shape tells, they are the published ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from mflux.checkpoints.published import Layout
from mflux.checkpoints.renamed import Names, Place, Renamed, Table, by_patterns, where
from mflux.models.anima.lora_names import ADAPTER, NORMS, ORIGINAL
from mflux.models.common.networks.autoencoders import wan_024
from mflux.models.common.networks.text_encoders import qwen3_024

_FOLDER = "split_files"
TRANSFORMER_FILES = {
    "anima-turbo": "anima-turbo-v1.1.safetensors",
    "anima-aesthetic": "anima-aesthetic-v1.1.safetensors",
    "anima-base": "anima-base-v1.0.safetensors",
}
# Where ComfyUI keeps a transformer's names, and where its trainers do.
_PREFIX = r"(?:(?:model\.)?diffusion_model\.|net\.)"
_ADAPTERS = tuple(f"{prefix}{ADAPTER}" for prefix in ("model.diffusion_model.", "diffusion_model.", "net.", ""))


def split_files(key: str) -> dict[str, str]:
    """The files of a model's own repository that hold its components, by the model's key in the registry."""
    transformer = f"{_FOLDER}/diffusion_models/{TRANSFORMER_FILES[key]}"
    return {
        "text_encoder": f"{_FOLDER}/text_encoders/qwen_3_06b_base.safetensors",
        "text_conditioner": transformer,
        "transformer": transformer,
        "vae": f"{_FOLDER}/vae/qwen_image_vae.safetensors",
    }


_TABLE = Table(ORIGINAL | NORMS, prefix=_PREFIX)


def _transformer_names(names: Iterable[str]) -> dict[str, Place] | None:
    return _TABLE(name for name in names if ADAPTER not in name)


_CONDITIONER_NAMES: Names = where(re.escape(ADAPTER), by_patterns((rf"^{_PREFIX}?{re.escape(ADAPTER)}", "")))


def _conditioner_of(names: Iterable[str]) -> dict[str, Place] | None:
    return _CONDITIONER_NAMES([name for name in names if ADAPTER in name])


def _transformer(tensors: Renamed) -> dict[str, Any]:
    block = "transformer_blocks.0"
    head, width = tensors.rows(f"{block}.attn1.norm_q.weight"), tensors.rows("patch_embed.proj.weight")
    return {
        "_class_name": "CosmosTransformer3DModel",
        "in_channels": tensors.width("patch_embed.proj") // 4 - 1,
        "out_channels": tensors.rows("proj_out.weight") // 4,
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "num_layers": tensors.count(r"transformer_blocks\.(\d+)\."),
        "mlp_ratio": tensors.rows(f"{block}.ff.net.0.proj.weight") / width,
        "text_embed_dim": tensors.width(f"{block}.attn2.to_k"),
        "adaln_lora_dim": tensors.rows(f"{block}.norm1.linear_1.weight"),
        "patch_size": [1, 2, 2],
        "rope_scale": [1.0, 4.0, 4.0],
        "max_size": [128, 240, 240],
        "concat_padding_mask": True,
        "extra_pos_embed_type": None,
    }


def _text_conditioner(tensors: Renamed) -> dict[str, Any]:
    head = tensors.rows("blocks.0.cross_attn.q_norm.weight")
    width = tensors.rows("blocks.0.cross_attn.q_proj.weight")
    vocabulary, target = tensors.spec("embed.weight").shape
    return {
        "_class_name": "AnimaTextConditioner",
        "source_dim": tensors.width("blocks.0.cross_attn.k_proj"),
        "target_dim": target,
        "model_dim": width,
        "num_layers": tensors.count(r"blocks\.(\d+)\."),
        "num_attention_heads": width // head,
        "mlp_ratio": tensors.rows("blocks.0.mlp.0.weight") / width,
        "target_vocab_size": vocabulary,
        "use_self_attention": "blocks.0.self_attn.q_proj.weight" in tensors,
        "use_layer_norm": False,
        "min_sequence_length": 512,
    }


def _text_encoder(tensors: Renamed) -> dict[str, Any]:
    return qwen3_024.shape(tensors) | {
        "architectures": ["Qwen3Model"],
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000,
        "attention_bias": False,
        "tie_word_embeddings": True,
    }


_QWEN3: Names = by_patterns((r"^(?!model\.|lm_head\.)", "model."))


def _models(_: Mapping[str, Any]) -> tuple[str, ...]:
    """The three have the same tensors."""
    return tuple(TRANSFORMER_FILES)


LAYOUT = Layout(
    title="Anima",
    files={
        "transformer": _transformer_names,
        "text_conditioner": _conditioner_of,
        "text_encoder": where(r"^(model\.)?layers\.0\.self_attn\.", _QWEN3),
        "vae": wan_024.SINGLE_FILE,
    },
    inside={"text_conditioner": _ADAPTERS},
    models=_models,
    names={
        "transformer": _transformer_names,
        "text_conditioner": _conditioner_of,
        "text_encoder": _QWEN3,
        "vae": wan_024.NAMES,
    },
    lies_in={"text_conditioner": "transformer"},
    split=split_files,
    configs={
        "transformer": _transformer,
        "text_conditioner": _text_conditioner,
        "text_encoder": _text_encoder,
        "vae": wan_024.config,
    },
    has_schedule=False,
    square=(("transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn1.to_q.weight"),),
    reshape=wan_024.with_axes,
)
