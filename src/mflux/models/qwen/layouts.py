"""What folders look like that mflux 0.24 or earlier saved Qwen-Image and Qwen-Image-Edit to.

The configurations follow from the shapes, and where no shape tells, they are the published ones.
"""

from __future__ import annotations

from typing import Any

from mflux.checkpoints.published import Layout, PublishedFolder
from mflux.checkpoints.renamed import PREFIXED, Names, Renamed, by_patterns
from mflux.models.common.networks.autoencoders import wan_024
from mflux.models.common.networks.text_encoders import qwen3_024

_NAMES: dict[str, Names] = {
    "transformer": by_patterns(
        (r"\.attn_to_out\.", ".to_out."),
        (r"\.(img|txt)_mod_linear\.", r".\1_mod.1."),
        (r"\.(img|txt)_ff\.mlp_in\.", r".\1_mlp.net.0.proj."),
        (r"\.(img|txt)_ff\.mlp_out\.", r".\1_mlp.net.2."),
    ),
    "text_encoder": by_patterns(
        (r"^encoder\.visual\.", "visual."),
        (r"^encoder\.", "model."),
        (r"\.mlp_0\.", ".mlp.0."),
        (r"\.mlp_1\.", ".mlp.2."),
    ),
    "vae": wan_024.NAMES,
}
_SQUARE = (
    ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q.bias"),
    ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj.bias"),
)
_MODEL_INDEX = {
    "_class_name": "QwenImagePipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "QwenImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage"],
}
_HEAD = 128
# <|image_pad|>.
_IMAGE_TOKEN = 151_655


def _scheduler(_: PublishedFolder) -> dict[str, Any]:
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0,
        "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "base_image_seq_len": 256,
        "max_image_seq_len": 8192, "shift_terminal": 0.02, "time_shift_type": "exponential",
    }  # fmt: skip


def _transformer(tensors: Renamed) -> dict[str, Any]:
    head = tensors.rows("transformer_blocks.0.attn.norm_q.weight")
    return {
        "_class_name": "QwenImageTransformer2DModel",
        "patch_size": 2,
        "in_channels": tensors.width("img_in"),
        "out_channels": tensors.rows("proj_out.bias") // 4,
        "num_layers": tensors.count(r"transformer_blocks\.(\d+)\."),
        "attention_head_dim": head,
        "num_attention_heads": tensors.rows("img_in.bias") // head,
        "joint_attention_dim": tensors.rows("txt_norm.weight"),
        "guidance_embeds": False,
        # No shape tells how a head is shared out; in the published proportion.
        "axes_dims_rope": [head // 8, head * 7 // 16, head * 7 // 16],
    }


def _text_encoder(tensors: Renamed) -> dict[str, Any]:
    layer = "model.layers.0"
    width = tensors.rows("model.norm.weight")
    text: dict[str, Any] = {
        "model_type": "qwen2_5_vl_text",
        "vocab_size": tensors.rows("model.embed_tokens.weight"),
        "hidden_size": width,
        "intermediate_size": tensors.rows(f"{layer}.mlp.gate_proj.weight"),
        "num_hidden_layers": tensors.count(r"model\.layers\.(\d+)\."),
        "num_attention_heads": max(width // _HEAD, 1),
        "num_key_value_heads": max(tensors.rows(f"{layer}.self_attn.k_proj.bias") // _HEAD, 1),
        "rope_theta": 1e6,
        "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
    }
    vision = {"out_hidden_size": width}
    if "visual.merger.ln_q.weight" in tensors:
        features = tensors.rows("visual.merger.ln_q.weight")
        vision |= {
            "depth": tensors.count(r"visual\.blocks\.(\d+)\."),
            "hidden_size": features,
            # As wide as published, 80 channels a head.
            "num_heads": max(features // 80, 1),
            "intermediate_size": tensors.rows("visual.blocks.0.mlp.gate_proj.bias"),
        }
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        # The tokenizer has the last word; a smaller vocabulary than the published one has no such token.
        "image_token_id": min(_IMAGE_TOKEN, text["vocab_size"] - 1),
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": False,
    }


LAYOUT = Layout(
    title="Qwen-Image",
    files={
        "transformer": PREFIXED,
        "text_encoder": qwen3_024.GGUF,
        "vae": wan_024.SINGLE_FILE,
    },
    inside={
        "text_encoder": ("text_encoders.qwen25_7b.transformer.",),
        "vae": ("vae.", "first_stage_model."),
    },
    # Editing has the same tensors.
    models=lambda _: ("qwen-image", "qwen-image-edit", "qwen-image-edit-2511"),
    names=_NAMES,
    configs={"transformer": _transformer, "text_encoder": _text_encoder, "vae": wan_024.config},
    scheduler=_scheduler,
    model_index=_MODEL_INDEX,
    square=_SQUARE,
    # mflux 0.16 to 0.21 lost it.
    zeros={"norm_out.linear.bias": "norm_out.linear.weight"},
    reshape=wan_024.with_axes,
)
