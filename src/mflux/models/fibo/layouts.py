"""What folders look like that mflux 0.24 or earlier saved FIBO to.

The configurations follow from the shapes, and where no shape tells, they are the published ones.
"""

from __future__ import annotations

from typing import Any

from mflux.checkpoints.published import Layout, PublishedFolder
from mflux.checkpoints.renamed import Names, Renamed, by_patterns

_NAMES: dict[str, Names] = {
    "text_encoder": by_patterns((r"^(?!model\.)", "model.")),
    "vae": by_patterns(
        (r"\.conv3d\.", "."),
        (r"\.resample_conv\.", ".resample.1."),
        (r"\.(norm|norm1|norm2|norm_out)\.weight$", r".\1.gamma"),
    ),
}
_SQUARE = (
    ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q.bias"),
    ("model.layers.0.self_attn.q_proj", "model.layers.0.input_layernorm.weight"),
)
_MODEL_INDEX = {
    "_class_name": "BriaFiboPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "SmolLM3ForCausalLM"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "BriaFiboTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
_HEAD = 128


def _scheduler(_: PublishedFolder) -> dict[str, Any]:
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0,
        "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    }  # fmt: skip


def _transformer(tensors: Renamed) -> dict[str, Any]:
    head = tensors.rows("single_transformer_blocks.0.attn.norm_q.weight")
    return {
        "_class_name": "BriaFiboTransformer2DModel",
        "in_channels": tensors.rows("proj_out.bias"),
        "num_layers": tensors.count(r"transformer_blocks\.(\d+)\."),
        "num_single_layers": tensors.count(r"single_transformer_blocks\.(\d+)\."),
        "attention_head_dim": head,
        "num_attention_heads": tensors.rows("x_embedder.bias") // head,
        "joint_attention_dim": tensors.width("context_embedder"),
        "text_encoder_dim": tensors.width("caption_projection.0.linear"),
        # No shape tells how a head is shared out; in the published proportion.
        "axes_dims_rope": [head // 8, head * 7 // 16, head * 7 // 16],
    }


def _text_encoder(tensors: Renamed) -> dict[str, Any]:
    layer = "model.layers.0"
    rows = tensors.rows(f"{layer}.self_attn.q_proj.weight")
    heads = max(rows // _HEAD, 1)
    return {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "vocab_size": tensors.rows("model.embed_tokens.weight"),
        "hidden_size": tensors.rows("model.norm.weight"),
        "intermediate_size": tensors.rows(f"{layer}.mlp.gate_proj.weight"),
        "num_hidden_layers": tensors.count(r"model\.layers\.(\d+)\."),
        "num_attention_heads": heads,
        "num_key_value_heads": tensors.rows(f"{layer}.self_attn.k_proj.weight") // (rows // heads),
        "head_dim": rows // heads,
        "tie_word_embeddings": True,
    }


def _vae(tensors: Renamed) -> dict[str, Any]:
    levels = tensors.count(r"encoder\.down_blocks\.(\d+)\.")
    base = tensors.rows("encoder.conv_in.bias")
    widths = [tensors.rows(f"encoder.down_blocks.{level}.resnets.0.conv1.bias") // base for level in range(levels)]
    return {
        "_class_name": "AutoencoderKLWan",
        "base_dim": base,
        "decoder_base_dim": tensors.rows("decoder.norm_out.gamma") // widths[0],
        "z_dim": tensors.rows("post_quant_conv.bias"),
        "dim_mult": widths,
        "num_res_blocks": tensors.count(r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "temperal_downsample": [
            f"encoder.down_blocks.{level}.downsampler.time_conv.weight" in tensors for level in range(levels - 1)
        ],
        "is_residual": True,
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors.rows("decoder.conv_out.bias"),
        "patch_size": 2,
    }


LAYOUT = Layout(
    title="FIBO",
    names=_NAMES,
    configs={"transformer": _transformer, "text_encoder": _text_encoder, "vae": _vae},
    scheduler=_scheduler,
    model_index=_MODEL_INDEX,
    square=_SQUARE,
)
