"""Black Forest Labs' names for what FLUX.1 and FLUX.2 have in common, in LoRAs and in single files.

They are those of the single-file checkpoints, and most tools train on these; there one matrix holds what are several
layers here, one below the other.
"""

from __future__ import annotations

DOUBLE, SINGLE = "transformer_blocks.{i}", "single_transformer_blocks.{i}"

LAYERS: dict[str, tuple[str, ...]] = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "double_blocks.{i}.img_attn.qkv": (f"{DOUBLE}.attn.to_q", f"{DOUBLE}.attn.to_k", f"{DOUBLE}.attn.to_v"),
    "double_blocks.{i}.txt_attn.qkv": (
        f"{DOUBLE}.attn.add_q_proj",
        f"{DOUBLE}.attn.add_k_proj",
        f"{DOUBLE}.attn.add_v_proj",
    ),
    "double_blocks.{i}.img_attn.proj": (f"{DOUBLE}.attn.to_out.0",),
    "double_blocks.{i}.txt_attn.proj": (f"{DOUBLE}.attn.to_add_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
# Theirs has the shift first, diffusers' the scale.
SWAPPED = ("norm_out.linear",)

# What no LoRA changes, and a single file has; its weights are called `scale`.
NORMS: dict[str, tuple[str, ...]] = {
    "double_blocks.{i}.img_attn.norm.query_norm": (f"{DOUBLE}.attn.norm_q",),
    "double_blocks.{i}.img_attn.norm.key_norm": (f"{DOUBLE}.attn.norm_k",),
    "double_blocks.{i}.txt_attn.norm.query_norm": (f"{DOUBLE}.attn.norm_added_q",),
    "double_blocks.{i}.txt_attn.norm.key_norm": (f"{DOUBLE}.attn.norm_added_k",),
    "single_blocks.{i}.norm.query_norm": (f"{SINGLE}.attn.norm_q",),
    "single_blocks.{i}.norm.key_norm": (f"{SINGLE}.attn.norm_k",),
}
