"""FLUX.1 in other layouts than the published one: folders that mflux 0.24 saved, and single files.

The configurations follow from the shapes, and where no shape tells, they are the published ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mflux.checkpoints.published import Layout, PublishedFolder
from mflux.checkpoints.renamed import Names, Renamed, Table, by_patterns, either, where
from mflux.models.common.lora.black_forest_labs import NORMS, SWAPPED
from mflux.models.common.networks.autoencoders import kl_024
from mflux.models.flux.lora_names import BLACK_FOREST_LABS

_FEED_FORWARD = ((r"\.linear1\.", ".net.0.proj."), (r"\.linear2\.", ".net.2."))
_NAMES: dict[str, Names] = {
    "transformer": by_patterns(*_FEED_FORWARD),
    "transformer_controlnet": by_patterns(*_FEED_FORWARD),
    "text_encoder_2": by_patterns(
        (r"^final_layer_norm\.", "encoder.final_layer_norm."),
        (r"^t5_blocks\.(\d+)\.attention\.", r"encoder.block.\1.layer.0."),
        (r"^t5_blocks\.(\d+)\.ff\.", r"encoder.block.\1.layer.1."),
        # The first block's bias on distances was saved with every block.
        left_out=r"t5_blocks\.(?!0\.)\d+\.attention\.SelfAttention\.relative_attention_bias\.",
    ),
    "vae": by_patterns(*kl_024.NAMES),
}
_SQUARE = (
    ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q.bias"),
    ("text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.0.self_attn.q_proj.bias"),
    ("encoder.block.0.layer.0.SelfAttention.q", "encoder.block.0.layer.0.layer_norm.weight"),
    ("encoder.layers.0.self_attn.q_proj", "encoder.layers.0.self_attn.q_proj.bias"),
    ("redux_down", "redux_up.bias"),
    *kl_024.SQUARE,
)

_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "base_image_seq_len": 256,
    "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15,
}  # fmt: skip
_MODEL_INDEX = {
    "_class_name": "FluxPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def _scheduler(folder: PublishedFolder) -> dict[str, Any]:
    """As published with FLUX.1-dev, which takes guidance, and with schnell."""
    guidance = folder.config("transformer")["guidance_embeds"]
    return _SCHEDULER | {"shift": 3.0 if guidance else 1.0, "use_dynamic_shifting": guidance}


def _transformer(tensors: Renamed) -> dict[str, Any]:
    channels = tensors.width("x_embedder")
    out = tensors.rows("proj_out.bias")
    return {
        "_class_name": "FluxTransformer2DModel",
        "out_channels": None if out == channels else out,
    } | _trunk(tensors)


def _controlnet(tensors: Renamed) -> dict[str, Any]:
    return {"_class_name": "FluxControlNetModel"} | _trunk(tensors)


def _trunk(tensors: Renamed) -> dict[str, Any]:
    head = tensors.rows("transformer_blocks.0.attn.norm_q.weight")
    return {
        "patch_size": 1,
        "in_channels": tensors.width("x_embedder"),
        "num_layers": tensors.count(r"transformer_blocks\.(\d+)\."),
        "num_single_layers": tensors.count(r"single_transformer_blocks\.(\d+)\."),
        "attention_head_dim": head,
        "num_attention_heads": tensors.rows("x_embedder.bias") // head,
        "joint_attention_dim": tensors.width("context_embedder"),
        "pooled_projection_dim": tensors.width("time_text_embed.text_embedder.linear_1"),
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in tensors,
        # No shape tells how a head is shared out; in the published proportion.
        "axes_dims_rope": [head // 8, head * 7 // 16, head * 7 // 16],
    }


def _clip(tensors: Renamed) -> dict[str, Any]:
    width = tensors.rows("text_model.final_layer_norm.weight")
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": tensors.rows("text_model.embeddings.token_embedding.weight"),
        "hidden_size": width,
        "intermediate_size": tensors.rows("text_model.encoder.layers.0.mlp.fc1.bias"),
        "num_hidden_layers": tensors.count(r"text_model\.encoder\.layers\.(\d+)\."),
        # CLIP's heads are 64 wide in all its sizes.
        "num_attention_heads": max(width // 64, 1),
        "max_position_embeddings": tensors.rows("text_model.embeddings.position_embedding.weight"),
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "eos_token_id": 2,
    }


def _t5(tensors: Renamed) -> dict[str, Any]:
    attention = "encoder.block.0.layer.0.SelfAttention"
    heads = tensors.width(f"{attention}.relative_attention_bias")
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": tensors.rows("shared.weight"),
        "d_model": tensors.rows("encoder.final_layer_norm.weight"),
        "d_kv": tensors.rows(f"{attention}.q.weight") // heads,
        "d_ff": tensors.rows("encoder.block.0.layer.1.DenseReluDense.wi_0.weight"),
        "num_layers": tensors.count(r"encoder\.block\.(\d+)\."),
        "num_heads": heads,
        "relative_attention_num_buckets": tensors.rows(f"{attention}.relative_attention_bias.weight"),
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu",
    }


def _siglip(tensors: Renamed) -> dict[str, Any]:
    width = tensors.rows("post_layernorm.weight")
    patch = tensors["embeddings.patch_embedding.weight"].shape[-1]
    return {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "hidden_size": width,
        "image_size": round(tensors.rows("embeddings.position_embedding.weight") ** 0.5) * patch,
        "intermediate_size": tensors.rows("encoder.layers.0.mlp.fc1.bias"),
        # Redux's tower has heads 72 wide.
        "num_attention_heads": max(width // 72, 1),
        "num_hidden_layers": tensors.count(r"encoder\.layers\.(\d+)\."),
        "patch_size": patch,
    }


def _redux(tensors: Renamed) -> dict[str, Any]:
    return {
        "_class_name": "ReduxImageEncoder",
        "redux_dim": tensors.width("redux_up"),
        "txt_in_features": tensors.rows("redux_down.bias"),
    }


_CONFIGS = {"transformer_controlnet": _controlnet, "image_encoder": _siglip, "image_embedder": _redux}
_CONFIGS |= {"transformer": _transformer, "text_encoder": _clip, "text_encoder_2": _t5, "vae": kl_024.config}

# As Black Forest Labs publish the transformer in one file, and ComfyUI.
_SINGLE_FILE = Table(
    BLACK_FOREST_LABS | NORMS,
    # The feed-forward is four times as wide as what stands before it.
    shares={"single_blocks.{i}.linear1": (1, 1, 1, 4)},
    swapped=SWAPPED,
    leaves={"scale": "weight"},
)

# llama.cpp's names of T5, which GGUF files have.
_T5_GGUF = where(
    r"^enc\.blk\.",
    by_patterns(
        (r"^token_embd\.", "shared."),
        (r"^enc\.output_norm\.", "encoder.final_layer_norm."),
        (r"^enc\.blk\.(\d+)\.attn_rel_b\.", r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias."),
        (r"^enc\.blk\.(\d+)\.attn_([qkvo])\.", r"encoder.block.\1.layer.0.SelfAttention.\2."),
        (r"^enc\.blk\.(\d+)\.attn_norm\.", r"encoder.block.\1.layer.0.layer_norm."),
        (r"^enc\.blk\.(\d+)\.ffn_gate\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
        (r"^enc\.blk\.(\d+)\.ffn_up\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
        (r"^enc\.blk\.(\d+)\.ffn_down\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
        (r"^enc\.blk\.(\d+)\.ffn_norm\.", r"encoder.block.\1.layer.1.layer_norm."),
    ),
)
# CLIP as transformers saved it before it left out the model's name, and what a whole CLIP holds beside it.
_CLIP_FILE = by_patterns(
    (r"^(?!text_model\.)(embeddings|encoder|final_layer_norm)\.", r"text_model.\1."),
    left_out=r"(logit_scale|text_projection|vision_model|visual_projection)",
)
_T5_FILE = either(_T5_GGUF, by_patterns(left_out="spiece_model"))


def _models(transformer: Mapping[str, Any]) -> tuple[str, ...]:
    """Kontext and Krea cannot be told from dev."""
    if not transformer.get("guidance_embeds"):
        return ("schnell", "schnell-controlnet-canny")
    if transformer.get("in_channels") == 384:
        return ("dev-fill", "dev-fill-catvton")
    if transformer.get("in_channels") == 128:
        return ("dev-depth",)
    others = ("krea-dev", "dev-kontext", "dev-redux", "dev-controlnet-canny", "dev-controlnet-upscaler")
    return ("dev", *others)


LAYOUT = Layout(
    title="FLUX.1",
    files={
        "transformer": _SINGLE_FILE,
        "text_encoder": _CLIP_FILE,
        "text_encoder_2": _T5_FILE,
        "vae": kl_024.SINGLE_FILE,
    },
    inside={
        "text_encoder": ("text_encoders.clip_l.transformer.",),
        "text_encoder_2": ("text_encoders.t5xxl.transformer.",),
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
