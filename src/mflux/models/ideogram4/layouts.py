"""Ideogram 4 in other layouts than the published one: fused matrices, folders that mflux 0.24 saved, single files.

The repository was first published with queries, keys and values in one matrix, as its authors' modules have them, and
both forms are around; either may be float8 with a scale a row. Where no shape tells a setting, it is the published one.
"""

from __future__ import annotations

from typing import Any

from mflux.checkpoints.published import Layout, PublishedFolder
from mflux.checkpoints.renamed import Names, Renamed, Table, by_patterns, either
from mflux.models.common.networks.autoencoders import flux2_024
from mflux.models.common.networks.text_encoders import qwen3_024
from mflux.models.ideogram4.lora_names import FUSED

_TRANSFORMERS = ("transformer", "unconditional_transformer")
_FUSED = Table(FUSED)
_LANGUAGE_MODEL = "language_model."
_NAMES: dict[str, Names] = {
    **dict.fromkeys(_TRANSFORMERS, either(_FUSED, by_patterns())),
    "text_encoder": by_patterns((rf"^(?!{_LANGUAGE_MODEL})", _LANGUAGE_MODEL)),
    "vae": by_patterns(*flux2_024.NAMES),
}
_SQUARE = (
    # Its own rows are as many as its columns.
    ("layers.0.attention.to_q", "layers.0.attention.to_q.weight"),
    (f"{_LANGUAGE_MODEL}layers.0.self_attn.k_proj", f"{_LANGUAGE_MODEL}layers.0.input_layernorm.weight"),
    ("decoder.mid_block.attentions.0.to_q", "decoder.mid_block.attentions.0.to_q.bias"),
)
_MODEL_INDEX = {
    "_class_name": "Ideogram4Pipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3VLModel"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "Ideogram4Transformer2DModel"],
    "unconditional_transformer": ["diffusers", "Ideogram4Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLFlux2"],
}


def _transformer(tensors: Renamed) -> dict[str, Any]:
    head, width = tensors.rows("layers.0.attention.norm_q.weight"), tensors.rows("input_proj.weight")
    return {
        "_class_name": "Ideogram4Transformer2DModel",
        "in_channels": tensors.width("input_proj"),
        "num_layers": tensors.count(r"layers\.(\d+)\."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "intermediate_size": tensors.rows("layers.0.feed_forward.w1.weight"),
        "adaln_dim": tensors.rows("adaln_proj.weight"),
        "llm_features_dim": tensors.rows("llm_cond_norm.weight"),
        "rope_theta": 5_000_000,
        # No shape tells how a head is shared out; in the published proportion.
        "mrope_section": [head * 3 // 32, head * 5 // 64, head * 5 // 64],
        "norm_eps": 1e-5,
    }


def _text_encoder(tensors: Renamed) -> dict[str, Any]:
    text = qwen3_024.shape(tensors, "language_model") | {
        "model_type": "qwen3_vl_text", "rms_norm_eps": 1e-6, "rope_theta": 5_000_000, "attention_bias": False,
    }  # fmt: skip
    return {"architectures": ["Qwen3VLModel"], "model_type": "qwen3_vl", "text_config": text}


def _scheduler(_: PublishedFolder) -> dict[str, Any]:
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0,
        "use_dynamic_shifting": False,
    }  # fmt: skip


LAYOUT = Layout(
    title="Ideogram 4",
    files={**dict.fromkeys(_TRANSFORMERS, _FUSED), "vae": flux2_024.SINGLE_FILE},
    inside={"vae": ("vae.", "first_stage_model.")},
    names=_NAMES,
    configs={
        **dict.fromkeys(_TRANSFORMERS, _transformer),
        "text_encoder": _text_encoder,
        "vae": flux2_024.config,
    },
    scheduler=_scheduler,
    model_index=_MODEL_INDEX,
    square=_SQUARE,
)
