"""What folders look like that mflux 0.24 or earlier saved Qwen-Image and Qwen-Image-Edit to.

The configurations follow from the shapes, and where no shape tells, they are the published ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from mflux.backend import mx
from mflux.checkpoints.published import Layout, PublishedFolder
from mflux.checkpoints.renamed import PREFIXED, Names, Place, Renamed, by_patterns, where
from mflux.models.common.networks.text_encoders import qwen3_024

# A level of the autoencoder's encoder has so many residual blocks, in all releases; the published names count through.
_BLOCKS = 2
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
    "vae": by_patterns(
        (r"\.conv3d\.", "."),
        (r"\.resample_conv\.", ".resample.1."),
        (r"\.skip_conv\.", ".conv_shortcut."),
        (r"^decoder\.up_block(\d+)\.", r"decoder.up_blocks.\1."),
        (r"\.(norm|norm1|norm2|norm_out)\.weight$", r".\1.gamma"),
        *(
            (rf"^encoder\.down_blocks\.{level}\.{part}\.", f"encoder.down_blocks.{(_BLOCKS + 1) * level + place}.")
            for level in range(4)
            for place, part in enumerate([*(rf"resnets\.{block}" for block in range(_BLOCKS)), r"downsamplers\.0"])
        ),
    ),
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


def _vae(tensors: Renamed) -> dict[str, Any]:
    base = tensors.rows("encoder.conv_in.bias")
    levels = tensors.count(r"decoder\.up_blocks\.(\d+)\.")
    widths = [
        tensors.rows(f"encoder.down_blocks.{(_BLOCKS + 1) * level}.conv1.bias") // base for level in range(levels)
    ]
    return {
        "_class_name": "AutoencoderKLQwenImage",
        "base_dim": base,
        "z_dim": tensors.rows("post_quant_conv.bias"),
        "dim_mult": widths,
        "num_res_blocks": _BLOCKS,
        "attn_scales": [],
        "temperal_downsample": [
            f"encoder.down_blocks.{(_BLOCKS + 1) * level + _BLOCKS}.time_conv.weight" in tensors
            for level in range(levels - 1)
        ],
        "input_channels": tensors.rows("decoder.conv_out.bias"),
    }


def _with_axes(name: str, value: mx.array) -> mx.array:
    """Norms of the autoencoder were flattened."""
    if name.endswith(".gamma") and value.ndim == 1:
        return value.reshape(-1, *[1] * (2 if ".attentions." in name else 3))
    return value


def _vae_file(names: Iterable[str]) -> dict[str, Place]:
    """The names of Wan's authors. Levels of the decoder are three residual blocks and what enlarges, but the last."""
    each = _BLOCKS + 2

    def up(name: str) -> str:
        if (found := re.match(r"decoder\.upsamples\.(\d+)\.(residual|shortcut|resample|time_conv)\.", name)) is None:
            return name
        level, place = divmod(int(found[1]), each)
        inner = "upsamplers.0" if found[2] in ("resample", "time_conv") else f"resnets.{place}"
        return f"decoder.up_blocks.{level}.{inner}.{name.split('.', 3)[3]}"

    here = {up(name): name for name in names}
    leaves = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}
    found = by_patterns(
        (r"^conv1\.", "quant_conv."),
        (r"^conv2\.", "post_quant_conv."),
        (r"^(en|de)coder\.conv1\.", r"\1coder.conv_in."),
        (r"\.head\.0\.", ".norm_out."),
        (r"\.head\.2\.", ".conv_out."),
        (r"^encoder\.downsamples\.", "encoder.down_blocks."),
        (r"\.middle\.0\.", ".mid_block.resnets.0."),
        (r"\.middle\.1\.", ".mid_block.attentions.0."),
        (r"\.middle\.2\.", ".mid_block.resnets.1."),
        *((rf"\.{re.escape(theirs)}\.", f".{ours}.") for theirs, ours in leaves.items()),
        (r"\.shortcut\.", ".conv_shortcut."),
    )(here)
    return {ours: Place(here[place.name]) for ours, place in (found or {}).items()}


LAYOUT = Layout(
    title="Qwen-Image",
    files={
        "transformer": PREFIXED,
        "text_encoder": qwen3_024.GGUF,
        "vae": where(r"^decoder\.upsamples\.", _vae_file),
    },
    inside={
        "text_encoder": ("text_encoders.qwen25_7b.transformer.",),
        "vae": ("vae.", "first_stage_model."),
    },
    # Editing has the same tensors.
    models=lambda _: ("qwen-image", "qwen-image-edit", "qwen-image-edit-2511"),
    names=_NAMES,
    configs={"transformer": _transformer, "text_encoder": _text_encoder, "vae": _vae},
    scheduler=_scheduler,
    model_index=_MODEL_INDEX,
    square=_SQUARE,
    # mflux 0.16 to 0.21 lost it.
    zeros={"norm_out.linear.bias": "norm_out.linear.weight"},
    reshape=_with_axes,
)
