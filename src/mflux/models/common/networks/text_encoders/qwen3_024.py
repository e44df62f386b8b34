"""Qwen3 in folders that mflux 0.24 or earlier saved, of FLUX.2 and Z-Image."""

from __future__ import annotations

from typing import Any

from mflux.checkpoints.renamed import Renamed


def shape(tensors: Renamed) -> dict[str, Any]:
    """What the shapes tell, and what all Qwen3 have in common."""
    head = tensors.rows("model.layers.0.self_attn.q_norm.weight")
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": tensors.rows("model.embed_tokens.weight"),
        "hidden_size": tensors.rows("model.layers.0.input_layernorm.weight"),
        "intermediate_size": tensors.rows("model.layers.0.mlp.gate_proj.weight"),
        "num_hidden_layers": tensors.count(r"model\.layers\.(\d+)\."),
        "num_attention_heads": tensors.rows("model.layers.0.self_attn.q_proj.weight") // head,
        "num_key_value_heads": tensors.rows("model.layers.0.self_attn.k_proj.weight") // head,
        "head_dim": head,
        "hidden_act": "silu",
    }
