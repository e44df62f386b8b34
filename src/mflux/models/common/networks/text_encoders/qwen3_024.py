"""Qwen language models in other layouts: folders that mflux 0.24 or earlier saved, of FLUX.2 and Z-Image, and GGUF."""

from __future__ import annotations

import re
from typing import Any

from mflux.checkpoints.renamed import Renamed, by_patterns, where

# llama.cpp's names of Qwen2.5-VL's language model and of Qwen3, which GGUF files have; no rows are in another order.
GGUF = where(
    r"^blk\.",
    by_patterns(
        (r"^token_embd\.", "model.embed_tokens."),
        (r"^output_norm\.", "model.norm."),
        (r"^output\.", "lm_head."),
        (r"^blk\.(\d+)\.attn_norm\.", r"model.layers.\1.input_layernorm."),
        (r"^blk\.(\d+)\.ffn_norm\.", r"model.layers.\1.post_attention_layernorm."),
        (r"^blk\.(\d+)\.attn_output\.", r"model.layers.\1.self_attn.o_proj."),
        (r"^blk\.(\d+)\.attn_([qk])_norm\.", r"model.layers.\1.self_attn.\2_norm."),
        (r"^blk\.(\d+)\.attn_([qkv])\.", r"model.layers.\1.self_attn.\2_proj."),
        (r"^blk\.(\d+)\.ffn_(gate|up|down)\.", r"model.layers.\1.mlp.\2_proj."),
        left_out=r"rope_freqs\.",
    ),
)


def shape(tensors: Renamed, place: str = "model") -> dict[str, Any]:
    """What the shapes tell, and what all Qwen3 have in common; `place` is the language model's in the names."""
    first = f"{place}.layers.0"
    head = tensors.rows(f"{first}.self_attn.q_norm.weight")
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": tensors.rows(f"{place}.embed_tokens.weight"),
        "hidden_size": tensors.rows(f"{first}.input_layernorm.weight"),
        "intermediate_size": tensors.rows(f"{first}.mlp.gate_proj.weight"),
        "num_hidden_layers": tensors.count(rf"{re.escape(place)}\.layers\.(\d+)\."),
        "num_attention_heads": tensors.rows(f"{first}.self_attn.q_proj.weight") // head,
        "num_key_value_heads": tensors.rows(f"{first}.self_attn.k_proj.weight") // head,
        "head_dim": head,
        "hidden_act": "silu",
    }
