"""FLUX.2 klein in other layouts than the published one: folders that mflux 0.24 saved, and single files.

The configurations follow from the shapes, and where no shape tells, they are the published ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mflux.checkpoints.published import Layout, PublishedFolder
from mflux.checkpoints.renamed import Names, Renamed, Table, by_patterns
from mflux.models.common.lora.black_forest_labs import NORMS, SWAPPED
from mflux.models.common.networks.autoencoders import flux2_024, kl_024
from mflux.models.common.networks.text_encoders import qwen3_024
from mflux.models.flux2.lora_names import BLACK_FOREST_LABS

_NAMES: dict[str, Names] = {
    "transformer": by_patterns(
        (r"^time_guidance_embed\.linear_", "time_guidance_embed.timestep_embedder.linear_"),
        (r"^(transformer_blocks\.\d+\.attn\.to_out)\.", r"\1.0."),
    ),
    "text_encoder": by_patterns((r"^", "model.")),
    "vae": by_patterns(*flux2_024.NAMES),
}
_SQUARE = (
    # Its own rows are as many as its columns.
    ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q.weight"),
    ("model.layers.0.self_attn.k_proj", "model.layers.0.input_layernorm.weight"),
    *kl_024.SQUARE,
)

_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "base_image_seq_len": 256,
    "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15, "shift": 3.0, "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}  # fmt: skip
_MODEL_INDEX = {
    "_class_name": "Flux2KleinPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3ForCausalLM"],
    "tokenizer": ["transformers", "Qwen2TokenizerFast"],
    "transformer": ["diffusers", "Flux2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLFlux2"],
}


def _transformer(tensors: Renamed) -> dict[str, Any]:
    head = tensors.rows("single_transformer_blocks.0.attn.norm_q.weight")
    channels, width = tensors.width("x_embedder"), tensors.rows("x_embedder.weight")
    out = tensors.rows("proj_out.weight")
    hidden = (tensors.rows("single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight") - 3 * width) // 2
    return {
        "_class_name": "Flux2Transformer2DModel",
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": None if out == channels else out,
        "num_layers": tensors.count(r"transformer_blocks\.(\d+)\."),
        "num_single_layers": tensors.count(r"single_transformer_blocks\.(\d+)\."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": tensors.width("context_embedder"),
        "timestep_guidance_channels": tensors.width("time_guidance_embed.timestep_embedder.linear_1"),
        "mlp_ratio": hidden / width,
        # No shape tells how a head is shared out; in equal parts, as published.
        "axes_dims_rope": [head // 4] * 4,
        "rope_theta": 2000,
        "eps": 1e-6,
        "guidance_embeds": False,
    }


def _text_encoder(tensors: Renamed) -> dict[str, Any]:
    return qwen3_024.shape(tensors) | {
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000,
        "attention_bias": False,
        "tie_word_embeddings": True,
    }


_CONFIGS = {"transformer": _transformer, "text_encoder": _text_encoder, "vae": flux2_024.config}


def _scheduler(_: PublishedFolder) -> dict[str, Any]:
    return _SCHEDULER


# As Black Forest Labs' repositories hold the transformer beside the folders, and ComfyUI.
_SINGLE_FILE = Table(
    BLACK_FOREST_LABS | NORMS,
    swapped=SWAPPED,
    leaves={"scale": "weight"},
)


def _models(transformer: Mapping[str, Any]) -> tuple[str, ...]:
    """What a distilled model's step is made for cannot be told from its tensors."""
    if transformer.get("joint_attention_dim") == 12288:
        return ("flux2-klein-9b", "flux2-klein-base-9b", "flux2-klein-9b-kv")
    return ("flux2-klein-4b", "flux2-klein-base-4b")


LAYOUT = Layout(
    title="FLUX.2",
    files={"transformer": _SINGLE_FILE, "text_encoder": qwen3_024.GGUF, "vae": flux2_024.SINGLE_FILE},
    inside={
        "text_encoder": ("text_encoders.qwen3_4b.transformer.", "text_encoders.qwen3_8b.transformer."),
        "vae": ("vae.", "first_stage_model."),
    },
    changes={"vae": kl_024.as_matrix},
    models=_models,
    names=_NAMES,
    configs=_CONFIGS,
    scheduler=_scheduler,
    model_index=_MODEL_INDEX,
    square=_SQUARE,
)
